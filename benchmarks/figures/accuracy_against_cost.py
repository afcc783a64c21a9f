"""Test accuracy against gradients a step, for the methods that pay for SAM in part.

After the tables of arXiv 2304.14647 (AE-SAM), which set accuracy against the share of
SAM steps, with MSAM of arXiv 2401.12033 beside:

    python benchmarks/figures/accuracy_against_cost.py --quick

Each stands at its own learning rate, rho and weight decay, tuned on validation data. A
method that was not tuned takes over those of the one it is a variant of: SS-SAM and
ESAM those of SAM, AE-LookSAM those of AE-SAM.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.reports.progress import progress
from benchmarks.tasks import optimizers
from msam_optax import plotting
from msam_optax.plotting import Estimates

# A method that is further below SGD diverged at a setting that is not its own.
_SHOWN_BELOW = 0.05
METHODS = ("sgd", "msam", "looksam", "ae_looksam", "esam", "ss_sam", "ae_sam", "sam")


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method and seed."""
    rows = []
    with progress(len(METHODS) * len(study.seeds)) as bar:
        for method in METHODS:
            trainer = study.trainer(method)
            extra_gradient = optimizers.METHODS[method].extra_gradient
            for seed in study.seeds:
                bar.describe(f"{method}, seed {seed + 1} of {len(study.seeds)}")
                *_, epoch = trainer.epochs(seed)
                rows.append(
                    {
                        "method": method,
                        **common.columns_of(study.setting(method)),
                        "hyperparameters": (
                            "tuned" if method in study.studied else "taken over"
                        ),
                        "seed": seed,
                        "sam_fraction": epoch.sam_fraction,
                        # In gradients of a batch a step, of which SGD takes one.
                        "cost": 1 + extra_gradient * epoch.sam_fraction,
                        **study.accuracies(epoch),
                    }
                )
                bar.advance()
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """A point a method, with 68% intervals; without those that some seeds break."""
    accuracies = common.summarise(rows, ("method",), "test_accuracy")
    costs = common.summarise(rows, ("method",), "cost")
    points = {
        method: Estimates(costs[method,].mean, *(100 * np.array(accuracy)))
        for (method,), accuracy in accuracies.items()
        if accuracy.mean > accuracies["sgd",].mean - _SHOWN_BELOW
    }
    figure, ((ax,),) = common.panels(1, 1)
    plotting.plot_cost(points, ax=ax)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
