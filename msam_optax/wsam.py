"""WSAM: weights SAM's sharpness against the loss, inside or outside the optimizer."""

from typing import Any, NamedTuple

import optax

from msam_optax._hyperparams import (
    ScalarOrSchedule,
    check_real,
    check_scalar_or_schedule,
    check_transformation,
    init_schedule,
    read_schedule,
)
from msam_optax._numerics import add_scaled
from msam_optax.ascent import normalized_ascent
from msam_optax.combine import interpolate
from msam_optax.sharpness_aware import (
    SharpnessAwareState,
    chained,
    sharpness_aware_gradient,
)


class DecoupledSharpnessState(NamedTuple):
    """State of `decoupled_sharpness`.

    Attributes:
      optimizer_state: state of the optimizer.
      sharpness_aware_state: state of the sharpness-aware gradient.
      learning_rate_state: counter of the learning rate's schedule, empty for a
        constant.
    """

    optimizer_state: optax.OptState
    sharpness_aware_state: SharpnessAwareState
    learning_rate_state: Any


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

    *Cost*: one extra gradient a step. *State*: the optimizer's, and one scalar, one
    more for each schedule among rho and learning_rate. *Position*: ``update`` needs
    ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius; a float or a schedule.
      gamma: weight of the sharpness, in [0, 1); 0.5 is SAM, 0.8 to 0.9 the paper's.
      learning_rate: the optimizer's own, for the decoupled form; a float or a schedule.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if gamma is outside [0, 1), or learning_rate is neither None, a finite
        number nor a schedule; else as :func:`msam_optax.sharpness_aware_gradient`.

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
    ascent = normalized_ascent(rho)
    if learning_rate is None:
        transform = sharpness_aware_gradient(ascent, interpolate(alpha))
        return chained(transform, optimizer)
    return decoupled_sharpness(optimizer, ascent, alpha, learning_rate)


def decoupled_sharpness(
    optimizer: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    alpha: float,
    learning_rate: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`-\eta\alpha\,(\tilde g - g)` to an optimizer's updates.

    *Cost*: one extra gradient. *State*: the optimizer's and the ascent's, and one
    scalar, one more for a schedule. *Position*: outermost; the optimizer sees the clean
    gradient.

    Args:
      optimizer: the whole base optimizer.
      ascent: what makes epsilon of the gradient.
      alpha: weight of the difference.
      learning_rate: eta; a float or a schedule.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params`` and
      ``grad_fn``.

    Raises:
      ValueError: if learning_rate is neither a finite number nor a schedule.
    """
    check_scalar_or_schedule("learning_rate", learning_rate)
    optimizer = check_transformation("optimizer", optimizer)
    check_real("alpha", alpha)
    sharpness = sharpness_aware_gradient(
        ascent, combine=lambda clean, perturbed: optax.tree.sub(perturbed, clean)
    )

    def init_fn(params):
        return DecoupledSharpnessState(
            optimizer_state=optimizer.init(params),
            sharpness_aware_state=sharpness.init(params),
            learning_rate_state=init_schedule(learning_rate),
        )

    def update_fn(updates, state, params=None, **extra_args):
        difference, sharpness_aware_state = sharpness.update(
            updates, state.sharpness_aware_state, params, **extra_args
        )
        updates, optimizer_state = optimizer.update(
            updates, state.optimizer_state, params, **extra_args
        )
        eta, learning_rate_state = read_schedule(
            learning_rate, state.learning_rate_state, extra_args
        )
        updates = add_scaled(updates, -eta * alpha, difference)
        return updates, DecoupledSharpnessState(
            optimizer_state, sharpness_aware_state, learning_rate_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
