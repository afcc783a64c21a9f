r"""The parameters in use and what was added to them: one tree of memory, any direction.

.. math::
  w_t = \tilde w_t - \varepsilon_t, \qquad w_{t+1} = w_t + u(g_t, w_t), \qquad
  \tilde w_{t+1} = w_{t+1} + \varepsilon_{t+1} .

Parameters of fewer than 32 bits round :math:`w + \varepsilon` by more than a training
step may move them, and the noise piles up. Of them the perturbation that came about is
kept, the rounded parameters less w, in float32: w is followed as if it were float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.numerics import is_short
from msam_optax._base.trees import check_params, check_state
from msam_optax.ascents._make import perturbation
from msam_optax.transforms._direction import Direction
from msam_optax.transforms._dry_step import check_ascent
from msam_optax.transforms._find_momentum import add_momentum
from msam_optax.transforms._perturbed_states import StoredPerturbationState

WHY_PARAMS = "MSAM moves the parameters it is given"


def stored_perturbation(
    inner: optax.GradientTransformationExtraArgs,
    ascent: optax.GradientTransformationExtraArgs,
    direction: Direction,
    exact: bool,
) -> optax.GradientTransformationExtraArgs:
    """`inner` with the perturbation -ascent(direction), kept in the state.

    Args:
      inner: the whole base optimizer.
      ascent: makes the perturbation of the direction.
      direction: along what.
      exact: keep the perturbation of short parameters in float32.
    """

    def init_fn(params: optax.Params) -> StoredPerturbationState:
        inner_state = inner.init(params)
        direction.check(inner_state, params)
        check_ascent(ascent, params)
        return StoredPerturbationState(
            inner_state=inner_state,
            perturbation=jax.tree.map(
                lambda p: jnp.zeros_like(p, jnp.float32 if is_exact(p) else None),
                params,
            ),
            ascent_state=ascent.init(params),
        )

    def is_exact(param: jax.Array) -> bool:
        return exact and is_short(param)

    def update_fn(
        updates: optax.Updates,
        state: StoredPerturbationState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, StoredPerturbationState]:
        check_state(state, StoredPerturbationState)
        check_params(WHY_PARAMS, params)
        clean = add_momentum(params, state.perturbation, -1)
        inner_updates, inner_state = inner.update(
            updates, state.inner_state, clean, **extra_args
        )
        ascended, _, ascent_state = perturbation(
            ascent,
            direction.of(inner_state, inner_updates, params),
            state.ascent_state,
            optax.apply_updates(clean, inner_updates),
            **extra_args,
        )
        epsilon = jax.tree.map(
            lambda e, p: (-e).astype(p.dtype), ascended, state.perturbation
        )
        new_updates = jax.tree.map(
            lambda u, e, new_e: (u - e + new_e).astype(u.dtype),
            inner_updates,
            state.perturbation,
            epsilon,
        )
        epsilon = jax.tree.map(
            lambda p, change, u, e, new_e: (
                _came_about(p, change, u, e) if is_exact(p) else new_e
            ),
            params,
            new_updates,
            inner_updates,
            state.perturbation,
            epsilon,
        )
        return new_updates, StoredPerturbationState(inner_state, epsilon, ascent_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _came_about(param: Any, change: Any, update: Any, epsilon: Any) -> jax.Array:
    """The next parameters in use, as they are rounded, less the weights w + update."""
    now = param.astype(jnp.float32)
    used = _rounded(now + change.astype(jnp.float32), param.dtype)
    return used - (now - epsilon + update.astype(jnp.float32))


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """float32 numbers rounded to a shorter dtype's, in float32.

    XLA may leave a cast there and back out. `lax.reduce_precision` stays, but has no
    numbers below the smallest normal one: there, float16's are the multiples of its
    smallest, to which adding and subtracting a large number rounds.
    """
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp >= jnp.finfo(jnp.float32).nexp:
        return rounded
    large = 1.5 * 2.0**23 * float(info.smallest_subnormal)
    below = jnp.abs(x) < float(info.smallest_normal)
    return jnp.where(below, (x + large) - large, rounded)
