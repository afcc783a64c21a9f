"""Hyper-parameters: checked when a transformation is built, scheduled when it runs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# A schedule maps a step, counted from 0, to the value at that step. To type
# checkers optax.ScalarOrSchedule is a variable and no type.
ScalarOrSchedule = float | jax.Array | Callable[[Any], Any]


def check_real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    excluded: float | None = None,
) -> None:
    """Raises ValueError unless `value` is one finite real number in [low, high].

    One end of the interval may be excluded. A traced value passes:
    `optax.inject_hyperparams` builds the transformation anew inside `jit`, where
    nothing is known about the value but its type.
    """
    needed = f"{name} must be one finite real number"
    if (low, high) != (-math.inf, math.inf):
        left, right = "(" if excluded == low else "[", ")" if excluded == high else "]"
        needed += f" in {left}{low:g}, {high:g}{right}"
    dtype = getattr(value, "dtype", None)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if dtype is not None:
        numeric = jnp.ndim(value) == 0 and (
            jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
        )
    if not numeric:
        raise ValueError(f"{needed}, but {value!r} was given.")
    if isinstance(value, jax.core.Tracer):
        return
    if not (math.isfinite(value) and low <= value <= high and value != excluded):
        raise ValueError(f"{needed}, but {value!r} was given.")


def check_scalar_or_schedule(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a finite real number or a schedule."""
    if not callable(value):
        check_real(f"{name} (or a schedule step -> {name})", value)


def check_integer(name: str, value: Any, low: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `low`."""
    check_real(name, value, low)
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise ValueError(f"{name} must be an integer, but {value!r} was given.")


def tail_start(total_steps: int, fraction: float) -> int:
    """The first step of the last `fraction` of a training; ValueError without any."""
    check_integer("total_steps", total_steps, low=1)
    check_real("fraction", fraction, low=0.0, high=1.0)
    known = static_value(fraction), static_value(total_steps)
    if None in known:
        raise ValueError(
            "total_steps and fraction must be Python numbers, but "
            f"{total_steps!r} and {fraction!r} were given."
        )
    tail = round(fraction * total_steps)
    if tail < 1:
        raise ValueError(
            f"The tail must have at least one step, but fraction={fraction} of "
            f"total_steps={total_steps} has none."
        )
    return total_steps - tail


def check_transformation(
    name: str, value: Any
) -> optax.GradientTransformationExtraArgs:
    """The transformation, ready for extra arguments; ValueError if it is none."""
    if isinstance(value, optax.MultiSteps):
        raise ValueError(
            f"{name} is an optax.MultiSteps, which is no transformation itself: give "
            "its .gradient_transformation()."
        )
    if not isinstance(value, optax.GradientTransformation):
        raise ValueError(
            f"{name} must be an optax.GradientTransformation, but {value!r} was given."
        )
    return optax.with_extra_args_support(value)


def init_schedule(value: ScalarOrSchedule) -> Any:
    """A counter where `value` is a schedule, nothing where it is a number.

    It is an int32 scalar without a name of its own, since several meet in one state:
    each is called after the hyper-parameter by the state that holds it.
    """
    return jnp.zeros([], jnp.int32) if callable(value) else optax.EmptyState()


def training_step(step: jax.Array, extra_args: dict[str, Any]) -> jax.Array:
    """The step of the training: the extra argument if there is one, else `step`.

    An `employ` gives it. It does not run its transformation on every step, so that one
    on its own would only count the steps that were employed.
    """
    return jnp.asarray(extra_args.get("step", step), jnp.int32)


def read_schedule(
    value: ScalarOrSchedule, state: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
    """The value at this step, and the state for the next one."""
    if not callable(value):
        return value, state
    if state is None or isinstance(state, dict | tuple):
        raise ValueError(
            "A schedule counts its steps in the state, but this state is of a run "
            f"whose hyper-parameter was a number: {state!r} stands in the counter's "
            "place. Put the step there that the schedule goes on from, for instance "
            "jnp.asarray(1000, jnp.int32), for MSAM by state._replace(rho_state=...)."
        )
    step = training_step(state, extra_args)
    return value_at(value, step), optax.safe_increment(step)


def value_at(value: ScalarOrSchedule, step: jax.Array) -> Any:
    """The value of a hyper-parameter at a step."""
    if not callable(value):
        return value
    now = value(step)
    check_real("What a schedule returns", now)
    return now


def static_value(value: Any) -> float | None:
    """The Python number that a hyper-parameter is for good, None if it may change.

    An array may: `optax.inject_hyperparams` keeps its numbers as arrays in the state.
    """
    return float(value) if isinstance(value, int | float) else None
