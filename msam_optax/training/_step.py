"""A training step for any model: one batch and one key for both gradients."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_integer, check_transformation
from msam_optax.training._loss_scaling import (
    LossScaleState,
    LossScaling,
    all_finite,
    scaled_backward,
    stay_finite,
)
from msam_optax.training._microbatches import microbatched
from msam_optax.training._state import CleanPass, StepMetrics, TrainState, step_metrics
from msam_optax.transforms._employ import EmployState
from msam_optax.transforms._find_momentum import find_states

# loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux)), where loss is
# a scalar or one loss for each example
LossFn = Callable[[Any, Any, Any, Any], tuple[jax.Array, tuple[Any, Any]]]
Dispatch = Literal["auto", "in_graph", "host"]
TrainStep = Callable[[TrainState, Any, Any], tuple[TrainState, StepMetrics]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    dispatch: Dispatch = "auto",
    donate: bool = True,
    loss_scaling: LossScaling | None = None,
    microbatches: int = 1,
) -> TrainStep:
    """Builds the jitted training step of a loss and an optimizer.

    Both gradients see the same batch and the same random key. The model's own state is
    taken from the clean pass alone, and so are the loss and the auxiliary outputs.

    An optimizer that employs its extra gradient on some steps only
    (:func:`msam_optax.employ`) must really skip it on the others. *In graph*,
    ``lax.cond`` does: right on GPU and TPU, and needed inside ``jit`` or ``scan``. On
    CPU, though, XLA runs a convolution's gradient many times slower inside a ``cond``.
    From the *host*, the step is two programs: the clean gradient with the policy's
    decision, and, once that is read, an update compiled with or without the extra
    gradient. Both ways cost 1 + f gradients for a fraction f of employed steps.

    Args:
      loss_fn: ``loss_fn(params, model_state, batch, key) -> (loss, (model_state,
        aux))``; aux is any tree of arrays. The loss is a scalar, or an array of one
        loss for each example, whose mean is trained on; methods that select samples
        (:func:`msam_optax.esam`) need the latter, and the examples along the first
        axis of all of the batch. ``msam_optax.flax.linen.linen_loss`` makes a loss
        function of a Linen module.
      optimizer: any Optax optimizer. It receives ``grad_fn``, ``value`` and, for
        methods that select samples, ``per_example_losses`` and ``per_example_loss_fn``
        as extra arguments.
      dispatch: "in_graph", "host", or "auto": from the host where the parameters are
        on CPU and the step is not itself traced, in graph elsewhere.
      donate: hand the state's memory to the new state. The state passed in, and the
        parameters in it, can't be used afterwards.
      loss_scaling: skips steps that are not finite, and scales the loss for float16;
        the first state then holds ``loss_scale=loss_scaling.init()``. Float32 and
        bfloat16 training needs none.
      microbatches: takes each gradient of the batch in so many parts, one after the
        other: activations need the memory of one part, and a tree like the parameters
        more. **There is one epsilon for the whole batch**, and the step equals that of
        the large batch. Batch norm normalises within each part. The loss is averaged,
        so methods that select samples can't be used. XLA for CPU runs a convolution's
        gradient many times slower in a loop, as this is. For one epsilon for each part
        (m-sharpness), hand the step one micro-batch after the other instead, and let
        Optax accumulate behind the ascent: ``optax.chain(sharpness_aware_gradient(
        ascent), optax.MultiSteps(optimizer, k).gradient_transformation())``.

    Returns:
      ``step(state, batch, key) -> (state, metrics)`` with a :class:`TrainState` and
      :class:`StepMetrics`. The key may be None where the loss draws nothing.

    Raises:
      ValueError: if dispatch is none of the three, or is "host" where the step is
        traced or the optimizer employs in several places; if microbatches is not a
        positive integer that divides the batch.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> def loss_fn(params, model_state, batch, key):
    ...     return jnp.mean((batch @ params) ** 2), (model_state, {})
    >>> tx = msam_optax.ae_sam(optax.sgd(0.1, momentum=0.9), rho=0.1, total_steps=10)
    >>> step = msam_optax.make_train_step(loss_fn, tx)
    >>> params = jnp.ones(3)
    >>> state = msam_optax.TrainState(params, tx.init(params))
    >>> for _ in range(10):
    ...     state, metrics = step(state, jnp.eye(3), None)
    >>> print(f"{metrics.loss:.4f}, SAM on {metrics.employed_fraction:.0%}")
    0.1927, SAM on 60%
    """
    if dispatch not in ("auto", "in_graph", "host"):
        raise ValueError(
            f'dispatch must be "auto", "in_graph" or "host", not {dispatch!r}.'
        )
    optimizer = check_transformation("optimizer", optimizer)
    if not callable(loss_fn):
        raise ValueError(f"loss_fn must be a function, but {loss_fn!r} was given.")
    if not (loss_scaling is None or isinstance(loss_scaling, LossScaling)):
        raise ValueError(
            f"loss_scaling must be a LossScaling, but {loss_scaling!r} was given."
        )

    check_integer("microbatches", microbatches, 1)

    def example_losses(loss_scale):
        def losses(params, model_state, batch, key):
            return _check_result(loss_fn(params, model_state, batch, key))

        # The scale belongs to the backward pass of each part.
        if loss_scaling is not None:
            losses = scaled_backward(losses, loss_scale.scale)
        return losses if microbatches == 1 else microbatched(losses, microbatches)

    # Jitted, so that the two passes are traced once.
    @jax.jit
    def value_and_grad(params, model_state, loss_scale, batch, key):
        def mean_loss(params):
            losses, others = example_losses(loss_scale)(params, model_state, batch, key)
            return jnp.mean(losses), (losses, others)

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    def clean_pass(state, batch, key):
        (loss, (losses, (model_state, aux))), grads = value_and_grad(
            state.params, state.model_state, state.loss_scale, batch, key
        )
        return CleanPass(loss, losses, model_state, aux, grads)

    def update(state, clean, batch, key, employed=None):
        def grad_fn(params):
            return value_and_grad(
                params, state.model_state, state.loss_scale, batch, key
            )[1]

        def per_example_loss_fn(params, indices=None):
            samples = batch
            if indices is not None:
                samples = jax.tree.map(lambda x: x[indices], batch)
            losses = example_losses(state.loss_scale)
            return losses(params, state.model_state, samples, key)[0]

        extra_args = {} if employed is None else {"employed": employed}
        return optimizer.update(
            clean.grads,
            state.opt_state,
            state.params,
            grad_fn=grad_fn,
            value=clean.loss,
            per_example_losses=clean.losses,
            per_example_loss_fn=per_example_loss_fn,
            **extra_args,
        )

    def finish(state, clean, batch, key, employed=None):
        updates, opt_state = update(state, clean, batch, key, employed)
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(params, opt_state, clean.model_state, state.loss_scale)
        finite = jnp.asarray(True)
        if loss_scaling is not None:
            finite = all_finite((clean.loss, clean.grads, updates)) & stay_finite(
                opt_state, state.opt_state
            )
            kept = jax.tree.map(partial(jnp.where, finite), new_state, state)
            loss_scale = loss_scaling.adjust(state.loss_scale, finite)
            new_state = kept._replace(loss_scale=loss_scale)
        return new_state, step_metrics(new_state, clean, skipped=~finite)

    def whole_step(state, batch, key):
        return finish(state, clean_pass(state, batch, key), batch, key)

    def decide(state, batch, key):
        clean = clean_pass(state, batch, key)
        # Of this update only the decision is returned: XLA drops all else.
        _, opt_state = update(state, clean, batch, key, employed=False)
        (employ_state,) = find_states(opt_state, EmployState)
        return clean, employ_state.employed

    donated = (0,) if donate else ()
    in_graph = jax.jit(whole_step, donate_argnums=donated)
    first_half = jax.jit(decide)
    second_half = jax.jit(finish, static_argnames="employed", donate_argnums=donated)

    def step(state, batch, key):
        _check_state(loss_scaling, state)
        if not _from_host(dispatch, state, (batch, key)):
            return in_graph(state, batch, key)
        clean, decision = first_half(state, batch, key)
        return second_half(state, clean, batch, key, employed=bool(decision))

    return step


def _check_state(loss_scaling: LossScaling | None, state: TrainState) -> None:
    if not isinstance(state, TrainState):
        raise ValueError(
            "The train step needs a msam_optax.TrainState(params, "
            "optimizer.init(params), model_state), but a "
            f"{type(state).__module__}.{type(state).__name__} was given. (For a step "
            "of your own on Flax's there is msam_optax.flax.linen.LinenTrainState.)"
        )
    if (loss_scaling is None) == isinstance(state.loss_scale, LossScaleState):
        raise ValueError(
            "A train step with loss_scaling needs its state, "
            "TrainState(params, opt_state, model_state, loss_scaling.init()), and one "
            f"without needs none, but loss_scaling={loss_scaling!r} and "
            f"state.loss_scale={state.loss_scale!r} were given."
        )


def loss_and_aux(result: Any) -> Any:
    """What a loss of a framework's glue returned; ValueError if it is no pair."""
    if not _is_pair(result):
        raise ValueError(
            "The loss must return (loss, aux), without auxiliary outputs (loss, {}), "
            f"but it returned {_described(result)}."
        )
    return result


def _described(result: Any) -> str:
    if hasattr(result, "shape"):
        return f"an array of shape {result.shape} alone"
    return f"{jax.tree.map(jnp.shape, result)!r} (in shapes)"


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2


def _check_result(result: Any) -> Any:
    if not (_is_pair(result) and _is_pair(result[1])):
        raise ValueError(
            "loss_fn(params, model_state, batch, key) must return (loss, (model_state, "
            f"aux)), but it returned {_described(result)}. "
            "Without model state and auxiliary outputs: loss, (model_state, {})."
        )
    return result


def _from_host(dispatch: Dispatch, state: TrainState, inputs: Any) -> bool:
    """Whether to dispatch from the host, as asked for or as fits."""
    places = _employing_places(jax.tree.structure(state.opt_state))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    traced = any(
        isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, inputs))
    )
    if dispatch == "host" and traced:
        raise ValueError(
            'dispatch="host" reads each decision on the host, but the step was called '
            'inside jit, scan or another transformation: use dispatch="in_graph".'
        )
    if dispatch == "host" and places > 1:
        raise ValueError(
            f'dispatch="host" takes one decision a step, but the optimizer employs in '
            f'{places} places: use dispatch="in_graph", or one policy for all.'
        )
    if dispatch == "in_graph" or traced or places != 1:
        return False
    return dispatch == "host" or _platform(leaves) == "cpu"


@cache
def _employing_places(structure: Any) -> int:
    """How many `employ` an optimizer's state holds; asked anew on every step."""
    state = jax.tree.unflatten(structure, [None] * structure.num_leaves)
    return len(find_states(state, EmployState))


def _platform(leaves: list[Any]) -> str:
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()
