"""Runs all scripts of figures, each in a process of its own, with the flags given.

python benchmarks/run_figures.py --quick --jobs 2

Scripts that run at the same time share out the cores, and all share JAX's compilation
cache. Results depend on the number of cores that a script has: sums are rounded
differently, and training amplifies that to the size of the differences between seeds.
"""

import argparse
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from benchmarks import arguments
from benchmarks.reports import report, tables

FOLDER = Path(__file__).resolve().with_name("figures")
# They start first, so that none of them is left to run alone at the end.
LONGEST = ("stability", "accuracy_against_cost", "label_noise")


class Outcome(NamedTuple):
    """How a script ended.

    Attributes:
      name: of the script.
      seconds: that it took.
      code: its exit code.
      errors: what it wrote to the standard error stream.
    """

    name: str
    seconds: float
    code: int
    errors: str


def scripts(folder: Path) -> list[Path]:
    """The files of a folder that can be run: the longest first, then by name."""
    found = [
        path
        for path in sorted(folder.glob("*.py"))
        if "__main__" in path.read_text("utf-8")
    ]
    return sorted(found, key=lambda path: path.stem not in LONGEST)


def shares(jobs: int) -> list[set[int]]:
    """The cores of each of the jobs that run at a time, as many for each.

    With more jobs than cores each may use all of them. They are empty where the system
    does not tell which cores there are.
    """
    cores = report.usable_cores()
    size = len(cores) // jobs
    if not size:
        return [set(cores) for _ in range(jobs)]
    return [set(cores[job * size : (job + 1) * size]) for job in range(jobs)]


def take(cores: set[int]) -> None:
    """Keeps this thread, and the processes that it starts, to these cores if any."""
    if cores and sys.platform == "linux":
        os.sched_setaffinity(0, cores)


def run(script: Path, flags: Sequence[str], compiled: str) -> Outcome:
    """Runs a script to its end.

    Args:
      script: its path.
      flags: its command line.
      compiled: folder of JAX's compilation cache.
    """
    environment = {
        "PYTHONIOENCODING": "utf-8",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        encoding="utf-8",
        errors="replace",
    )
    seconds = time.perf_counter() - start
    return Outcome(script.stem, seconds, done.returncode, done.stderr)


def main(argv: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Runs the scripts; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="All other flags are handed to the scripts, for instance --quick "
        "--seeds 2 --out DIR. Without --quick they train a WRN: for a GPU.",
    )
    parser.add_argument(
        "--jobs",
        type=arguments.positive_integer,
        default=1,
        metavar="N",
        help="scripts that run at a time, on their share of the cores "
        "(default: %(default)s)",
    )
    args, flags = parser.parse_known_args(argv)
    console = Console()
    free: queue.Queue[set[int]] = queue.Queue()
    for cores in shares(args.jobs):
        free.put(cores)

    def run_and_tell(script: Path, compiled: str) -> Outcome:
        outcome = run(script, flags, compiled)
        state = "failed" if outcome.code else "done"
        console.print(f"{outcome.name}: {state}, {outcome.seconds:.0f} s")
        return outcome

    with (
        tempfile.TemporaryDirectory() as compiled,
        ThreadPoolExecutor(args.jobs, initializer=lambda: take(free.get())) as pool,
    ):
        outcomes = list(pool.map(run_and_tell, scripts(folder), repeat(compiled)))
    failed = [outcome for outcome in outcomes if outcome.code]
    for outcome in failed:
        console.print(f"\n{outcome.name} ended with {outcome.code}:")
        console.print(outcome.errors.strip(), markup=False, highlight=False)
    tables.show(
        console,
        tables.Table(
            "Figures",
            ["script", "seconds", "exit code"],
            [[o.name, f"{o.seconds:.1f}", str(o.code)] for o in outcomes],
        ),
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
