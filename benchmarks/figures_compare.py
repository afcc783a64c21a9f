"""Figures of compare.py: arrays in, matplotlib figures out."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart whatever the colour vision; with the line styles
# also in grey.
_COLORS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#D55E00",
    "#0072B2",
    "#CC79A7",
)
_STYLES = ("-", "--", "-.", ":")


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
    figure = _figure()
    axes = figure.add_subplot()
    for curve, (color, style) in zip(curves, _looks(), strict=False):
        percent, interval = 100 * curve.mean, 100 * curve.interval
        axes.plot(curve.x, percent, style, color=color, label=curve.label)
        axes.fill_between(
            curve.x,
            percent - interval,
            percent + interval,
            color=color,
            alpha=0.2,
            lw=0,
        )
    axes.set_xlabel("gradient evaluations")
    axes.set_ylabel("test accuracy (%)")
    _finish(axes)
    return figure


def accuracy_against_rho(
    curves: Sequence[Curve], references: Mapping[str, float]
) -> Figure:
    """Final test accuracy over rho, with 68% intervals.

    Args:
      curves: one a method.
      references: final test accuracy of the methods without rho, as level lines.
    """
    figure = _figure()
    axes = figure.add_subplot()
    looks = _looks()
    for name, accuracy in references.items():
        color, style = next(looks)
        axes.axhline(100 * accuracy, ls=style, color=color, label=name, lw=1)
    for curve in curves:
        color, _ = next(looks)
        axes.errorbar(
            curve.x,
            100 * curve.mean,
            100 * curve.interval,
            fmt="o-",
            color=color,
            capsize=3,
            label=curve.label,
        )
    if all((curve.x > 0).all() for curve in curves):
        axes.set_xscale("log")
    axes.set_xlabel("ρ")
    axes.set_ylabel("final test accuracy (%)")
    _finish(axes)
    return figure


def _figure() -> Figure:
    return Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")


def _looks():
    """A colour and a line style for each curve; pairs repeat after 28 curves."""
    return zip(cycle(_COLORS), cycle(_STYLES), strict=False)


def _finish(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
