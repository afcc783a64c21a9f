"""Ascents of one length or of one step size along the direction."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_real,
    check_scalar_or_schedule,
)
from msam_optax._base.numerics import (
    global_norm,
    safe_divide,
    scale,
    statistics_dtype,
    sum_of_scalars,
)
from msam_optax.ascents._make import along, make, make_with_norm


def normalized(
    rho: ScalarOrSchedule, p: float = 2
) -> optax.GradientTransformationExtraArgs:
    r"""The point of the p-norm ball of radius rho where the linearised loss is highest.

    With :math:`1/p + 1/q = 1` and the direction :math:`g`,

    .. math::
      \varepsilon = \arg\max_{\|\varepsilon\|_p \le \rho} \langle g, \varepsilon\rangle
        = \rho\,\operatorname{sign}(g)\,|g|^{q-1} \big/ (\|g\|_q^q)^{1/p},

    with norms over all parameters together. :math:`p = 2` is the
    :math:`\rho\,g/\|g\|` of SAM, :math:`p = \infty` is
    :math:`\rho\,\operatorname{sign}(g)`, and :math:`p = 1` puts all of rho on the
    largest :math:`|g|` (evenly on several that are equal). A zero direction gives
    :math:`\varepsilon = 0`.

    *Cost*: one reduction over the direction. *State*: none, or one int32 where rho is
    a schedule. *Position*: inside ``sharpness_aware_gradient`` or
    ``momentum_perturbation``.

    Args:
      rho: radius, in the unit of the parameters; a float or a schedule. Negative turns
        the ascent into a descent.
      p: which norm rho is measured in; a Python number in [1, inf].

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if rho is not a finite number or a schedule, or p is outside [1, inf].

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.normalized(rho=0.5)
    >>> direction = jnp.array([3.0, 4.0])
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon)
    [0.3 0.4]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, equation 2. The
      authors' JAX code offers p = 2 only.
    """
    if isinstance(p, bool) or not isinstance(p, int | float) or not p >= 1:
        raise ValueError(
            f"p must be a Python number in [1, inf], but {p!r} was given. Under "
            "optax.inject_hyperparams name it in static_args."
        )

    if p == 2:
        return make_with_norm(rho, lambda rho, g, params: along(rho, global_norm(g), g))
    return make(rho, lambda rho, g, params: scale(rho, _dual_direction(g, p)))


def loss_equated(
    sigma: ScalarOrSchedule, rho_max: float
) -> optax.GradientTransformationExtraArgs:
    r"""SAM's ascent as far as the linearised loss rises by sigma.

    .. math::
      \varepsilon = \rho_t\, \frac{g}{\|g\|}, \qquad
      \rho_t = \min\!\left(\frac{\sigma_t}{\|g\|},\; \rho_{max}\right),

    with the norm over all parameters together. The radius grows as the gradient
    shrinks, up to rho_max. A zero direction gives :math:`\varepsilon = 0`.

    *Cost*: one reduction over the direction. *State*: none, or one int32 where sigma is
    a schedule. *Position*: inside ``sharpness_aware_gradient``; around a momentum the
    rise is that along the momentum.

    Args:
      sigma: the rise of the loss, in its unit, at least 0; a float or a schedule. The
        paper's is constant, and falls to 0 along a cosine over the last fifth of the
        training, as in the example.
      rho_max: the largest radius, in the unit of the parameters; positive.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if sigma is neither a finite number of at least 0 nor a schedule, or
        rho_max is not a positive finite number.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> held, falling = optax.constant_schedule, optax.cosine_decay_schedule
    >>> sigma = optax.join_schedules([held(1.0), falling(1.0, 200)], [800])
    >>> ascent = msam_optax.ascents.loss_equated(sigma, rho_max=0.5)
    >>> direction = jnp.array([3.0, 4.0])  # of length 5, so that rho is 1/5
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon)
    [0.12 0.16]

    References:
      Wang et al., `Fix the Loss, Not the Radius: Rethinking the Adversarial
      Perturbation of Sharpness-Aware Minimization
      <https://arxiv.org/abs/2605.10183>`_, ICML 2026. They add a small constant to
      the norm instead of treating zero apart.
    """
    check_scalar_or_schedule("sigma", sigma)
    if not callable(sigma):
        check_real("sigma", sigma, low=0)
    check_real("rho_max", rho_max, low=0, excluded=0)

    def perturb(
        sigma: Any, direction: optax.Updates, params: Any
    ) -> tuple[optax.Updates, jax.Array]:
        del params
        norm = global_norm(direction)
        rho = jnp.minimum(safe_divide(sigma, norm), rho_max)
        return along(rho, norm, direction)

    return make_with_norm(sigma, perturb)


def unnormalized(
    rho: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""A plain gradient ascent step, :math:`\varepsilon = \rho\,g`.

    The perturbation shrinks with the gradient. Around MSAM's momentum, and with rho
    equal to learning rate times momentum decay, it is Nesterov's look-ahead.

    *Cost*: none. *State*: none, or one int32 where rho is a schedule. *Position*:
    inside ``sharpness_aware_gradient`` or ``momentum_perturbation``.

    Args:
      rho: step size, in units of parameter per direction; a float or a schedule.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule.

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.unnormalized(rho=0.5)
    >>> direction = jnp.array([3.0, 4.0])
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon)
    [1.5 2. ]

    References:
      Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware
      Minimization <https://arxiv.org/abs/2206.06232>`_, 2022; Becker et al.,
      `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_, 2024, appendix A.2.
    """
    return make(rho, lambda rho, direction, params: scale(rho, direction))


def _dual_direction(direction: optax.Updates, p: float) -> optax.Updates:
    r"""sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p), of p-norm 1, for p other than 2."""
    if p == math.inf:
        return jax.tree.map(jnp.sign, direction)
    dtype = statistics_dtype(direction)
    sizes = jax.tree.map(lambda g: jnp.abs(g).astype(dtype), direction)
    largest = _largest(sizes, dtype)
    if p == 1:  # q is infinite, and only the largest entries survive.
        powers = jax.tree.map(
            lambda s: ((s == largest) & (largest > 0)).astype(dtype), sizes
        )
        total = _sum(powers, dtype)
    else:
        q = p / (p - 1)
        # The quotient does not change when g is scaled, and no power overflows then.
        sizes = jax.tree.map(lambda s: safe_divide(s, largest), sizes)
        powers = jax.tree.map(  # whose slope at 0 may be infinite
            lambda s: jnp.where(s > 0, jnp.where(s > 0, s, 1) ** (q - 1), 0), sizes
        )
        total = _sum(jax.tree.map(lambda s: s**q, sizes), dtype)
    factor = 1 / jnp.where(total == 0, 1, total) ** (1 / p)
    return jax.tree.map(
        lambda g, s: (factor * jnp.sign(g) * s).astype(g.dtype),
        direction,
        powers,
    )


def _sum(tree: Any, dtype: Any) -> jax.Array:
    return sum_of_scalars([jnp.sum(x) for x in jax.tree.leaves(tree)], dtype)


def _largest(tree: Any, dtype: Any) -> jax.Array:
    """The largest entry, by a sort at last: XLA makes a chain of a maximum."""
    parts = [jnp.max(x, initial=0) for x in jax.tree.leaves(tree)]
    return jnp.sort(jnp.asarray([0, *parts], dtype))[-1]
