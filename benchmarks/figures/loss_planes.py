"""The loss on a plane around the trained network, by optimizer.

After the planes of appendix A.13 of arXiv 2401.12033 (MSAM). Here the plane is spanned
by the momentum and by what of the gradient of a batch is orthogonal to it, which are
the directions of MSAM's and SAM's perturbation. The loss is that of the training part,
with the labels trained on:

    python benchmarks/figures/loss_planes.py --quick
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.figures import common
from benchmarks.figures.networks import networks, unit
from msam_optax.plotting import plot_plane
from msam_optax.sharpness import loss_on_plane

METHODS = ("sgd", "sam", "msam", "ae_sam")
# How far it is looked, in the unit of the weights.
_REACH = 1.0


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method, seed and point."""
    rows = []
    at = np.linspace(-_REACH, _REACH, study.settings["points"])
    for network in networks(study, METHODS):
        momentum, gradient = unit(network.momentum), network.gradient()
        along = optax.tree.vdot(momentum, gradient)
        across = unit(optax.tree.add_scale(gradient, -along, momentum))
        losses = loss_on_plane(
            network.loss,
            network.weights,
            (momentum, across),
            at,
            at,
            network.batches,
        )
        at_weights = losses[len(at) // 2, len(at) // 2]
        rows += [
            {
                **network.columns,
                "along_momentum": float(x),
                "along_gradient": float(y),
                "loss": float(losses[j, i]),
                "rise": float(losses[j, i] - at_weights),
            }
            for j, y in enumerate(at)
            for i, x in enumerate(at)
        ]
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each method, all of one scale: means over the seeds."""
    by_method = common.grouped(rows, "method")
    planes = {name: _plane(chosen) for name, chosen in by_method.items()}
    rises = np.concatenate([np.ravel(rises) for _, rises in planes.values()])
    levels = MaxNLocator(15).tick_values(rises.min(), np.quantile(rises, 0.9))
    figure, axes = common.panels(2, -(-len(planes) // 2))
    for ax, (name, (at, rises)) in zip(axes.flat, planes.items(), strict=False):
        points = {"w": (0.0, 0.0)}
        if name == "msam":
            points["w + ε"] = (-by_method[name][0]["rho"], 0.0)
        label = "L(w + ε) - L(w)"
        plot_plane(at, at, rises, points=points, levels=levels, label=label, ax=ax)
        ax.set(
            title=name,
            xlabel="along the momentum v/‖v‖",
            ylabel="along the gradient, across v",
        )
    return figure


def _plane(rows: Sequence[Any]) -> tuple[list[float], np.ndarray]:
    found = common.summarise(rows, ("along_gradient", "along_momentum"), "rise")
    at = sorted({y for y, _ in found})
    return at, np.array([[found[y, x].mean for x in at] for y in at])


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(
        __file__,
        __doc__,
        argv,
        compute,
        draw,
        quick={"examples": 1000, "points": 15},
        full={"examples": 10_000, "points": 31},
    )


if __name__ == "__main__":
    sys.exit(main())
