"""Flax Linen: modules in `make_train_step`, and a TrainState for steps of your own.

Extra: ``pip install msam_optax[flax]``.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import optax
from flax.training import train_state

from msam_optax.flax._inputs import Inputs
from msam_optax.flax._linen_statistics import recalibrate_batch_stats
from msam_optax.training._state import TrainState
from msam_optax.training._step import LossFn, loss_and_aux
from msam_optax.transforms._eval_params import eval_params

__all__ = [
    "Inputs",
    "LinenTrainState",
    "init_linen",
    "linen_loss",
    "recalibrate_batch_stats",
]


def _first(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        raise ValueError(
            f"the batch is a dict of {', '.join(map(repr, batch))}; linen_loss needs "
            "to know what the module is called with, for instance inputs=lambda batch: "
            'batch["image"]'
        )
    return batch[0]


def linen_loss(
    model: nn.Module,
    loss: Callable[[Any, Any], tuple[jax.Array, Any]],
    *,
    inputs: Callable[[Any], Any] = _first,
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
      inputs: what of the batch the module is called with; its first element by
        default. A batch that is a dict needs it.
      rngs: names of the module's random streams.
      **apply_kwargs: passed to the module, for instance ``train=True``.

    Returns:
      ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``.

    Raises:
      ValueError: by ``loss_fn``, if the batch is a dict and ``inputs`` is not given.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, msam_optax, optax
    >>> from msam_optax.flax.linen import init_linen, linen_loss
    >>> def loss(outputs, batch):
    ...     return jnp.mean((outputs - batch[1]) ** 2), {}
    >>> model, tx = nn.Dense(1), msam_optax.msam(0.1)
    >>> batch = (jnp.ones((8, 3)), jnp.zeros((8, 1)))
    >>> state = init_linen(model, tx, jax.random.key(0), batch[0])
    >>> step = msam_optax.make_train_step(linen_loss(model, loss), tx)
    >>> state, metrics = step(state, batch, jax.random.key(1))
    """

    def loss_fn(params, model_state, batch, key):
        variables = {"params": params, **(model_state or {})}
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
        value, aux = loss_and_aux(loss(outputs, batch))
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


class LinenTrainState(train_state.TrainState):
    """Flax's TrainState, whose optimizer may ask for the gradient anew.

    In the place of :class:`flax.training.train_state.TrainState` in a trainer of your
    own, also as the base of a subclass with further fields; with
    :func:`msam_optax.make_train_step` you need none. Batch statistics are yours to keep
    apart: take them from the clean gradient, and let ``grad_fn`` drop its own.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, msam_optax, optax
    >>> from msam_optax.flax.linen import LinenTrainState
    >>> model, x, y = nn.Dense(1), jnp.ones((8, 3)), jnp.zeros((8, 1))
    >>> state = LinenTrainState.create(
    ...     apply_fn=model.apply,
    ...     params=model.init(jax.random.key(0), x)["params"],
    ...     tx=msam_optax.sam(optax.sgd(0.1)),
    ... )
    >>> @jax.jit
    ... def step(state):
    ...     def loss(params):
    ...         return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)
    ...     grad_fn = jax.grad(loss)
    ...     return state.apply_gradients(grads=grad_fn(state.params), grad_fn=grad_fn)
    >>> state = step(state)
    >>> logits = model.apply({"params": state.eval_params}, x)
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        grad_fn: Callable[[Any], Any] | None = None,
        extra_args: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> "LinenTrainState":
        """Updates step, params and opt_state.

        Args:
          grads: clean gradients, a tree like the parameters.
          grad_fn: ``grad_fn(params) -> grads`` of the same batch with the same random
            key; needed by all methods that take a second gradient.
          extra_args: what else the optimizer's ``update`` needs, for instance
            ``{"value": loss}``, or :func:`msam_optax.esam`'s per-example losses.
          **kwargs: other fields to replace, for instance ``batch_stats=...``.
        """
        given = (
            {**extra_args} if grad_fn is None else {**extra_args, "grad_fn": grad_fn}
        )
        tx = optax.with_extra_args_support(self.tx)

        def update(updates, state, params=None):
            return tx.update(updates, state, params, **given)

        handing_on = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = super(LinenTrainState, handing_on).apply_gradients(
            grads=grads, **kwargs
        )
        return stepped.replace(tx=self.tx)

    @property
    def eval_params(self) -> Any:
        """The unperturbed parameters: those to evaluate and to save."""
        return eval_params(self.opt_state, self.params)
