"""Flax NNX: modules in `make_train_step`, and updates of an `nnx.Optimizer`.

Extra: ``pip install msam_optax[flax]``.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from msam_optax.flax._inputs import Inputs
from msam_optax.flax._nnx_statistics import recalibrate_batch_stats
from msam_optax.training._state import TrainState
from msam_optax.training._step import LossFn, loss_and_aux
from msam_optax.transforms._eval_params import eval_params

__all__ = [
    "Inputs",
    "eval_model",
    "init_nnx",
    "nnx_loss",
    "nnx_update",
    "recalibrate_batch_stats",
]

Module = TypeVar("Module", bound=nnx.Module)
# loss(model, batch) -> (loss, aux)
NNXLoss = Callable[[nnx.Module, Any], tuple[jax.Array, Any]]


def nnx_loss(model: nnx.Module, loss: NNXLoss) -> LossFn:
    """The loss function of an NNX module, for :func:`msam_optax.make_train_step`.

    What is not a parameter (batch statistics, the counters of random streams) is the
    train state's ``model_state``; the step keeps that of the clean pass. Both passes
    start from the same streams, so they drop the same units; the step's key is not
    used. To call the model after training, write the state back into it:
    ``nnx.update(model, eval_params(state.opt_state, state.params),
    state.model_state)``.

    Args:
      model: an NNX module, in training mode.
      loss: ``loss(model, batch) -> (loss, aux)``; the loss is a scalar, or one loss
        for each example.

    Returns:
      ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> from flax import nnx
    >>> from msam_optax.flax.nnx import init_nnx, nnx_loss
    >>> def loss(model, batch):
    ...     return jnp.mean((model(batch[0]) - batch[1]) ** 2), {}
    >>> model, tx = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), msam_optax.msam(0.1)
    >>> step = msam_optax.make_train_step(nnx_loss(model, loss), tx)
    >>> state = init_nnx(model, tx)
    >>> state, metrics = step(state, (jnp.ones((8, 3)), jnp.zeros((8, 1))), None)
    """
    graphdef, _, _ = _split(model, nnx.Param)

    def loss_fn(params, model_state, batch, key):
        del key
        inside = nnx.merge(graphdef, params, model_state, copy=True)
        value, aux = loss_and_aux(loss(inside, batch))
        _, _, model_state = _split(inside, nnx.Param)
        return value, (nnx.as_pure(model_state), aux)

    return loss_fn


def init_nnx(model: nnx.Module, optimizer: optax.GradientTransformation) -> TrainState:
    """The first train state of an NNX module, with copies of all its arrays.

    Args:
      model: an NNX module.
      optimizer: any Optax optimizer.

    Returns:
      A :class:`msam_optax.TrainState` whose ``params`` are the module's ``nnx.Param``
      and whose ``model_state`` is all else.
    """
    _, params, model_state = _split(_copy(model), nnx.Param)
    params = nnx.as_pure(params)
    return TrainState(params, optimizer.init(params), nnx.as_pure(model_state))


def nnx_update(
    model: nnx.Module, optimizer: nnx.Optimizer, loss: NNXLoss, batch: Any
) -> tuple[jax.Array, Any]:
    """One training step of an NNX module by its `nnx.Optimizer`, in place.

    For a trainer of your own, inside ``nnx.jit``. The second gradient sees the same
    batch, the same dropout and the same batch statistics as the first; the module keeps
    the statistics of the clean pass.

    Args:
      model: an NNX module, in training mode.
      optimizer: ``nnx.Optimizer(model, tx, wrt=nnx.Param)`` with any method of this
        package, or of Optax, that needs ``grad_fn`` and ``value`` at most.
      loss: ``loss(model, batch) -> (loss, aux)``, the loss a scalar.
      batch: handed to the loss.

    Returns:
      The clean loss, and aux.

    Raises:
      TypeError: if ``optimizer`` is not an ``nnx.Optimizer``.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> from flax import nnx
    >>> from msam_optax.flax.nnx import eval_model, nnx_update
    >>> def loss(model, batch):
    ...     return jnp.mean((model(batch[0]) - batch[1]) ** 2), {}
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, msam_optax.msam(0.1), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer, batch):
    ...     return nnx_update(model, optimizer, loss, batch)
    >>> value, aux = step(model, optimizer, (jnp.ones((8, 3)), jnp.zeros((8, 1))))
    >>> outputs = eval_model(model, optimizer)(jnp.ones((8, 3)))
    """
    _check_optimizer(optimizer)
    graphdef, params, others = _split(model, optimizer.wrt)

    def loss_at(params):
        # A copy: what a pass changes in it, statistics and random streams, is not seen
        # by the other pass.
        inside = nnx.merge(graphdef, params, others, copy=True)
        value, aux = loss_and_aux(loss(inside, batch))
        _, _, changed = _split(inside, optimizer.wrt)
        return value, (aux, changed)

    def grad_fn(params):
        return nnx.as_pure(jax.grad(loss_at, has_aux=True)(params)[0])

    (value, (aux, changed)), grads = jax.value_and_grad(loss_at, has_aux=True)(params)
    optimizer.update(model, grads, grad_fn=grad_fn, value=value)
    nnx.update(model, changed)
    return value, aux


def eval_model(model: Module, optimizer: nnx.Optimizer) -> Module:
    """A copy of the module with the unperturbed parameters: the one to evaluate.

    Call its ``eval()``, and take its batch statistics anew by
    :func:`msam_optax.flax.nnx.recalibrate_batch_stats`.

    Args:
      model: an NNX module.
      optimizer: its optimizer.

    Returns:
      A copy that shares no arrays with the module.

    Raises:
      TypeError: if ``optimizer`` is not an ``nnx.Optimizer``.
    """
    _check_optimizer(optimizer)
    copy = _copy(model)
    params = nnx.as_pure(nnx.state(copy, optimizer.wrt))
    nnx.update(copy, eval_params(nnx.as_pure(optimizer.opt_state), params))
    return copy


def _copy(model: Module) -> Module:
    """A copy with arrays of its own: those of `nnx.clone` are the module's."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"the second argument is a {type(optimizer).__name__}; it must be the "
            "module's nnx.Optimizer(model, tx, wrt=nnx.Param), after the module itself"
        )


def _split(model: nnx.Module, wrt: Any) -> Any:
    """An NNX module's graph, its parameters, and all else that it holds."""
    return nnx.split(model, wrt, ...)
