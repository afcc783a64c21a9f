"""The code blocks of README, CONTRIBUTING and the site's pages run as they stand."""

import re
from pathlib import Path

import pytest

from benchmarks.reports.main_table import MARKS, main_table
from msam_optax import methods

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs"
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
PAGES += [
    page.relative_to(ROOT).as_posix()
    for page in sorted([*SITE.glob("*.md"), *SITE.glob("guides/*.md")])
    if "```python\n" in page.read_text()
]
WITHOUT_CODE = ["benchmarks/results/figures/README.md"]


def code_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run_in_order(page):
    blocks = code_blocks(page)
    assert blocks
    # One namespace a page: later blocks build on earlier ones, as a reader would.
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES[:3] + WITHOUT_CODE)
def test_linked_files_exist(page):
    path = ROOT / page
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", path.read_text())
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing


def test_readme_has_the_committed_table_of_the_main_job():
    assert MARKS.findall((ROOT / "README.md").read_text()) == [f"\n{main_table()}\n"]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_method_has_a_row_on_the_page_of_blocks():
    table = (SITE / "_parts" / "methods_table.md").read_text()
    names = [name for name in methods.__all__ if name.islower()]
    assert not [name for name in names if f"msam_optax.{name}>" not in table]
