r"""Gradients of batches too large for the memory, micro-batch by micro-batch.

With :math:`B = B_1 \cup \dots \cup B_k` of equal size,
:math:`\nabla L_B = \frac1k \sum_i \nabla L_{B_i}`: each gradient is added to the sum
before the next micro-batch begins, so only one micro-batch's activations are kept.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from msam_optax._hyperparams import check_integer
from msam_optax.train import LossFn


def microbatched(loss_fn: LossFn, microbatches: int) -> LossFn:
    """A loss function whose loss and gradient are taken micro-batch by micro-batch.

    For :func:`msam_optax.make_train_step`. Both gradients of a SAM step are those of
    the whole batch, so **there is one epsilon for the whole batch**, and the step
    equals that of the large batch. For one epsilon for each micro-batch
    (m-sharpness, less synchronisation) leave the loss function as it is, hand the step
    one micro-batch after the other, and let Optax accumulate behind the ascent:
    ``optax.chain(sharpness_aware_gradient(ascent), optax.MultiSteps(optimizer,
    k).gradient_transformation())``.

    Random draws differ between the micro-batches, and are the same in both gradients.
    The model's state is averaged over the micro-batches, each of which starts from the
    step's: batch norm's running average moves as far as with the large batch, by the
    mean of the micro-batches' statistics. Of integers (counters) it is the last one.
    The auxiliary outputs are averaged in the same way.

    *Cost*: the same gradients, in micro-batches; memory of one micro-batch's
    activations and one more tree like the parameters. On CPU, XLA runs a convolution's
    gradient many times slower inside a loop, as here: accumulate over steps there.

    Args:
      loss_fn: as for `make_train_step`, ``loss_fn(params, model_state, batch, key)``;
        one loss for each example is averaged, so methods that select samples
        (:func:`msam_optax.esam`) can't be used.
      microbatches: number of micro-batches; divides the batch's first axis.

    Returns:
      A loss function with a scalar loss. It can be differentiated once, in reverse.

    Raises:
      ValueError: if microbatches is not a positive integer, or, when the loss is
        called, does not divide the batch.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> def loss_fn(params, model_state, batch, key):
    ...     return jnp.mean((batch @ params) ** 2), (model_state, {})
    >>> tx = msam_optax.sam(optax.sgd(0.1))
    >>> step = msam_optax.make_train_step(msam_optax.microbatched(loss_fn, 4), tx)
    >>> params = jnp.ones(3)
    >>> state = msam_optax.TrainState(params, tx.init(params))
    >>> state, metrics = step(state, jnp.eye(8, 3), None)
    """
    check_integer("microbatches", microbatches, 1)

    def one(params, model_state, batch, key):
        losses, others = loss_fn(params, model_state, batch, key)
        return jnp.mean(losses), others

    def over_microbatches(function, model_state, batch, key):
        """Averages function(model_state, micro-batch, its key) over all of them."""
        parts = _parts(batch, microbatches)

        def at(index):
            part = jax.tree.map(lambda x: x[:, index], parts)
            part_key = None if key is None else jax.random.fold_in(key, index)
            return function(model_state, part, part_key)

        def is_averaged(x):
            return jnp.issubdtype(x.dtype, jnp.inexact)

        def zero(x):
            # Sums of many bfloat16 or float16 numbers lose the small ones.
            wide = jnp.promote_types(x.dtype, jnp.float32)
            return jnp.zeros(x.shape, wide if is_averaged(x) else x.dtype)

        def add(index, total):
            return jax.tree.map(
                lambda t, x: t + x / microbatches if is_averaged(x) else x,
                total,
                at(index),
            )

        shapes = jax.eval_shape(at, 0)
        total = jax.lax.fori_loop(0, microbatches, add, jax.tree.map(zero, shapes))
        return jax.tree.map(lambda t, x: t.astype(x.dtype), total, shapes)

    @jax.custom_vjp
    def averaged(params, model_state, batch, key):
        return over_microbatches(partial(one, params), model_state, batch, key)

    def forward(params, model_state, batch, key):
        value_and_grad = jax.value_and_grad(one, has_aux=True)
        results, gradient = over_microbatches(
            partial(value_and_grad, params), model_state, batch, key
        )
        return results, gradient

    def backward(gradient, cotangents):
        by_loss, _ = cotangents
        scaled = jax.tree.map(lambda g: (by_loss * g).astype(g.dtype), gradient)
        return scaled, None, None, None

    averaged.defvjp(forward, backward)
    return averaged


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
