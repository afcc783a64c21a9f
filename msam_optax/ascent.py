r"""Ascents: how a direction becomes the perturbation :math:`\varepsilon`.

An ascent is an :class:`optax.GradientTransformationExtraArgs` whose ``update`` takes a
*direction* (usually the gradient) where an optimizer takes gradients, and returns
:math:`\varepsilon` where an optimizer returns updates::

    epsilon, state = ascent.update(direction, state, params)

Use one inside :func:`msam_optax.sharpness_aware_gradient` (SAM) or
:func:`msam_optax.momentum_perturbation` (MSAM). ``optax.masked(ascent, mask)``
restricts it to some parameters: those two leave a parameter that its ascent hands back
untouched unperturbed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._hyperparams import (
    ScalarOrSchedule,
    check_real,
    check_scalar_or_schedule,
    init_schedule,
    read_schedule,
)
from msam_optax._numerics import global_norm, safe_divide, scale, statistics_dtype

# perturb(rho, direction, params) -> epsilon
Perturb = Callable[[Any, optax.Updates, Any], optax.Updates]


def normalized_ascent(
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
    >>> ascent = msam_optax.normalized_ascent(rho=0.5)
    >>> direction = jnp.array([3.0, 4.0])
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon)
    [0.3 0.4]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, equation 2. The
      authors' JAX code offers p = 2 only.
    """
    if not isinstance(p, int | float) or not p >= 1:
        raise ValueError(
            f"p must be a Python number in [1, inf], but {p!r} was given. Under "
            "optax.inject_hyperparams name it in static_args."
        )

    def perturb(rho, direction, params):
        del params
        if p == 2:
            return scale(safe_divide(rho, global_norm(direction)), direction)
        return scale(rho, _dual_direction(direction, p))

    return _ascent(rho, perturb)


def adaptive_ascent(
    rho: ScalarOrSchedule, eta: float = 0.0, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Ascent whose radius scales with each weight, so node rescaling leaves it alone.

    .. math::
      \varepsilon = \rho\,T^2 g / \|T g\|, \qquad
      T = \begin{cases} |w| + \eta & \text{where mask} \\ 1 & \text{elsewhere,}
      \end{cases}

    *Cost*: one reduction over the direction. *State*: none, or one int32 where rho is
    a schedule. *Position*: inside ``sharpness_aware_gradient`` or
    ``momentum_perturbation``.

    Args:
      rho: radius, relative to the weights' size where T is adaptive; a float or a
        schedule. Larger than SAM's by about ten.
      eta: added to :math:`|w|`, so that zero weights move too.
      mask: tree of booleans like the parameters (or a prefix), or a function of the
        parameters that returns one: where T is adaptive. The default is the tensors of
        at least two dimensions, that is weights, and not biases and scales.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if rho or eta is not a finite number (rho may be a schedule), eta is
        negative, or ``params`` are missing from ``update``.

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.adaptive_ascent(rho=0.5)
    >>> params, direction = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 1.0]])
    >>> epsilon, _ = ascent.update(direction, ascent.init(params), params)
    >>> print(epsilon)
    [[1. 0.]]

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, 2021. The authors' PyTorch code chooses
      T by parameter name; a widely used port takes :math:`|w|` everywhere, which is
      ``adaptive_ascent(rho, mask=lambda params: True)``.
    """
    check_real("eta", eta, low=0.0)

    def perturb(rho, direction, params):
        if params is None:
            raise ValueError(
                "adaptive_ascent scales with the weights, but params were None: call "
                "update(direction, state, params)."
            )
        dtype = statistics_dtype(params)
        chosen = mask(params) if callable(mask) else mask
        if chosen is None:
            chosen = jax.tree.map(lambda w: jnp.ndim(w) >= 2, params)

        def times_t(x, is_weight, w):
            size = (jnp.abs(w) + eta).astype(dtype) if is_weight else 1
            return x.astype(dtype) * size

        def times_t_tree(tree):
            return jax.tree.map(
                lambda m, *subtrees: jax.tree.map(
                    lambda x, w: times_t(x, m, w), *subtrees
                ),
                chosen,
                tree,
                params,
            )

        scaled = times_t_tree(direction)  # T g
        epsilon = scale(safe_divide(rho, global_norm(scaled)), times_t_tree(scaled))
        return jax.tree.map(lambda e, g: e.astype(g.dtype), epsilon, direction)

    return _ascent(rho, perturb)


def unnormalized_ascent(
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
    >>> ascent = msam_optax.unnormalized_ascent(rho=0.5)
    >>> direction = jnp.array([3.0, 4.0])
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon)
    [1.5 2. ]

    References:
      Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware
      Minimization <https://arxiv.org/abs/2206.06232>`_, 2022; Becker et al.,
      `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_, 2024, appendix A.2.
    """
    return _ascent(rho, lambda rho, direction, params: scale(rho, direction))


def perturbation(
    ascent: optax.GradientTransformationExtraArgs,
    direction: optax.Updates,
    state: optax.OptState,
    params: Any,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    """The ascent's epsilon, 0 where the ascent hands the direction back untouched.

    `optax.masked` passes what it masks out through, which is right for updates, but
    here would make the raw gradient a perturbation.
    """
    epsilon, state = ascent.update(direction, state, params, **extra_args)
    epsilon = jax.tree.map(
        lambda e, g: jnp.zeros_like(e) if e is g else e, epsilon, direction
    )
    return epsilon, state


def _ascent(
    rho: ScalarOrSchedule, perturb: Perturb
) -> optax.GradientTransformationExtraArgs:
    check_scalar_or_schedule("rho", rho)

    def init_fn(params):
        del params
        return init_schedule(rho)

    def update_fn(direction, state, params=None, *, step=None, **extra_args):
        del extra_args
        radius, state = read_schedule(rho, state, step)
        return perturb(radius, direction, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _dual_direction(direction: optax.Updates, p: float) -> optax.Updates:
    r"""sign(g) |g|^(q-1) / (‖g‖_q^q)^(1/p), of p-norm 1, for p other than 2."""
    if p == math.inf:
        return jax.tree.map(jnp.sign, direction)
    dtype = statistics_dtype(direction)
    sizes = jax.tree.map(lambda g: jnp.abs(g).astype(dtype), direction)
    largest = jax.tree.reduce(
        jnp.maximum, jax.tree.map(lambda s: jnp.max(s, initial=0), sizes), jnp.zeros([])
    ).astype(dtype)
    # The quotient does not change when g is scaled, and with the largest entry at 1 no
    # power overflows. For p = 1, q is infinite and only entries at 1 survive.
    sizes = jax.tree.map(lambda s: safe_divide(s, largest), sizes)
    if p == 1:
        powers = jax.tree.map(lambda s: (s == 1).astype(dtype), sizes)
        total = sum(map(jnp.sum, jax.tree.leaves(powers)), start=jnp.zeros([], dtype))
    else:
        q = p / (p - 1)
        powers = jax.tree.map(lambda s: s ** (q - 1), sizes)
        total = sum(
            (jnp.sum(s**q) for s in jax.tree.leaves(sizes)),
            start=jnp.zeros([], dtype),
        ) ** (1 / p)
    return jax.tree.map(
        lambda g, s: (jnp.sign(g) * safe_divide(s, total)).astype(g.dtype),
        direction,
        powers,
    )
