"""Finds the momentum that an optimizer holds in its state."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.trees import is_like, is_masked, shapes_like

# Where Optax's states keep the running sum or mean of gradients: TraceState.trace and
# ScaleByAdamState.mu, ScaleByLionState.mu, MuonState.mu, ...
MOMENTUM_FIELDS = ("trace", "mu")


def find_momentum(inner_state: optax.OptState, params: optax.Params) -> optax.Updates:
    """The momentum inside an optimizer's state, as a tree like the parameters.

    It is found by the field of an optimizer state that holds it, never by the name of
    a parameter. An optimizer that splits its parameters (`optax.partition`, Muon) holds
    several momenta that mask each other's parameters out; together they are one.
    Parameters without any momentum, frozen ones for instance, get zeros.

    Args:
      inner_state: state of an optimizer.
      params: the parameters that belong to it.

    Returns:
      A tree like params, raw as the optimizer holds it.

    Raises:
      ValueError: if there is no momentum, or two for the same parameter.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> params = jnp.array([1.0, 2.0])
    >>> tx = optax.sgd(0.1, momentum=0.9)
    >>> _, state = tx.update(jnp.ones(2), tx.init(params), params)
    >>> print(msam_optax.find_momentum(state, params))
    [1. 1.]
    """
    found = list(_candidates(inner_state, shapes_like(params)))
    names = ", ".join(name for name, _ in found)
    if not found:
        raise ValueError(
            "No momentum like the parameters was found in the optimizer's state "
            f"(fields {' and '.join(MOMENTUM_FIELDS)} of {_state_names(inner_state)}). "
            "Use an optimizer with momentum, for instance optax.sgd(learning_rate, "
            "momentum=0.9), or say where it is: momentum_fn=lambda inner_state: ..."
        )
    leaves, treedef = jax.tree.flatten(params)
    merged: list[Any] = [None] * len(leaves)
    for _, momentum in found:
        for i, leaf in enumerate(_leaf_by_leaf(momentum, params)):
            if leaf is None:
                continue
            if merged[i] is not None:
                raise ValueError(
                    f"Several momenta were found in the optimizer's state: {names}. "
                    "Choose one: momentum_fn=lambda inner_state: ..."
                )
            merged[i] = leaf
    return jax.tree.unflatten(
        treedef,
        [
            jnp.zeros_like(p) if m is None else m
            for m, p in zip(merged, leaves, strict=True)
        ],
    )


def _candidates(node: Any, shapes: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    # A tree like the parameters (a second moment, say) is never searched: what it calls
    # "mu" is a parameter.
    if is_like(node, shapes, masked=True):
        return
    children, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    for key_path, child in children:
        if not key_path:  # an array
            return
        field = getattr(key_path[0], "name", None)
        name = f"{path or type(node).__name__}{jax.tree_util.keystr(key_path)}"
        if field in MOMENTUM_FIELDS and is_like(child, shapes, masked=True):
            yield name, child
        else:
            yield from _candidates(child, shapes, name)


def _leaf_by_leaf(momentum: Any, params: optax.Params) -> list[Any]:
    """The momentum's leaves, one for each of the parameters', None where masked."""
    leaves: list[Any] = []

    def collect(leaf, param):
        masked = is_masked(leaf)
        leaves.extend([None] * len(jax.tree.leaves(param)) if masked else [leaf])

    jax.tree.map(collect, momentum, params, is_leaf=is_masked)
    return leaves


def add_momentum(params: optax.Params, momentum: Any, factor: Any) -> optax.Params:
    """params + factor momentum in the parameters' dtypes; what it masks out stays."""
    return jax.tree.map(
        lambda x, p: p if is_masked(x) else (p + factor * x).astype(jnp.result_type(p)),
        momentum,
        params,
        is_leaf=is_masked,
    )


def find_states(tree: Any, kinds: type | tuple[type, ...]) -> list[Any]:
    """All states of some kinds inside an optimizer's state, outermost first."""
    found = [tree] if isinstance(tree, kinds) else []
    for child in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree):
        if child is not tree:
            found += find_states(child, kinds)
    return found


def _state_names(state: Any) -> str:
    """The names of the NamedTuples that make up a state."""
    named = [node for node in find_states(state, tuple) if hasattr(node, "_fields")]
    names = dict.fromkeys(type(node).__name__ for node in named)
    return ", ".join(names) or type(state).__name__
