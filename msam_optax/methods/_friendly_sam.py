"""Friendly SAM."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def friendly_sam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    sigma: float = 1.0,
    decay: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Friendly SAM around any optimizer.

    *Cost*: one extra gradient a step. *State*: one tree like the parameters and three
    scalars. *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius; a float or a schedule.
      sigma: see :func:`ascents.friendly`.
      decay: see :func:`ascents.friendly`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    >>> import msam_optax, optax
    >>> tx = msam_optax.friendly_sam(optax.sgd(0.1, momentum=0.9), rho=0.05)

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024.
    """
    ascent = ascents.friendly(rho, sigma, decay)
    return chained(sharpness_aware_gradient(ascent), optimizer)
