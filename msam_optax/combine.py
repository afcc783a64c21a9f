r"""Combine rules: how the clean and the perturbed gradient become one.

A rule is a function ``combine(clean, perturbed) -> gradient`` for
:func:`msam_optax.sharpness_aware_gradient`.
"""

from collections.abc import Callable

import jax
import optax

from msam_optax._base.hyperparams import check_real
from msam_optax._base.numerics import (
    add_scaled,
    global_norm,
    projection,
    safe_divide,
    scale,
)

__all__ = [
    "Combine",
    "interpolate",
    "renormalize",
    "surrogate_gap",
]

# combine(clean, perturbed) -> gradient
Combine = Callable[[optax.Updates, optax.Updates], optax.Updates]


def surrogate_gap(alpha: float) -> Combine:
    r"""GSAM's rule: descends on the perturbed loss and on its gap to the clean one.

    .. math::
      \tilde g - \alpha\, g_\perp, \qquad
      g_\perp = g - \frac{\langle g, \tilde g \rangle}{\|\tilde g\|^2}\, \tilde g,

    with g the clean gradient and norms over all parameters together. The second term
    lowers the gap by raising the clean loss along what is orthogonal to
    :math:`\tilde g`, so it leaves the perturbed loss alone.

    Args:
      alpha: weight of the gap.

    Returns:
      A rule ``combine(clean, perturbed) -> gradient``.

    Raises:
      ValueError: if alpha is not a finite number.

    >>> import jax.numpy as jnp, msam_optax
    >>> combine = msam_optax.combine.surrogate_gap(alpha=0.5)
    >>> print(combine(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])))
    [-0.5  1. ]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    check_real("alpha", alpha)

    def combine(clean: optax.Updates, perturbed: optax.Updates) -> optax.Updates:
        share = projection(clean, perturbed)
        orthogonal = add_scaled(clean, -share, perturbed)
        return add_scaled(perturbed, -alpha, orthogonal)

    return combine


def interpolate(alpha: float) -> Combine:
    r"""The weighted mean :math:`(1-\alpha)\,g + \alpha\,\tilde g`.

    With :math:`\alpha = \lambda / \rho` it is, to first order, the gradient of
    :math:`L + \lambda \|\nabla L\|`; above 1 it extrapolates beyond SAM.

    Args:
      alpha: weight of the perturbed gradient.

    Returns:
      A rule ``combine(clean, perturbed) -> gradient``.

    Raises:
      ValueError: if alpha is not a finite number.

    >>> import jax.numpy as jnp, msam_optax
    >>> combine = msam_optax.combine.interpolate(alpha=0.75)
    >>> print(combine(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])))
    [0.25 1.25]

    References:
      Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization in
      Deep Learning <https://arxiv.org/abs/2202.03599>`_, ICML 2022; Yue et al.,
      `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization
      Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023.
    """
    check_real("alpha", alpha)

    def combine(clean: optax.Updates, perturbed: optax.Updates) -> optax.Updates:
        return jax.tree.map(
            lambda g, p: ((1 - alpha) * g + alpha * p).astype(p.dtype), clean, perturbed
        )

    return combine


def renormalize(clean: optax.Updates, perturbed: optax.Updates) -> optax.Updates:
    r"""The perturbed gradient at the clean one's length.

    .. math:: \tilde g\, \|g\| \big/ \|\tilde g\|

    A rule itself, to be given without a call. The norms go over all parameters
    together. SAM's gradient is often the longer one, so that this tells apart what its
    direction does and what its length.

    Args:
      clean: the gradient at the parameters.
      perturbed: the gradient at the perturbed point.

    Returns:
      A tree like the perturbed gradient.

    >>> import jax.numpy as jnp, msam_optax
    >>> combine = msam_optax.combine.renormalize
    >>> print(combine(jnp.array([3.0, 4.0]), jnp.array([0.0, 1.0])))
    [0. 5.]

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024. Built from a
      secondary source.
    """
    return scale(safe_divide(global_norm(clean), global_norm(perturbed)), perturbed)
