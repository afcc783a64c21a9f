"""What all ascents share: rho is read, and what an ascent leaves alone stays."""

from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class TellsNorm:
    """The update of an ascent that knows the l2 norm of its epsilon.

    A norm that is measured for the metrics alone is one more pass over all parameters,
    and at 1,600 tensors takes XLA for CPU as long to compile as all else in a step of
    SAM.

    Attributes:
      with_norm: as an update, to ``(epsilon, norm, state)``.
    """

    with_norm: Callable[..., tuple[optax.Updates, jax.Array, optax.OptState]]

    def __call__(
        self, direction: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        epsilon, _, state = self.with_norm(direction, state, params, **extra_args)
        return epsilon, state


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
    if isinstance(ascent.update, TellsNorm):
        return ascent.update.with_norm(direction, state, params, **extra_args)
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


def make_with_norm(
    rho: ScalarOrSchedule, perturb: PerturbWithNorm
) -> optax.GradientTransformationExtraArgs:
    """As `make`, for a perturb that tells the norm of epsilon, too."""
    ascent = make(rho, perturb)

    def with_norm(*args: Any, **extra_args: Any) -> tuple[Any, jax.Array, Any]:
        (epsilon, norm), state = ascent.update(*args, **extra_args)
        return epsilon, norm, state

    return optax.GradientTransformationExtraArgs(ascent.init, TellsNorm(with_norm))


def along(
    radius: Any, norm: jax.Array, direction: optax.Updates
) -> tuple[optax.Updates, jax.Array]:
    """radius · direction / norm and its norm, of a direction of that norm."""
    factor = safe_divide(radius, norm)
    # Where the norm overflows epsilon is 0.
    length = jnp.abs(factor) * jnp.where(norm < jnp.inf, norm, 0)
    return scale(factor, direction), length
