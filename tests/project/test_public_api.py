"""Names, imports and docstrings: what a user may rely on, and who imports whom."""

import ast
import dataclasses
import doctest
import functools
import inspect
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import optax
import pytest

import msam_optax as mo

PACKAGE = pathlib.Path(mo.__file__).parent
ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(PACKAGE.rglob("*.py"))

PUBLIC: dict[str, list[str]] = {
    "aliases": ["adamw_msam", "ae_sam", "asam", "msam", "sam", "ss_sam"],
    "ascents": ["ascents.adaptive", "ascents.normalized", "ascents.unnormalized"],
    "combine": ["combine.interpolate", "combine.surrogate_gap"],
    "blocks": [
        "employ",
        "eval_params",
        "train_params",
        "momentum_perturbation",
        "sharpness_aware_gradient",
    ],
    "policies": [
        "policies.Policy",
        "policies.adaptive",
        "policies.always",
        "policies.bernoulli",
        "policies.between",
        "policies.every",
        "policies.never",
    ],
    "training": ["StepMetrics", "TrainState", "make_train_step"],
    "states": [
        "policies.AdaptiveState",
        "EmployState",
        "MomentumPerturbationState",
        "SharpnessAwareState",
        "StoredPerturbationState",
    ],
}


NAMESPACES = (mo.ascents, mo.combine, mo.policies)


@functools.cache
def exported() -> dict[str, Any]:
    """The public names of the package and of its namespaces, without types."""
    found = {}
    for space in (mo, *NAMESPACES):
        prefix = space.__name__.removeprefix("msam_optax").lstrip(".")
        for name in space.__all__:
            value = getattr(space, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{prefix}.{name}".lstrip(".")] = value
    return found


def fields_of(value: Any) -> tuple[str, ...]:
    """The fields of a NamedTuple or a dataclass."""
    if dataclasses.is_dataclass(value):
        return tuple(field.name for field in dataclasses.fields(value))
    return getattr(value, "_fields", ())


def is_state(value: Any) -> bool:
    return inspect.isclass(value) and bool(fields_of(value))


FUNCTIONS = {n: f for n, f in exported().items() if inspect.isfunction(f)}
STATES = {n: c for n, c in exported().items() if is_state(c)}


# --- Names ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for names in PUBLIC.values() for name in names])
def test_the_public_names_are_exported(name):
    assert name in exported()


def test_every_exported_name_is_a_function_or_a_named_tuple_of_the_package():
    assert set(exported()) == {*FUNCTIONS, *STATES, "TrainStep"}
    for value in exported().values():
        assert value.__module__.startswith("msam_optax.")


def test_no_module_is_hidden_by_a_function():
    for path in FILES:
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if path.stem != "__init__":
            assert module not in exported()


def test_the_folder_shows_the_plan():
    entries = {p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert len(entries) <= 12


def test_names_are_exported_the_way_type_checkers_understand():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and "msam_optax" in str(node.module):
            assert all(
                alias.asname in (alias.name, f"_{alias.name}") for alias in node.names
            )
    assert (PACKAGE / "py.typed").exists()


PARAMETERS = {
    "ascents.normalized": ["rho", "p"],
    "ascents.adaptive": ["rho", "eta", "mask", "axes"],
    "ascents.unnormalized": ["rho"],
    "sharpness_aware_gradient": ["ascent", "combine", "second_order"],
    "policies.every": ["k"],
    "policies.bernoulli": ["probability", "seed"],
    "policies.between": ["start", "stop"],
    "employ": ["policy", "transform", "otherwise"],
    "momentum_perturbation": [
        "inner",
        "rho",
        "along",
        "ascent",
        "momentum_fn",
        "exact",
    ],
    "eval_params": ["state", "params"],
    "train_params": ["state", "weights"],
    "sam": ["optimizer", "rho"],
    "ss_sam": ["optimizer", "rho", "probability", "seed"],
}

STARTS = {
    "policies.adaptive": ["total_steps", "delta", "lambda_1", "lambda_2"],
    "msam": list(inspect.signature(optax.sgd).parameters),
    "adamw_msam": list(inspect.signature(optax.adamw).parameters),
    "asam": ["optimizer", "rho", "eta"],
    "ae_sam": ["optimizer", "rho", "total_steps", "delta", "lambda_1", "lambda_2"],
    "make_train_step": ["loss_fn", "optimizer"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_those_of_the_design(name):
    assert list(inspect.signature(FUNCTIONS[name]).parameters) == PARAMETERS[name]


@pytest.mark.parametrize("name", STARTS)
def test_the_parameters_start_as_in_the_design(name):
    parameters = list(inspect.signature(FUNCTIONS[name]).parameters)
    assert parameters[: len(STARTS[name])] == STARTS[name]


@pytest.mark.parametrize(
    "name, defaults",
    [
        ("ascents.normalized", {"p": 2}),
        ("ascents.adaptive", {"eta": 0.0, "mask": None}),
        ("sharpness_aware_gradient", {"combine": None, "second_order": False}),
        ("policies.adaptive", {"delta": 0.9, "lambda_1": -1.0, "lambda_2": 1.0}),
        ("msam", {"momentum": 0.9, "rho": inspect.Parameter.empty}),
        ("adamw_msam", {"rho": inspect.Parameter.empty}),
        ("sam", {"rho": 0.05}),
        ("asam", {"rho": 0.5, "eta": 0.01}),
        ("ss_sam", {"probability": 0.5, "seed": 0}),
        ("ae_sam", {"delta": 0.9, "lambda_1": -1.0, "lambda_2": 1.0}),
        ("make_train_step", {"dispatch": "auto"}),
    ],
)
def test_the_defaults_are_those_of_the_papers(name, defaults):
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert {key: parameters[key].default for key in defaults} == defaults


@pytest.mark.parametrize(
    "alias, base", [(mo.msam, optax.sgd), (mo.adamw_msam, optax.adamw)]
)
def test_the_drop_in_optimizers_take_every_argument_of_the_ones_they_replace(
    alias, base
):
    ours = inspect.signature(alias).parameters
    theirs = inspect.signature(base).parameters
    assert set(theirs) <= set(ours)
    for name, parameter in theirs.items():
        if name != "momentum":  # MSAM's is 0.9, without it there is nothing to do
            assert ours[name].default == parameter.default


# --- Docstrings -----------------------------------------------------------------------


def examples_of(value: Any) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_documented(name):
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    assert text.splitlines()[0].endswith(".")
    parameters = inspect.signature(function).parameters
    if parameters:
        assert "Args:" in text
    documented = text.partition("Args:")[2]
    for parameter in parameters:
        assert f"{parameter}:" in documented.replace("*", ""), parameter
    returns_policy = function.__module__.endswith(".policies")
    assert "Returns:" in text or examples_of(function) or returns_policy


@pytest.mark.parametrize("name", [*PUBLIC["aliases"], *PUBLIC["ascents"]])
def test_methods_tell_cost_state_position_source_and_an_example(name):
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    for heading in ("*Cost*", "*State*", "*Position*", "Args:", "Returns:"):
        assert heading in text
    assert "https://arxiv.org/abs/" in text
    assert examples_of(FUNCTIONS[name])


@pytest.mark.parametrize("name", STATES)
def test_every_state_documents_its_fields(name):
    text = inspect.getdoc(STATES[name]) or ""
    assert "Attributes:" in text
    for field in fields_of(STATES[name]):
        assert f"{field}: " in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


# --- Imports --------------------------------------------------------------------------

# Whom of the package each folder may import, itself apart.
BLOCKS = {"_base", "ascents"}
ALLOWED: dict[str, set[str]] = {
    "_base": set(),
    "ascents": {"_base"},
    "combine": {"_base"},
    "policies": {"_base"},
    "sharpness": {"_base"},
    "transforms": {*BLOCKS, "combine", "policies"},
    "methods": {*BLOCKS, "combine", "policies", "transforms"},
    "training": {*BLOCKS, "policies", "transforms"},
    "flax": {"_base", "training", "transforms"},
    "plotting": {"_base"},
}


def imports_of(path: pathlib.Path) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it; docstrings excluded."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {path.name}"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(path: pathlib.Path) -> str:
    """A file's folder, or its own name if it stands on top."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_folders(path: pathlib.Path) -> set[str]:
    names = [name.split(".") for name in imports_of(path)]
    inside = {name[1] for name in names if name[0] == "msam_optax" and len(name) > 1}
    return (inside & set(ALLOWED)) - {folder_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_private_of_another_package_is_imported_or_used(path):
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] not in ("msam_optax", "__future__"):
            assert not any(part.startswith("_") for part in parts), name
    text = path.read_text()
    assert "jax._src" not in text
    assert "optax._src" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_folder_imports_what_stands_below_it(path):
    folder = folder_of(path)
    if folder == "__init__":
        assert "plotting" not in imported_folders(path)
    else:
        assert imported_folders(path) <= ALLOWED[folder]


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@functools.cache
def imported_modules() -> dict[str, set[str]]:
    """For each module of the package, which others of it are imported."""
    modules = {module_of(path) for path in FILES}
    return {
        module_of(path): (set(imports_of(path)) & modules) - {"msam_optax"}
        for path in FILES
    }


def test_imports_go_round_nowhere():
    def below(module: str, path: tuple[str, ...] = ()) -> None:
        assert module not in path, " -> ".join((*path, module))
        for other in imported_modules()[module]:
            below(other, (*path, module))

    for module in imported_modules():
        below(module)


def test_nobody_imports_the_glue():
    for module, imported in imported_modules().items():
        for other in imported:
            glue = other.startswith(("msam_optax.flax.", "msam_optax.plotting"))
            assert not glue or other.split(".")[1] == module.split(".")[1], module


def test_importing_the_package_brings_neither_flax_nor_matplotlib():
    # Optax 0.2.5 brings chex.
    code = (
        "import sys, jax, optax; before = set(sys.modules); import msam_optax; "
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "msam_optax" in loaded
    assert not loaded & {"flax", "matplotlib", "sklearn", "orbax", "chex"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda p: p.stem
)
def test_benchmarks_use_public_names_only(path):
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] in ("msam_optax", "jax", "optax", "flax"):
            assert not any(part.startswith("_") for part in parts), name
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("msam_optax", "mo")
        ):
            assert not node.attr.startswith("_"), node.attr
