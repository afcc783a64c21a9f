"""What is seen to stand in the wrong place, from states and from a dry step."""

from typing import Any

import optax

from msam_optax.transforms._dry_step import descends
from msam_optax.transforms._find_momentum import find_states
from msam_optax.transforms._perturbed_states import PERTURBED
from msam_optax.transforms._remembered import RememberedGradientState
from msam_optax.transforms._sharpness_aware import SharpnessAwareState


def check_is_no_optimizer(
    place: str,
    transform: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    params: Any,
) -> None:
    """Raises ValueError for a whole optimizer where a part of one belongs.

    Args:
      place: what was given it, in words.
      transform: what was given.
      state: its state at the parameters.
      params: the parameters.
    """
    parts = SharpnessAwareState, RememberedGradientState
    if find_states(state, PERTURBED):
        raise ValueError(
            f"{place} was given MSAM, a whole optimizer: on the other steps the raw "
            "gradient would be the update. For MSAM on some steps give rho a schedule, "
            "rho=lambda step: 0.3 * (step >= 100)."
        )
    # This package's own elements are known to be parts of one, which saves the try.
    if not isinstance(state, parts) and descends(transform, params):
        raise ValueError(
            f"{place} needs a transformation of the gradient, but was given a whole "
            "optimizer, whose updates go against the gradient: what follows, or the "
            "steps without it, would take the one for the other. Put the optimizer "
            "behind, optax.chain(employ(policy, sharpness_aware_gradient(ascent)), "
            "optimizer). Where this is meant, say what the other steps do: "
            "employ(policy, transform, otherwise=lambda updates, inner_state: ...)."
        )


def check_wrappers(state: optax.OptState, skips: bool = False) -> None:
    """Raises ValueError for a wrapper that surely does not do what it is meant to.

    An accumulator and a guard do not see a gradient that is taken inside, and what is
    left out on some steps must be no whole optimizer.

    Args:
      state: of the whole optimizer; its structure alone counts.
      skips: whether steps that are not finite are skipped whole anyway.
    """
    for some_steps in find_states(state, optax.ConditionallyTransformState):
        if find_states(some_steps.inner_state, PERTURBED):
            raise ValueError(
                "optax.conditionally_transform stands around MSAM, a whole optimizer: "
                "on the other steps the raw gradient would be the update. To leave "
                "these out use optax.conditionally_mask; for MSAM on some steps give "
                "rho a schedule."
            )
    for accumulator in find_states(state, optax.MultiStepsState):
        if find_states(accumulator.inner_opt_state, SharpnessAwareState):
            raise ValueError(
                "optax.MultiSteps stands around a sharpness-aware gradient, but the "
                "gradient that is taken inside is the last micro-batch's alone: "
                "accumulate behind it, optax.chain(sharpness_aware_gradient(ascent), "
                "optax.MultiSteps(optimizer, k).gradient_transformation()), or take "
                "one epsilon for all parts by make_train_step(..., microbatches=k)."
            )
    for guard in () if skips else find_states(state, optax.ApplyIfFiniteState):
        if find_states(guard.inner_state, SharpnessAwareState):
            raise ValueError(
                "optax.apply_if_finite stands around a sharpness-aware gradient, but "
                "it looks at the gradient that comes in, and one that is taken inside "
                "may not be finite where that one is: put it inside, "
                "sam(optax.apply_if_finite(optimizer, n)), or skip whole steps by "
                "make_train_step(..., loss_scaling=LossScaling(1.0, factor=1.0))."
            )
