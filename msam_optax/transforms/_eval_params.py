"""The unperturbed parameters of a training run by MSAM."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.numerics import global_norm, statistics_dtype
from msam_optax.transforms._find_momentum import (
    add_momentum,
    find_momentum,
    find_states,
    leaves_like,
    momentum_leaves,
)
from msam_optax.transforms._momentum import PERTURBED, StoredPerturbationState


def eval_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The unperturbed parameters w: those to evaluate, to save and to hand on.

    Args:
      state: any optimizer state, with a `momentum_perturbation` (`msam`, `adamw_msam`)
        somewhere inside or without one.
      params: the parameters that belong to it.

    Returns:
      A tree like params; params themselves where nothing is perturbed.

    Raises:
      ValueError: if state is not an optimizer state of these parameters, or is batched
        (then ``vmap`` this function too).

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> params = jnp.array([1.0, 2.0])
    >>> state = optax.adam(1e-3).init(params)
    >>> print(msam_optax.eval_params(state, params))
    [1. 2.]
    """
    if isinstance(state, optax.GradientTransformation):
        raise ValueError(
            "eval_params(state, params) was given the optimizer: pass its state."
        )
    found = find_states(state, (dict, *PERTURBED))
    if any(map(_is_state_dict, found)):
        raise ValueError(
            "eval_params(state, params) was given a dictionary made of an optimizer "
            "state: restore it first, for instance by "
            "flax.serialization.from_state_dict(optimizer.init(params), dictionary)."
        )
    swapped = leaves_like(state, params) is not None
    if state is None or _holds_optax_state(params) or swapped:
        raise ValueError(
            "eval_params(state, params) needs an optimizer state first and its "
            f"parameters second, but {type(state).__name__} and "
            f"{type(params).__name__} were given: were they swapped?"
        )
    for node in found:
        if isinstance(node, PERTURBED):
            params = _unperturbed(node, params)
    return params


def perturbation_norm(state: optax.OptState, params: optax.Params) -> jax.Array:
    """l2 norm of the momentum perturbations that are on the parameters now."""
    total = jnp.zeros([], statistics_dtype(params))
    for found in find_states(state, PERTURBED):
        if isinstance(found, StoredPerturbationState):
            norm = global_norm(found.perturbation)
        else:
            norm = found.scale * global_norm(find_momentum(found.inner_state, params))
        total = jnp.hypot(total, norm)
    return total


def _is_state_dict(node: Any) -> bool:
    """Whether a node is a dictionary with the fields of a perturbed state."""
    return isinstance(node, dict) and any(
        node.keys() >= set(kind._fields[:2]) for kind in PERTURBED
    )


def _holds_optax_state(params: Any) -> bool:
    return any(
        isinstance(node, PERTURBED)
        or (hasattr(node, "_fields") and type(node).__module__.startswith("optax."))
        for node in find_states(params, tuple)
        if not isinstance(node, optax.MaskedNode)
    )


_FOREIGN_STATE = (
    "The optimizer state does not belong to these parameters: the perturbation inside "
    "it has another structure or other shapes. (With Flax NNX use "
    "msam_optax.flax.nnx.eval_model.)"
)


def _unperturbed(state: Any, params: optax.Params) -> optax.Params:
    leaves, treedef = jax.tree.flatten(params)
    found: list[Any] | None
    if isinstance(state, StoredPerturbationState):
        factor, found = -1, leaves_like(state.perturbation, params)
        if found is None:
            raise ValueError(_FOREIGN_STATE)
    else:
        if jnp.ndim(state.scale) != 0:
            raise ValueError(
                "The state is batched (its scale has shape "
                f"{jnp.shape(state.scale)}): use jax.vmap(eval_params)(state, params)."
            )
        factor = state.scale
        try:
            found = momentum_leaves(state.inner_state, params)
        except ValueError as error:
            raise ValueError(_FOREIGN_STATE) from error
    return jax.tree.unflatten(treedef, add_momentum(leaves, found, factor))
