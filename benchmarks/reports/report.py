"""What the benchmarks write beside their figures: intervals and provenance."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats


class Estimate(NamedTuple):
    """A mean over runs.

    Attributes:
      mean: over the runs; NaN for none.
      interval: half the width of the confidence interval of the mean; NaN for less
        than two runs.
    """

    mean: float
    interval: float

    def percent(self, sign: str = "") -> str:
        """A share as `90.1 ± 0.3`, or `90.1` for a single run; with a sign if `+`."""
        mean = f"{100 * self.mean:{sign}.1f}"
        single = math.isnan(self.interval)
        return mean if single else f"{mean} ± {100 * self.interval:.1f}"


def estimate(values: Sequence[float], level: float = 0.68) -> Estimate:
    """Mean and interval (68% if not said), from Student's t for few runs."""
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    if count < 2:
        return Estimate(mean, math.nan)
    with np.errstate(invalid="ignore"):  # The loss of a diverged run may be infinite.
        error = float(np.std(values, ddof=1)) / math.sqrt(count)
    # An interval of 68% leaves 16% on either side.
    return Estimate(mean, float(stats.t.ppf((1 + level) / 2, count - 1)) * error)


def provenance(script: str, argv: Sequence[str]) -> dict[str, Any]:
    """What is needed to repeat a measurement: command, code, versions and machine."""
    packages = ("jax", "jaxlib", "optax", "flax", "msam_optax", "numpy")
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *argv]),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_model(),
            "cores": len(usable_cores()) or os.cpu_count(),
            "device": device.device_kind,
            "platform": device.platform,
        },
    }


def origin(provenance: Mapping[str, Any]) -> list[str]:
    """Command, commit, machine and versions as lines of Markdown."""
    lines = [f"Command: `{provenance['command']}`, commit {provenance['commit']}."]
    for key in ("machine", "versions"):
        values = ", ".join(f"{k} {v}" for k, v in provenance[key].items())
        lines += ["", f"{key.capitalize()}: {values}."]
    return lines


def _version(package: str) -> str:
    """Of a package that need not be installed, as this one where it is a folder."""
    return getattr(import_module(package), "__version__", "unknown")


def commit() -> str:
    """The commit of the code, with a + where files differ; empty without Git."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(folder), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, in which a number that is not finite becomes null."""
    text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def usable_cores() -> list[int]:
    """Those that this process may run on; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def finite(content: Any) -> Any:
    """The same, with null for each number that JSON does not know."""
    match content:
        case dict():
            return {key: finite(value) for key, value in content.items()}
        case list() | tuple():
            return [finite(value) for value in content]
        case float() if not math.isfinite(content):
            return None
    return content
