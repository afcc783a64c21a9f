"""Fisher SAM's ascent."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import ScalarOrSchedule, check_real
from msam_optax._base.numerics import (
    global_norm,
    safe_divide,
    scale,
    statistics_dtype,
)
from msam_optax.ascents._make import make


def fisher(
    rho: ScalarOrSchedule, eta: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Ascent in the ellipsoid of an empirical Fisher information.

    With the diagonal :math:`F = 1 + \eta\, g^2`,

    .. math::
      \varepsilon = \rho\, F^{-1} g \big/ \sqrt{g^\top F^{-1} g} .

    F, and so epsilon, depends on the scale of the loss: hand it unscaled gradients.

    *Cost*: one reduction over the direction. *State*: none, or one int32 where rho is
    a schedule. *Position*: inside ``sharpness_aware_gradient`` or
    ``momentum_perturbation``.

    Args:
      rho: radius in the metric F; a float or a schedule.
      eta: weight of the squared gradient against the identity; 0 gives SAM. The
        default is ours: tune it.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule, or eta is negative.

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.fisher(rho=0.5, eta=0.0)
    >>> direction = jnp.array([3.0, 4.0])
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon)
    [0.3 0.4]

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, 2022.
    """
    check_real("eta", eta, low=0.0)

    def perturb(rho: Any, direction: optax.Updates, params: Any) -> optax.Updates:
        del params
        g = optax.tree.cast(direction, statistics_dtype(direction))
        f = jax.tree.map(lambda g: 1 + eta * jnp.square(g), g)
        # The length is that of F^(-1/2) g. As the product of g and F^(-1) g XLA would
        # keep the quotient of each tensor, for it and for epsilon.
        length = global_norm(jax.tree.map(lambda g, f: g / jnp.sqrt(f), g, f))
        natural = jax.tree.map(jnp.divide, g, f)
        return optax.tree.cast_like(scale(safe_divide(rho, length), natural), direction)

    return make(rho, perturb)
