"""Runs a script of `benchmarks/figures` as its user does, and reads what it leaves."""

import csv
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

# Five steps an epoch.
FAST = ["--quick", "--dataset", "digits", "--model", "mlp", "--batch-size", "256"]

Row = dict[str, Any]


def run(script: ModuleType, out: Path, *flags: str) -> list[Row]:
    """The rows of the CSV, with numbers where there are any, after common checks.

    Args:
      script: the module.
      out: folder for its files.
      *flags: further ones; `--epochs` takes the place of one epoch.
    """
    argv = [*FAST, "--epochs", "1", "--seeds", "2", *flags, "--out", str(out)]
    assert script.main(argv) == 0
    name = script.__name__.rpartition(".")[2]
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    assert written["command"].startswith(f"python benchmarks/figures/{name}.py --quick")
    assert written["settings"].items() >= {"dataset": "digits", "seeds": 2}.items()
    with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            {key: _number(text) for key, text in row.items()}
            for row in csv.DictReader(file)
        ]
    assert {row["seed"] for row in rows} >= {0, 1}
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers)), row
    return rows


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
