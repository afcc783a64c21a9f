r"""MSAM: the gradient is taken where the momentum has pushed the parameters.

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
perturbation can be taken away exactly, whatever rho does meanwhile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
from msam_optax._base.numerics import global_norm, safe_divide, statistics_dtype
from msam_optax._base.trees import check_params, is_like, shapes_like
from msam_optax.ascents._make import perturbation
from msam_optax.transforms._find_momentum import (
    add_momentum,
    find_momentum,
    find_states,
)

# momentum_fn(inner_state) -> the momentum, a tree like the parameters
MomentumFn = Callable[[optax.OptState], optax.Updates]


class MomentumPerturbationState(NamedTuple):
    """State of `momentum_perturbation` with rho: the inner state and one scalar.

    Attributes:
      inner_state: state of the inner optimizer, which holds the momentum v.
      scale: float32 scalar; the parameters in use are w - scale v.
      rho_state: counter of rho's schedule, empty for a constant.
    """

    inner_state: optax.OptState
    scale: jax.Array
    rho_state: optax.OptState


class StoredPerturbationState(NamedTuple):
    """State of `momentum_perturbation` with an ascent or a momentum_fn.

    Attributes:
      inner_state: state of the inner optimizer.
      perturbation: tree like the parameters; those in use are w + perturbation.
      ascent_state: state of the ascent.
    """

    inner_state: optax.OptState
    perturbation: optax.Updates
    ascent_state: optax.OptState


PERTURBED = (MomentumPerturbationState, StoredPerturbationState)

_MOVES = "MSAM moves the parameters that it is given"


def momentum_perturbation(
    inner: optax.GradientTransformation,
    rho: ScalarOrSchedule | None = None,
    *,
    ascent: optax.GradientTransformation | None = None,
    momentum_fn: MomentumFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM around any optimizer that holds a momentum.

    The perturbation is :math:`\varepsilon = -\rho\,v/\|v\|` with v the momentum, on
    the side of Nesterov's look-ahead. Take gradients at the parameters as they are, and
    evaluate and save :func:`eval_params`.

    *Cost*: no extra gradient. *State*: one scalar with rho (two if it is a schedule);
    one tree like the parameters with an ascent or a momentum_fn, whose perturbation
    can't be had back from the momentum and a scalar. *Position*: outermost. The inner
    optimizer is the whole one, learning rate included, and sees the unperturbed
    parameters, so its weight decay acts on w. What stands before this in a chain
    sees the perturbed ones, as weight decay does in the authors' SGD code.

    The momentum is found by itself in ``optax.sgd`` with momentum, ``adam``, ``adamw``,
    ``nadam``, ``nadamw``, ``amsgrad``, ``adabelief``, ``lion`` and
    ``optax.contrib.muon``, also inside ``chain``, ``partition``, ``masked``,
    ``inject_hyperparams``, ``apply_if_finite`` and ``MultiSteps``: it is the state's
    field ``trace`` or ``mu``, raw and not preconditioned. One norm goes over all its
    parts, whatever their scale. Say where it is with momentum_fn for optimizers that
    call it otherwise (``optax.adan``, ``optax.ema``, ``optax.contrib.ademamix``) or
    hold several.

    Args:
      inner: the whole base optimizer.
      rho: length of the perturbation, in the unit of the parameters; a float or a
        schedule, read at the same count as a learning rate. May be negative. The
        number 0 (without momentum_fn) gives the inner optimizer itself, bit for bit.
      ascent: makes the perturbation of the momentum in place of rho, for instance
        :func:`msam_optax.ascents.adaptive`.
      momentum_fn: ``momentum_fn(inner_state) -> momentum``, a tree like the parameters.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if neither or both of rho and ascent are given, rho is not a finite
        number or a schedule, ``init`` finds no momentum or several, or ``update``
        gets no ``params``.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> tx = msam_optax.momentum_perturbation(optax.lion(1e-3), rho=0.1)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> grads = jax.grad(lambda w: jnp.sum(w**2))(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> epsilon = params - msam_optax.eval_params(state, params)
    >>> print(*(f"{e:.4f}" for e in epsilon))
    -0.0447 -0.0894

    References:
      Becker, Altrock and Risse, `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024, algorithm 1.
      The authors' SGD code takes the old perturbation away with the new rho, so that
      the weights drift where rho changes; here they do not.
    """
    if rho is not None and ascent is None:
        if momentum_fn is None:
            return scaled_momentum_perturbation(inner, rho)
        return _stored_perturbation(inner, ascents.normalized(rho), momentum_fn)
    if rho is None and ascent is not None:
        return _stored_perturbation(inner, ascent, momentum_fn)
    raise ValueError(
        "momentum_perturbation needs either rho or an ascent, but "
        f"rho={rho!r} and ascent={ascent!r} were given."
    )


def scaled_momentum_perturbation(
    inner: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    previous: Callable[..., jax.Array] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`momentum_perturbation(inner, rho)`, faster where `previous` is known.

    Args:
      inner: the whole base optimizer.
      rho: length of the perturbation.
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

    def init_fn(params):
        inner_state = inner.init(params)
        _check_inner(inner_state)
        find_momentum(inner_state, params)  # raises here rather than in update
        return MomentumPerturbationState(
            inner_state=inner_state,
            scale=jnp.zeros([], statistics_dtype(params)),
            rho_state=init_schedule(rho),
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_params(_MOVES, params)
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
def _moved(scale, new_scale, update, momentum, new_momentum):
    return (scale * momentum + update - new_scale * new_momentum).astype(update.dtype)


def _stored_perturbation(
    inner: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    momentum_fn: MomentumFn | None,
) -> optax.GradientTransformationExtraArgs:
    inner = check_transformation("inner", inner)
    ascent = check_transformation("ascent", ascent)

    def momentum_of(inner_state, params):
        if momentum_fn is None:
            return find_momentum(inner_state, params)
        momentum = momentum_fn(inner_state)
        if not is_like(momentum, shapes_like(params), masked=True):
            raise ValueError(
                "momentum_fn must return a tree like the parameters, "
                f"{jax.tree.structure(params)}, but it returned "
                f"{jax.tree.structure(momentum)} or other shapes."
            )
        return momentum

    def init_fn(params):
        inner_state = inner.init(params)
        _check_inner(inner_state)
        momentum_of(inner_state, params)  # raises here rather than in update
        return StoredPerturbationState(
            inner_state=inner_state,
            perturbation=optax.tree.zeros_like(params),
            ascent_state=ascent.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        check_params(_MOVES, params)
        clean = add_momentum(params, state.perturbation, -1)
        inner_updates, inner_state = inner.update(
            updates, state.inner_state, clean, **extra_args
        )
        new_clean = optax.apply_updates(clean, inner_updates)
        ascended, ascent_state = perturbation(
            ascent,
            momentum_of(inner_state, params),
            state.ascent_state,
            new_clean,
            **extra_args,
        )
        epsilon = jax.tree.map(
            lambda e, p: (-e).astype(p.dtype), ascended, state.perturbation
        )
        new_updates = jax.tree.map(
            lambda u, e, new_e: u - e + new_e,
            inner_updates,
            state.perturbation,
            epsilon,
        )
        return new_updates, StoredPerturbationState(inner_state, epsilon, ascent_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_inner(inner_state: Any) -> None:
    if find_states(inner_state, PERTURBED):
        raise ValueError(
            "The inner optimizer is itself perturbed along its momentum; "
            "momentum_perturbation (msam, adamw_msam) must not be nested."
        )
