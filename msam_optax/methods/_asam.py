"""Adaptive SAM."""

from typing import Any

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax._base.layers import AxesLike
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def asam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.5,
    eta: float = 0.01,
    mask: Any = None,
    *,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive SAM around any optimizer: SAM with a radius relative to each weight.

    *Cost*: one extra gradient a step. *State*: two scalars. *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: relative radius; a float or a schedule. 0.5 (CIFAR-10) and 1
        (CIFAR-100) in the paper.
      eta: added to the weights' absolute values.
      mask: see :func:`msam_optax.ascents.adaptive`.
      axes: which axes count stacked layers, see :class:`msam_optax.ascents.Axes`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    >>> import msam_optax, optax
    >>> tx = msam_optax.asam(optax.adamw(1e-3), rho=0.5)

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    ascent = ascents.adaptive(rho, eta, mask, axes=axes)
    return chained(sharpness_aware_gradient(ascent), optimizer)
