"""Lists every error message of the package, so that the site's search finds it."""

import ast
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import msam_optax

PACKAGE = Path(msam_optax.__file__).parent


def template(node: ast.expr) -> str:
    """The text of a message, with an ellipsis for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def messages() -> dict[str, list[str]]:
    """The messages by the file they are raised in."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if named and node.func.id.endswith(("Error", "Warning")) and node.args:
                text = " ".join(template(node.args[0]).split())
                if len(text) > 5:
                    name = path.relative_to(PACKAGE.parent).as_posix()
                    found.setdefault(name, []).append(text)
    return found


def write(app: Sphinx, config: Any) -> None:
    lines = ["… stands for what was given.", ""]
    for name, texts in messages().items():
        lines += [f"`{name}`", ""]
        lines += [f"- `{text.replace('`', chr(39))}`" for text in texts] + [""]
    path = Path(app.srcdir) / "_parts" / "messages.md"
    text = "\n".join(lines)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("config-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
