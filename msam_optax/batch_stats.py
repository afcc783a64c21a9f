"""Batch statistics at given parameters (extra: ``pip install msam_optax[flax]``).

Batch norm's running averages belong to the parameters of the last steps of training.
MSAM trains at perturbed parameters and evaluates the unperturbed ones: take the
statistics anew there, by forward passes over training data (as the authors of `MSAM
<https://arxiv.org/abs/2401.12033>`_ do).
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


def recalibrate_batch_stats(
    model: nn.Module,
    params: Any,
    model_state: Any,
    batches: Iterable[Any],
    **apply_kwargs: Any,
) -> Any:
    """Takes a Linen module's batch statistics anew, as an exact average.

    Each statistic is the mean over the examples of that of their batch: all batches
    count alike, in the place of a running average's tail. As in training, the variance
    is that within the batches.

    *Cost*: one forward pass a batch, of which one shape is compiled once.

    Args:
      model: a Linen module; its statistics are the collection ``batch_stats``.
      params: where the statistics are taken, :func:`msam_optax.eval_params` of a run.
      model_state: the module's collections other than the parameters.
      batches: the module's inputs without labels, batch by batch: a list for instance.
      **apply_kwargs: passed to the module as in training, for instance ``train=True``.

    Returns:
      `model_state` with the new ``batch_stats``; as it is for a model without any.

    Raises:
      ValueError: if there are no batches, one batch was given in their place, or the
        module, called so, takes no statistics.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from msam_optax.batch_stats import recalibrate_batch_stats
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> inputs = jnp.array([[0.0], [2.0]])
    >>> state = model.init(jax.random.key(0), inputs)
    >>> params = state.pop("params")
    >>> state = recalibrate_batch_stats(model, params, state, [inputs, inputs + 1.0])
    >>> print(state["batch_stats"]["mean"], state["batch_stats"]["var"])
    [1.5] [1.]
    """
    _check_batches(batches)
    if "batch_stats" not in model_state:
        return model_state
    update = partial(_linen_statistics, model, tuple(sorted(apply_kwargs.items())))
    old = model_state["batch_stats"]
    variables = {**model_state, "params": params}
    del variables["batch_stats"]
    mean, decay = _Mean(), None
    for inputs in batches:
        if decay is None:
            decay = _decay(update, variables, old, inputs)
            # A layer that is frozen normalises by its statistics, and keeps them.
            running = jax.tree.map(lambda d, s: jnp.where(d == 1, s, 0), decay, old)
        mean.add(update(variables, running, inputs), inputs)
    statistics = jax.tree.map(
        lambda t, d, s: s if jnp.all(d == 1) else t / _share(d),
        mean.result(),
        decay,
        old,
    )
    return {**model_state, "batch_stats": statistics}


def recalibrate_nnx_batch_stats(
    model: nnx.Module, batches: Iterable[Any], **call_kwargs: Any
) -> None:
    """Takes an NNX module's batch statistics anew, as an exact average, in place.

    As :func:`recalibrate_batch_stats`, at the parameters that the module holds; see
    :func:`msam_optax.flax_nnx.eval_model`. Random streams and other state, the mode of
    training or evaluation included, stay as they are.

    Args:
      model: an NNX module, all of whose batch norm layers are ``nnx.BatchNorm``.
      batches: the module's inputs without labels, batch by batch: a list for instance.
      **call_kwargs: passed to the module.

    Raises:
      ValueError: if there are no batches, but batch statistics, or one batch was given
        in their place.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from msam_optax.batch_stats import recalibrate_nnx_batch_stats
    >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    >>> inputs = jnp.array([[0.0], [2.0]])
    >>> recalibrate_nnx_batch_stats(model, [inputs, inputs + 1.0])
    >>> print(model.mean[...], model.var[...])
    [1.5] [1.]
    """
    _check_batches(batches)
    training = nnx.clone(model)
    training.train()
    for _, module in nnx.iter_modules(training):
        if isinstance(module, nnx.BatchNorm):
            module.momentum = 0.0  # the running average is the last batch's
    graphdef, state = nnx.split(training)
    if not jax.tree.leaves(nnx.state(training, nnx.BatchStat)):
        return
    update = partial(_nnx_statistics, graphdef, tuple(sorted(call_kwargs.items())))
    mean = _Mean()
    for inputs in batches:
        mean.add(update(state, inputs), inputs)
    nnx.update(model, mean.result())


def _check_batches(batches: Any) -> None:
    """ValueError for an array whose examples would be taken for batches."""
    if hasattr(batches, "shape") and len(batches.shape) < 3:
        raise ValueError(
            "batches must hold the module's inputs batch by batch, but an array of "
            f"shape {batches.shape} was given: give [batch]."
        )


def _decay(update: Any, variables: Any, statistics: Any, inputs: Any) -> Any:
    """Of the running averages; 1 where the module takes no statistics.

    A step of the running average is decay * running + (1 - decay) * batch. The step
    from ones less that from zeros is the decay, exactly in a network of zeros, whose
    batch statistics are 0.
    """
    network = {**variables, "params": optax.tree.zeros_like(variables["params"])}
    inputs = jax.tree.map(jnp.zeros_like, inputs)
    decay = optax.tree.sub(
        update(network, optax.tree.ones_like(statistics), inputs),
        update(network, optax.tree.zeros_like(statistics), inputs),
    )
    if all(bool(jnp.all(d == 1)) for d in jax.tree.leaves(decay)):
        raise ValueError(
            "The module left its batch statistics as they are: call it as in training, "
            "recalibrate_batch_stats(..., train=True) for instance."
        )
    return decay


def _share(decay: jax.Array) -> float:
    """1 - decay, from the number that was written: 1 - float32(0.99) is off by 2e-6."""
    return 1 - float(str(np.asarray(decay).flat[0]))


class _Mean:
    """Mean of trees, one a batch, weighted by the examples in the batch."""

    def __init__(self) -> None:
        self._total: Any = None
        self._count = 0

    def add(self, statistics: Any, inputs: Any) -> None:
        size = jax.tree.leaves(inputs)[0].shape[0]
        weighted = jax.tree.map(lambda x: size * x, statistics)
        if self._total is None:
            self._total = weighted
        else:
            self._total = optax.tree.add(self._total, weighted)
        self._count += size

    def result(self) -> Any:
        if not self._count:
            raise ValueError("Batch statistics need at least one batch of examples.")
        return jax.tree.map(lambda x: x / self._count, self._total)


@partial(jax.jit, static_argnums=(0, 1))
def _linen_statistics(model, apply_kwargs, variables, statistics, inputs):
    _, updated = model.apply(
        {**variables, "batch_stats": statistics},
        inputs,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
        **dict(apply_kwargs),
    )
    return updated["batch_stats"]


@partial(jax.jit, static_argnums=(0, 1))
def _nnx_statistics(graphdef, call_kwargs, state, inputs):
    model = nnx.merge(graphdef, state, copy=True)
    model(inputs, **dict(call_kwargs))
    return nnx.state(model, nnx.BatchStat)
