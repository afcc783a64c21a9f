"""Sharpness along gradient, momentum and random directions, by optimizer.

After figures 4A to 4C of arXiv 2401.12033 (MSAM): how much the loss of the trained
network rises at a distance along the gradient of a batch, along the momentum, on both
sides, and along a random direction with the proportions of the weights' filters. The
loss is that of the training part, with the labels trained on:

    python benchmarks/figures/sharpness_directions.py --quick
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.networks import networks
from msam_optax.plotting import plot_line
from msam_optax.sharpness import loss_on_line

METHODS = ("sgd", "sam", "msam", "ae_sam")
# How far it is looked, in the unit of the weights; a random direction is far flatter.
_REACH = {"gradient": 1.0, "momentum": 1.0, "random": 10.0}
_XLABELS = {
    "gradient": "ρ, ε = ρ g/‖g‖",
    "momentum": "ρ, ε = ρ v/‖v‖",
    "random": "ρ, ε = ρ d/‖d‖, d random",
}


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method, seed, direction and distance."""
    rows = []
    shares = np.linspace(-1, 1, study.settings["points"])
    for network in networks(study, METHODS):
        for name, direction in network.directions().items():
            distances = _REACH[name] * shares
            losses = loss_on_line(
                network.loss, network.weights, direction, distances, network.batches
            )
            at_weights = losses[np.argmin(np.abs(distances))]
            rows += [
                {
                    **network.columns,
                    "direction": name,
                    "distance": float(distance),
                    "loss": float(loss),
                    "sharpness": float(loss - at_weights),
                }
                for distance, loss in zip(distances, losses, strict=True)
            ]
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """A column for each direction."""
    figure, (axes,) = common.panels(1, len(_REACH))
    by_direction = common.grouped(rows, "direction")
    for ax, (name, chosen) in zip(axes, by_direction.items(), strict=True):
        plot_line(common.curves(chosen, "method", "distance", "sharpness"), ax=ax)
        ax.set(title=name, xlabel=_XLABELS[name], ylabel="sharpness L(w + ε) - L(w)")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(
        __file__,
        __doc__,
        argv,
        compute,
        draw,
        quick={"examples": 1000, "points": 11},
        full={"examples": 10_000, "points": 41},
    )


if __name__ == "__main__":
    sys.exit(main())
