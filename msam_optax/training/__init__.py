"""The training step: one batch and one key for both gradients, and what it tells."""

from msam_optax.training._loss_scaling import LossScaleState as LossScaleState
from msam_optax.training._loss_scaling import LossScaling as LossScaling
from msam_optax.training._state import StepMetrics as StepMetrics
from msam_optax.training._state import TrainState as TrainState
from msam_optax.training._step import LossFn as LossFn
from msam_optax.training._step import TrainStep as TrainStep
from msam_optax.training._step import make_train_step as make_train_step

__all__ = [
    "LossFn",
    "LossScaleState",
    "LossScaling",
    "StepMetrics",
    "TrainState",
    "TrainStep",
    "make_train_step",
]
