"""What stands in a chain: the blocks that methods are made of."""

from msam_optax.transforms._alternating import (
    AlternatingAscentState as AlternatingAscentState,
)
from msam_optax.transforms._alternating import alternating_ascent as alternating_ascent
from msam_optax.transforms._decoupled import (
    DecoupledSharpnessState as DecoupledSharpnessState,
)
from msam_optax.transforms._decoupled import decoupled_sharpness as decoupled_sharpness
from msam_optax.transforms._direction import MomentumFn as MomentumFn
from msam_optax.transforms._employ import EmployState as EmployState
from msam_optax.transforms._employ import Otherwise as Otherwise
from msam_optax.transforms._employ import employ as employ
from msam_optax.transforms._eval_params import eval_params as eval_params
from msam_optax.transforms._eval_params import train_params as train_params
from msam_optax.transforms._find_momentum import find_momentum as find_momentum
from msam_optax.transforms._m_sharpness import MSharpness as MSharpness
from msam_optax.transforms._m_sharpness import m_sharpness as m_sharpness
from msam_optax.transforms._momentum import (
    momentum_perturbation as momentum_perturbation,
)
from msam_optax.transforms._perturbed_states import (
    MomentumPerturbationState as MomentumPerturbationState,
)
from msam_optax.transforms._perturbed_states import (
    StoredPerturbationState as StoredPerturbationState,
)
from msam_optax.transforms._remembered import (
    RememberedGradientState as RememberedGradientState,
)
from msam_optax.transforms._remembered import remembered_gradient as remembered_gradient
from msam_optax.transforms._remembered import reuse_remembered as reuse_remembered
from msam_optax.transforms._selected import selected_gradient as selected_gradient
from msam_optax.transforms._sharpness_aware import (
    SharpnessAwareState as SharpnessAwareState,
)
from msam_optax.transforms._sharpness_aware import (
    sharpness_aware_gradient as sharpness_aware_gradient,
)

__all__ = [
    "AlternatingAscentState",
    "DecoupledSharpnessState",
    "EmployState",
    "MSharpness",
    "MomentumFn",
    "MomentumPerturbationState",
    "Otherwise",
    "RememberedGradientState",
    "SharpnessAwareState",
    "StoredPerturbationState",
    "alternating_ascent",
    "decoupled_sharpness",
    "employ",
    "eval_params",
    "find_momentum",
    "m_sharpness",
    "momentum_perturbation",
    "remembered_gradient",
    "reuse_remembered",
    "selected_gradient",
    "sharpness_aware_gradient",
    "train_params",
]
