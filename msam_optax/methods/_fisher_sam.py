"""Fisher SAM."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def fisher_sam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    eta: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """SAM in the ellipsoid of an empirical Fisher information.

    *Cost*: one extra gradient a step. *State*: two scalars. *Position*: outermost. F
    depends on the scale of the loss: hand in gradients of the unscaled one.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius in the Fisher metric; a float or a schedule.
      eta: see :func:`msam_optax.ascents.fisher`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    >>> import msam_optax, optax
    >>> tx = msam_optax.fisher_sam(optax.sgd(0.1, momentum=0.9), rho=0.1)

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, 2022.
    """
    return chained(sharpness_aware_gradient(ascents.fisher(rho, eta)), optimizer)
