r"""Gradients of batches too large for the memory, micro-batch by micro-batch.

With :math:`B = B_1 \cup \dots \cup B_k` of equal weight,
:math:`\nabla L_B = \frac1k \sum_i \nabla L_{B_i}`, else :math:`\nabla L_B = \sum_i
w_i \nabla L_{B_i} / \sum_i w_i`. Each gradient is added to the sum before the next
micro-batch begins, so only one micro-batch's activations are kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.numerics import safe_divide
from msam_optax._base.weighted import divided, is_weighted, mean_of, summed


def microbatched(loss_fn: Callable[..., Any], microbatches: int) -> Callable[..., Any]:
    """A loss function whose loss and gradient are taken micro-batch by micro-batch.

    What `make_train_step(..., microbatches=...)` trains on. Each gradient is that of
    the whole batch, in reverse mode and with respect to the parameters; all else has
    none.

    Random draws differ between the micro-batches. The model's state is averaged over
    them, each of which starts from the step's: batch norm's running average moves as
    far as with the large batch, by the mean of the micro-batches' statistics. What has
    no average, counters and keys, goes on from one micro-batch to the next. The
    auxiliary outputs are averaged as well, counts and booleans in float32, and each
    `WeightedMean` by its weights.

    Args:
      loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state,
        aux))``; one loss for each example is averaged, all with the same weight. With
        a `WeightedMean` the parts count by theirs.
      microbatches: number of micro-batches; divides the batch's first axis.

    Returns:
      A loss function with a scalar loss, which raises ValueError where the batch can't
      be cut so.
    """

    def one(params: Any, model_state: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        losses, (model_state, aux) = loss_fn(params, model_state, batch, key)
        weight = losses.summed().weight if is_weighted(losses) else None
        return mean_of(losses), (
            weight,
            model_state,
            jax.tree.map(_averaged, summed(aux)),
        )

    def over_microbatches(
        function: Callable[..., Any], model_state: Any, batch: Any, key: Any
    ) -> tuple[Any, Any, Any]:
        """Averages (means, aux, model state) of function(model state, part, its key).

        Which also returns the weight of the part's means, None for equal ones.
        """
        parts = _parts(batch, microbatches)

        def at(index: Any, state: Any) -> tuple[Any, Any]:
            part = jax.tree.map(lambda x: x[:, index], parts)
            part_key = jax.tree.map(lambda k: jax.random.fold_in(k, index), key)
            means, weight, aux, state = function(state, part, part_key)
            if weight is not None:
                means = jax.tree.map(lambda x: weight * x, means)
            return (means, weight, aux), state

        def add(index: Any, total: Any) -> Any:
            _, latest = total
            state = jax.tree.map(
                lambda first, last: first if _is_averaged(first) else last,
                model_state,
                latest,
            )
            return jax.tree.map(
                lambda t, x: t + x / microbatches if _is_averaged(x) else x,
                total,
                at(index, state),
            )

        shapes = jax.eval_shape(at, 0, model_state)
        first = jax.tree.map(_zero, shapes[0]), jax.tree.map(_zero, model_state)
        total = jax.lax.fori_loop(0, microbatches, add, first)
        (means, weight, aux), state = jax.tree.map(
            lambda t, x: t.astype(x.dtype), total, shapes
        )
        if weight is not None:
            means = jax.tree.map(lambda x: safe_divide(x, weight), means)
        return means, divided(aux), state

    @jax.custom_vjp
    def averaged(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        def value(*args: Any) -> tuple[Any, ...]:
            loss, (weight, state, aux) = one(params, *args)
            return loss, weight, aux, state

        loss, aux, state = over_microbatches(value, model_state, batch, key)
        return loss, (state, aux)

    def forward(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        value_and_grad = partial(jax.value_and_grad(one, has_aux=True), params)

        def values(*args: Any) -> tuple[Any, ...]:
            (loss, (weight, state, aux)), gradient = value_and_grad(*args)
            return (loss, gradient), weight, aux, state

        (loss, gradient), aux, state = over_microbatches(
            values, model_state, batch, key
        )
        return (loss, (state, aux)), optax.tree.cast_like(gradient, params)

    def backward(gradient: Any, cotangents: Any) -> tuple[Any, ...]:
        by_loss, _ = cotangents
        scaled = jax.tree.map(lambda g: (by_loss * g).astype(g.dtype), gradient)
        return scaled, None, None, None

    averaged.defvjp(forward, backward)
    return averaged


def _is_averaged(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _averaged(x: Any) -> Any:
    """An auxiliary output, a count for instance, in a dtype that has an average."""
    x = jnp.asarray(x)
    counts = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == bool
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if counts else x


def _zero(x: Any) -> Any:
    """Where a sum begins, or x itself where there is none."""
    if not _is_averaged(x):
        return x if isinstance(x, jax.Array) else jnp.zeros(x.shape, x.dtype)
    # Sums of many bfloat16 or float16 numbers lose the small ones.
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))


def _parts(batch: Any, microbatches: int) -> Any:
    """Each array [B, ...] as [B / microbatches, microbatches, ...].

    A micro-batch is a column: a batch sharded along its first axis stays so in each.
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes or max(sizes)[0] % microbatches:
        raise ValueError(
            f"A batch can be cut into {microbatches} micro-batches if this divides the "
            "first axis of all its arrays, but their shapes are "
            f"{jax.tree.map(jnp.shape, batch)!r}."
        )
    return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]), batch)
