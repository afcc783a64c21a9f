"""The main job's result as README and the site's first page show it.

    python -m benchmarks.reports.main_table

writes it into README.md, between its two marks. A test holds README to it.
"""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "compare_mnist5k_mlp" / "table.csv"
MARKS = re.compile(
    r"(?<=<!-- main table -->\n).*?(?=<!-- end of main table -->)", flags=re.DOTALL
)


def percent(row: dict[str, str], name: str, sign: str = "") -> str:
    mean, interval = (
        100 * float(row[f"{name}_{what}"]) for what in ("mean", "interval")
    )
    return f"{mean:{sign}.1f} ± {interval:.1f}"


def main_table() -> str:
    """A line about the task, and a row for each optimizer."""
    with RESULT.open(newline="") as file:
        rows = list(csv.DictReader(file))
    one = rows[0]
    steps = float(one["gradients"])
    lines = [
        f"{int(one['train_examples']):,} MNIST digits to train on, "
        f"{float(one['label_noise']):.0%} of their labels random, an MLP, "
        f"{one['epochs']} epochs, {one['runs']} seeds, each method at its own tuned "
        "setting; ± is a 95% interval:",
        "",
        "| | test accuracy % | gain over SGD | gradients a step | time / SGD |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gain = percent(row, "gain", "+") if row is not one else ""
        lines.append(
            f"| `{row['optimizer']}` | {percent(row, 'final_accuracy')} | {gain} "
            f"| {float(row['gradients']) / steps:.2f} "
            f"| {float(row['relative_time']):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    table = f"\n{main_table()}\n"
    readme.write_text(MARKS.sub(lambda _: table, readme.read_text()))


if __name__ == "__main__":
    main()
