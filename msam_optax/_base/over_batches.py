"""Means over a whole data set in batches, of numbers and of trees."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msam_optax._base.numerics import statistics_dtype
from msam_optax._base.trees import check_alive, check_like, described
from msam_optax._base.weighted import WeightedMean, is_weighted

# loss_fn(params, batch) -> the mean loss of the batch, a scalar or a WeightedMean
MeanLoss = Callable[[Any, Any], jax.Array | WeightedMean]
OnBatch = Callable[[], Any]


def wide(params: Any) -> Any:
    """The parameters in float32 at least, all in one dtype."""
    check_alive("params", params)
    dtype = statistics_dtype(params)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def like(name: str, tree: Any, params: Any) -> Any:
    """The tree in the dtype of `params`; ValueError if it is of another shape."""
    check_like(f"{name} must be a tree like the parameters", tree, params, dtypes=False)
    return jax.tree.map(lambda x, w: jnp.asarray(x, w.dtype), tree, params)


class Batches(NamedTuple):
    """A data set in batches, each of which counts by its weight.

    Attributes:
      batches: the data.
      on_batch: called once a batch.
      weight_of: ``weight_of(batch)``, None where its examples count alike.
    """

    batches: Iterable[Any]
    on_batch: OnBatch | None
    weight_of: Callable[[Any], Any]


def over(
    loss_fn: MeanLoss, params: Any, batches: Iterable[Any], on_batch: OnBatch | None
) -> Batches:
    """The batches, each of which counts as the loss says."""
    return Batches(batches, on_batch, functools.partial(_weight, loss_fn, params))


def mean_number(number_of: Callable[[Any], Any], data: Batches) -> float:
    """The mean over all of the data, summed in float64 on the host."""
    total, weights = 0.0, 0.0
    for batch, weight in _weighted(data):
        total += weight * float(number_of(batch))
        weights += weight
    return total / weights


def mean_tree(tree_of: Callable[[Any], Any], data: Batches) -> Any:
    """The mean over all of the data, by a compensated sum on the device.

    Each batch is waited for, so that no more than one is on the device, and progress
    is told as it is.
    """
    total, error, weights = None, None, 0.0
    for batch, weight in _weighted(data):
        tree = tree_of(batch)
        if total is None:
            total, error = (jax.tree.map(jnp.zeros_like, tree) for _ in range(2))
        total, error = jax.block_until_ready(_add(total, error, tree, weight))
        weights += weight
    return jax.tree.map(lambda x: x / weights, total)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(total: Any, error: Any, tree: Any, weight: Any) -> tuple[Any, Any]:
    """Kahan's sum: total + weight · tree, and by how much the result is too large."""
    terms = jax.tree.map(lambda x, e: weight * x - e, tree, error)
    sums = jax.tree.map(jnp.add, total, terms)
    errors = jax.tree.map(lambda s, t, y: (s - t) - y, sums, total, terms)
    return sums, errors


_ONE = (
    "batches must be a list of batches, but a {} was given, {}: give [batch], or "
    "list({}) if each is one."
)


def _weighted(data: Batches) -> Iterator[tuple[Any, float]]:
    """Each batch with its weight; tells `on_batch` when it is done."""
    batches, on_batch, weight_of = data
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches must be readable several times, but an iterator was given, which "
            "is empty after the first pass: give a list, or an object whose __iter__ "
            "starts anew."
        )
    if isinstance(batches, Mapping):
        raise ValueError(_ONE.format("dict", described(batches), "batches.values()"))
    if isinstance(batches, tuple) and any(hasattr(x, "shape") for x in batches):
        raise ValueError(_ONE.format("tuple of arrays", described(batches), "batches"))
    empty, weights = True, 0.0
    for batch in batches:
        first, *_ = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)] or [()]
        if not first or not first[0]:
            raise ValueError(
                "The leading axis of a batch's first leaf must count its examples, at "
                f"least one, but the batch is {described(batch)}."
            )
        empty = False
        # By examples where the loss knows no weights of its own.
        weight = weight_of(batch)
        weight = float(first[0] if weight is None else weight)
        weights += weight
        yield batch, weight
        if on_batch is not None:
            on_batch()
    if empty:
        raise ValueError("batches must hold at least one batch, but they are empty.")
    if weights == 0:
        raise ValueError(
            "All batches have weight 0 by the WeightedMean that loss_fn returns, so "
            "that there is no mean over them."
        )


# The loss function is static: it is compiled once for each function object.


@functools.partial(jax.jit, static_argnums=0)
def batch_loss(loss_fn: MeanLoss, params: Any, batch: Any) -> jax.Array:
    """The loss of one batch."""
    value = loss_fn(params, batch)
    if is_weighted(value):
        return value.mean()
    if isinstance(value, tuple) or jnp.shape(value) != ():
        raise ValueError(
            "loss_fn must return the mean loss over the batch, one number or a "
            "WeightedMean, without auxiliary outputs, but it returned "
            f"{described(value)}."
        )
    return value


@functools.partial(jax.jit, static_argnums=0)
def _weight(loss_fn: MeanLoss, params: Any, batch: Any) -> jax.Array | None:
    """The weight of one batch, of which XLA computes no loss; None where it has none.

    A batch's mean is as it is; only here do the batches' weights enter.
    """
    value = loss_fn(params, batch)
    return value.summed().weight if is_weighted(value) else None


@functools.partial(jax.jit, static_argnums=0)
def batch_gradient(loss_fn: MeanLoss, params: Any, batch: Any) -> Any:
    """The gradient of one batch."""
    return jax.grad(batch_loss, argnums=1)(loss_fn, params, batch)


@functools.partial(jax.jit, static_argnums=0)
def batch_hessian_vector(
    loss_fn: MeanLoss, params: Any, vector: Any, batch: Any
) -> Any:
    """H · vector for the Hessian of one batch, forward over reverse."""

    def at(params: Any) -> Any:
        return batch_gradient(loss_fn, params, batch)

    return jax.jvp(at, (params,), (vector,))[1]
