"""Flax NNX: modules in `make_train_step`, and updates of an `nnx.Optimizer`.

Extra: ``pip install msam_optax[flax]``.
"""

from typing import Any, TypeVar

from msam_optax._base.versions import require as _require

_require("flax", extra="flax")

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from msam_optax._base.hyperparams import check_transformation
from msam_optax._base.weighted import divided, is_weighted, mean_of
from msam_optax.flax import _nnx_passes as passes
from msam_optax.flax._arguments import check_function, check_module
from msam_optax.flax._inputs import Inputs
from msam_optax.flax._nnx_captured import objects_in
from msam_optax.flax._nnx_optimizer import call_update, check_optimizer, handing_on
from msam_optax.flax._nnx_passes import NNXLoss
from msam_optax.flax._nnx_statistics import recalibrate_batch_stats
from msam_optax.flax._pure import as_pure
from msam_optax.flax._slow_cond import warn_of_a_slow_cond
from msam_optax.training._gradients import LossFn
from msam_optax.training._metrics import PerturbationMetrics
from msam_optax.training._metrics import step_metrics as msam_step_metrics
from msam_optax.training._state import TrainState
from msam_optax.transforms._eval_params import eval_params
from msam_optax.transforms._placement import check_wrappers

__all__ = [
    "Inputs",
    "eval_model",
    "init_nnx",
    "nnx_loss",
    "nnx_update",
    "recalibrate_batch_stats",
    "step_metrics",
]

Module = TypeVar("Module", bound=nnx.Module)


def nnx_loss(model: nnx.Module, loss: NNXLoss, *others: Any) -> LossFn:
    """The loss function of an NNX module, for :func:`msam_optax.make_train_step`.

    What is not a parameter (batch statistics, the counters of random streams) is the
    train state's ``model_state``; the step keeps that of the clean pass. Both passes
    start from the same streams, so they drop the same units; the step's key is not
    used. To call the model after training, write the state back into it:
    ``nnx.update(model, eval_params(state.opt_state, state.params),
    state.model_state)``.

    What the module sows (``nnx.Intermediate``) is of one pass and not carried on; the
    loss can take it, ``nnx.pop(model, nnx.Intermediate)``, and add it.

    Args:
      model: an NNX module, in training mode.
      loss: ``loss(model, batch, *others) -> (loss, aux)``; the loss is a scalar, or one
        loss for each example.
      *others: what else the loss is called with. The state of NNX objects (random
        streams, for a model that takes ``rngs=``) is carried on too, if
        :func:`init_nnx` gets the same; then ``model_state`` is that of the tuple:
        ``nnx.update((model, *others), state.model_state)``.

    Returns:
      ``loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux))``.

    Raises:
      ValueError: by ``loss_fn``, if a pass adds state to the module, or changes an NNX
        object that is not among the arguments.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> from flax import nnx
    >>> from msam_optax.flax.nnx import init_nnx, nnx_loss
    >>> def loss(model, batch):
    ...     return jnp.mean((model(batch[0]) - batch[1]) ** 2), {}
    >>> model, tx = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), msam_optax.msam(0.1, rho=0.3)
    >>> step = msam_optax.make_train_step(nnx_loss(model, loss), tx)
    >>> state = init_nnx(model, tx)
    >>> state, metrics = step(state, (jnp.ones((8, 3)), jnp.zeros((8, 1))), None)
    """
    check_module("nnx_loss(model, loss)", model, nnx.Module)
    check_function("nnx_loss(model, loss)", "loss", loss)
    objects = objects_in(others)
    graph, _, _ = passes.split(model, objects, nnx.Param)

    def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        del key
        rest = model_state if objects else passes.of_the_first(model_state)
        value, (aux, changed) = passes.run(graph, params, rest, loss, batch, others)
        flat = dict(nnx.to_flat_state(rest)) | dict(nnx.to_flat_state(changed))
        rest = nnx.from_flat_state(list(flat.items()))
        return value, (rest if objects else _of_first(rest), aux)

    return loss_fn


def init_nnx(
    model: nnx.Module, optimizer: optax.GradientTransformation, *others: Any
) -> TrainState:
    """The first train state of an NNX module, with copies of all its arrays.

    Args:
      model: an NNX module.
      optimizer: any Optax optimizer.
      *others: those of :func:`nnx_loss`.

    Returns:
      A :class:`msam_optax.TrainState` whose ``params`` are the module's ``nnx.Param``
      and whose ``model_state`` is all else.
    """
    check_module("init_nnx(model, optimizer)", model, nnx.Module)
    check_transformation("optimizer", optimizer)
    objects = objects_in(others)
    _, params, rest = passes.split(model, objects, nnx.Param)
    params, rest = jax.tree.map(jnp.copy, (as_pure(params), rest))
    model_state = rest if objects else _of_first(rest)
    return TrainState(params, optimizer.init(params), model_state)


def nnx_update(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    loss: NNXLoss,
    batch: Any,
    *others: Any,
) -> tuple[jax.Array, Any]:
    """One training step of an NNX module by its `nnx.Optimizer`, in place.

    For a trainer of your own, inside ``nnx.jit``. The second gradient sees the same
    batch, the same dropout and the same batch statistics as the first; the module, and
    all NNX objects that the loss uses, keep what the clean pass made of them.

    *On several devices* shard the batch over a mesh and jit: both gradients are then of
    the whole batch. Under ``pmap`` both would be each device's own, with no place for a
    ``pmean`` (in the loss it does not reach the gradient): the replicas drift apart.

    What the module sows (``nnx.Intermediate``) is of one pass and not carried on; the
    loss can take it, ``nnx.pop(model, nnx.Intermediate)``, and add it.

    Args:
      model: an NNX module, in training mode.
      optimizer: ``nnx.Optimizer(model, tx, wrt=nnx.Param)`` with any method of this
        package or of Optax. A subclass may have another ``update``, of ``(model,
        grads)`` or of ``grads``.
      loss: ``loss(model, batch, *others) -> (loss, aux)``; the loss is a scalar, one
        loss for each example (:func:`msam_optax.esam` needs these), or a
        :class:`msam_optax.WeightedMean`.
      batch: handed to the loss.
      *others: handed to the loss: random streams, a teacher, arrays. NNX objects in the
        loss's closure are found, too.

    Returns:
      The clean loss, a scalar, and aux. :func:`step_metrics` tells about the step.

    Raises:
      TypeError: if ``optimizer`` is not an ``nnx.Optimizer``, or its ``update`` needs
        other arguments.
      ValueError: if an argument is in another's place, the pass adds state to the
        module, or changes an NNX object that the jitted step has not got as an
        argument; by the optimizer, if it holds something before its second gradient.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> from flax import nnx
    >>> from msam_optax.flax.nnx import eval_model, nnx_update
    >>> def loss(model, batch):
    ...     return jnp.mean((model(batch[0]) - batch[1]) ** 2), {}
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, msam_optax.msam(0.1, rho=0.3), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer, batch):
    ...     return nnx_update(model, optimizer, loss, batch)
    >>> value, aux = step(model, optimizer, (jnp.ones((8, 3)), jnp.zeros((8, 1))))
    >>> outputs = eval_model(model, optimizer)(jnp.ones((8, 3)))
    """
    check_optimizer(optimizer)
    call = "nnx_update(model, optimizer, loss, batch)"
    check_module(call, model, nnx.Module)
    check_function(call, "loss", loss)
    objects = objects_in((loss, batch, others))
    graph, params, rest = passes.split(model, objects, optimizer.wrt)

    def loss_at(params: Any) -> Any:
        value, (aux, changed) = passes.run(graph, params, rest, loss, batch, others)
        losses = None if is_weighted(value) else value
        return mean_of(value), (losses, divided(aux), changed)

    def value_and_grad_fn(params: Any) -> Any:
        (value, _), grads = jax.value_and_grad(loss_at, has_aux=True)(params)
        return value, as_pure(grads)

    def per_example_loss_fn(params: Any, indices: Any = None) -> Any:
        samples = batch
        if indices is not None:
            samples = jax.tree.map(lambda x: x[indices], batch)
        return passes.run(graph, params, rest, loss, samples, others)[0]

    opt_state = as_pure(optimizer.opt_state)
    check_wrappers(opt_state)
    warn_of_a_slow_cond(
        opt_state, loss_at, params, "nnx_loss(model, loss) and init_nnx(model, tx)"
    )
    (value, more), grads = jax.value_and_grad(loss_at, has_aux=True)(params)
    losses, aux, changed = more
    given = {
        "grad_fn": lambda params: value_and_grad_fn(params)[1],
        "value_and_grad_fn": value_and_grad_fn,
        "value": value,
        "clean_grad": as_pure(grads),
        "all_params": as_pure(params),
        "per_example_losses": losses,
        "per_example_loss_fn": per_example_loss_fn,
    }
    with handing_on(optimizer, **given):
        call_update(optimizer, model, grads)
    passes.write(graph, changed)
    return value, aux


def step_metrics(model: nnx.Module, optimizer: nnx.Optimizer) -> PerturbationMetrics:
    """What the optimizer's last step did, after :func:`nnx_update`.

    :func:`msam_optax.step_metrics` of a module: inside ``nnx.jit``, behind the update.

    Args:
      model: an NNX module.
      optimizer: its optimizer.

    Returns:
      A :class:`msam_optax.PerturbationMetrics`.

    Raises:
      TypeError: if ``optimizer`` is not an ``nnx.Optimizer``.

    >>> import jax.numpy as jnp, msam_optax
    >>> from flax import nnx
    >>> from msam_optax.flax.nnx import nnx_update, step_metrics
    >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    >>> tx = msam_optax.msam(0.1, rho=0.2)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> value, aux = nnx_update(
    ...     model, optimizer, lambda model, x: (jnp.sum(model(x)), {}), jnp.ones((8, 3))
    ... )
    >>> print(step_metrics(model, optimizer).perturbation_norm.round(3))
    0.2
    """
    check_optimizer(optimizer)
    params = as_pure(nnx.state(model, optimizer.wrt))
    return msam_step_metrics(as_pure(optimizer.opt_state), params)


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
    check_optimizer(optimizer)
    copy = _copy(model)
    params = as_pure(nnx.state(copy, optimizer.wrt))
    nnx.update(copy, eval_params(as_pure(optimizer.opt_state), params))
    return copy


def _copy(model: Module) -> Module:
    """A copy with arrays of its own: those of `nnx.clone` are the module's."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def _of_first(state: Any) -> nnx.State:
    """What a state of a tuple holds of its first object."""
    return state.get(0, nnx.State({}))
