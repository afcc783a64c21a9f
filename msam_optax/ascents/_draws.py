"""Random numbers for every tensor of a tree, without compiling a draw for each.

A draw is a few hundred instructions, and on CPU even the slice that takes a tensor's
part out of a larger array is compiled again in every fusion that uses it. So the draws
are made together, and each is handed on as an array that no fusion reaches behind. The
numbers are those of one draw after the other, each with its key of the split.

Both are jitted for the sake of steps that are not: a `cond` would be compiled for each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def coins_like(tree: Any, key: jax.Array, step: jax.Array, probability: Any) -> Any:
    """For each leaf 1 with a probability, else 0: float32 scalars.

    Args:
      tree: whose leaves count.
      key: of all draws.
      step: int32 scalar, at least 0.
      probability: of 1.
    """
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))

    def draw_all() -> list[jax.Array]:
        coins = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
        return [*coins.astype(jnp.float32)]

    return jax.tree.unflatten(treedef, _in_a_branch(draw_all, step))


@partial(jax.jit, static_argnames="draw")
def draws_like(
    tree: Any, key: jax.Array, step: jax.Array, draw: Callable[[jax.Array, Any], Any]
) -> Any:
    """``draw(key, leaf)`` for each leaf, in one loop for all of a shape and dtype.

    Where such leaves are sharded along different axes, some of their draws change
    devices: one all-to-all a shape.

    Args:
      tree: of arrays; their shapes and dtypes count.
      key: of all draws.
      step: int32 scalar, at least 0.
      draw: from a key and a leaf to an array; the same function for each step.
    """
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    alike: dict[Any, list[int]] = {}
    for place, leaf in enumerate(leaves):
        alike.setdefault((jnp.shape(leaf), jnp.result_type(leaf)), []).append(place)

    def draw_all() -> list[jax.Array]:
        draws: list[Any] = [None] * len(leaves)
        for places in alike.values():
            leaf = leaves[places[0]]
            together = jax.lax.map(
                lambda key, leaf=leaf: draw(key, leaf), keys[np.array(places)]
            )
            for place, one in zip(places, together, strict=True):
                draws[place] = one
        return draws

    return jax.tree.unflatten(treedef, _in_a_branch(draw_all, step))


def _in_a_branch(
    draw_all: Callable[[], list[jax.Array]], step: jax.Array
) -> list[jax.Array]:
    """What is drawn, in a branch; that step is at least 0 is what XLA can't know."""

    def nothing() -> list[jax.Array]:
        shapes = jax.eval_shape(draw_all)
        return [jnp.zeros(x.shape, x.dtype) for x in shapes]

    # Nothing is fused into a branch.
    return jax.lax.cond(step >= 0, draw_all, nothing)


def wide_normal(key: jax.Array, like: jax.Array) -> jax.Array:
    """Standard normal numbers in float32 at least: the same for all short dtypes."""
    dtype = jnp.promote_types(jnp.result_type(like), jnp.float32)
    return jax.random.normal(key, jnp.shape(like), dtype)
