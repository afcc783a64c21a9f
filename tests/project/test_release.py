"""What is released: one version everywhere, floors that are said, pinned workflows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import msam_optax
from msam_optax._base import versions

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def field(name: str) -> str:
    """A field of CITATION.cff."""
    match = re.search(rf"^{name}: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert match
    return match[1]


def test_the_version_and_its_date_are_the_same_everywhere():
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "msam_optax/__init__.py"
    assert field("version") == msam_optax.__version__
    dated = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$",
        (ROOT / "CHANGELOG.md").read_text(),
        re.M,
    )
    assert dated[0] == (msam_optax.__version__, field("date-released"))
    assert dated == sorted(dated, reverse=True)


def floors_of_the_project() -> dict[str, str]:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = PROJECT["project"]["dependencies"] + extras["flax"] + extras["plot"]
    return dict(requirement.split(">=") for requirement in asked)


def test_the_floors_that_are_checked_are_those_that_are_installed():
    assert floors_of_the_project() == versions.FLOORS


def test_the_floors_are_met_here():
    versions.require(*versions.FLOORS)


@pytest.mark.parametrize(
    "package, extra, installed, ours",
    [
        ("jax", "", "0.6.1", "msam_optax"),
        ("optax", "", "0.2.4.dev1", "msam_optax"),
        ("jaxlib", "", "0.5", "msam_optax"),
        ("flax", "flax", "0.11.1", "msam_optax[flax]"),
        ("matplotlib", "plot", "none", "msam_optax[plot]"),
    ],
)
def test_what_is_too_old_or_missing_is_said_in_one_sentence(
    package, extra, installed, ours, monkeypatch
):
    monkeypatch.setattr(versions, "_installed", lambda package: installed)
    with pytest.raises(ImportError) as error:
        versions.require(package, extra=extra)
    assert str(error.value) == (
        f"{ours} needs {package} >= {versions.FLOORS[package]}, and {installed} is "
        f"installed: pip install --upgrade '{ours}'"
    )


@pytest.mark.parametrize(
    "installed", ["0.6.2", "0.10", "0.12.0.1", "1.0", "0.7.0.dev20250901+abc", None]
)
def test_what_is_new_enough_or_unknown_passes(installed, monkeypatch):
    monkeypatch.setattr(versions, "_installed", lambda package: installed)
    versions.require("jax")


@pytest.mark.parametrize(
    "module, hidden, told",
    [
        ("msam_optax", "optax", "msam_optax needs optax >= "),
        ("msam_optax.flax.nnx", "flax", "pip install --upgrade 'msam_optax[flax]'"),
        ("msam_optax.flax.linen", "flax", "pip install --upgrade 'msam_optax[flax]'"),
        ("msam_optax.plotting", "matplotlib", "'msam_optax[plot]'"),
    ],
)
def test_an_import_without_a_package_names_what_to_install(module, hidden, told):
    code = f"""
import importlib.util, sys
from importlib import metadata

find, version = importlib.util.find_spec, metadata.version

def hide(name):
    if name == {hidden!r}:
        raise metadata.PackageNotFoundError(name)
    return version(name)

metadata.version = hide
importlib.util.find_spec = lambda name: None if name == {hidden!r} else find(name)
sys.modules[{hidden!r}] = None
import {module}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert told in last
    assert "none is installed" in last


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_scripts_and_actions_by_their_commits(path):
    text = path.read_text()
    actions = re.findall(r"uses: (\S+)", text)
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
    for command in re.findall(r"run: (.*)", text):
        script = command.split()[0]
        installs = command.startswith("pip install -e ")
        assert installs or (script.startswith(".ci/") and (ROOT / script).exists())


def test_pre_commit_runs_what_lint_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    commands = (ROOT / ".ci" / "lint").read_text()
    for command in ("ruff check", "ruff format --check", "mypy", "zizmor"):
        assert f"entry: {command}" in hooks
        assert re.search(rf"^{command}", commands, re.M)
