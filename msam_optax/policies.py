r"""Policies: on which steps a transformation is employed.

A :class:`Policy` is a pair of pure functions, ``init(params) -> state`` and
``decide(updates, state, params, *, step, **extra_args) -> (decision, state)`` with a
boolean scalar decision. :func:`msam_optax.employ` counts the steps and asks it on every
one, so that running statistics see every gradient. Policies combine,
``between(500) & adaptive(1000)``; write your own as a function that returns a
``Policy``.

>>> import jax.numpy as jnp, msam_optax
>>> policy = msam_optax.policies.between(1, 5) & msam_optax.policies.every(2)
>>> state, decisions = policy.init(jnp.zeros(3)), []
>>> for step in range(8):
...     decision, state = policy.decide(jnp.ones(3), state, step=step)
...     decisions.append(int(decision))
>>> decisions
[0, 0, 1, 0, 1, 0, 0, 0]
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_integer, check_real, tail_start
from msam_optax._base.numerics import safe_sqrt, statistics_dtype, sum_of_squares

__all__ = [
    "AdaptiveState",
    "Policy",
    "adaptive",
    "always",
    "bernoulli",
    "between",
    "every",
    "never",
    "tail",
]


class Policy(NamedTuple):
    """Decides on which steps a transformation is employed.

    Attributes:
      init: ``init(params) -> state``, a tree of arrays; ``optax.EmptyState()`` where
        there is nothing to remember.
      decide: ``decide(updates, state, params, *, step, **extra_args) -> (decision,
        state)``, called once a step; the step is an int32 scalar that counts from 0,
        and the decision a boolean scalar array.

    Two policies combine to one with ``&`` and ``|``. Both decide on every step, so
    that the statistics of one see the gradients that the other rules out.
    """

    init: Callable[[Any], Any]
    decide: Callable[..., tuple[jax.Array, Any]]

    def __and__(self, other: "Policy") -> "Policy":
        return _combine(self, other, jnp.logical_and)

    def __bool__(self) -> bool:
        raise ValueError("Join policies by & and |, not by `and` and `or`.")

    def __or__(self, other: "Policy") -> "Policy":
        return _combine(self, other, jnp.logical_or)


class AdaptiveState(NamedTuple):
    """State of `adaptive`.

    Attributes:
      mean: float32 scalar, running mean of the squared gradient norm.
      variance: float32 scalar, running variance of the squared gradient norm.
      threshold: float32 scalar, what the last squared gradient norm was compared to; 0
        before the first.
    """

    mean: jax.Array
    variance: jax.Array
    threshold: jax.Array


def _combine(
    one: Policy, other: Policy, rule: Callable[[jax.Array, jax.Array], jax.Array]
) -> Policy:
    if not isinstance(other, Policy):
        raise ValueError(f"A policy joins with a Policy, but got {other!r}.")

    def init(params: Any) -> Any:
        return one.init(params), other.init(params)

    def decide(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[jax.Array, Any]:
        first, first_state = one.decide(updates, state[0], params, **extra_args)
        second, second_state = other.decide(updates, state[1], params, **extra_args)
        return rule(first, second), (first_state, second_state)

    return Policy(init, decide)


def _at_steps(chosen: Callable[[jax.Array], Any]) -> Policy:
    """The policy that employs at the steps t (from 0) where chosen(t) is true."""

    def init(params: Any) -> Any:
        del params
        return optax.EmptyState()

    def decide(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        step: jax.Array,
        **extra_args: Any,
    ) -> tuple[jax.Array, Any]:
        del updates, params, extra_args
        return jnp.asarray(chosen(step), bool), state

    return Policy(init, decide)


def always() -> Policy:
    """Employs on every step."""
    return _at_steps(lambda step: True)


def never() -> Policy:
    """Employs on no step."""
    return _at_steps(lambda step: False)


def every(k: int) -> Policy:
    """Employs on steps 0, k, 2k, ...

    Args:
      k: period in steps, at least 1.

    Raises:
      ValueError: if k is not an integer of at least 1.
    """
    check_integer("k", k, low=1)
    return _at_steps(lambda step: step % k == 0)


def between(start: int, stop: int | None = None) -> Policy:
    """Employs on the steps start <= t < stop, for a late or an early phase.

    Args:
      start: first step employed, from 0.
      stop: first step no longer employed; None for no end.

    Raises:
      ValueError: if start or stop is not an integer of at least 0, or stop does not
        come after start.
    """
    check_integer("start", start, low=0)
    if stop is None:
        return _at_steps(lambda step: step >= start)
    check_integer("stop", stop, low=0)
    if not isinstance(stop, jax.core.Tracer) and stop <= start:
        raise ValueError(
            f"stop must come after start, but start={start} and stop={stop} were given."
        )
    return _at_steps(lambda step: (start <= step) & (step < stop))


def tail(total_steps: int, fraction: float) -> Policy:
    """Employs on the last steps of the training, those on which the rate decays.

    With :func:`msam_optax.hold_then_decay` of the same two numbers as learning rate,
    these are exactly the steps from which to the next the rate falls. The paper finds
    that the sharpness-aware steps late in training do most of what all of them do.

    Args:
      total_steps: number of steps of the whole training.
      fraction: share of the steps employed, in (0, 1].

    Raises:
      ValueError: if total_steps is not an integer of at least 1, fraction is outside
        [0, 1] or less than half of a step, or one of them is not a Python number.

    >>> import msam_optax, optax
    >>> rate = msam_optax.hold_then_decay(0.1, total_steps=1000, fraction=0.2)
    >>> sam = msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(0.05))
    >>> late = msam_optax.employ(msam_optax.policies.tail(1000, 0.2), sam)
    >>> tx = optax.chain(late, optax.sgd(rate, momentum=0.9))

    References:
      Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late
      in Training <https://arxiv.org/abs/2410.10373>`_, ICLR 2025.
    """
    return between(tail_start(total_steps, fraction))


def bernoulli(probability: float, seed: int = 0) -> Policy:
    """Employs on each step with the same probability, independently (SS-SAM).

    The draw of step t depends on the seed and t alone, so all devices and a resumed
    run decide alike.

    Args:
      probability: of employing, in [0, 1].
      seed: integer seed of the draws.

    Raises:
      ValueError: if probability is outside [0, 1] or seed is not an integer.

    References:
      Zhao et al., `SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization for
      Efficiently Training Deep Neural Networks <https://arxiv.org/abs/2203.09962>`_,
      2022.
    """
    check_real("probability", probability, low=0.0, high=1.0)
    check_integer("seed", seed, low=0)

    def draw(step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.bernoulli(key, probability)

    return _at_steps(draw)


def adaptive(
    total_steps: int,
    delta: float = 0.9,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
    initial_mean: float = 0.0,
    initial_variance: float = 0.0,
) -> Policy:
    r"""Employs where the squared gradient norm is high against its running statistics.

    AE-SAM's policy. At step :math:`t = 0, 1, \dots`, with
    :math:`n_t = \|g_t\|^2` over all parameters together,

    .. math::
      \begin{align*}
        \mu_t &= \delta \mu_{t-1} + (1 - \delta) n_t \\
        \sigma_t^2 &= \delta \sigma_{t-1}^2 + (1 - \delta) (n_t - \mu_t)^2 \\
        c_t &= (t/T) \lambda_1 + (1 - t/T) \lambda_2 \\
        \text{employ} &\iff n_t \ge \mu_t + c_t \sigma_t .
      \end{align*}

    The statistics take in :math:`n_t` before the test, on every step. With the
    defaults the threshold falls from one standard deviation above the mean to one
    below, so that employing grows more frequent, and averages about half of the steps.
    Past the total :math:`c_t` stays :math:`\lambda_1`. A gradient that is not finite
    is not employed and does not enter the statistics.

    *Cost*: one reduction over the gradient. *State*: three scalars, of which the
    threshold is kept to be looked at. *Position*: in an
    ``employ`` that stands first in the chain, where the gradient is the loss's alone
    and clean of weight decay.

    Args:
      total_steps: T, the number of steps of the whole training.
      delta: decay rate of the statistics, in [0, 1).
      lambda_1: threshold at the end, in standard deviations.
      lambda_2: threshold at the start, in standard deviations.
      initial_mean: of the statistics. The paper does not say; 0 here.
      initial_variance: of the statistics, likewise.

    Raises:
      ValueError: if total_steps is not an integer of at least 1, delta is outside
        [0, 1), or another argument is not a finite number.

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023.
    """
    check_integer("total_steps", total_steps, low=1)
    check_real("delta", delta, low=0.0, high=1.0, excluded=1.0)
    check_real("lambda_1", lambda_1)
    check_real("lambda_2", lambda_2)
    check_real("initial_mean", initial_mean)
    check_real("initial_variance", initial_variance, low=0.0)

    def init(params: Any) -> Any:
        dtype = statistics_dtype(params)
        return AdaptiveState(
            mean=jnp.array(initial_mean, dtype),
            variance=jnp.array(initial_variance, dtype),
            threshold=jnp.zeros([], dtype),
        )

    def decide(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        step: jax.Array,
        **extra_args: Any,
    ) -> tuple[jax.Array, Any]:
        del params, extra_args
        dtype = state.mean.dtype
        squared_norm = sum_of_squares(updates).astype(dtype)
        mean = delta * state.mean + (1 - delta) * squared_norm
        variance = delta * state.variance + (1 - delta) * (squared_norm - mean) ** 2
        progress = jnp.minimum(jnp.asarray(step, dtype) / total_steps, 1)
        c = progress * lambda_1 + (1 - progress) * lambda_2
        threshold = mean + c * safe_sqrt(variance)
        # The square of a finite deviation may overflow too, hence both.
        finite = jnp.isfinite(squared_norm) & jnp.isfinite(variance)
        return finite & (squared_norm >= threshold), AdaptiveState(
            mean=jnp.where(finite, mean, state.mean).astype(dtype),
            variance=jnp.where(finite, variance, state.variance).astype(dtype),
            threshold=jnp.where(finite, threshold, state.threshold).astype(dtype),
        )

    return Policy(init, decide)
