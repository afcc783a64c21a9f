"""Cosine of momentum and gradient over training (MSAM paper, figure 2C).

MSAM perturbs the weights by -ρ v/|v|. Whether that climbs the loss of the batch that
comes next is the sign of cos(v, g), with v = v_{t-1} the momentum before the step and
g = g_t the gradient of the step's batch at the unperturbed weights: the perturbation is
an ascent where the cosine is negative. The momentum is what the optimizer holds, made
of SAM's gradients in SAM, of those at the perturbed weights in MSAM, and of the weight
decay.

Each method trains at its own tuned setting.

Reference: Becker, Altrock and Risse, "Momentum-SAM", arXiv 2401.12033.

    python benchmarks/figures/momentum_cosine.py --quick
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.along_training import Moment, measured
from msam_optax.plotting import plot_estimates

METHODS = ("sgd", "msam", "sam")
LOOKS = 10


@jax.jit
def cosine(vector: Any, other: Any) -> jax.Array:
    """Of the angle between two trees of arrays; 0 where one of them is all zeros."""
    lengths = optax.tree.norm(vector) * optax.tree.norm(other)
    return optax.tree.vdot(vector, other) / jnp.where(lengths == 0, 1, lengths)


def measure(moment: Moment) -> dict[str, jax.Array]:
    """The cosine at a step."""
    return {"cosine": cosine(moment.momentum, moment.gradient(moment.weights))}


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each seed, method and epoch."""
    found = measured(study, dict.fromkeys(METHODS, measure), LOOKS)
    return [{**columns, "cosine": float(values["cosine"])} for columns, values in found]


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The cosine over the epochs."""
    figure, ((ax,),) = common.panels(1, 1)
    plot_estimates(
        common.curves(rows, "method", "epoch", "cosine"),
        xlabel="epoch",
        ylabel="cos(momentum, gradient)",
        ax=ax,
    )
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
