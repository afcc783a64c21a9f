"""What a training step says where it is used in a way that it can't be."""

from typing import Any

from msam_optax.training._loss_scaling import LossScaleState, LossScaling
from msam_optax.training._state import TrainState


def check_state(loss_scaling: LossScaling | None, state: Any) -> None:
    """Raises ValueError unless `state` is a train state, scaled as the step is."""
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
