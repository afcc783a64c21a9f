"""Writes the pages of the API from every ``__all__``.

One page a topic with a table of its names, and one page a name. They are made before
each build and kept out of the repository.
"""

import importlib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import msam_optax

# Where a name lives, what its page is called. The folders of what stands at the top.
TOPICS = {
    "Methods": ("msam_optax", "methods"),
    "Chain elements": ("msam_optax", "transforms"),
    "Training": ("msam_optax", "training"),
    "Ascents": ("msam_optax.ascents", None),
    "Combine rules": ("msam_optax.combine", None),
    "Policies": ("msam_optax.policies", None),
    "Flax Linen": ("msam_optax.flax.linen", None),
    "Flax NNX": ("msam_optax.flax.nnx", None),
    "Sharpness": ("msam_optax.sharpness", None),
    "Plotting": ("msam_optax.plotting", None),
}
NAMESPACES = {"ascents", "combine", "flax", "plotting", "policies", "sharpness"}


def names_of(module: str, folder: str | None) -> list[str]:
    """The public names of a topic."""
    source = importlib.import_module(f"msam_optax.{folder}" if folder else module)
    names = set(source.__all__)
    if folder:
        names &= set(msam_optax.__all__)
    return sorted(names, key=lambda name: (name[0].isupper(), name))


def documented() -> dict[str, list[str]]:
    """The names of every topic; those at the top that no folder has come last."""
    found = {topic: names_of(*where) for topic, where in TOPICS.items()}
    at_the_top = [
        name for topic, (_, folder) in TOPICS.items() if folder for name in found[topic]
    ]
    rest = set(msam_optax.__all__) - NAMESPACES - set(at_the_top)
    # A type or a schedule that is public at the top and in its namespace: one page.
    return found | {"Others": sorted(rest)}


def page(topic: str, module: str, folder: str | None, names: list[str]) -> str:
    automodule = f"msam_optax.{folder}" if folder else module
    lines = [
        topic,
        "=" * len(topic),
        "",
        f".. automodule:: {automodule}",
        "   :no-members:",
        # The folders of what stands at the top are no modules of the user's.
        *(["   :no-index:"] if folder else []),
        "",
        f".. currentmodule:: {module}",
        "",
        ".. autosummary::",
        "   :toctree: names",
        "   :nosignatures:",
        "",
        *(f"   {name}" for name in names),
        "",
    ]
    return "\n".join(lines)


def write(app: Sphinx, config: Any) -> None:
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    for topic, names in documented().items():
        if not names:
            continue
        where = TOPICS.get(topic, ("msam_optax", None))
        path = folder / f"{topic.lower().replace(' ', '_')}.rst"
        text = page(topic, *where, names)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Sphinx) -> dict[str, bool]:
    # Before Sphinx looks which pages there are.
    app.connect("config-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
