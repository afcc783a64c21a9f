"""Batch loss before and after the perturbation, MSAM and SAM (MSAM paper, figure A.12).

Before a step both losses of its batch B are taken: L_B(w) at the unperturbed weights w,
and L_B(w + ε) with MSAM's ε = -ρ v/|v|, v the momentum of the steps before, or SAM's
ε = ρ g/|g|, g the gradient of B itself at w. SAM's ε is made to climb L_B; MSAM's may
or may not.

Each method trains at its own tuned setting.

Reference: Becker, Altrock and Risse, "Momentum-SAM", arXiv 2401.12033.

    python benchmarks/figures/perturbation_effect.py --quick
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.along_training import Measure, Moment, measured, perturbed
from msam_optax.plotting import plot_estimates

LOOKS = 10


def measures(sam_rho: float) -> dict[str, Measure]:
    """How the losses before and after are measured, by method."""

    def msam(moment: Moment) -> dict[str, jax.Array]:
        # The parameters in use are the perturbed ones.
        return _losses(moment, moment.params)

    def sam(moment: Moment) -> dict[str, jax.Array]:
        weights = moment.weights
        return _losses(moment, perturbed(weights, moment.gradient(weights), sam_rho))

    return {"msam": msam, "sam": sam}


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each seed, method and epoch."""
    rows = []
    for columns, values in measured(study, measures(study.setting("sam").rho), LOOKS):
        before, after = float(values["loss_before"]), float(values["loss_after"])
        losses = {"loss_before": before, "loss_after": after, "rise": after - before}
        rows.append({**columns, **losses})
    return rows


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Both losses, and beside them their difference."""
    figure, ((left, right),) = common.panels(1, 2)
    curves = {
        f"{method} {point}": curve
        for point, loss in (("at w", "loss_before"), ("at w + ε", "loss_after"))
        for method, curve in common.curves(rows, "method", "epoch", loss).items()
    }
    plot_estimates(curves, xlabel="epoch", ylabel="batch loss", ax=left)
    plot_estimates(
        common.curves(rows, "method", "epoch", "rise"),
        xlabel="epoch",
        ylabel="batch loss at w + ε less that at w",
        ax=right,
    )
    right.axhline(0, color="0.6", lw=0.8, zorder=0)
    return figure


def _losses(moment: Moment, after: Any) -> dict[str, jax.Array]:
    before = moment.loss(moment.weights)
    return {"loss_before": before, "loss_after": moment.loss(after)}


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
