"""Batch statistics of NNX modules at given parameters."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
from flax import nnx

from msam_optax.flax._means import Mean, check_batches


def recalibrate_batch_stats(
    model: nnx.Module, batches: Iterable[Any], **call_kwargs: Any
) -> None:
    """Takes an NNX module's batch statistics anew, as an exact average, in place.

    As :func:`msam_optax.flax.linen.recalibrate_batch_stats`, at the parameters that the
    module holds; see :func:`msam_optax.flax.nnx.eval_model`. Random streams and other
    state, the mode of training or evaluation included, stay as they are.

    Args:
      model: an NNX module, all of whose batch norm layers are ``nnx.BatchNorm``.
      batches: the module's inputs without labels, batch by batch: a list for instance.
      **call_kwargs: passed to the module.

    Raises:
      ValueError: if there are no batches, but batch statistics, or one batch was given
        in their place.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from msam_optax.flax.nnx import recalibrate_batch_stats
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> inputs = jnp.array([[0.0], [2.0]])
    >>> recalibrate_batch_stats(model, [inputs, inputs + 1.0])
    >>> print(model.mean[...], model.var[...])
    [1.5] [1.]
    """
    check_batches(batches)
    training = nnx.clone(model)
    training.train()
    for _, module in nnx.iter_modules(training):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0  # the running average is the last batch's
    graphdef, state = nnx.split(training)
    if not jax.tree.leaves(nnx.state(training, nnx.BatchStat)):
        return
    update = partial(_nnx_statistics, graphdef, tuple(sorted(call_kwargs.items())))
    mean = Mean()
    for inputs in batches:
        mean.add(update(state, inputs), inputs)
    nnx.update(model, mean.result())


@partial(jax.jit, static_argnums=(0, 1))
def _nnx_statistics(graphdef, call_kwargs, state, inputs):
    model = nnx.merge(graphdef, state, copy=True)
    model(inputs, **dict(call_kwargs))
    return nnx.state(model, nnx.BatchStat)
