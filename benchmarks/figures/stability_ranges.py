"""How wide the range of good rhos is, from runs over rho."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.figures import common
from benchmarks.reports import report, tables

# A rho is good whose accuracy is not further below the best of the same seed.
TOLERANCE = 0.01

Rows = Sequence[Mapping[str, Any]]


class Range(NamedTuple):
    """Over which rho a variant is good on a data set; estimates are over the seeds.

    Attributes:
      best_rho: that of the highest mean accuracy.
      accuracy: at that rho.
      smallest: the smallest good rho of a seed.
      largest: the largest good rho of a seed.
      ratio: the largest over the smallest.
      stable: the largest rho below the first that makes a seed diverge; 0 for none.
    """

    best_rho: float
    accuracy: report.Estimate
    smallest: report.Estimate
    largest: report.Estimate
    ratio: report.Estimate
    stable: report.Estimate


def good_range(rows: Rows) -> Range:
    """Of the runs of one variant on one data set."""
    means = common.summarise(rows, ("rho",), "validation_accuracy")
    (best_rho,) = max(means, key=lambda key: means[key].mean)
    smallest, largest, stable = [], [], []
    for runs in common.grouped(rows, "seed").values():
        # A rounding error must not decide about a whole example.
        bar = max(run["validation_accuracy"] for run in runs) - TOLERANCE - 1e-6
        good = [run["rho"] for run in runs if run["validation_accuracy"] >= bar]
        smallest.append(min(good))
        largest.append(max(good))
        edge = min((run["rho"] for run in runs if run["diverged"]), default=np.inf)
        below = [run["rho"] for run in runs if run["rho"] < edge]
        stable.append(max(below, default=0.0))
    ratios = [high / low for high, low in zip(largest, smallest, strict=True)]
    widths = (smallest, largest, ratios, stable)
    return Range(best_rho, means[best_rho,], *map(report.estimate, widths))


def range_tables(rows: Rows) -> list[tables.Table]:
    """A table a data set, a row a variant."""
    headers = (
        *("variant", "best ρ", "accuracy there (%)", "smallest good ρ"),
        *("largest good ρ", "largest / smallest", "largest ρ without divergence"),
    )
    found = []
    for dataset, runs in common.grouped(rows, "dataset").items():
        lines = []
        for variant, own in common.grouped(runs, "variant").items():
            width = good_range(own)
            numbers = [f"{e.mean:.2f} ± {e.interval:.2f}" for e in width[2:]]
            lines.append(
                [variant, f"{width.best_rho:g}", width.accuracy.percent(), *numbers]
            )
        found.append(tables.Table(dataset, headers, lines))
    return found
