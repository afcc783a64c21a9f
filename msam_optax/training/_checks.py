"""What a training step says where it is used in a way that it can't be."""

from collections.abc import Iterator
from typing import Any

import jax
import optax

from msam_optax._base.trees import check_like
from msam_optax.training._loss_scaling import LossScaleState, LossScaling
from msam_optax.training._state import TrainState


def check_state(loss_scaling: LossScaling | None, state: Any) -> None:
    """Raises ValueError unless `state` is a train state, scaled as the step is."""
    if not isinstance(state, TrainState):
        raise ValueError(
            "The train step is called as step(state, batch, key) with a "
            "msam_optax.TrainState(params, optimizer.init(params), model_state), but "
            f"a {type(state).__module__}.{type(state).__name__} was given as state. "
            "(For a step of your own on Flax's there is "
            "msam_optax.flax.linen.LinenTrainState.)"
        )
    if (loss_scaling is None) == isinstance(state.loss_scale, LossScaleState):
        raise ValueError(
            "A train step with loss_scaling needs its state, "
            "TrainState(params, opt_state, model_state, loss_scaling.init()), and one "
            f"without needs none, but loss_scaling={loss_scaling!r} and "
            f"state.loss_scale={state.loss_scale!r} were given."
        )


def diagnose(
    optimizer: optax.GradientTransformation, donate: bool, *arguments: Any
) -> str | None:
    """Why a step with these arguments failed, None where it is none of the usual ways.

    Asked once a step has failed, so that one which does not is spared the questions.
    """
    state = arguments[0]
    return (
        # A failed donation leaves arrays deleted, so it is asked about first.
        (_donated_twice(*arguments) if donate else None)
        or _deleted(*arguments)
        or _of_another_optimizer(optimizer, state)
    )


def _arrays(name: str, argument: Any) -> Iterator[tuple[str, jax.Array]]:
    """The arrays in an argument of a step, with their paths."""
    for path, leaf in jax.tree.leaves_with_path(argument):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            yield name + jax.tree_util.keystr(path), leaf


def _donated_twice(state: Any, batch: Any, key: Any) -> str | None:
    paths: dict[int, str] = {}

    def told(first: str, second: str) -> str:
        return (
            f"The step takes over the memory of its state, but {first} and {second} "
            "are one and the same array: give one of the two a copy, by "
            "jax.tree.map(jnp.copy, ...), or the state its own memory back, by "
            "make_train_step(..., donate=False)."
        )

    for path, array in _arrays("state", state):
        if paths.setdefault(id(array), path) != path:
            return told(paths[id(array)], path)
    for path, array in [*_arrays("batch", batch), *_arrays("key", key)]:
        if id(array) in paths:
            return told(paths[id(array)], path)
    return None


def _deleted(state: Any, batch: Any, key: Any) -> str | None:
    for path, array in [
        *_arrays("state", state),
        *_arrays("batch", batch),
        *_arrays("key", key),
    ]:
        if array.is_deleted():
            return (
                f"{path} was given to an earlier step, which took over its memory. Go "
                "on from the state that the step returned, or keep the old one by "
                "make_train_step(..., donate=False)."
            )
    return None


def _of_another_optimizer(
    optimizer: optax.GradientTransformation, state: TrainState
) -> str | None:
    try:
        needed = jax.eval_shape(optimizer.init, state.params)
    except Exception:
        return (
            "The optimizer can't be initialised by state.params, a "
            f"{type(state.params).__name__}: were TrainState(params, opt_state, "
            "model_state) given in another order?"
        )
    try:
        check_like(
            "state.opt_state must be optimizer.init(state.params) of the very "
            "optimizer that make_train_step was given, or what came of it",
            state.opt_state,
            needed,
            dtypes=False,
        )
    except ValueError as error:
        return str(error)
    return None
