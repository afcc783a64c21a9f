"""Sharpness-aware optimizers for JAX as pure Optax transformations."""

from msam_optax.aliases import ae_sam as ae_sam
from msam_optax.aliases import asam as asam
from msam_optax.aliases import fisher_sam as fisher_sam
from msam_optax.aliases import gradient_norm_penalty as gradient_norm_penalty
from msam_optax.aliases import gsam as gsam
from msam_optax.aliases import sam as sam
from msam_optax.aliases import ss_sam as ss_sam
from msam_optax.ascent import fisher_ascent as fisher_ascent
from msam_optax.ascent import normalized_ascent as normalized_ascent
from msam_optax.ascent import unnormalized_ascent as unnormalized_ascent
from msam_optax.ascent_random import RandomAscentState as RandomAscentState
from msam_optax.ascent_random import gaussian_ascent as gaussian_ascent
from msam_optax.ascent_random import stochastic_ascent as stochastic_ascent
from msam_optax.ascent_scaled import adaptive_ascent as adaptive_ascent
from msam_optax.ascent_scaled import clip_by_weight_norm as clip_by_weight_norm
from msam_optax.ascent_scaled import filterwise_ascent as filterwise_ascent
from msam_optax.ascent_scaled import layerwise_ascent as layerwise_ascent
from msam_optax.ascent_scaled import weight_scaled_ascent as weight_scaled_ascent
from msam_optax.combine import interpolate as interpolate
from msam_optax.combine import surrogate_gap as surrogate_gap
from msam_optax.employ import EmployState as EmployState
from msam_optax.employ import employ as employ
from msam_optax.esam import esam as esam
from msam_optax.esam import selected_gradient as selected_gradient
from msam_optax.eval_params import eval_params as eval_params
from msam_optax.friendly import FriendlyAscentState as FriendlyAscentState
from msam_optax.friendly import friendly_ascent as friendly_ascent
from msam_optax.friendly import friendly_sam as friendly_sam
from msam_optax.looksam import RememberedGradientState as RememberedGradientState
from msam_optax.looksam import ae_looksam as ae_looksam
from msam_optax.looksam import looksam as looksam
from msam_optax.looksam import remembered_gradient as remembered_gradient
from msam_optax.looksam import reuse as reuse
from msam_optax.loss_scaling import LossScaleState as LossScaleState
from msam_optax.loss_scaling import LossScaling as LossScaling
from msam_optax.m_sharpness import MSharpness as MSharpness
from msam_optax.m_sharpness import m_sharpness as m_sharpness
from msam_optax.momentum import MomentumPerturbationState as MomentumPerturbationState
from msam_optax.momentum import StoredPerturbationState as StoredPerturbationState
from msam_optax.momentum import momentum_perturbation as momentum_perturbation
from msam_optax.msam import adamw_msam as adamw_msam
from msam_optax.msam import msam as msam
from msam_optax.policy import AdaptiveState as AdaptiveState
from msam_optax.policy import Policy as Policy
from msam_optax.policy import StepState as StepState
from msam_optax.policy import adaptive as adaptive
from msam_optax.policy import always as always
from msam_optax.policy import bernoulli as bernoulli
from msam_optax.policy import between as between
from msam_optax.policy import every as every
from msam_optax.policy import never as never
from msam_optax.schedules import rho_like_learning_rate as rho_like_learning_rate
from msam_optax.sharpness_aware import SharpnessAwareState as SharpnessAwareState
from msam_optax.sharpness_aware import (
    sharpness_aware_gradient as sharpness_aware_gradient,
)
from msam_optax.train import make_train_step as make_train_step
from msam_optax.train_state import StepMetrics as StepMetrics
from msam_optax.train_state import TrainState as TrainState
from msam_optax.wsam import DecoupledSharpnessState as DecoupledSharpnessState
from msam_optax.wsam import decoupled_sharpness as decoupled_sharpness
from msam_optax.wsam import wsam as wsam

__version__ = "0.1.0"
