"""SS-SAM."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax.policies import bernoulli
from msam_optax.transforms._employ import employ
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def ss_sam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    probability: float = 0.5,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic scheduled SAM: SAM on random steps, the plain gradient on the others.

    *Cost*: ``probability`` extra gradients a step on average. *State*: five scalars.
    *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius; a float or a schedule over training steps.
      probability: of a SAM step, in [0, 1].
      seed: of the draws.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    >>> import msam_optax, optax
    >>> tx = msam_optax.ss_sam(optax.sgd(0.1, momentum=0.9), rho=0.05)

    References:
      Zhao et al., `SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization for
      Efficiently Training Deep Neural Networks <https://arxiv.org/abs/2203.09962>`_,
      2022.
    """
    transform = sharpness_aware_gradient(ascents.normalized(rho))
    return chained(employ(bernoulli(probability, seed), transform), optimizer)
