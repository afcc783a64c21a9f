"""Flax Linen modules in `make_train_step` (extra: ``pip install msam_optax[flax]``)."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax

from msam_optax.train import LossFn, TrainState


def linen_loss(
    model: nn.Module,
    loss: Callable[[Any, Any], tuple[jax.Array, Any]],
    *,
    inputs: Callable[[Any], Any] = lambda batch: batch[0],
    rngs: Sequence[str] = ("dropout",),
    **apply_kwargs: Any,
) -> LossFn:
    """The loss function of a Linen module, for :func:`msam_optax.make_train_step`.

    Mutable collections (batch statistics) are the train state's ``model_state``; the
    step keeps those of the clean pass. All random streams are drawn from the step's
    key, so both passes drop the same units.

    Args:
      model: a Linen module.
      loss: ``loss(outputs, batch) -> (loss, aux)``; the loss is a scalar, or one loss
        for each example.
      inputs: what of the batch the module is called with.
      rngs: names of the module's random streams.
      **apply_kwargs: passed to the module, for instance ``train=True``.

    Returns:
      ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, msam_optax, optax
    >>> from msam_optax.flax_linen import init_linen, linen_loss
    >>> def loss(outputs, batch):
    ...     return jnp.mean((outputs - batch[1]) ** 2), {}
    >>> model, tx = nn.Dense(1), msam_optax.msam(0.1)
    >>> batch = (jnp.ones((8, 3)), jnp.zeros((8, 1)))
    >>> state = init_linen(model, tx, jax.random.key(0), batch[0])
    >>> step = msam_optax.make_train_step(linen_loss(model, loss), tx)
    >>> state, metrics = step(state, batch, jax.random.key(1))
    """

    def loss_fn(params, model_state, batch, key):
        variables = {"params": params, **model_state}
        streams = (
            {}
            if key is None
            else dict(zip(rngs, jax.random.split(key, len(rngs)), strict=True))
        )
        outputs = model.apply(
            variables,
            inputs(batch),
            rngs=streams,
            mutable=list(model_state) or False,
            **apply_kwargs,
        )
        if model_state:
            outputs, model_state = outputs
        value, aux = loss(outputs, batch)
        return value, (model_state, aux)

    return loss_fn


def init_linen(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    inputs: Any,
    **apply_kwargs: Any,
) -> TrainState:
    """Initialises a Linen module and its optimizer.

    Args:
      model: a Linen module.
      optimizer: any Optax optimizer.
      key: random key of the initial parameters.
      inputs: an example of what the module is called with.
      **apply_kwargs: passed to the module, for instance ``train=False``.

    Returns:
      A :class:`msam_optax.TrainState` whose ``model_state`` is the dict of all
      collections other than the parameters.
    """
    variables = dict(model.init(key, inputs, **apply_kwargs))
    params = variables.pop("params")
    return TrainState(params, optimizer.init(params), variables)
