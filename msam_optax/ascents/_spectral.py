"""The ascent in the spectral norm."""

from typing import Any

import jax
import optax

from msam_optax._base.hyperparams import ScalarOrSchedule, check_real
from msam_optax._base.layers import AxesLike, layouts
from msam_optax._base.numerics import global_norm, safe_divide, scale
from msam_optax.ascents._make import make


def spectral(
    rho: ScalarOrSchedule, rho_other: float, *, axes: AxesLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""Ascent of spectral norm rho in each matrix, and of l2 norm rho_other elsewhere.

    .. math::
      \varepsilon_i = \rho\, \operatorname{Ortho}(g_i) \text{ for a matrix,} \qquad
      \varepsilon_r = \rho_{other}\, g_r / \|g_r\| \text{ for all others together,}

    with Ortho(g) = U V^T for g = U S V^T, by Optax's own Newton-Schulz iteration, the
    five steps of ``optax.contrib.muon``. These bring the singular values to about 0.7
    to 1.2, not to 1.

    **The radius is not SAM's**: Ortho(g) has about the norm :math:`\sqrt{rank}`, so
    that a network of k square matrices of size n is perturbed by about
    :math:`\rho\sqrt{k n}`.

    A weight of more than two dimensions is the matrix of its filters, [all that a
    filter sums over, filters]; axes tells filters and stacked layers.

    *Cost*: fifteen products of matrices for each, and one reduction. *State*: none, or
    one int32 where rho is a schedule. *Position*: inside ``sharpness_aware_gradient``,
    usually around ``optax.contrib.muon``.

    Args:
      rho: spectral norm of the perturbation of a matrix; a float or a schedule.
      rho_other: l2 norm of the perturbation of biases and scales; at least 0.
      axes: which axes of a parameter count its filters, and which stacked layers; see
        :class:`msam_optax.ascents.Axes`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule, rho_other is not a
        finite number of at least 0, or a parameter has no such axes.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> ascent = msam_optax.ascents.spectral(rho=0.01, rho_other=0.05)
    >>> tx = optax.chain(
    ...     msam_optax.sharpness_aware_gradient(ascent), optax.contrib.muon(1e-3)
    ... )
    >>> direction = {"w": jnp.diag(jnp.array([5.0, 1.0])), "b": jnp.array([3.0, 4.0])}
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon["b"])
    [0.03 0.04]

    References:
      `SpecSAM <https://arxiv.org/abs/2607.26001>`_, 2026, whose formula was taken from
      an account of it. What "the rest normalised" means is open there: one vector of
      all the rest is our reading. Bernstein and Newhouse, `Old Optimizer, New Norm: An
      Anthology <https://arxiv.org/abs/2409.20325>`_, 2024, for the ascent in the
      spectral norm.
    """
    check_real("rho_other", rho_other, low=0)

    def perturb(rho: Any, direction: Any, params: Any) -> Any:
        del params
        of_direction = layouts(axes, direction)

        rest = jax.tree.map(
            lambda layout, g: None if layout.is_weight else g, of_direction, direction
        )
        factor = safe_divide(rho_other, global_norm(rest))
        return jax.tree.map(
            lambda layout, g: (
                scale(rho, layout.each_matrix(_orthogonal, g))
                if layout.is_weight
                else scale(factor, g)
            ),
            of_direction,
            direction,
        )

    return make(rho, perturb)


def _orthogonal(matrix: jax.Array) -> jax.Array:
    """Newton and Schulz's iteration, by Muon without a memory."""
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False)
    orthogonal, _ = muon.update(matrix, muon.init(matrix), matrix)
    return orthogonal
