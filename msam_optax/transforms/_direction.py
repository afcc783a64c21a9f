"""Along what MSAM perturbs: the inner optimizer's momentum or its own last update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.trees import is_like, shapes_like
from msam_optax.transforms._dry_step import sides
from msam_optax.transforms._find_momentum import (
    find_momentum,
    find_states,
    leaves_like,
    momentum_parts,
)
from msam_optax.transforms._perturbed_states import PERTURBED

# momentum_fn(inner_state) -> the momentum, a tree like the parameters
MomentumFn = Callable[[optax.OptState], optax.Updates]


class Direction(NamedTuple):
    """What is subtracted from the parameters, before its length is set.

    Attributes:
      of: ``of(inner_state, inner_updates, params)`` after the inner optimizer's step,
        a tree like the parameters.
      check: ``check(inner_state, params)``, raises ValueError in ``init`` where there
        is no such direction or where it is known to have the wrong sign.
    """

    of: Callable[[optax.OptState, optax.Updates, optax.Params], optax.Updates]
    check: Callable[[optax.OptState, optax.Params], None]


def along_momentum(
    inner: optax.GradientTransformationExtraArgs, momentum_fn: MomentumFn | None = None
) -> Direction:
    """The momentum v, found or told."""

    def of(inner_state: Any, updates: Any, params: Any) -> Any:
        del updates
        if momentum_fn is None:
            return find_momentum(inner_state, params)
        momentum = momentum_fn(inner_state)
        if not is_like(momentum, shapes_like(params), masked=True):
            raise ValueError(
                "momentum_fn must return a tree like the parameters, "
                f"{jax.tree.structure(params)}, but it returned "
                f"{jax.tree.structure(momentum)} or other shapes."
            )
        return momentum

    def check(inner_state: Any, params: Any) -> None:
        _check_not_nested(inner_state)
        if momentum_fn is None:
            parts = dict(momentum_parts(inner_state, params))
        else:
            leaves = leaves_like(of(inner_state, None, params), params) or []
            parts = {"momentum_fn": {i: x for i, x in enumerate(leaves)}}

        def with_update(state: Any, updates: Any, grads: Any, params: Any) -> Any:
            del grads
            return of(state, updates, params), updates

        for name, side in sides(inner, params, parts, with_update).items():
            if side > 0:
                raise ValueError(
                    f"The momentum in the optimizer's state ({name}) points along the "
                    "optimizer's step and not against it, so that MSAM would perturb "
                    "to the wrong side. Either it stands behind the learning rate, as "
                    "in optax.rmsprop(learning_rate, momentum=0.9) and optax.lars: use "
                    'momentum_perturbation(..., along="update"), or turn its sign, '
                    "momentum_fn=lambda inner_state: ... Or the learning rate, and "
                    "with it the minus sign, stands outside: give the whole optimizer, "
                    "learning rate included."
                )

    return Direction(of, check)


def along_update(inner: optax.GradientTransformationExtraArgs) -> Direction:
    """The update less its sign, so that what is subtracted leads further along it."""

    def of(inner_state: Any, updates: Any, params: Any) -> Any:
        del inner_state, params
        return jax.tree.map(jnp.negative, updates)

    def check(inner_state: Any, params: Any) -> None:
        _check_not_nested(inner_state)
        if find_states(inner_state, (optax.MultiStepsState, optax.ApplyEvery)):
            raise ValueError(
                'along="update" needs an update on every step, but the inner optimizer '
                "holds an optax.MultiSteps or apply_every, whose update is zero in "
                "between: put MultiSteps around, "
                "optax.MultiSteps(momentum_perturbation(...), k)."
            )

        def with_gradient(state: Any, updates: Any, grads: Any, params: Any) -> Any:
            del state, params
            return updates, grads

        parts = {"": dict(enumerate(jax.tree.leaves(params)))}
        if any(
            side > 0 for side in sides(inner, params, parts, with_gradient).values()
        ):
            raise ValueError(
                "The inner optimizer's update points along the gradient and not "
                "against it. The learning rate, and with it the minus sign, must "
                "stand inside: momentum_perturbation(optax.chain(..., "
                'optax.scale_by_learning_rate(learning_rate)), rho, along="update"). '
                "(To climb, negate the loss.)"
            )

    return Direction(of, check)


def _check_not_nested(inner_state: Any) -> None:
    if find_states(inner_state, PERTURBED):
        raise ValueError(
            "The inner optimizer is itself perturbed along its momentum; "
            "momentum_perturbation (msam, adamw_msam) must not be nested."
        )
