"""WSAM: weights SAM's sharpness against the loss, inside or outside the optimizer."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule, check_real
from msam_optax.combine import interpolate
from msam_optax.transforms._decoupled import decoupled_sharpness
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def wsam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    gamma: float = 0.9,
    learning_rate: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM: minimises :math:`L + \frac{\gamma}{1-\gamma} (L_{SAM} - L)`.

    With :math:`\alpha = \gamma/(1-\gamma)`, g the clean and :math:`\tilde g` the
    perturbed gradient, *coupled* (without a learning rate) the optimizer steps with
    :math:`(1-\alpha)\,g + \alpha\,\tilde g`. *Decoupled* (with one) it steps with g,
    and :math:`-\eta\alpha\,(\tilde g - g)` is added outside its momentum.

    *Cost*: one extra gradient a step. *State*: two scalars. *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius; a float or a schedule.
      gamma: weight of the sharpness, in [0, 1); 0.5 is SAM, 0.8 to 0.9 the paper's.
      learning_rate: the optimizer's own, for the decoupled form; a float or a schedule.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if gamma is outside [0, 1), or learning_rate is neither None, a finite
        number nor a schedule; with one by ``init``, if the optimizer accumulates or
        leaves some of the parameters alone.

    >>> import msam_optax, optax
    >>> base = optax.sgd(0.1, momentum=0.9)
    >>> coupled = msam_optax.wsam(base, rho=0.05, gamma=0.9)
    >>> decoupled = msam_optax.wsam(base, rho=0.05, gamma=0.9, learning_rate=0.1)

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, KDD 2023.
    """
    check_real("gamma", gamma, low=0.0, high=1.0, excluded=1.0)
    alpha = gamma / (1 - gamma)
    ascent = ascents.normalized(rho)
    if learning_rate is None:
        transform = sharpness_aware_gradient(ascent, interpolate(alpha))
        return chained(transform, optimizer)
    return decoupled_sharpness(optimizer, ascent, alpha, learning_rate)
