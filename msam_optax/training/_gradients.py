"""Both gradients of a step: of one loss, on one batch, with one random key."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.weighted import WeightedMean, divided, is_weighted, mean_of
from msam_optax.training._loss_scaling import LossScaling, scaled_backward
from msam_optax.training._microbatches import microbatched
from msam_optax.training._state import TrainState

# loss_fn(params, model_state, batch, key) -> (loss, (model_state, aux)), where loss is
# a scalar, one loss for each example, or a mean that knows its weights
LossFn = Callable[[Any, Any, Any, Any], tuple[jax.Array | WeightedMean, Any]]


class CleanPass(NamedTuple):
    """Results of the first gradient: that on the batch at the parameters as given.

    ``losses`` are those of the examples, None where the loss knows its own weights.
    """

    loss: jax.Array
    losses: jax.Array | None
    model_state: Any
    aux: Any
    grads: optax.Updates


class Gradients:
    """The gradients of a loss function, scaled and taken in parts as asked for."""

    def __init__(
        self, loss_fn: LossFn, loss_scaling: LossScaling | None, microbatches: int
    ) -> None:
        self._loss_fn = loss_fn
        self._loss_scaling = loss_scaling
        self._microbatches = microbatches
        # Jitted, so that the two passes are traced once.
        self._value_and_grad = jax.jit(self._mean_and_grad)

    def clean_pass(self, state: TrainState, batch: Any, key: Any) -> CleanPass:
        """The first gradient, and all that comes with it."""
        (loss, (losses, (model_state, aux))), grads = self._value_and_grad(
            state.params, state.model_state, state.loss_scale, batch, key
        )
        return CleanPass(loss, losses, model_state, aux, grads)

    def extra_args(
        self, state: TrainState, clean: CleanPass, batch: Any, key: Any
    ) -> dict[str, Any]:
        """What an optimizer may ask for, once the clean gradient is there."""
        key = used_again(key)

        def whole_pass(params: optax.Params) -> Any:
            return self._value_and_grad(
                params, state.model_state, state.loss_scale, batch, used_again(key)
            )

        def value_and_grad_fn(params: optax.Params) -> tuple[jax.Array, optax.Updates]:
            (loss, _), gradient = whole_pass(params)
            return loss, gradient

        def per_example_loss_fn(params: optax.Params, indices: Any = None) -> Any:
            if indices is None:
                # Out of the pass that is traced already, whose gradient XLA drops. So
                # these losses are not to be differentiated; those of samples may be.
                (_, (losses, _)), _ = whole_pass(params)
                return losses
            sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
            if sizes != {x.shape[:1] for x in jax.tree.leaves(clean.losses)}:
                raise ValueError(
                    "Examples can be selected where they lie along the first axis of "
                    "all arrays of the batch, but their shapes are "
                    f"{jax.tree.map(jnp.shape, batch)!r}: what is no example belongs "
                    "into model_state, or is repeated for each."
                )
            samples = jax.tree.map(lambda x: x[indices], batch)
            loss_fn = self._losses(state.loss_scale)
            return loss_fn(params, state.model_state, samples, used_again(key))[0]

        return {
            "grad_fn": lambda params: value_and_grad_fn(params)[1],
            "value_and_grad_fn": value_and_grad_fn,
            "value": clean.loss,
            "clean_grad": clean.grads,
            "all_params": state.params,
            "per_example_losses": clean.losses,
            "per_example_loss_fn": per_example_loss_fn,
        }

    def jaxpr(self, state: TrainState, batch: Any, key: Any) -> Any:
        """The clean pass as JAX traced it; no other pass over it is traced anew."""
        return self._value_and_grad.trace(
            state.params, state.model_state, state.loss_scale, batch, key
        ).jaxpr.jaxpr

    def _mean_and_grad(
        self, params: Any, model_state: Any, loss_scale: Any, batch: Any, key: Any
    ) -> Any:
        def mean_loss(params: optax.Params) -> tuple[jax.Array, Any]:
            losses, (model_state_after, aux) = self._losses(loss_scale)(
                params, model_state, batch, key
            )
            by_example = None if is_weighted(losses) else losses
            return mean_of(losses), (by_example, (model_state_after, divided(aux)))

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    def _losses(self, loss_scale: Any) -> Callable[..., Any]:
        def losses(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
            return _check_result(self._loss_fn(params, model_state, batch, key))

        # The scale belongs to the backward pass of each part.
        if self._loss_scaling is not None:
            losses = scaled_backward(losses, loss_scale.scale)
        if self._microbatches == 1:
            return losses
        return microbatched(losses, self._microbatches)


def used_again(key: Any) -> Any:
    """The step's random key for a further pass, which is meant to draw alike.

    `jax_debug_key_reuse` takes a key that is used twice for an error, but its clone.
    """

    def clone(key: jax.Array) -> jax.Array:
        is_key = jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key)
        return jax.random.clone(key) if is_key else key

    return jax.tree.map(clone, key)


def loss_and_aux(result: Any) -> Any:
    """What a loss of a framework's glue returned; ValueError if it is no pair."""
    if not _is_pair(result):
        raise ValueError(
            "The loss must return (loss, aux), without auxiliary outputs (loss, {}), "
            f"but it returned {_described(result)}."
        )
    return result


def _check_result(result: Any) -> Any:
    if not (_is_pair(result) and _is_pair(result[1])):
        raise ValueError(
            "loss_fn(params, model_state, batch, key) must return (loss, (model_state, "
            f"aux)), but it returned {_described(result)}. "
            "Without model state and auxiliary outputs: loss, (model_state, {})."
        )
    return result


def _described(result: Any) -> str:
    if hasattr(result, "shape"):
        return f"an array of shape {result.shape} alone"
    return f"{jax.tree.map(jnp.shape, result)!r} (in shapes)"


def _is_pair(x: Any) -> bool:
    # A weighted mean alone is no pair of a loss and something else.
    return isinstance(x, tuple) and len(x) == 2 and not is_weighted(x)
