"""The papers' methods by their names, each assembled from the blocks in a few lines.

What those around an optimizer share; their own docstrings tell what differs.

- *Cost* is in gradients a step beyond the first, *state* in what is kept beside the
  optimizer's own: one scalar more for each schedule among the hyper-parameters.
- *Position*: **outermost**. The optimizer inside is the whole one, and what must see
  the gradient that is taken belongs inside as well: clipping, weight decay,
  accumulation, a guard against NaNs,
  ``sam(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))``. Before the
  method it would steer the ascent and be lost from the step; ``optax.MultiSteps`` and
  ``optax.apply_if_finite`` around it see the clean gradient alone.
- ``update`` needs ``params`` and ``grad_fn``, a function from parameters to the
  gradient of the same loss on the same batch with the same random key, or what else
  :func:`msam_optax.sharpness_aware_gradient` takes in its place.
  :func:`msam_optax.make_train_step` and the entry points in ``msam_optax.flax`` hand
  it in.
- rho is a float or a schedule over the steps of the training, those on which it is
  not employed included.
- What can't be right raises ValueError when the method is built or, at the latest,
  while it is traced.
"""

from msam_optax.methods._ae_sam import ae_sam as ae_sam
from msam_optax.methods._asam import asam as asam
from msam_optax.methods._bsam import BsamState as BsamState
from msam_optax.methods._bsam import bsam as bsam
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
from msam_optax.methods._sampa import SampaState as SampaState
from msam_optax.methods._sampa import sampa as sampa
from msam_optax.methods._ss_sam import ss_sam as ss_sam
from msam_optax.methods._wsam import wsam as wsam

__all__ = [
    "BsamState",
    "SampaState",
    "adamw_msam",
    "ae_looksam",
    "ae_sam",
    "asam",
    "bsam",
    "esam",
    "fisher_sam",
    "friendly_sam",
    "gradient_norm_penalty",
    "gsam",
    "looksam",
    "msam",
    "sam",
    "sampa",
    "ss_sam",
    "wsam",
]
