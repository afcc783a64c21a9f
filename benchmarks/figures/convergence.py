"""How fast AE-SAM converges beside SAM and SGD: loss and gradient of the training part.

The AE-SAM paper proves for its policy the rate of SAM, in the mean squared norm of the
loss's gradient over the steps. All three are trained with SAM's learning rate, ρ and
weight decay, so that only the policy differs. Loss and gradient are those of the whole
training part with the labels trained on, at the unperturbed weights, after each epoch;
against the steps, and against the gradients of a batch that they took.

Reference: Jiang, Yang, Zhang and Kwok, "An Adaptive Policy to Employ Sharpness-Aware
Minimization", arXiv 2304.14647.

    python benchmarks/figures/convergence.py --quick
"""

import sys
from collections.abc import Sequence
from typing import Any

import optax
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.networks import networks
from benchmarks.tasks.search import Hyperparameters
from msam_optax.plotting import Estimates, plot_estimates
from msam_optax.sharpness import mean_gradient, mean_loss

METHODS = ("sgd", "ae_sam", "sam")
_MEASURES = {
    "train_loss": "training loss",
    "mean_squared_gradient": "‖∇L‖², mean over the epochs so far",
}


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method, seed and epoch."""
    setting = study.setting("sam")
    alike = Hyperparameters(
        setting.learning_rate, setting.rho or None, setting.weight_decay
    )
    study = study._replace(studied=dict.fromkeys(METHODS, alike))
    found: dict[tuple[str, int], list[float]] = {}
    rows = []
    for network in networks(study, METHODS, range(1, study.task.epochs + 1)):
        columns = network.columns
        where = network.loss, network.weights, network.batches
        squared = found.setdefault((columns["method"], columns["seed"]), [])
        squared.append(float(optax.tree.norm(mean_gradient(*where), squared=True)))
        rows.append(
            {
                **columns,
                "steps": columns["epoch"] * study.task.steps_per_epoch,
                "gradients": network.gradients,
                "train_loss": float(mean_loss(*where)),
                "mean_squared_gradient": sum(squared) / len(squared),
            }
        )
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Loss above gradient; against steps to the left, against gradients to the right.

    Seeds differ in the gradients that AE-SAM took: their mean is shown.
    """
    figure, axes = common.panels(2, 2)
    for line, (column, label) in zip(axes, _MEASURES.items(), strict=True):
        for ax, along in zip(line, ("steps", "gradients"), strict=True):
            values = common.summarise(rows, ("method", "epoch"), column)
            places = common.summarise(rows, ("method", "epoch"), along)
            curves = {}
            for method in METHODS:
                of = [key for key in values if key[0] == method]
                curves[method] = Estimates(
                    [places[key].mean for key in of],
                    [values[key].mean for key in of],
                    [values[key].interval for key in of],
                )
            xlabel = {"steps": "steps", "gradients": "gradients of a batch"}[along]
            plot_estimates(curves, xlabel=xlabel, ylabel=label, log_y=True, ax=ax)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(
        *(__file__, __doc__, argv, compute, draw),
        quick={"examples": 4000},
        full={"examples": 10_000},
    )


if __name__ == "__main__":
    sys.exit(main())
