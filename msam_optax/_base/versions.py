"""What must be installed, said in one sentence where it is not.

Read before all else of the package, so this file imports nothing of JAX. The floors are
those of ``pyproject.toml``, tried by ``.ci/matrix oldest``.
"""

import importlib.util
import re
from importlib import metadata

FLOORS = {
    "jax": "0.6.2",
    "jaxlib": "0.6.2",
    "optax": "0.2.5",
    "flax": "0.11.2",
    "matplotlib": "3.9",
}


def require(*packages: str, extra: str = "") -> None:
    """Refuses to go on without these packages, or with older ones.

    Args:
      *packages: names in ``FLOORS``.
      extra: the extra of this package that installs them, if they come by one.

    Raises:
      ImportError: that names what is installed, what is needed and the command that
        installs it.
    """
    ours = f"msam_optax[{extra}]" if extra else "msam_optax"
    for package in packages:
        installed = _installed(package)
        if installed and _numbers(installed) < _numbers(FLOORS[package]):
            raise ImportError(
                f"{ours} needs {package} >= {FLOORS[package]}, and {installed} is "
                f"installed: pip install --upgrade '{ours}'"
            )


def _installed(package: str) -> str | None:
    """A package's version; None where nobody knows it, though the package is there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # On the path, but not by an installer
        return None if importlib.util.find_spec(package) else "none"


def _numbers(version: str) -> tuple[int, ...]:
    """Of a release, (0, 10, 2) for 0.10.2 and for its development versions alike."""
    release = re.match(r"[\d.]*", version)
    return tuple(int(n) for n in release[0].split(".") if n) if release else ()
