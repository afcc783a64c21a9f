r"""Sharpness and curvature of a loss at a point, over a whole data set in batches.

All functions of this folder take

- ``loss_fn(params, batch) -> scalar``, the mean loss over the batch. It must be
  deterministic: without dropout, with stored batch statistics. It is compiled once for
  each function object, so define it once and not anew for each call;
- ``params``, a tree of arrays. Those of lower precision are cast to float32: in
  bfloat16 a small perturbation is lost in rounding. Results are Python floats, or
  arrays in float32, float64 if a parameter is;
- ``batches``, which can be read several times: a list, or an object whose ``__iter__``
  starts anew. All examples count equally; a batch has as many as the leading axis of
  its first leaf is long. Where they do not (a mean over tokens that are not padding),
  return a :class:`msam_optax.WeightedMean`, whose weights then count. One batch at a
  time is on the device;
- ``on_batch``, called without arguments whenever a batch is done, for a progress bar:
  ``on_batch=bar.update``, as often as the function says.

Numbers are summed over the batches in float64 on the host, trees by compensated sums on
the device.
"""

from msam_optax.sharpness._connectivity import loss_on_curve as loss_on_curve
from msam_optax.sharpness._connectivity import point_on_curve as point_on_curve
from msam_optax.sharpness._gauss_newton import GaussNewton as GaussNewton
from msam_optax.sharpness._hessian import HessianEigenvalues as HessianEigenvalues
from msam_optax.sharpness._hessian import HessianTrace as HessianTrace
from msam_optax.sharpness._hessian import curvature_along as curvature_along
from msam_optax.sharpness._hessian import hessian_eigenvalues as hessian_eigenvalues
from msam_optax.sharpness._hessian import hessian_trace as hessian_trace
from msam_optax.sharpness._landscape import loss_on_line as loss_on_line
from msam_optax.sharpness._landscape import loss_on_plane as loss_on_plane
from msam_optax.sharpness._losses import WorstCase as WorstCase
from msam_optax.sharpness._losses import (
    filter_normalized_direction as filter_normalized_direction,
)
from msam_optax.sharpness._losses import mean_gradient as mean_gradient
from msam_optax.sharpness._losses import mean_loss as mean_loss
from msam_optax.sharpness._losses import sharpness_along as sharpness_along
from msam_optax.sharpness._losses import worst_case_sharpness as worst_case_sharpness
from msam_optax.sharpness._spectral_density import SpectralDensity as SpectralDensity
from msam_optax.sharpness._spectral_density import spectral_density as spectral_density

__all__ = [
    "GaussNewton",
    "HessianEigenvalues",
    "HessianTrace",
    "SpectralDensity",
    "WorstCase",
    "curvature_along",
    "filter_normalized_direction",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_on_curve",
    "loss_on_line",
    "loss_on_plane",
    "mean_gradient",
    "mean_loss",
    "point_on_curve",
    "sharpness_along",
    "spectral_density",
    "worst_case_sharpness",
]
