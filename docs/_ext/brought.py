"""Brings into the site what is kept elsewhere: notebooks, figures and tables."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from benchmarks.reports.main_table import main_table
from tests import what_goes_where

FILES = "https://github.com/msam-optax/msam_optax/blob/main"
BADGE = re.compile(r"\[!\[([^\]]*)\]\(https?://[^)]*\)\]\(([^)]*)\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)]*)\)")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)([^)]*)\)")


def put(path: Path, text: str) -> None:
    """Writes what has changed alone, so that a second build is quick."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def page(root: Path, folder: str) -> str:
    """A folder's README without its title, its links made to lead somewhere."""
    text = (root / folder / "README.md").read_text().split("\n", 1)[1]
    text = IMAGE.sub(rf"![\1](../{folder}/\2)", text)
    return LINK.sub(rf"[\1]({FILES}/{folder}/\2)", text)


def bring(app: Sphinx, config: Any) -> None:
    site = Path(app.srcdir)
    root = site.parent
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        # The badge is a picture from afar.
        text = BADGE.sub(r"[\1](\2)", notebook.read_text())
        put(site / "gallery" / notebook.name, text)
    for name in ("figures", "studies"):
        put(site / "_parts" / f"{name}.md", page(root, f"benchmarks/results/{name}"))
    put(site / "_parts" / "main_table.md", main_table())
    for method in ("SAM", "MSAM"):
        name = f"what_goes_where_{method.lower()}.md"
        put(site / "_parts" / name, what_goes_where.markdown(method) + "\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", bring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
