"""Test accuracy against gradients a step, for the methods that pay for SAM in part.

After the tables of arXiv 2304.14647 (AE-SAM), which set accuracy against the share of
SAM steps, with MSAM of arXiv 2401.12033 beside:

    python benchmarks/figures/accuracy_against_cost.py --quick

Once with what was tuned for this task (a method that was not takes SGD's learning rate
and its default rho), and once, in half the epochs, at the usual learning rate, at which
SGD fits wrong labels, with each method's default rho.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.reports.progress import Bar, progress
from benchmarks.tasks import optimizers
from msam_optax import plotting
from msam_optax.plotting import Estimates

METHODS = ("sgd", "msam", "looksam", "ae_looksam", "esam", "ss_sam", "ae_sam", "sam")


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a learning rate, method and seed."""
    usual = study.with_epochs(max(study.task.epochs // 2, 1))._replace(tuned={})
    settings = [study, usual] if study.tuned else [study]
    rows = []
    with progress(len(settings) * len(METHODS) * len(study.seeds)) as bar:
        for chosen in settings:
            for method in METHODS:
                rows += _runs(chosen, method, bar)
    return rows


def _runs(study: common.Study, method: str, bar: Bar) -> list[dict[str, Any]]:
    setting = study.setting(method)
    trainer = study.trainer(method)
    extra_gradient = optimizers.METHODS[method].extra_gradient
    rows = []
    for seed in study.seeds:
        bar.describe(f"{method}, seed {seed + 1} of {len(study.seeds)}")
        *_, epoch = trainer.epochs(seed)
        rows.append(
            {
                "method": method,
                "seed": seed,
                "epochs": study.task.epochs,
                "learning_rate": setting.learning_rate,
                "rho": setting.rho,
                "hyperparameters": "tuned" if method in study.tuned else "default",
                "sam_fraction": epoch.sam_fraction,
                # In gradients of a batch a step, of which SGD takes one.
                "cost": 1 + extra_gradient * epoch.sam_fraction,
                **study.accuracies(epoch),
            }
        )
        bar.advance()
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """A point a method, with 68% intervals over the seeds; a panel a learning rate."""
    groups = common.grouped(rows, "learning_rate")
    figure, (axes,) = common.panels(1, len(groups))
    for ax, (learning_rate, runs) in zip(axes, groups.items(), strict=True):
        accuracies = common.summarise(runs, ("method",), "test_accuracy")
        costs = common.summarise(runs, ("method",), "cost")
        points = {
            method: Estimates(costs[method,].mean, *(100 * np.array(accuracy)))
            for (method,), accuracy in accuracies.items()
        }
        plotting.plot_cost(points, ax=ax)
        ax.set_title(f"learning rate {learning_rate:g}, {runs[0]['epochs']} epochs")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw, quick={"epochs": 20})


if __name__ == "__main__":
    sys.exit(main())
