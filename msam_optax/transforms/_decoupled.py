"""Sharpness added to an optimizer's updates, outside its momentum."""

from typing import Any, NamedTuple

import optax

from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_real,
    check_scalar_or_schedule,
    check_transformation,
    init_schedule,
    read_schedule,
)
from msam_optax._base.numerics import add_scaled
from msam_optax._base.trees import check_init, check_state
from msam_optax.transforms._dry_step import left_alone
from msam_optax.transforms._find_momentum import find_states
from msam_optax.transforms._sharpness_aware import (
    SharpnessAwareState,
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


def decoupled_sharpness(
    optimizer: optax.GradientTransformation,
    ascent: optax.GradientTransformation,
    alpha: float,
    learning_rate: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`-\eta\alpha\,(\tilde g - g)` to an optimizer's updates.

    *Cost*: one extra gradient. *State*: the optimizer's and the ascent's, and two
    scalars, one more for a schedule. *Position*: outermost; the optimizer sees the
    clean gradient, and what stands in it (clipping, say) does not see the difference,
    which is added behind. Frozen parameters, an accumulator and a guard against NaNs
    belong around: ``optax.partition`` and ``make_train_step``'s ``microbatches`` and
    ``loss_scaling``.

    Args:
      optimizer: the whole base optimizer.
      ascent: what makes epsilon of the gradient.
      alpha: weight of the difference.
      learning_rate: eta; a float or a schedule.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params`` and
      ``grad_fn``.

    Raises:
      ValueError: if learning_rate is neither a finite number nor a schedule; by
        ``init``, if the optimizer holds an accumulator or leaves some of the
        parameters alone.
    """
    check_scalar_or_schedule("learning_rate", learning_rate)
    optimizer = check_transformation("optimizer", optimizer)
    check_real("alpha", alpha)
    sharpness = sharpness_aware_gradient(
        ascent, combine=lambda clean, perturbed: optax.tree.sub(perturbed, clean)
    )

    def init_fn(params: Any) -> Any:
        check_init(params)
        optimizer_state = optimizer.init(params)
        _check_inside(optimizer, optimizer_state, params)
        return DecoupledSharpnessState(
            optimizer_state=optimizer_state,
            sharpness_aware_state=sharpness.init(params),
            learning_rate_state=init_schedule(learning_rate),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_state(state, DecoupledSharpnessState)
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


def _check_inside(
    optimizer: optax.GradientTransformationExtraArgs, state: Any, params: Any
) -> None:
    """Raises ValueError where the difference would undo what the optimizer leaves."""
    waiting = optax.MultiStepsState, optax.ApplyEvery, optax.ConditionallyMaskState
    if find_states(state, waiting):
        raise ValueError(
            "Decoupled sharpness is added behind the optimizer, where one that updates "
            "on some steps only does not hold it back: take make_train_step(..., "
            "microbatches=k) in the place of optax.MultiSteps and apply_every, put "
            "conditionally_mask around, or take the coupled form, without "
            "learning_rate."
        )
    if left_alone(optimizer, params):
        raise ValueError(
            "Decoupled sharpness is added behind the optimizer, which leaves some of "
            "the parameters alone, and would move these too: freeze around, "
            'optax.partition({"train": wsam(...), "freeze": optax.set_to_zero()}, '
            "labels), or take the coupled form, without learning_rate."
        )
