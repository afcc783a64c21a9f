r"""MSAM along the momentum: the state is the base optimizer's and one scalar.

The parameters that the user holds are the *perturbed* ones
:math:`\tilde w_t = w_t - \rho\,v_t/\|v_t\|`, so that their plain gradient is already
the sharpness-aware one. Each update takes the old perturbation away, lets the inner
optimizer step, and puts the new one on:

.. math::
  w_t = \tilde w_t + s_t v_t, \qquad
  w_{t+1} = w_t + u(g_t, w_t), \qquad
  \tilde w_{t+1} = w_{t+1} - s_{t+1} v_{t+1}, \qquad
  s_{t+1} = \rho / \|v_{t+1}\| .

The state keeps the scale :math:`s_{t+1}` that was applied: with it and the momentum the
perturbation can be taken away, whatever rho does meanwhile.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_scalar_or_schedule,
    check_transformation,
    init_schedule,
    read_schedule,
    static_value,
)
from msam_optax._base.numerics import (
    global_norm,
    is_short,
    safe_divide,
    statistics_dtype,
)
from msam_optax._base.trees import check_params, check_state
from msam_optax.transforms._direction import along_momentum
from msam_optax.transforms._find_momentum import add_momentum, find_momentum
from msam_optax.transforms._perturbed_states import (
    MomentumPerturbationState,
    StoredPerturbationState,
)
from msam_optax.transforms._stored_perturbation import (
    WHY_PARAMS,
    stored_perturbation,
)

State = MomentumPerturbationState | StoredPerturbationState


def scaled_momentum_perturbation(
    inner: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    exact: bool = True,
    previous: Callable[..., jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`momentum_perturbation(inner, rho)`, faster where `previous` is known.

    Args:
      inner: the whole base optimizer.
      rho: length of the perturbation.
      exact: keep the perturbation where a parameter has fewer than 32 bits.
      previous: ``previous(update, momentum) -> momentum``, leaf by leaf: the old
        momentum by way of the new one, of which the recursion is solved for the old.
        The update w~' - w~ = s v + u - s' v' waits for the norm of the new momentum
        v'. With v computed from v', XLA may write v' over v meanwhile, instead of
        keeping both.
    """
    check_scalar_or_schedule("rho", rho)
    inner = check_transformation("inner", inner)
    if static_value(rho) == 0:
        # Adding zeros would round differently; and a state without a scale can't take
        # over perturbed parameters from another rho's checkpoint unnoticed.
        return inner
    direction = along_momentum(inner)
    stored = stored_perturbation(inner, ascents.normalized(rho), direction, exact)

    def init_fn(params: optax.Params) -> State:
        if exact and any(map(is_short, jax.tree.leaves(params))):
            return stored.init(params)
        inner_state = inner.init(params)
        direction.check(inner_state, params)
        return MomentumPerturbationState(
            inner_state=inner_state,
            scale=jnp.zeros([], statistics_dtype(params)),
            rho_state=init_schedule(rho),
        )

    def update_fn(
        updates: optax.Updates, state: State, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, State]:
        if isinstance(state, StoredPerturbationState):
            return stored.update(updates, state, params, **extra_args)
        check_state(state, MomentumPerturbationState)
        check_params(WHY_PARAMS, params)
        momentum = find_momentum(state.inner_state, params)
        if previous is not None:
            momentum = jax.tree.map(previous, updates, momentum)
        clean = add_momentum(params, momentum, state.scale)
        inner_updates, inner_state = inner.update(
            updates, state.inner_state, clean, **extra_args
        )
        new_momentum = find_momentum(inner_state, params)
        radius, rho_state = read_schedule(rho, state.rho_state, extra_args)
        scale = safe_divide(radius, global_norm(new_momentum)).astype(state.scale.dtype)
        new_updates = jax.tree.map(
            functools.partial(_moved, state.scale, scale),
            inner_updates,
            momentum,
            new_momentum,
        )
        return new_updates, MomentumPerturbationState(inner_state, scale, rho_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@functools.partial(jax.jit, inline=True)
def _moved(
    scale: jax.Array,
    new_scale: jax.Array,
    update: jax.Array,
    momentum: jax.Array,
    new_momentum: jax.Array,
) -> jax.Array:
    return (scale * momentum + update - new_scale * new_momentum).astype(update.dtype)
