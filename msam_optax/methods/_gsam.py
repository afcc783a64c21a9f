"""GSAM."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax.combine import surrogate_gap
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def gsam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    alpha: float = 0.4,
) -> optax.GradientTransformationExtraArgs:
    """GSAM: minimises the perturbed loss and its gap to the clean one.

    *Cost*: one extra gradient a step. *State*: two scalars. *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius; a float or a schedule. The paper's follows the learning rate:
        :func:`msam_optax.rho_like_learning_rate`.
      alpha: weight of the gap, see :func:`msam_optax.combine.surrogate_gap`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    >>> import msam_optax, optax
    >>> learning_rate = optax.cosine_decay_schedule(0.1, 1000)
    >>> rho = msam_optax.rho_like_learning_rate(
    ...     learning_rate, rho_max=0.2, rho_min=0.02, learning_rate_max=0.1
    ... )
    >>> tx = msam_optax.gsam(optax.sgd(learning_rate, momentum=0.9), rho, alpha=0.4)

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    transform = sharpness_aware_gradient(ascents.normalized(rho), surrogate_gap(alpha))
    return chained(transform, optimizer)
