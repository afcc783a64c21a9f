"""AE-SAM."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax.policies import adaptive
from msam_optax.transforms._employ import employ
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def ae_sam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    total_steps: int,
    delta: float = 0.9,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Adaptively employed SAM: SAM in sharp regions, the plain gradient elsewhere.

    *Cost*: about half an extra gradient a step with the defaults. *State*: eight
    scalars. *Position*: outermost.

    The policy is :func:`msam_optax.policies.adaptive`, which has the mathematics.
    With total_steps far from the truth the threshold does not fall, or at once: look
    at the state's ``threshold`` and at the share of steps employed, which
    :func:`msam_optax.make_train_step` tells.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius; a float or a schedule over training steps.
      total_steps: number of steps of the whole training.
      delta: decay rate of the statistics, in [0, 1).
      lambda_1: threshold at the end, in standard deviations.
      lambda_2: threshold at the start, in standard deviations.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    >>> import msam_optax, optax
    >>> tx = msam_optax.ae_sam(optax.sgd(0.1, momentum=0.9), rho=0.05, total_steps=1000)

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023.
    """
    policy = adaptive(total_steps, delta, lambda_1, lambda_2)
    transform = sharpness_aware_gradient(ascents.normalized(rho))
    return chained(employ(policy, transform), optimizer)
