"""Every public name has its page, and no page a name that is gone.

``python docs/check_names.py docs/_build/html``
"""

import sys
from importlib import import_module
from pathlib import Path

SPACES = (
    "msam_optax",
    "msam_optax.ascents",
    "msam_optax.combine",
    "msam_optax.policies",
    "msam_optax.flax.linen",
    "msam_optax.flax.nnx",
    "msam_optax.sharpness",
    "msam_optax.plotting",
)


def public() -> set[str]:
    names = {
        f"{space}.{name}" for space in SPACES for name in import_module(space).__all__
    }
    return names - set(SPACES) - {"msam_optax.flax"}


def main() -> None:
    folder = Path(sys.argv[1]) / "api" / "names"
    pages = {path.stem for path in folder.glob("*.html")}
    wrong = [f"{name} has no page" for name in sorted(public() - pages)]
    wrong += [f"{name} has a page and is gone" for name in sorted(pages - public())]
    print("\n".join(wrong) or f"check_names: {len(pages)} public names, a page each")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
