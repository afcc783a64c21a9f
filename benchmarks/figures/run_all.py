"""Runs all scripts of figures, each in a process of its own, with the flags given.

python benchmarks/figures/run_all.py --quick --jobs 2
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `benchmarks/*.py`

import arguments
import tables
from rich.console import Console

FOLDER = Path(__file__).resolve().parent


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
    """The files of a folder that can be run, in the order of their names."""
    return [
        path
        for path in sorted(folder.glob("*.py"))
        if path != Path(__file__).resolve() and "__main__" in path.read_text("utf-8")
    ]


def run(script: Path, flags: Sequence[str]) -> Outcome:
    """Runs a script to its end."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        errors="replace",
    )
    seconds = time.perf_counter() - start
    return Outcome(script.stem, seconds, done.returncode, done.stderr)


def main(argv: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Runs the scripts; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="All other flags are handed to the scripts.",
    )
    parser.add_argument(
        "--jobs",
        type=arguments.positive_integer,
        default=1,
        metavar="N",
        help="scripts that run at a time (default: %(default)s)",
    )
    args, flags = parser.parse_known_args(argv)
    console = Console()

    def run_and_tell(script: Path) -> Outcome:
        outcome = run(script, flags)
        state = "failed" if outcome.code else "done"
        console.print(f"{outcome.name}: {state}, {outcome.seconds:.0f} s")
        return outcome

    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = list(pool.map(run_and_tell, scripts(folder)))
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
