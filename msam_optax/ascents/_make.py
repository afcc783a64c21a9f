"""What all ascents share: rho is read, and what an ascent leaves alone stays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_scalar_or_schedule,
    init_schedule,
    read_schedule,
)
from msam_optax._base.numerics import safe_divide, scale
from msam_optax.ascents._restrict import check_masked

# perturb(rho, direction, params) -> epsilon
Perturb = Callable[[Any, optax.Updates, Any], optax.Updates]
# The same, and the l2 norm of epsilon
PerturbWithNorm = Callable[[Any, optax.Updates, Any], tuple[optax.Updates, jax.Array]]


class KnownNorm(optax.GradientTransformationExtraArgs):
    """An ascent that tells the l2 norm of its epsilon, so that nobody measures it.

    A norm for the metrics alone is one more pass over all parameters, and at 1,600
    tensors takes XLA for CPU as long to compile as all else in a step of SAM.

    Attributes:
      update_with_norm: as update, to ``(epsilon, norm, state)``.
    """

    update_with_norm: Callable[..., tuple[optax.Updates, jax.Array, optax.OptState]]

    @classmethod
    def make(
        cls,
        init: optax.TransformInitFn,
        update_with_norm: Callable[
            ..., tuple[optax.Updates, jax.Array, optax.OptState]
        ],
    ) -> "KnownNorm":
        """The ascent of an update that tells the norm."""

        def update(
            direction: Any, state: Any, params: Any = None, **extra_args: Any
        ) -> tuple[Any, Any]:
            epsilon, _, state = update_with_norm(direction, state, params, **extra_args)
            return epsilon, state

        ascent = cls(init, update)
        ascent.update_with_norm = update_with_norm
        return ascent


def perturbation(
    ascent: optax.GradientTransformationExtraArgs,
    direction: optax.Updates,
    state: optax.OptState,
    params: Any,
    **extra_args: Any,
) -> tuple[optax.Updates, jax.Array | None, optax.OptState]:
    """The ascent's epsilon, its norm where the ascent knows it, and the next state.

    Epsilon is 0 where the ascent hands the direction back untouched: `optax.masked`
    passes what it masks out through, which is right for updates, but here would make
    the raw gradient a perturbation.
    """
    check_masked(state)
    if isinstance(ascent, KnownNorm):
        return ascent.update_with_norm(direction, state, params, **extra_args)
    epsilon, state = ascent.update(direction, state, params, **extra_args)
    epsilon = jax.tree.map(
        lambda e, g: jnp.zeros_like(e) if e is g else e, epsilon, direction
    )
    return epsilon, None, state


def make(
    rho: ScalarOrSchedule, perturb: Perturb
) -> optax.GradientTransformationExtraArgs:
    """An ascent of your own, without state: `perturb` once rho is read.

    *Cost*: that of perturb. *State*: none, or one int32 where rho is a schedule.
    *Position*: inside ``sharpness_aware_gradient`` or ``momentum_perturbation``.

    Args:
      rho: radius, in a unit of perturb's choice; a float or a schedule.
      perturb: ``perturb(rho, direction, params) -> epsilon``, a tree like the direction
        in its dtypes. params are None where the caller gives none.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule.

    >>> import jax, jax.numpy as jnp, msam_optax
    >>> def signs(rho, direction, params):
    ...     return jax.tree.map(lambda g: rho * jnp.sign(g), direction)
    >>> ascent = msam_optax.ascents.make(0.5, signs)
    >>> direction = jnp.array([3.0, -4.0])
    >>> epsilon, _ = ascent.update(direction, ascent.init(direction))
    >>> print(epsilon)
    [ 0.5 -0.5]
    """
    check_scalar_or_schedule("rho", rho)

    def init_fn(params: Any) -> Any:
        del params
        return init_schedule(rho)

    def update_fn(
        direction: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        radius, state = read_schedule(rho, state, extra_args)
        return perturb(radius, direction, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def make_with_norm(rho: ScalarOrSchedule, perturb: PerturbWithNorm) -> KnownNorm:
    """As `make`, for a perturb that tells the norm of epsilon, too."""
    check_scalar_or_schedule("rho", rho)

    def update_with_norm(
        direction: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, jax.Array, Any]:
        radius, state = read_schedule(rho, state, extra_args)
        return *perturb(radius, direction, params), state

    return KnownNorm.make(lambda params: init_schedule(rho), update_with_norm)


def along(
    radius: Any, norm: jax.Array, direction: optax.Updates
) -> tuple[optax.Updates, jax.Array]:
    """radius · direction / norm and its norm, of a direction of that norm."""
    factor = safe_divide(radius, norm)
    return scale(factor, direction), jnp.abs(factor) * norm
