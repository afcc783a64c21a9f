"""Similarity of MSAM's gradient to SAM's over training (MSAM paper, figure 3B, C).

At a step with batch B, unperturbed weights w and the momentum v of the steps before,
three gradients of L_B are taken:

    g_SGD       at w
    g_SAM       at w + ρ_SAM g_SGD/|g_SGD|, with SAM's tuned ρ_SAM
    g_MSAM(ρ)   at w - ρ v/|v|

and g_MSAM is projected into the plane of g_SAM and g_SGD. The plane's basis is made by
Gram and Schmidt: e_1 = g_SAM/|g_SAM|, and e_2 is g_SGD less its part along e_1,
normalised. With the coordinates of g_MSAM of length 1,

    x = <g_MSAM/|g_MSAM|, e_1>, the cosine of g_MSAM and g_SAM,
    y = <g_MSAM/|g_MSAM|, e_2>,

each averaged over the measured steps of an epoch, the angle of the projection to g_SAM
is

    θ(ρ) = atan2(y, x) in (-180°, 180°].

It is positive on the side of g_SGD, and θ(0) > 0 is the angle of g_SGD itself. Where
ρ > 0 turns the gradient from g_SGD towards g_SAM, θ falls. ρ_0, the smallest ρ with
θ(ρ_0) = 0, is where MSAM's gradient within the plane points as SAM's does; beyond it θ
is negative. ρ_0 is read from θ linearly between the values of ρ. What of g_MSAM lies
outside the plane does not show in θ. It does in x, shown below θ: at ρ_0 the gradients
themselves are parallel only if x is 1.

The runs are of SGD and of MSAM, each at its own tuned setting.

Reference: Becker, Altrock and Risse, "Momentum-SAM", arXiv 2401.12033.

    python benchmarks/figures/similarity.py --quick
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.along_training import Moment, measured, perturbed
from msam_optax.plotting import plot_estimates

METHODS = ("sgd", "msam")
RHOS = (0.0, 0.1, 0.2, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0)
EPOCHS, LOOKS = 5, 10


@jax.jit
def coordinates(vector: Any, axis: Any, side: Any) -> tuple[jax.Array, jax.Array]:
    """Where a vector of length 1 stands in the plane of two others.

    Args:
      vector: tree of arrays; its length does not matter.
      axis: tree; the first vector of the basis points along it.
      side: tree; the second one points to its side of the axis.

    Returns:
      The vector's coordinates x and y; 0 where a basis vector can't be made.
    """
    first = _normalized(axis)
    across = optax.tree.add_scale(side, -optax.tree.vdot(side, first), first)
    unit = _normalized(vector)
    return optax.tree.vdot(unit, first), optax.tree.vdot(unit, _normalized(across))


def signed_angle(x: float, y: float) -> float:
    """The angle to the first axis in degrees, positive on the side of the second."""
    return math.degrees(math.atan2(y, x))


def crossing(rhos: Sequence[float], angles: Sequence[float]) -> float:
    """The smallest ρ where the line through the points falls to 0; NaN if none does."""
    pairs = list(zip(rhos, angles, strict=True))
    for (left, above), (right, below) in itertools.pairwise(pairs):
        if above > 0 >= below:
            return left + (right - left) * above / (above - below)
    return math.nan


def measure(moment: Moment, sam_rho: float) -> dict[str, Any]:
    """The coordinates at a step for each of `RHOS`."""
    weights = moment.weights
    sgd = moment.gradient(weights)
    sam = moment.gradient(perturbed(weights, sgd, sam_rho))
    found = [
        coordinates(
            moment.gradient(perturbed(weights, moment.momentum, -rho)), sam, sgd
        )
        for rho in RHOS
    ]
    x, y = zip(*found, strict=True)
    return {"x": x, "y": y}


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each seed, method, measured epoch and perturbation."""
    sam_rho = study.setting("sam").rho
    measures = dict.fromkeys(METHODS, partial(measure, sam_rho=sam_rho))
    return [
        {
            **columns,
            "sam_rho": sam_rho,
            "perturbation": rho,
            "x": float(x),
            "y": float(y),
            "theta_degrees": signed_angle(x, y),
        }
        for columns, means in measured(study, measures, LOOKS, EPOCHS)
        for rho, x, y in zip(RHOS, means["x"], means["y"], strict=True)
    ]


def crossings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """ρ_0 for each seed, method and epoch that has one."""
    curves: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    columns = ("seed", "method", "epoch")
    for row in rows:
        curve = curves.setdefault(tuple(row[column] for column in columns), [])
        curve.append((row["perturbation"], row["theta_degrees"]))
    found = []
    for key, curve in curves.items():
        rho_0 = crossing(*zip(*curve, strict=True))
        if math.isfinite(rho_0):
            found.append({**dict(zip(columns, key, strict=True)), "rho_0": rho_0})
    return found


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """θ and the cosine x against ρ in three epochs of MSAM, and ρ_0 over training.

    Seeds without a crossing are left out of the mean of ρ_0; a point that lacks some
    is marked by how many it has.
    """
    figure, ((left, middle, right),) = common.panels(1, 3)
    seeds = len({row["seed"] for row in rows})
    epochs = sorted({row["epoch"] for row in rows})
    shown = {epochs[0], epochs[len(epochs) // 2], epochs[-1]}
    of_msam = [
        {**row, "label": f"epoch {row['epoch']}"}
        for row in rows
        if row["method"] == "msam" and row["epoch"] in shown
    ]
    for ax, measured_as, label in (
        (left, "theta_degrees", "θ (degrees)"),
        (middle, "x", "cos(g_MSAM, g_SAM)"),
    ):
        plot_estimates(
            common.curves(of_msam, "label", "perturbation", measured_as),
            xlabel="ρ",
            ylabel=label,
            log_x=True,
            bars=True,
            ax=ax,
        )
        ax.set_title("training by msam")
    left.axhline(0, color="0.6", lw=0.8, zorder=0)
    _draw_crossings(crossings(rows), seeds, right)
    return figure


def _draw_crossings(found: Sequence[Mapping[str, Any]], seeds: int, ax: Axes) -> None:
    curves = common.curves(found, "method", "epoch", "rho_0")
    plot_estimates(curves, xlabel="epoch", ylabel="ρ₀", bars=True, ax=ax)
    ax.legend(frameon=False, title="training by")
    by = ("method", "epoch")
    counts = Counter(tuple(row[column] for column in by) for row in found)
    for point, estimate in common.summarise(found, by, "rho_0").items():
        if counts[point] < seeds:
            at = (point[1], estimate.mean)
            ax.annotate(f" {counts[point]}/{seeds}", at, fontsize="small")


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


def _normalized(tree: Any) -> Any:
    length = optax.tree.norm(tree)
    return optax.tree.scale(1 / jnp.where(length == 0, 1, length), tree)


if __name__ == "__main__":
    sys.exit(main())
