"""The papers' methods by their names, each assembled from the blocks in a few lines."""

from msam_optax.methods._ae_sam import ae_sam as ae_sam
from msam_optax.methods._asam import asam as asam
from msam_optax.methods._esam import esam as esam
from msam_optax.methods._fisher_sam import fisher_sam as fisher_sam
from msam_optax.methods._friendly_sam import friendly_sam as friendly_sam
from msam_optax.methods._gradient_norm_penalty import (
    gradient_norm_penalty as gradient_norm_penalty,
)
from msam_optax.methods._gsam import gsam as gsam
from msam_optax.methods._looksam import ae_looksam as ae_looksam
from msam_optax.methods._looksam import looksam as looksam
from msam_optax.methods._msam import adamw_msam as adamw_msam
from msam_optax.methods._msam import msam as msam
from msam_optax.methods._sam import sam as sam
from msam_optax.methods._ss_sam import ss_sam as ss_sam
from msam_optax.methods._wsam import wsam as wsam

__all__ = [
    "adamw_msam",
    "ae_looksam",
    "ae_sam",
    "asam",
    "esam",
    "fisher_sam",
    "friendly_sam",
    "gradient_norm_penalty",
    "gsam",
    "looksam",
    "msam",
    "sam",
    "ss_sam",
    "wsam",
]
