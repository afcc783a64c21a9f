"""Schedules for rho, and of a learning rate whose decay has SAM's steps."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_real,
    check_scalar_or_schedule,
    tail_start,
)


def rho_like_learning_rate(
    learning_rate: ScalarOrSchedule,
    rho_max: float,
    rho_min: float,
    learning_rate_max: float,
    learning_rate_min: float = 0.0,
) -> optax.Schedule:
    r"""A rho that rises and falls with the learning rate.

    .. math::
      \rho_t = \rho_{min} + (\rho_{max} - \rho_{min})
        \frac{\eta_t - \eta_{min}}{\eta_{max} - \eta_{min}}

    Args:
      learning_rate: a float or a schedule.
      rho_max: rho at the largest learning rate.
      rho_min: rho at the smallest.
      learning_rate_max: largest learning rate.
      learning_rate_min: smallest learning rate.

    Returns:
      A schedule.

    Raises:
      ValueError: if an argument is not a finite number, or the largest learning rate is
        not above the smallest.

    >>> import msam_optax, optax
    >>> learning_rate = optax.linear_schedule(0.1, 0.0, 100)
    >>> rho = msam_optax.rho_like_learning_rate(
    ...     learning_rate, rho_max=0.2, rho_min=0.1, learning_rate_max=0.1
    ... )
    >>> print(f"{rho(0):.2f} {rho(50):.2f} {rho(100):.2f}")
    0.20 0.15 0.10

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    check_scalar_or_schedule("learning_rate", learning_rate)
    check_real("rho_max", rho_max)
    check_real("rho_min", rho_min)
    check_real("learning_rate_max", learning_rate_max)
    check_real("learning_rate_min", learning_rate_min)
    if not learning_rate_max > learning_rate_min:
        raise ValueError(
            "learning_rate_max must be above learning_rate_min, but "
            f"{learning_rate_max!r} and {learning_rate_min!r} were given."
        )

    def schedule(step: Any) -> jax.Array:
        eta = learning_rate(step) if callable(learning_rate) else learning_rate
        share = (eta - learning_rate_min) / (learning_rate_max - learning_rate_min)
        return jnp.asarray(rho_min + (rho_max - rho_min) * share)

    return schedule


def hold_then_decay(
    value: float, total_steps: int, fraction: float, end_value: float = 0.0
) -> optax.Schedule:
    r"""A learning rate that is held and then falls to its end on a straight line.

    With the first step of the tail :math:`s = T - \operatorname{round}(fT)`, it is
    value for :math:`t \le s`, and from there falls linearly to end_value at step T. For
    sharpness-aware steps on the tail alone see :func:`msam_optax.policies.tail`.

    Args:
      value: the rate that is held.
      total_steps: T, number of steps of the whole training.
      fraction: f, the share of them on which the rate falls, in (0, 1].
      end_value: the rate after the last step.

    Returns:
      A schedule.

    Raises:
      ValueError: if value or end_value is not a finite number; else as
        :func:`msam_optax.policies.tail`.

    >>> import msam_optax
    >>> rate = msam_optax.hold_then_decay(0.1, total_steps=100, fraction=0.2)
    >>> print(f"{rate(0):.2f} {rate(80):.2f} {rate(90):.2f} {rate(100):.2f}")
    0.10 0.10 0.05 0.00
    """
    check_real("value", value)
    check_real("end_value", end_value)
    start = tail_start(total_steps, fraction)
    return optax.linear_schedule(value, end_value, total_steps - start, start)
