"""AE-SAM's premise: is the squared gradient norm nearly normal within a stretch?

Reads the rows of `figures/policy_trace.py`, and trains nothing. A stretch is an epoch
of a seed, whose straight line is taken out; what is left is divided by its deviation.

    python benchmarks/normality.py
"""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks import arguments
from benchmarks.reports import report, studies
from benchmarks.tasks import optimizers

LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def standardised(rows: Iterable[Mapping[str, str]]) -> np.ndarray:
    """The squared norms of all stretches, each without its line, at deviation 1."""
    stretches: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        epoch = int(np.ceil(float(row["epoch"]) - 1e-6))
        stretches.setdefault((row["seed"], epoch), []).append(
            float(row["squared_norm"])
        )
    found = []
    for values in stretches.values():
        steps = np.arange(len(values))
        left = np.array(values) - np.polyval(np.polyfit(steps, values, 1), steps)
        # Two degrees of freedom went into the line.
        found.append(left / np.sqrt(np.sum(left**2) / (len(left) - 2)))
    return np.concatenate(found)


def table(left: np.ndarray) -> list[str]:
    """Quantiles beside those of a normal distribution, and the moments."""
    lines = ["| quantile | squared norm | normal |", "|---|---|---|"]
    for level in LEVELS:
        lines.append(
            f"| {level:g} | {np.quantile(left, level):+.2f} "
            f"| {stats.norm.ppf(level):+.2f} |"
        )
    above = np.mean(left >= 1), np.mean(left >= -1)
    return [
        *lines,
        "",
        f"Skewness {stats.skew(left):.2f}, excess kurtosis {stats.kurtosis(left):.2f} "
        f"(both 0 for a normal distribution), {len(left)} steps. Above the mean by a "
        f"deviation: {above[0]:.1%} (normal: 15.9%); not below it by one: "
        f"{above[1]:.1%} (normal: 84.1%).",
    ]


def figure(left: np.ndarray) -> Figure:
    """Histogram with the normal density, and quantiles against quantiles."""
    drawn = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    histogram, quantiles = drawn.subplots(1, 2)
    grid = np.linspace(-4, 4, 200)
    histogram.hist(left, bins=50, density=True, color="0.75")
    histogram.plot(grid, stats.norm.pdf(grid))
    histogram.set_xlabel("squared norm, line taken out, in deviations")
    histogram.set_ylabel("density")
    levels = (np.arange(len(left)) + 0.5) / len(left)
    quantiles.plot(stats.norm.ppf(levels), np.sort(left), ".", markersize=2)
    quantiles.plot(grid, grid, color="0.5", linewidth=0.8)
    quantiles.set_xlabel("normal quantile")
    quantiles.set_ylabel("quantile")
    return drawn


def main(argv: Sequence[str] | None = None) -> int:
    """Writes table and figure; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    rows = optimizers.RESULTS / "figures" / "policy_trace.csv"
    parser.add_argument("--rows", type=Path, default=rows)
    arguments.add_out(parser, Path("runs/studies/normality"))
    args = parser.parse_args(argv)
    with args.rows.open(newline="", encoding="utf-8") as file:
        left = standardised(csv.DictReader(file))
    provenance = report.provenance("normality.py", argv)
    studies.publish(args.out / "table.md", table(left), provenance)
    figure(left).savefig(args.out / "normality.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
