"""Batch statistics of Linen modules at given parameters."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax.flax._means import Mean, check_batches


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
    >>> from msam_optax.flax.linen import recalibrate_batch_stats
    >>> model = nn.BatchNorm(use_running_average=False)
    >>> inputs = jnp.array([[0.0], [2.0]])
    >>> state = model.init(jax.random.key(0), inputs)
    >>> params = state.pop("params")
    >>> state = recalibrate_batch_stats(model, params, state, [inputs, inputs + 1.0])
    >>> print(state["batch_stats"]["mean"], state["batch_stats"]["var"])
    [1.5] [1.]
    """
    check_batches(batches)
    if "batch_stats" not in model_state:
        return model_state
    update = partial(_linen_statistics, model, tuple(sorted(apply_kwargs.items())))
    old = model_state["batch_stats"]
    variables = {**model_state, "params": params}
    del variables["batch_stats"]
    mean, decay = Mean(), None
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
