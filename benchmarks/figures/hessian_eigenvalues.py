"""The largest eigenvalues of the Hessian and its trace, by optimizer.

After table A.1 of arXiv 2401.12033 (MSAM). The Hessian is that of the training part's
loss at the trained network, with the labels trained on; the eigenvalues come from
Lanczos' method, the trace from Hutchinson's, each with its error:

    python benchmarks/figures/hessian_eigenvalues.py --quick
"""

import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.networks import networks
from msam_optax.plotting import plot_eigenvalues
from msam_optax.sharpness import hessian_eigenvalues, hessian_trace

METHODS = ("sgd", "sam", "msam", "ae_sam")
_COUNT = 5


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method, seed and place; the trace has place 0.

    The error of an eigenvalue is the length of Hv - λv, that of the trace its standard
    error.
    """
    rows = []
    for network in networks(study, METHODS):
        where = network.loss, network.weights, network.batches
        largest = hessian_eigenvalues(
            *where, _COUNT, network.key(), num_matvecs=study.settings["num_matvecs"]
        )
        trace = hessian_trace(
            *where, network.key(), num_samples=study.settings["trace_samples"]
        )
        found = [trace, *zip(largest.values, largest.errors, strict=True)]
        rows += [
            {
                **network.columns,
                "quantity": f"lambda_{place}" if place else "trace",
                "place": place,
                "value": float(value),
                "error": float(error),
            }
            for place, (value, error) in enumerate(found)
        ]
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Eigenvalues to the left, the trace to the right."""
    figure, ((left, right),) = common.panels(1, 2)
    eigenvalues = [row for row in rows if row["place"] > 0]
    trace = [row for row in rows if row["place"] == 0]
    plot_eigenvalues(common.curves(eigenvalues, "method", "place", "value"), ax=left)
    plot_eigenvalues(common.curves(trace, "method", "place", "value"), ax=right)
    right.set(xlabel="", xticks=[], xlim=(-0.5, 0.5), ylabel="trace of the Hessian")
    for ax in (left, right):
        ax.set_ylim(bottom=0)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(
        __file__,
        __doc__,
        argv,
        compute,
        draw,
        quick={"examples": 1000, "num_matvecs": 30, "trace_samples": 10},
        full={"examples": 10_000, "num_matvecs": 60, "trace_samples": 50},
    )


if __name__ == "__main__":
    sys.exit(main())
