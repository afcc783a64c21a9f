"""The training step: one batch and one key for both gradients, and what it tells."""

from msam_optax.training._dispatch import Dispatch as Dispatch
from msam_optax.training._gradients import LossFn as LossFn
from msam_optax.training._loss_scaling import LossScaleState as LossScaleState
from msam_optax.training._loss_scaling import LossScaling as LossScaling
from msam_optax.training._metrics import PerturbationMetrics as PerturbationMetrics
from msam_optax.training._metrics import StepMetrics as StepMetrics
from msam_optax.training._metrics import step_metrics as step_metrics
from msam_optax.training._state import TrainState as TrainState
from msam_optax.training._step import CompiledStep as CompiledStep
from msam_optax.training._step import LoweredStep as LoweredStep
from msam_optax.training._step import TrainStep as TrainStep
from msam_optax.training._step import make_train_step as make_train_step

__all__ = [
    "CompiledStep",
    "Dispatch",
    "LossFn",
    "LossScaleState",
    "LossScaling",
    "LoweredStep",
    "PerturbationMetrics",
    "StepMetrics",
    "TrainState",
    "TrainStep",
    "make_train_step",
    "step_metrics",
]
