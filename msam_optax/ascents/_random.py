"""Ascents with a random part."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_integer,
    check_real,
    check_scalar_or_schedule,
    training_step,
    value_at,
)
from msam_optax._base.layers import AxesLike, Layout, layouts
from msam_optax._base.numerics import (
    global_norm,
    safe_divide,
    safe_sqrt,
    scale,
    statistics_dtype,
    sum_of_scalars,
    sum_of_squares,
)
from msam_optax._base.trees import check_params
from msam_optax.ascents._draws import coins_like, draws_like, wide_normal


class RandomAscentState(NamedTuple):
    """State of an ascent that draws random numbers.

    Attributes:
      ascent_step: int32 scalar, the step of the next draw, which depends on it and on
        the seed alone.
    """

    ascent_step: jax.Array


def stochastic(
    rho: ScalarOrSchedule, beta: float, seed: int = 0, by_coordinate: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic weight perturbation: each parameter takes part with probability beta.

    With :math:`g'` the direction g, zero on those that do not take part,

    .. math:: \varepsilon = \frac{\rho}{\beta}\, \frac{g'}{\|g'\|} .

    *Cost*: one reduction over the direction, and the draws. *State*: one int32.
    *Position*: inside ``sharpness_aware_gradient`` or ``momentum_perturbation``.

    Args:
      rho: radius times beta, in the unit of the parameters; a float or a schedule.
        Epsilon has length rho/beta, or 0 where nothing takes part.
      beta: probability of taking part, in (0, 1].
      seed: integer seed of the draws.
      by_coordinate: draw for each single weight, as ESAM's paper writes it, and not for
        each parameter tensor, as the authors' code does.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule, beta is outside
        (0, 1], or seed is not an integer.

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.stochastic(rho=0.5, beta=1.0)
    >>> direction = jnp.array([3.0, 4.0])
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon)
    [0.3 0.4]

    References:
      Du et al., `Efficient Sharpness-Aware Minimization for Improved Training of Neural
      Networks <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.
    """
    check_real("beta", beta, low=0.0, high=1.0, excluded=0.0)

    def flip(key: jax.Array, g: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, beta, jnp.shape(g))

    def perturb(
        rho: Any, direction: Any, params: Any, key: jax.Array, step: jax.Array
    ) -> optax.Updates:
        del params
        if by_coordinate:
            takes_part = draws_like(direction, key, step, flip)
            chosen = jax.tree.map(
                lambda taken, g: jnp.where(taken, g, 0), takes_part, direction
            )
            factor = safe_divide(rho, global_norm(chosen)) / beta
            return optax.tree.cast_like(scale(factor, chosen), direction)
        # A tensor's factor leaves it out, without a pass over it of its own.
        coins = coins_like(direction, key, step, beta)
        squares = jax.tree.map(_square_if, coins, direction)
        squared = sum_of_scalars(jax.tree.leaves(squares), statistics_dtype(squares))
        factor = safe_divide(rho, safe_sqrt(squared)) / beta
        return jax.tree.map(partial(_scaled_if, factor), coins, direction)

    return _random_ascent(rho, seed, perturb)


def gaussian(
    rho: ScalarOrSchedule,
    seed: int = 0,
    *,
    filterwise: bool = False,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A random direction of length rho: :math:`\rho\,n/\|n\|`, n standard normal.

    What comes in as direction only lends its shape. The papers use it as the control
    of what an ascent's direction is worth.

    *Filter-wise* it is random weight perturbation: for each filter j of weights w with
    d entries,

    .. math:: \varepsilon_j = \rho\, \|w_j\|\, n_j / \sqrt{d},

    whose expected squared length is :math:`\rho^2 \|w_j\|^2`; biases and scales are
    not perturbed. Its radius rises along a cosine from 0.

    *Cost*: the draws and one reduction. Inside ``sharpness_aware_gradient`` the clean
    gradient serves nothing then, and a ``jit`` in which nothing else asks for it leaves
    it out: a step costs one gradient. *State*: one int32. *Position*: inside
    ``sharpness_aware_gradient`` or ``momentum_perturbation``.

    Args:
      rho: radius, in the unit of the parameters, or filter-wise relative to the
        filters' norms; a float or a schedule.
      seed: integer seed of the draws.
      filterwise: scale each filter of the noise by that of the weights.
      axes: for filterwise, which axes of a parameter count its filters, and which
        stacked layers; see :class:`msam_optax.ascents.Axes`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; filter-wise it needs ``params``.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule, seed is not an
        integer, axes are given without filterwise, or ``params`` are missing.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> ascent = msam_optax.ascents.gaussian(rho=0.5)
    >>> direction = jnp.array([3.0, 4.0])
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(f"{jnp.linalg.norm(epsilon):.2f}")
    0.50
    >>> falling = optax.cosine_decay_schedule(0.1, decay_steps=1000)
    >>> rising = lambda step: 0.1 - falling(step)
    >>> ascent = msam_optax.ascents.gaussian(rising, filterwise=True)
    >>> tx = optax.chain(msam_optax.sharpness_aware_gradient(ascent), optax.sgd(0.1))

    References:
      Becker, Altrock and Risse, `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_,
      2024, for the control. Li et al., `Revisiting Random Weight Perturbation for
      Efficiently Improving Generalization <https://arxiv.org/abs/2404.00357>`_, 2024,
      and Li et al., `Flat-LoRA <https://arxiv.org/abs/2409.14396>`_, 2024, for
      filter-wise noise. The division by :math:`\sqrt d` is Flat-LoRA's; without it
      rho is :math:`\sqrt d` times smaller, and not one number for all layers.
    """
    if axes is not None and not filterwise:
        raise ValueError("axes say what a filter is: give filterwise=True with them.")

    def perturb(
        rho: Any, direction: Any, params: Any, key: jax.Array, step: jax.Array
    ) -> optax.Updates:
        if not filterwise:
            noise = draws_like(direction, key, step, _normal)
            return scale(safe_divide(rho, global_norm(noise)), noise)

        check_params("Noise is scaled by the weights' filters", params)
        dtype = statistics_dtype(params)

        def tensor(
            layout: Layout, n: jax.Array, w: jax.Array, g: jax.Array
        ) -> jax.Array:
            if not layout.is_weight:
                return jnp.zeros_like(g)
            size = rho / math.sqrt(layout.filter_size(w))
            return (size * layout.filter_norm(w.astype(dtype)) * n).astype(g.dtype)

        noise = draws_like(direction, key, step, wide_normal)
        return jax.tree.map(tensor, layouts(axes, params), noise, params, direction)

    return _random_ascent(rho, seed, perturb)


def _normal(key: jax.Array, like: jax.Array) -> jax.Array:
    return jax.random.normal(key, jnp.shape(like), jnp.result_type(like))


@partial(jax.jit, inline=True)
def _square_if(coin: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.where(coin > 0, sum_of_squares(g), 0)


@partial(jax.jit, inline=True)
def _scaled_if(factor: jax.Array, coin: jax.Array, g: jax.Array) -> jax.Array:
    return scale(coin * factor, g)


def _random_ascent(
    rho: ScalarOrSchedule, seed: int, perturb: Any
) -> optax.GradientTransformationExtraArgs:
    check_scalar_or_schedule("rho", rho)
    check_integer("seed", seed, low=0)

    def init_fn(params: Any) -> Any:
        del params
        return RandomAscentState(ascent_step=jnp.zeros([], jnp.int32))

    def update_fn(
        direction: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        step = training_step(state.ascent_step, extra_args)
        key = jax.random.fold_in(jax.random.key(seed), step)
        epsilon = perturb(value_at(rho, step), direction, params, key, step)
        return epsilon, RandomAscentState(ascent_step=optax.safe_increment(step))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
