"""The figures, a function each."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike

from msam_optax.plotting._draw import (
    GREY,
    Estimates,
    arrays,
    axes,
    error_bars,
    finish,
    make_logarithmic,
    name_points,
    shade,
)
from msam_optax.plotting._looks import looks


def plot_estimates(
    curves: Mapping[str, Estimates],
    *,
    xlabel: str,
    ylabel: str,
    references: Mapping[str, Estimates] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    bars: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Curves with 68% intervals, and levels to compare them with.

    Args:
      curves: one for each name of the legend.
      xlabel: what x is, with its unit.
      ylabel: what the means are, with their unit.
      references: what does not depend on x, drawn as level lines: single points whose
        x does not matter.
      log_x: a logarithmic x-axis, symmetric about 0 if an x is not above 0.
      log_y: likewise for the y-axis.
      bars: a marker with an error bar at each point rather than a band.
      ax: where to draw.

    Returns:
      The Axes.

    >>> from msam_optax.plotting import Estimates, plot_estimates
    >>> ax = plot_estimates(
    ...     {"msam": Estimates([0.1, 0.3, 1.0], [88, 90, 89], [0.3, 0.2, 0.4])},
    ...     references={"sgd": Estimates(0, 87.5, 0.3)},
    ...     xlabel="ρ",
    ...     ylabel="test accuracy (%)",
    ...     log_x=True,
    ... )
    >>> ax.get_xscale()
    'log'
    """
    ax, references = axes(ax), references or {}
    drawn = looks([*curves, *references])
    for name, level in references.items():
        look, (_, mean, interval) = drawn[name], arrays(level)
        ax.axhline(mean[0], color=look.color, ls=look.style, lw=1.3, label=name)
        if np.isfinite(interval[0]):
            ax.axhspan(mean[0] - interval[0], mean[0] + interval[0], **shade(look))
    for name, curve in curves.items():
        look, (x, mean, interval) = drawn[name], arrays(curve)
        if bars:
            error_bars(ax, curve, look, label=name, ls=look.style, lw=1.3)
            continue
        ax.plot(x, mean, color=look.color, ls=look.style, lw=1.6, label=name)
        ax.fill_between(x, mean - interval, mean + interval, **shade(look))
    if log_x:
        make_logarithmic(ax, "x", [curve.x for curve in curves.values()])
    if log_y:
        every = [*curves.values(), *references.values()]
        make_logarithmic(ax, "y", [estimates.mean for estimates in every])
    finish(ax, xlabel, ylabel)
    return ax


def plot_line(curves: Mapping[str, Estimates], *, ax: Axes | None = None) -> Axes:
    """The loss along lines through w.

    Args:
      curves: one for each line; x is the distance from w, negative on w's other side,
        the means are as :func:`msam_optax.sharpness.loss_on_line` has them.
      ax: where to draw.

    Returns:
      The Axes.

    >>> from msam_optax.plotting import Estimates, plot_line
    >>> ax = plot_line({"msam": Estimates([-1, 0, 1], [0.7, 0.2, 0.9])})
    >>> ax.get_ylabel()
    'loss L(w + ε)'
    """
    ax = axes(ax)
    ax.axvline(0, color=GREY, lw=0.8, zorder=1)
    return plot_estimates(
        curves,
        xlabel="distance from w, ‖ε‖ (unit of the weights)",
        ylabel="loss L(w + ε)",
        ax=ax,
    )


def plot_plane(
    xs: ArrayLike,
    ys: ArrayLike,
    losses: ArrayLike,
    *,
    points: Mapping[str, tuple[float, float]] | None = None,
    levels: ArrayLike | int = 15,
    label: str = "loss L(w + ε)",
    ax: Axes | None = None,
) -> Axes:
    """The loss on a plane, as :func:`msam_optax.sharpness.loss_on_plane` has it.

    Args:
      xs: float[n], distances along the first direction.
      ys: float[m], distances along the second direction.
      losses: float[m, n], rows are y. What is not finite stays white.
      points: places on the plane, (x, y) by name.
      levels: of the contours, or about how many. What lies above the last of given
        levels has that level's colour.
      label: what the colours are, with its unit.
      ax: where to draw.

    Returns:
      The Axes; its figure has one more, the bar of the colours.

    Raises:
      ValueError: if the losses do not have one row a y and one column an x.

    >>> import numpy as np
    >>> from msam_optax.plotting import plot_plane
    >>> xs, ys = np.linspace(-1, 1, 5), np.linspace(-2, 2, 9)
    >>> ax = plot_plane(xs, ys, xs**2 + ys[:, None] ** 2, points={"w": (0, 0)})
    >>> float(ax.get_ylim()[1])
    2.0
    """
    shape = np.size(ys), np.size(xs)
    values = np.ma.masked_invalid(np.asarray(losses, float))
    if values.shape != shape:
        raise ValueError(
            "losses must have one row for each y and one column for each x, shape "
            f"{shape}, but their shape is {values.shape}."
        )
    ax = axes(ax)
    extend: Literal["max", "neither"] = "max" if np.ndim(levels) else "neither"
    filled = ax.contourf(xs, ys, values, levels, cmap="viridis", extend=extend)
    ax.contour(xs, ys, values, filled.levels, colors="white", linewidths=0.4, alpha=0.6)
    for name, place in (points or {}).items():
        ax.plot(*place, "o", color="black", markeredgecolor="white", ms=6)
        outline = withStroke(linewidth=2.5, foreground="white")
        ax.annotate(
            name,
            place,
            xytext=(6, 6),
            textcoords="offset points",
            path_effects=[outline],
        )
    ax.figure.colorbar(filled, ax=ax, label=label)
    ax.set(
        xlabel="distance along the first direction",
        ylabel="distance along the second direction",
        aspect="equal",
    )
    return ax


def plot_policy(
    squared_norms: ArrayLike,
    means: ArrayLike,
    thresholds: ArrayLike,
    employed: ArrayLike,
    *,
    ax: Axes | None = None,
) -> Axes:
    """What AE-SAM's policy saw, and on which steps it employed SAM.

    Args:
      squared_norms: float[steps], squared norm of each step's gradient.
      means: float[steps], their running mean.
      thresholds: float[steps], above which SAM is employed. The axis is logarithmic:
        one below 0, which every gradient passes, is not seen.
      employed: bool[steps], whether SAM was.
      ax: where to draw.

    Returns:
      The Axes.

    >>> from msam_optax.plotting import plot_policy
    >>> ax = plot_policy([4.0, 1.0], [2.0, 1.5], [3.0, 2.0], [True, False])
    >>> ax.get_xlabel()
    'step'
    """
    ax = axes(ax)
    norms, chosen = np.asarray(squared_norms, float), np.asarray(employed, bool)
    steps = np.arange(len(norms))
    look = looks(["ae_sam"])["ae_sam"]
    ax.plot(steps, norms, color=GREY, lw=0.7, label="squared gradient norm")
    ax.plot(
        *(steps[chosen], norms[chosen]),
        *("o",),
        color=look.color,
        ms=3,
        label="SAM employed",
    )
    ax.plot(steps, means, color="black", lw=1.6, label="running mean")
    ax.plot(steps, thresholds, color="black", lw=1.2, ls="--", label="threshold")
    make_logarithmic(ax, "y", [norms, means])
    finish(ax, "step", "squared gradient norm ‖g‖²")
    return ax


def plot_cost(points: Mapping[str, Estimates], *, ax: Axes | None = None) -> Axes:
    """What each method costs and what it reaches: a labelled point with its interval.

    Args:
      points: one for each method: x is the gradients of a batch in a step, the mean is
        the test accuracy in percent.
      ax: where to draw.

    Returns:
      The Axes.

    >>> from msam_optax.plotting import Estimates, plot_cost
    >>> ax = plot_cost({"msam": Estimates(1, 89.7, 0.3), "sam": Estimates(2, 89, 0.2)})
    >>> sorted(text.get_text() for text in ax.texts)
    ['msam', 'sam']
    """
    ax = axes(ax)
    for name, look in looks(points).items():
        error_bars(ax, points[name], look, ls="none")
    finish(ax, "gradients of a batch in a step", "test accuracy (%)", legend=False)
    name_points(ax, points)
    return ax


def plot_eigenvalues(
    eigenvalues: Mapping[str, Estimates], *, ax: Axes | None = None
) -> Axes:
    """The largest eigenvalues of each method's Hessian, side by side.

    Args:
      eigenvalues: of each method; x is an eigenvalue's place, from 1 for the largest.
      ax: where to draw.

    Returns:
      The Axes.

    >>> from msam_optax.plotting import Estimates, plot_eigenvalues
    >>> sgd, msam = Estimates([1, 2], [15, 9], [1, 1]), Estimates([1, 2], [4, 3])
    >>> ax = plot_eigenvalues({"sgd": sgd, "msam": msam})
    >>> ax.get_xticks().tolist()
    [1.0, 2.0]
    """
    ax = axes(ax)
    places: set[float] = set()
    for i, (name, look) in enumerate(looks(eigenvalues).items()):
        x, mean, interval = arrays(eigenvalues[name])
        places.update(x)
        beside = Estimates(x + 0.12 * (i - (len(eigenvalues) - 1) / 2), mean, interval)
        error_bars(ax, beside, look, label=name, ls="none")
    ax.set_xticks(sorted(places))
    finish(ax, "place of the eigenvalue", "eigenvalue of the Hessian", legend=False)
    # In rows above the points, where room is made for it.
    bottom, top = ax.get_ylim()
    rows = -(-len(eigenvalues) // 4)
    ax.set_ylim(top=top + 0.1 * rows * (top - bottom))
    ax.legend(frameon=False, ncols=4, loc="upper center")
    return ax
