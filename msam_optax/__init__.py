"""Sharpness-aware optimizers for JAX as pure Optax transformations."""

from importlib import import_module
from types import ModuleType

from msam_optax._base.versions import require as _require

_require("jax", "jaxlib", "optax")

from msam_optax import ascents as ascents
from msam_optax import combine as combine
from msam_optax import flax as flax
from msam_optax import policies as policies
from msam_optax import sharpness as sharpness
from msam_optax._base.weighted import WeightedMean as WeightedMean
from msam_optax.ascents._schedules import hold_then_decay as hold_then_decay
from msam_optax.ascents._schedules import (
    rho_like_learning_rate as rho_like_learning_rate,
)
from msam_optax.combine import Combine as Combine
from msam_optax.methods import BsamState as BsamState
from msam_optax.methods import SampaState as SampaState
from msam_optax.methods import adamw_msam as adamw_msam
from msam_optax.methods import ae_looksam as ae_looksam
from msam_optax.methods import ae_sam as ae_sam
from msam_optax.methods import asam as asam
from msam_optax.methods import bsam as bsam
from msam_optax.methods import esam as esam
from msam_optax.methods import fisher_sam as fisher_sam
from msam_optax.methods import friendly_sam as friendly_sam
from msam_optax.methods import gradient_norm_penalty as gradient_norm_penalty
from msam_optax.methods import gsam as gsam
from msam_optax.methods import looksam as looksam
from msam_optax.methods import msam as msam
from msam_optax.methods import sam as sam
from msam_optax.methods import sampa as sampa
from msam_optax.methods import ss_sam as ss_sam
from msam_optax.methods import wsam as wsam
from msam_optax.training import CompiledStep as CompiledStep
from msam_optax.training import Dispatch as Dispatch
from msam_optax.training import LossFn as LossFn
from msam_optax.training import LossScaleState as LossScaleState
from msam_optax.training import LossScaling as LossScaling
from msam_optax.training import LoweredStep as LoweredStep
from msam_optax.training import PerturbationMetrics as PerturbationMetrics
from msam_optax.training import StepMetrics as StepMetrics
from msam_optax.training import TrainState as TrainState
from msam_optax.training import TrainStep as TrainStep
from msam_optax.training import make_train_step as make_train_step
from msam_optax.training import step_metrics as step_metrics
from msam_optax.transforms import AlternatingAscentState as AlternatingAscentState
from msam_optax.transforms import DecoupledSharpnessState as DecoupledSharpnessState
from msam_optax.transforms import EmployState as EmployState
from msam_optax.transforms import MomentumFn as MomentumFn
from msam_optax.transforms import MomentumPerturbationState as MomentumPerturbationState
from msam_optax.transforms import MSharpness as MSharpness
from msam_optax.transforms import Otherwise as Otherwise
from msam_optax.transforms import RememberedGradientState as RememberedGradientState
from msam_optax.transforms import SharpnessAwareState as SharpnessAwareState
from msam_optax.transforms import StoredPerturbationState as StoredPerturbationState
from msam_optax.transforms import alternating_ascent as alternating_ascent
from msam_optax.transforms import decoupled_sharpness as decoupled_sharpness
from msam_optax.transforms import employ as employ
from msam_optax.transforms import eval_params as eval_params
from msam_optax.transforms import find_momentum as find_momentum
from msam_optax.transforms import m_sharpness as m_sharpness
from msam_optax.transforms import momentum_perturbation as momentum_perturbation
from msam_optax.transforms import remembered_gradient as remembered_gradient
from msam_optax.transforms import reuse_remembered as reuse_remembered
from msam_optax.transforms import selected_gradient as selected_gradient
from msam_optax.transforms import sharpness_aware_gradient as sharpness_aware_gradient
from msam_optax.transforms import train_params as train_params

__all__ = [
    "AlternatingAscentState",
    "BsamState",
    "Combine",
    "CompiledStep",
    "DecoupledSharpnessState",
    "Dispatch",
    "EmployState",
    "LossFn",
    "LossScaleState",
    "LossScaling",
    "LoweredStep",
    "MSharpness",
    "MomentumFn",
    "MomentumPerturbationState",
    "Otherwise",
    "PerturbationMetrics",
    "RememberedGradientState",
    "SampaState",
    "SharpnessAwareState",
    "StepMetrics",
    "StoredPerturbationState",
    "TrainState",
    "TrainStep",
    "WeightedMean",
    "adamw_msam",
    "ae_looksam",
    "ae_sam",
    "alternating_ascent",
    "asam",
    "ascents",
    "bsam",
    "combine",
    "decoupled_sharpness",
    "employ",
    "esam",
    "eval_params",
    "find_momentum",
    "fisher_sam",
    "flax",
    "friendly_sam",
    "gradient_norm_penalty",
    "gsam",
    "hold_then_decay",
    "looksam",
    "m_sharpness",
    "make_train_step",
    "momentum_perturbation",
    "msam",
    "plotting",
    "policies",
    "remembered_gradient",
    "reuse_remembered",
    "rho_like_learning_rate",
    "sam",
    "sampa",
    "selected_gradient",
    "sharpness",
    "sharpness_aware_gradient",
    "ss_sam",
    "step_metrics",
    "train_params",
    "wsam",
]

__version__ = "0.2.0"


def __getattr__(name: str) -> ModuleType:
    # Not imported above: it needs matplotlib.
    if name == "plotting":
        return import_module("msam_optax.plotting")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
