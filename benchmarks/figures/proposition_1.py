"""The rise of the loss under Gaussian noise against the Hessian's trace.

Proposition 1 of arXiv 2401.12033 (MSAM): for ε of independent normal entries of
standard deviation σ, E[L(w + ε)] - L(w) is about (σ²/2) tr H where σ is small. The
loss is that of the training part, with the labels trained on, at the trained network.
Each direction is taken on both sides, which takes the first order out of the mean.

The proposition is about a loss with second derivatives. Where a ReLU has its kink there
are none: the loss bends there too, but the Hessian does not tell. So a fully connected
network with GELU is measured beside the model asked for:

    python benchmarks/figures/proposition_1.py --quick
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.networks import Network, networks
from msam_optax.plotting import Estimates, plot_estimates
from msam_optax.sharpness import hessian_trace, loss_on_line

METHODS = ("sgd", "msam")
_SIGMAS = np.geomspace(1e-3, 1e-1, 7)


class SmoothMLP(nn.Module):
    """The benchmarks' MLP with GELU in the place of ReLU."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        del train
        x = images.reshape(images.shape[0], -1)
        for _ in range(2):
            x = nn.gelu(nn.Dense(256)(x))
        return nn.Dense(self.num_classes)(x)


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a model, method, seed and sigma."""
    task = copy.copy(study.task)
    task.model = SmoothMLP(task.num_classes)
    models = {study.args.model: study, "mlp with GELU": study._replace(task=task)}
    rows = []
    for model, of_model in models.items():
        for network in networks(of_model, METHODS):
            trace = hessian_trace(
                network.loss,
                network.weights,
                network.batches,
                network.key(),
                num_samples=study.settings["trace_samples"],
            )
            rises = _rises(network, study.settings["samples"])
            for sigma, rise in zip(_SIGMAS.tolist(), rises.tolist(), strict=True):
                predicted = sigma**2 / 2 * trace.value
                rows.append(
                    {
                        "model": model,
                        **network.columns,
                        "sigma": sigma,
                        "rise": rise,
                        "predicted": predicted,
                        "ratio": rise / predicted,
                        "trace": trace.value,
                        "trace_error": trace.standard_error,
                    }
                )
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Rise and prediction to the left, their ratio to the right; a row for a model."""
    by_model = common.grouped(rows, "model")
    figure, axes = common.panels(len(by_model), 2)
    xlabel = "standard deviation σ of the noise (unit of the weights)"
    for (left, right), (model, chosen) in zip(axes, by_model.items(), strict=True):
        both = [
            {"label": label, "sigma": row["sigma"], "value": row[column]}
            for row in chosen
            for column, label in (
                ("rise", row["method"]),
                ("predicted", f"{row['method']} (σ²/2) tr H"),
            )
        ]
        plot_estimates(
            common.curves(both, "label", "sigma", "value"),
            xlabel=xlabel,
            ylabel="E[L(w + ε)] - L(w)",
            log_x=True,
            log_y=True,
            ax=left,
        )
        plot_estimates(
            common.curves(chosen, "method", "sigma", "ratio"),
            references={"proposition 1": Estimates(0, 1)},
            xlabel=xlabel,
            ylabel="rise over (σ²/2) tr H",
            log_x=True,
            bars=True,
            ax=right,
        )
        right.set_ylim(bottom=0)
        for ax in (left, right):
            ax.set_title(model)
    return figure


def _rises(network: Network, samples: int) -> np.ndarray:
    """E[L(w + σ n)] - L(w) for each σ, over normal directions n."""
    losses = [
        loss_on_line(
            network.loss,
            network.weights,
            optax.tree.random_like(key, network.weights),
            [0.0, *_SIGMAS, *-_SIGMAS],
            network.batches,
        )
        for key in jax.random.split(network.key(), samples)
    ]
    at_weights, *ahead = np.asarray(losses, np.float64).mean(axis=0)
    return np.reshape(ahead, (2, -1)).mean(axis=0) - at_weights


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(
        __file__,
        __doc__,
        argv,
        compute,
        draw,
        quick={"examples": 1000, "samples": 8, "trace_samples": 20},
        full={"examples": 10_000, "samples": 50, "trace_samples": 100},
    )


if __name__ == "__main__":
    sys.exit(main())
