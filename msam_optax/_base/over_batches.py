"""Means over a whole data set in batches, of numbers and of trees."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from msam_optax._base.numerics import statistics_dtype
from msam_optax._base.trees import check_like, described

MeanLoss = Callable[[Any, Any], jax.Array]
OnBatch = Callable[[], Any]


def wide(params: Any) -> Any:
    """The parameters in float32 at least, all in one dtype."""
    dtype = statistics_dtype(params)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def like(name: str, tree: Any, params: Any) -> Any:
    """The tree in the dtype of `params`; ValueError if it is of another shape."""
    check_like(f"{name} must be a tree like the parameters", tree, params, dtypes=False)
    return jax.tree.map(lambda x, w: jnp.asarray(x, w.dtype), tree, params)


def mean_number(
    number_of: Callable[[Any], Any], batches: Iterable[Any], on_batch: OnBatch | None
) -> float:
    """The mean over all examples, summed in float64 on the host."""
    total, examples = 0.0, 0
    for batch, size in _sized(batches, on_batch):
        total += size * float(number_of(batch))
        examples += size
    return total / examples


def mean_tree(
    tree_of: Callable[[Any], Any], batches: Iterable[Any], on_batch: OnBatch | None
) -> Any:
    """The mean over all examples, by a compensated sum on the device.

    Each batch is waited for, so that no more than one is on the device, and progress
    is told as it is.
    """
    total, error, examples = None, None, 0
    for batch, size in _sized(batches, on_batch):
        tree = tree_of(batch)
        if total is None:
            total, error = (jax.tree.map(jnp.zeros_like, tree) for _ in range(2))
        total, error = jax.block_until_ready(_add(total, error, tree, size))
        examples += size
    return jax.tree.map(lambda x: x / examples, total)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(total: Any, error: Any, tree: Any, size: Any) -> tuple[Any, Any]:
    """Kahan's sum: total + size · tree, and by how much the result is too large."""
    terms = jax.tree.map(lambda x, e: size * x - e, tree, error)
    sums = jax.tree.map(jnp.add, total, terms)
    errors = jax.tree.map(lambda s, t, y: (s - t) - y, sums, total, terms)
    return sums, errors


def _sized(
    batches: Iterable[Any], on_batch: OnBatch | None
) -> Iterator[tuple[Any, int]]:
    """Each batch with its number of examples; tells `on_batch` when it is done."""
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches must be readable several times, but an iterator was given, which "
            "is empty after the first pass: give a list, or an object whose __iter__ "
            "starts anew."
        )
    if isinstance(batches, tuple) and any(hasattr(x, "shape") for x in batches):
        raise ValueError(
            "batches must be a list of batches, but a tuple of arrays was given, "
            f"{described(batches)}: give [batch], or list(batches) if each is one."
        )
    empty = True
    for batch in batches:
        first, *_ = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)] or [()]
        if not first or not first[0]:
            raise ValueError(
                "The leading axis of a batch's first leaf must count its examples, at "
                f"least one, but the batch is {described(batch)}."
            )
        empty = False
        yield batch, first[0]
        if on_batch is not None:
            on_batch()
    if empty:
        raise ValueError("batches must hold at least one batch, but they are empty.")


# The loss function is static: it is compiled once for each function object.


@functools.partial(jax.jit, static_argnums=0)
def batch_loss(loss_fn: MeanLoss, params: Any, batch: Any) -> jax.Array:
    """The loss of one batch."""
    value = loss_fn(params, batch)
    if isinstance(value, tuple) or jnp.shape(value) != ():
        raise ValueError(
            "loss_fn must return the mean loss over the batch, one number without "
            f"auxiliary outputs, but it returned {described(value)}."
        )
    return value


@functools.partial(jax.jit, static_argnums=0)
def batch_gradient(loss_fn: MeanLoss, params: Any, batch: Any) -> Any:
    """The gradient of one batch."""
    return jax.grad(batch_loss, argnums=1)(loss_fn, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def batch_hessian_vector(
    loss_fn: MeanLoss, params: Any, vector: Any, batch: Any
) -> Any:
    """H · vector for the Hessian of one batch, forward over reverse."""

    def at(params):
        return batch_gradient(loss_fn, params, batch)

    return jax.jvp(at, (params,), (vector,))[1]
