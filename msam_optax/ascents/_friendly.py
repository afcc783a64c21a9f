"""Friendly SAM: ascends along what is particular to the batch, not along the trend."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import (
    ScalarOrSchedule,
    check_real,
    check_scalar_or_schedule,
    init_schedule,
    read_schedule,
)
from msam_optax._base.numerics import add_scaled, global_norm
from msam_optax.ascents._make import TellsNorm, along


class FriendlyAscentState(NamedTuple):
    """State of `friendly`.

    Attributes:
      average: tree like the parameters, running mean of the gradients.
      started: boolean scalar, whether the average holds a gradient yet.
      rho_state: counter of rho's schedule, empty for a constant.
    """

    average: optax.Updates
    started: jax.Array
    rho_state: Any


def friendly(
    rho: ScalarOrSchedule, sigma: float = 1.0, decay: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Ascent along the gradient less its running mean.

    With :math:`m` the running mean of the gradients,

    .. math::
      d_t = g_t - \sigma m_{t-1}, \qquad \varepsilon = \rho\, d_t / \|d_t\|, \qquad
      m_t = \lambda m_{t-1} + (1 - \lambda) g_t ,

    starting with :math:`d_0 = m_0 = g_0`. The mean takes in the gradient, not d.

    *Cost*: one reduction over the gradient. *State*: one tree like the parameters, one
    boolean, and one int32 where rho is a schedule. *Position*: inside
    ``sharpness_aware_gradient``; under ``employ`` the mean sees only the gradients of
    the steps employed.

    Args:
      rho: radius, in the unit of the parameters; a float or a schedule.
      sigma: how much of the mean is taken away.
      decay: lambda, of the mean; 0.6 to 0.9 in the paper.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule, sigma is not a
        finite number, or decay is outside [0, 1].

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.friendly(rho=0.5)
    >>> state = ascent.init(jnp.zeros(2))
    >>> _, state = ascent.update(jnp.array([3.0, 0.0]), state)
    >>> epsilon, _ = ascent.update(jnp.array([3.0, 4.0]), state)  # less the mean
    >>> print(epsilon)
    [0.  0.5]

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, CVPR 2024.
    """
    check_scalar_or_schedule("rho", rho)
    check_real("sigma", sigma)
    check_real("decay", decay, low=0.0, high=1.0)

    def init_fn(params: Any) -> Any:
        return FriendlyAscentState(
            average=optax.tree.zeros_like(params),
            started=jnp.zeros([], bool),
            rho_state=init_schedule(rho),
        )

    def with_norm(
        direction: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, jax.Array, Any]:
        del params
        radius, rho_state = read_schedule(rho, state.rho_state, extra_args)
        # The mean is zero before the first step, so d is the gradient then.
        friendly = add_scaled(direction, -sigma, state.average)
        weight = jnp.where(state.started, 1 - decay, 1)
        norm = global_norm(friendly)
        finite = jnp.isfinite(norm)  # else the mean would never be a number again
        average = jax.tree.map(
            lambda m, g: jnp.where(finite, (1 - weight) * m + weight * g, m).astype(
                m.dtype
            ),
            state.average,
            direction,
        )
        epsilon, length = along(radius, norm, friendly)
        started = state.started | finite
        return epsilon, length, FriendlyAscentState(average, started, rho_state)

    return optax.GradientTransformationExtraArgs(init_fn, TellsNorm(with_norm))
