"""The penalty on the gradient's norm."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax.combine import interpolate
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def gradient_norm_penalty(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.1,
    alpha: float = 0.8,
) -> optax.GradientTransformationExtraArgs:
    r"""Penalises the gradient's norm: steps with :math:`(1-\alpha) g + \alpha\tilde g`.

    *Cost*: one extra gradient a step. *State*: two scalars. *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius, the paper's r; a float or a schedule.
      alpha: the penalty's coefficient over the radius.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    >>> import msam_optax, optax
    >>> tx = msam_optax.gradient_norm_penalty(optax.sgd(0.1, momentum=0.9))

    References:
      Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization in
      Deep Learning <https://arxiv.org/abs/2202.03599>`_, ICML 2022.
    """
    transform = sharpness_aware_gradient(ascents.normalized(rho), interpolate(alpha))
    return chained(transform, optimizer)
