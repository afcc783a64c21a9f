"""Figures of compare.py: arrays in, matplotlib figures out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from msam_optax.plotting import Estimates, plot_estimates


class Curve(NamedTuple):
    """Test accuracy along something.

    Attributes:
      label: of the legend.
      x: float[n].
      mean: float[n], accuracy as a share.
      interval: float[n], half the width of its 68% interval; NaN where unknown.
    """

    label: str
    x: np.ndarray
    mean: np.ndarray
    interval: np.ndarray


def accuracy_against_gradients(curves: Sequence[Curve]) -> Figure:
    """Test accuracy over the gradients spent, with 68% bands."""
    figure, ax = _figure()
    plot_estimates(
        _in_percent(curves),
        xlabel="gradients of a batch",
        ylabel="test accuracy (%)",
        ax=ax,
    )
    return figure


def accuracy_against_rho(
    curves: Sequence[Curve], references: Mapping[str, float]
) -> Figure:
    """Final test accuracy over rho, with 68% intervals.

    Args:
      curves: one a method.
      references: final test accuracy of the methods without rho, as level lines.
    """
    figure, ax = _figure()
    plot_estimates(
        _in_percent(curves),
        references={name: Estimates(0, 100 * a) for name, a in references.items()},
        xlabel="ρ (unit of the weights)",
        ylabel="final test accuracy (%)",
        log_x=True,
        bars=True,
        ax=ax,
    )
    return figure


def _in_percent(curves: Sequence[Curve]) -> dict[str, Estimates]:
    return {c.label: Estimates(c.x, 100 * c.mean, 100 * c.interval) for c in curves}


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    return figure, figure.add_subplot()
