"""Curvature along gradient, momentum and random directions, over training.

After appendix A.8 of arXiv 2401.12033 (MSAM): the curvature uᵀHu along unit vectors u
against the mean curvature tr H / |W| over all |W| parameters, which is what a Gaussian
direction has in the mean. H is the Hessian of the training part's loss, with the
labels trained on; the gradient is that of a batch:

    python benchmarks/figures/curvature.py --quick
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.networks import networks
from msam_optax.plotting import plot_estimates
from msam_optax.sharpness import curvature_along, hessian_trace

METHODS = ("sgd", "sam", "msam")


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method, seed, epoch and direction; the mean is one of them."""
    rows = []
    stops = np.linspace(1, study.task.epochs, study.settings["stops"])
    for network in networks(study, METHODS, epochs=set(map(round, stops))):
        where = network.loss, network.weights
        key = jax.random.fold_in(network.key(), network.columns["epoch"])
        directions = {
            "gradient g": network.gradient(),
            "momentum v": network.momentum,
            "random": optax.tree.random_like(key, network.weights),
        }
        curvatures = {
            name: curvature_along(*where, direction, network.batches)
            for name, direction in directions.items()
        }
        samples = study.settings["trace_samples"]
        trace = hessian_trace(*where, network.batches, key, num_samples=samples)
        curvatures["mean, tr H / |W|"] = trace.value / optax.tree.size(network.weights)
        rows += [
            {**network.columns, "direction": name, "curvature": curvature}
            for name, curvature in curvatures.items()
        ]
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each method."""
    by_method = common.grouped(rows, "method")
    figure, axes = common.panels(1, len(by_method))
    for ax, (method, chosen) in zip(axes.flat, by_method.items(), strict=True):
        plot_estimates(
            common.curves(chosen, "direction", "epoch", "curvature"),
            xlabel="epoch",
            ylabel="curvature uᵀHu, ‖u‖ = 1",
            log_y=True,
            ax=ax,
        )
        ax.set_title(method)
    if all(ax.get_yscale() == "log" for ax in axes.flat):  # no curvature below 0
        bottoms, tops = zip(*(ax.get_ylim() for ax in axes.flat), strict=True)
        for ax in axes.flat:
            ax.set_ylim(min(bottoms), max(tops))
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(
        __file__,
        __doc__,
        argv,
        compute,
        draw,
        quick={"examples": 1000, "stops": 8, "trace_samples": 4},
        full={"examples": 10_000, "stops": 20, "trace_samples": 20},
    )


if __name__ == "__main__":
    sys.exit(main())
