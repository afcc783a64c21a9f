"""Finds the momentum that an optimizer holds in its state."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.numerics import plus_scaled

# Where Optax's states keep the running sum or mean of gradients: TraceState.trace and
# ScaleByAdamState.mu, ScaleByLionState.mu, MuonState.mu, ...
MOMENTUM_FIELDS = ("trace", "mu")


def find_momentum(inner_state: optax.OptState, params: optax.Params) -> optax.Updates:
    """The momentum inside an optimizer's state, as a tree like the parameters.

    It is found by the field of an optimizer state that holds it, never by the name of
    a parameter. An optimizer that splits its parameters (`optax.partition`, Muon) holds
    several momenta that mask each other's parameters out; together they are one.
    Parameters without any momentum, frozen ones for instance, get zeros. The time it
    takes is linear in the size of the state.

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
    leaves, treedef = jax.tree.flatten(params)
    found = momentum_leaves(inner_state, params)
    return jax.tree.unflatten(
        treedef,
        [
            jnp.zeros_like(param) if leaf is None else leaf
            for leaf, param in zip(found, leaves, strict=True)
        ],
    )


def momentum_leaves(inner_state: optax.OptState, params: optax.Params) -> list[Any]:
    """The momentum of each of the parameters' leaves, None where there is none."""
    merged: list[Any] = [None] * len(jax.tree.leaves(params))
    for _, part in momentum_parts(inner_state, params):
        for i, leaf in part.items():
            merged[i] = leaf
    return merged


def momentum_parts(
    inner_state: optax.OptState, params: optax.Params
) -> list[tuple[str, dict[int, Any]]]:
    """The momenta, each with its name and its leaves by their parameter's position."""
    found = list(_candidates(inner_state, _Like(params)))
    if not found:
        raise ValueError(
            "No momentum like the parameters was found in the optimizer's state "
            f"(fields {' and '.join(MOMENTUM_FIELDS)} of {_state_names(inner_state)}). "
            "Use an optimizer with momentum, for instance optax.sgd(learning_rate, "
            "momentum=0.9), say where it is, momentum_fn=lambda inner_state: ..., or "
            'perturb along the update: momentum_perturbation(..., along="update").'
        )
    places = [i for _, part in found for i in part]
    if len(places) != len(set(places)):
        raise ValueError(
            "Several momenta were found in the optimizer's state: "
            f"{', '.join(name for name, _ in found)}. "
            "Choose one: momentum_fn=lambda inner_state: ..."
        )
    return found


def leaves_like(tree: Any, params: optax.Params) -> list[Any] | None:
    """A tree's leaf for each of the parameters', None where it leaves it out.

    None in the place of the list if the tree is not like the parameters.
    """
    like = _Like(params)
    part = like.leaves_of(tree)
    return None if part is None else [part.get(i) for i in range(len(like.shapes))]


class _Like:
    """What a tree must be to be like the parameters: structure and shapes.

    The dtype has no meaning. The parameters' positions stand for them: JAX's error on
    trees of different structure prints their leaves, which would copy arrays from the
    device.
    """

    def __init__(self, params: Any):
        leaves, treedef = jax.tree.flatten(params)
        self.treedef: Any = treedef
        self.shapes = [_shape(leaf) for leaf in leaves]
        self.top = _top(params)

    def leaves_of(self, tree: Any) -> dict[int, Any] | None:
        """The leaves of a tree by the position of their parameter; None if not like.

        A position is missing where the tree masks its parameter out, alone or with a
        whole branch.
        """
        leaves, structure = jax.tree.flatten(tree, is_leaf=left_out)
        part: dict[int, Any] | None
        part = {i: leaf for i, leaf in enumerate(leaves) if not left_out(leaf)}
        if structure != self.treedef:
            if len(part) == len(leaves):
                return None
            part = self._by_branches(tree)
        if part is None or any(_shape(x) != self.shapes[i] for i, x in part.items()):
            return None
        return part

    def _by_branches(self, tree: Any) -> dict[int, Any] | None:
        places = []
        positions = jax.tree.unflatten(self.treedef, range(len(self.shapes)))
        try:
            jax.tree.map(
                lambda leaf, place: places.append((place, leaf)),
                tree,
                positions,
                is_leaf=left_out,
            )
        except (TypeError, ValueError):  # the trees' structures differ
            return None
        kept = [(place, leaf) for place, leaf in places if not left_out(leaf)]
        return dict(kept) if all(type(place) is int for place, _ in kept) else None


def _candidates(
    node: Any, like: _Like, path: str = ""
) -> Iterator[tuple[str, dict[int, Any]]]:
    # A tree like the parameters (a second moment, say) is never searched: what it calls
    # "mu" is a parameter. To look deeper than its top only where that is the same keeps
    # the search linear.
    if _top(node) == like.top and like.leaves_of(node) is not None:
        return
    children, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    for key_path, child in children:
        if not key_path:  # an array
            return
        name = f"{path or type(node).__name__}{jax.tree_util.keystr(key_path)}"
        part = None
        if getattr(key_path[0], "name", None) in MOMENTUM_FIELDS and child is not None:
            part = like.leaves_of(child)
        if part is None:
            yield from _candidates(child, like, name)
        else:
            yield name, part


def add_momentum(params: optax.Params, momentum: Any, factor: Any) -> optax.Params:
    """params + factor momentum in the parameters' dtypes; what it masks out stays."""
    return jax.tree.map(
        lambda x, p: p if left_out(x) else plus_scaled(p, factor, x),
        momentum,
        params,
        is_leaf=left_out,
    )


def find_states(tree: Any, kinds: type | tuple[type, ...]) -> list[Any]:
    """All states of some kinds inside an optimizer's state, outermost first."""
    found = []

    def look(node: Any) -> bool:
        if isinstance(node, kinds):
            found.append(node)
        return False

    jax.tree.leaves(tree, is_leaf=look)
    return found


def left_out(x: Any) -> bool:
    """Whether a node stands for parameters that an optimizer does not see.

    Optax's wrappers put a MaskedNode there, `equinox.filter` None.
    """
    return x is None or isinstance(x, optax.MaskedNode)


def _top(node: Any) -> Any:
    return jax.tree.structure(node, is_leaf=lambda x: x is not node)


def _shape(leaf: Any) -> tuple[int, ...] | None:
    """The shape of an array or a number, None of anything else."""
    if isinstance(leaf, int | float | complex):
        return ()
    return getattr(leaf, "shape", None)


def _state_names(state: Any) -> str:
    """The names of the NamedTuples that make up a state."""
    named = [node for node in find_states(state, tuple) if hasattr(node, "_fields")]
    names = dict.fromkeys(type(node).__name__ for node in named)
    return ", ".join(names) or type(state).__name__
