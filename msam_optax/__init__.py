"""Sharpness-aware optimizers for JAX as pure Optax transformations."""

from msam_optax.aliases import adamw_msam as adamw_msam
from msam_optax.aliases import ae_sam as ae_sam
from msam_optax.aliases import asam as asam
from msam_optax.aliases import msam as msam
from msam_optax.aliases import sam as sam
from msam_optax.aliases import ss_sam as ss_sam
from msam_optax.ascent import adaptive_ascent as adaptive_ascent
from msam_optax.ascent import normalized_ascent as normalized_ascent
from msam_optax.ascent import unnormalized_ascent as unnormalized_ascent
from msam_optax.employ import EmployState as EmployState
from msam_optax.employ import employ as employ
from msam_optax.momentum import MomentumPerturbationState as MomentumPerturbationState
from msam_optax.momentum import StoredPerturbationState as StoredPerturbationState
from msam_optax.momentum import eval_params as eval_params
from msam_optax.momentum import momentum_perturbation as momentum_perturbation
from msam_optax.policy import AdaptiveState as AdaptiveState
from msam_optax.policy import Policy as Policy
from msam_optax.policy import StepState as StepState
from msam_optax.policy import adaptive as adaptive
from msam_optax.policy import always as always
from msam_optax.policy import bernoulli as bernoulli
from msam_optax.policy import between as between
from msam_optax.policy import every as every
from msam_optax.policy import never as never
from msam_optax.sharpness_aware import SharpnessAwareState as SharpnessAwareState
from msam_optax.sharpness_aware import (
    sharpness_aware_gradient as sharpness_aware_gradient,
)
from msam_optax.train import StepMetrics as StepMetrics
from msam_optax.train import TrainState as TrainState
from msam_optax.train import make_train_step as make_train_step

__version__ = "0.1.0"
