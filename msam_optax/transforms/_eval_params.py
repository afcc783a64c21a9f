"""The unperturbed parameters of a training run by MSAM, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax._base.numerics import global_norm, statistics_dtype
from msam_optax._base.trees import check_alive, is_of_an_optimizer
from msam_optax.transforms._behind import check_placement
from msam_optax.transforms._find_momentum import (
    add_momentum,
    find_momentum,
    find_states,
    leaves_like,
    momentum_leaves,
)
from msam_optax.transforms._perturbed_states import (
    PERTURBED,
    StoredPerturbationState,
)


def eval_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The unperturbed parameters w: those to evaluate and to publish.

    To resume, save params and state, not these: a run that goes on from w with its old
    state takes a perturbation off that is not there. :func:`train_params` is the way
    back. An Equinox model may be given whole or filtered; what is no array stays.

    Args:
      state: any optimizer state, with a `momentum_perturbation` (`msam`, `adamw_msam`)
        somewhere inside or without one.
      params: the parameters that belong to it.

    Returns:
      A tree like params; params themselves where nothing is perturbed.

    Raises:
      ValueError: if state is not an optimizer state of these parameters; if a
        training step took over the memory of either; if it is
        batched (then ``vmap`` this function too); or if something stands behind MSAM in
        the same chain or moves the parameters around it, so that they are not those
        that MSAM made.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> params = jnp.array([1.0, 2.0])
    >>> state = optax.adam(1e-3).init(params)
    >>> print(msam_optax.eval_params(state, params))
    [1. 2.]
    """
    return _moved("eval_params", state, params, 1)


def train_params(state: optax.OptState, weights: optax.Params) -> optax.Params:
    """The parameters to train on from weights w: the inverse of `eval_params`.

    It loads weights into a run that goes on: those that were published, averaged or
    edited, under the state that there is.

    Args:
      state: the optimizer's state, as for `eval_params`.
      weights: unperturbed parameters.

    Returns:
      A tree like weights; weights themselves where nothing is perturbed.

    Raises:
      ValueError: as `eval_params`.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> tx = msam_optax.msam(0.1, rho=0.5)
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> weights = msam_optax.eval_params(state, params)
    >>> print(*(f"{w:.4f}" for w in weights))
    0.9000 1.8000
    >>> bool(jnp.allclose(msam_optax.train_params(state, weights), params))
    True
    """
    return _moved("train_params", state, weights, -1)


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


def _moved(name: str, state: Any, params: optax.Params, sign: int) -> optax.Params:
    if isinstance(state, optax.GradientTransformation):
        raise ValueError(
            f"{name}(state, params) was given the optimizer: pass its state."
        )
    found = find_states(state, (dict, *PERTURBED))
    if any(map(_is_state_dict, found)):
        raise ValueError(
            f"{name}(state, params) was given a dictionary made of an optimizer "
            "state: restore it first, for instance by "
            "flax.serialization.from_state_dict(optimizer.init(params), dictionary)."
        )
    check_placement(state)
    swapped = leaves_like(state, params) is not None
    if (
        state is None
        or any(map(is_of_an_optimizer, find_states(params, tuple)))
        or swapped
    ):
        raise ValueError(
            f"{name}(state, params) needs an optimizer state first and its "
            f"parameters second, but {type(state).__name__} and "
            f"{type(params).__name__} were given: were they swapped?"
        )
    check_alive("params", params)
    for node in found:
        if isinstance(node, PERTURBED):
            check_alive("state", node)
            params = _moved_by(name, node, params, sign)
    return params


def _moved_by(name: str, state: Any, params: optax.Params, sign: int) -> optax.Params:
    if not isinstance(state, StoredPerturbationState) and jnp.ndim(state.scale) != 0:
        raise ValueError(
            "The state is batched (its scale has shape "
            f"{jnp.shape(state.scale)}): use jax.vmap({name})(state, params)."
        )
    leaves, treedef = jax.tree.flatten(params)
    if any(map(np.iscomplexobj, leaves)):
        state = _with_complex(state)
    found = _perturbed_leaves(state, params)
    stored = isinstance(state, StoredPerturbationState)
    factor = -sign if stored else sign * state.scale
    if found is not None:
        return jax.tree.unflatten(treedef, add_momentum(leaves, found, factor))
    # optax.flatten hands the optimizer one vector of all the parameters.
    if leaves and all(isinstance(x, jax.Array | np.ndarray) for x in leaves):
        vector = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        found = _perturbed_leaves(state, vector)
        if found is not None:
            (vector,) = add_momentum([vector], found, factor)
            parts = jnp.split(vector, np.cumsum([x.size for x in leaves])[:-1])
            return jax.tree.unflatten(
                treedef,
                [
                    part.reshape(x.shape).astype(x.dtype)
                    for part, x in zip(parts, leaves, strict=True)
                ],
            )
    raise ValueError(
        "The optimizer state does not belong to these parameters: the perturbation "
        "inside it has another structure or other shapes. Give the parameters that the "
        "optimizer was initialised with. (With Flax NNX use "
        "msam_optax.flax.nnx.eval_model.)"
    )


def _perturbed_leaves(state: Any, params: optax.Params) -> list[Any] | None:
    """What is on each parameter, or its momentum; None if they are not the state's."""
    if isinstance(state, StoredPerturbationState):
        return leaves_like(state.perturbation, params)
    try:
        return momentum_leaves(state.inner_state, params)
    except ValueError:
        return None


def _with_complex(state: Any) -> Any:
    """The state with complex arrays where `split_real_and_imaginary` made pairs."""

    def is_pair(node: Any) -> bool:
        return getattr(node, "_fields", None) == ("real", "imaginary")

    return jax.tree.map(
        lambda x: jax.lax.complex(x.real, x.imaginary) if is_pair(x) else x,
        state,
        is_leaf=is_pair,
    )


def _is_state_dict(node: Any) -> bool:
    """Whether a node is a dictionary with the fields of a perturbed state."""
    return isinstance(node, dict) and any(
        node.keys() >= set(kind._fields[:2]) for kind in PERTURBED
    )
