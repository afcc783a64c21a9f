"""The density of a Hessian's eigenvalues."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from msam_optax.plotting._draw import Estimates, arrays, axes, finish, shade
from msam_optax.plotting._looks import looks


def plot_spectrum(
    densities: Mapping[str, Estimates], *, floor: float = 1e-5, ax: Axes | None = None
) -> Axes:
    """The density of the eigenvalues of each method's Hessian, on a logarithmic axis.

    Args:
      densities: of each method; x are eigenvalues, the means the density there, as
        :meth:`msam_optax.sharpness.SpectralDensity.on_grid` has it.
      floor: where the axis ends below. A single eigenvalue of P is a bell of height
        0.4 / (P width), so take less than that.
      ax: where to draw.

    Returns:
      The Axes.

    Raises:
      ValueError: if the floor is not positive.

    >>> from msam_optax.plotting import Estimates, plot_spectrum
    >>> ax = plot_spectrum({"msam": Estimates([-1, 0, 1, 2], [0.01, 0.9, 0.1, 0])})
    >>> ax.get_yscale()
    'log'
    """
    if not floor > 0:
        raise ValueError(f"floor must be positive, but {floor!r} was given.")
    ax = axes(ax)
    for name, look in looks(densities).items():
        x, mean, interval = arrays(densities[name])
        # What falls below the floor is drawn on it: a logarithm of 0 leaves gaps.
        low, middle, high = (
            np.maximum(y, floor) for y in (mean - interval, mean, mean + interval)
        )
        ax.plot(x, middle, color=look.color, ls=look.style, lw=1.6, label=name)
        ax.fill_between(x, low, high, **shade(look))
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor)
    finish(ax, "eigenvalue of the Hessian", "density of eigenvalues")
    return ax
