"""Figures of sharpness and of training: arrays in, matplotlib Axes out.

Nothing is computed here. Every function takes an Axes to draw on and returns it.
Without one it makes a figure of its own, which ``ax.figure.savefig`` writes. A method
has the same colour, line style and marker in all figures (:func:`looks`).

Extra: ``pip install msam_optax[plot]``.
"""

from msam_optax._base.versions import require as _require

_require("matplotlib", extra="plot")

from msam_optax.plotting._draw import Estimates as Estimates
from msam_optax.plotting._figures import plot_cost as plot_cost
from msam_optax.plotting._figures import plot_eigenvalues as plot_eigenvalues
from msam_optax.plotting._figures import plot_estimates as plot_estimates
from msam_optax.plotting._figures import plot_line as plot_line
from msam_optax.plotting._figures import plot_plane as plot_plane
from msam_optax.plotting._figures import plot_policy as plot_policy
from msam_optax.plotting._looks import Look as Look
from msam_optax.plotting._looks import looks as looks
from msam_optax.plotting._spectrum import plot_spectrum as plot_spectrum

__all__ = [
    "Estimates",
    "Look",
    "looks",
    "plot_cost",
    "plot_eigenvalues",
    "plot_estimates",
    "plot_line",
    "plot_plane",
    "plot_policy",
    "plot_spectrum",
]
