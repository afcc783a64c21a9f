"""What the figures of `plotting` are drawn with."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter
from numpy.typing import ArrayLike

from msam_optax.plotting._looks import Look, looks

GREY = "#666666"


class Estimates(NamedTuple):
    """Means with intervals at points along x.

    Attributes:
      x: float[n], or a scalar for a single point.
      mean: in the shape of x.
      interval: half the width of the means' 68% intervals, in the shape of x; NaN where
        one is not known, None for no intervals at all.
    """

    x: ArrayLike
    mean: ArrayLike
    interval: ArrayLike | None = None


class _PlainFormatter(LogFormatter):
    """Labels the ticks that matplotlib would, as 0.3 rather than 3 × 10⁻¹."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def axes(ax: Axes | None) -> Axes:
    """The Axes given, or those of a new figure, which pyplot does not know of."""
    if ax is not None:
        return ax
    return Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained").add_subplot()


def arrays(estimates: Estimates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and interval as float[n]."""
    x, mean = (np.atleast_1d(np.asarray(a, float)) for a in estimates[:2])
    if estimates.interval is None:
        return x, mean, np.full_like(mean, np.nan)
    return x, mean, np.atleast_1d(np.asarray(estimates.interval, float))


def shade(look: Look) -> dict[str, Any]:
    """How the band of an interval is filled."""
    return {"color": look.color, "alpha": 0.18, "lw": 0}


def error_bars(ax: Axes, estimates: Estimates, look: Look, **style: Any) -> None:
    """Draws a marker with an error bar at each point."""
    x, mean, interval = arrays(estimates)
    style = {"ms": 5, "capsize": 3, "elinewidth": 1.2, **style}
    ax.errorbar(x, mean, interval, color=look.color, marker=look.marker, **style)


def make_logarithmic(
    ax: Axes, axis: Literal["x", "y"], values: Iterable[ArrayLike]
) -> None:
    """Makes an axis logarithmic, symmetric about 0 if a value is not above 0."""
    flat = np.concatenate([np.ravel(np.asarray(v, float)) for v in values])
    flat = flat[np.isfinite(flat)]
    sizes = np.abs(flat[flat != 0])
    if not sizes.size:
        return
    set_scale = ax.set_xscale if axis == "x" else ax.set_yscale
    if (flat > 0).all():
        set_scale("log")
    else:
        # Linear between the two smallest values; three decades on a side at most.
        linear = max(sizes.min(), sizes.max() / 1000)
        set_scale("symlog", linthresh=linear, linscale=0.5, subs=[2, 5])
    if sizes.min() >= 1e-4 and sizes.max() < 1e4:
        formatted = ax.xaxis if axis == "x" else ax.yaxis
        formatted.set_major_formatter(_PlainFormatter())
        formatted.set_minor_formatter(_PlainFormatter())


def name_points(ax: Axes, points: Mapping[str, Estimates]) -> None:
    """Writes the names to the right of the points, none over another one."""
    ax.margins(x=0.1)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    width, height = 0.25 * (right - left), 0.05 * (top - bottom)
    ax.set_xlim(left, right + width)
    places = {name: [a[0] for a in arrays(points[name])[:2]] for name in points}
    written: list[tuple[float, float]] = []
    for name in sorted(points, key=lambda name: places[name][1]):
        x, y = places[name]
        for other_x, other_y in written:
            # From below: a name that would cover another one moves up.
            if abs(other_x - x) < width:
                y = max(y, other_y + height)
        written.append((x, y))
        color = looks(points)[name].color
        outline = withStroke(linewidth=2.5, foreground="white")
        at = x + 0.06 * width, y
        ax.text(*at, name, color=color, va="center", path_effects=[outline])


def finish(ax: Axes, xlabel: str, ylabel: str, legend: bool = True) -> None:
    """Sets what all figures have alike."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False)
