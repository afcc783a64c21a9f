r"""Loss scaling: float16 gradients without underflow, overflowing steps skipped.

Cotangents :math:`\bar y` of a float16 backward pass underflow below 6e-8. Scaling the
loss by S scales all of them, and the gradient is divided by S once it is out of the
network. Here this happens around the loss function itself,

.. math::
  \ell \to S \cdot \bar\ell \quad\text{at its output}, \qquad
  \bar w \to \bar w / S \quad\text{at its parameters},

both in the backward pass alone. So the loss keeps its value, and whoever differentiates
it, whichever gradient of a step that is, gets the unscaled gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_integer, check_real


class LossScaleState(NamedTuple):
    """State of `LossScaling`.

    Attributes:
      scale: float32 scalar, the factor S of the next step.
      finite_steps: int32 scalar, steps without an overflow since S last changed.
    """

    scale: jax.Array
    finite_steps: jax.Array


@dataclasses.dataclass(frozen=True)
class LossScaling:
    """A loss scale that halves where gradients overflow and grows where they do not.

    For :func:`msam_optax.make_train_step`: a step whose gradients or updates are not
    finite is skipped whole. All methods get unscaled gradients, so that those which
    depend on the loss's scale (:func:`msam_optax.fisher_sam`,
    :func:`msam_optax.ascents.unnormalized`, AE-SAM's statistics) are right.

    ``LossScaling(1.0, factor=1.0)`` scales nothing and only skips: what bfloat16 or
    float32 training needs to survive a batch with a NaN.

    *Cost*: none in gradients; the new state waits until all updates are known to be
    finite, one more pass over them. *State*: two scalars.

    Attributes:
      initial: the first scale.
      growth_interval: number of finite steps after which the scale grows.
      factor: what the scale is multiplied or divided by.
      minimum: below which the scale never falls.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> def loss_fn(params, model_state, batch, key):
    ...     outputs = batch.astype(jnp.float16) @ params.astype(jnp.float16)
    ...     return jnp.mean(outputs.astype(jnp.float32) ** 2), (model_state, {})
    >>> tx, scaling = msam_optax.sam(optax.sgd(0.1)), msam_optax.LossScaling()
    >>> step = msam_optax.make_train_step(loss_fn, tx, loss_scaling=scaling)
    >>> params = jnp.ones(3)
    >>> state = msam_optax.TrainState(params, tx.init(params), (), scaling.init())
    >>> state, metrics = step(state, jnp.eye(3), None)
    >>> state, metrics = step(state, jnp.full((3, 3), jnp.nan), None)
    >>> print(bool(metrics.skipped), float(state.loss_scale.scale))
    True 16384.0

    References:
      Micikevicius et al., `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, ICLR 2018, section 3.2.
    """

    initial: float = 2.0**15
    growth_interval: int = 2000
    factor: float = 2.0
    minimum: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError where the attributes make no sense."""
        check_integer("growth_interval", self.growth_interval, 1)
        check_real("factor", self.factor, 1)
        check_real("minimum", self.minimum, 0, excluded=0)
        check_real("initial", self.initial, self.minimum)

    def init(self) -> LossScaleState:
        """The first state."""
        return LossScaleState(
            jnp.asarray(self.initial, jnp.float32), jnp.zeros([], jnp.int32)
        )

    def adjust(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """The next state, after a step that was finite or was not."""
        steps = jnp.where(finite, state.finite_steps + 1, 0)
        grows = steps >= self.growth_interval
        grown = jnp.where(grows, state.scale * self.factor, state.scale)
        fallen = jnp.maximum(state.scale / self.factor, self.minimum)
        return LossScaleState(
            # A scale that is itself infinite would never come back.
            scale=jnp.where(
                finite, jnp.where(jnp.isfinite(grown), grown, state.scale), fallen
            ),
            finite_steps=jnp.where(grows, 0, steps),
        )


def scaled_backward(
    loss_fn: Callable[..., Any], scale: jax.Array
) -> Callable[..., Any]:
    """`loss_fn(params, ...) -> (loss, others)`, scaled in its backward pass alone."""

    def scaled(params: Any, *args: Any) -> tuple[Any, Any]:
        loss, others = loss_fn(_scale_cotangent(params, 1 / scale), *args)
        return _scale_cotangent(loss, scale), others

    return scaled


@jax.custom_vjp
def _scale_cotangent(tree: Any, factor: jax.Array) -> Any:
    """`tree`, whose cotangent is multiplied by a factor."""
    return tree


def _forward(tree: Any, factor: jax.Array) -> tuple[Any, jax.Array]:
    return tree, factor


def _backward(factor: jax.Array, cotangent: Any) -> tuple[Any, None]:
    def scale(x: Any) -> Any:
        if x.dtype == jax.dtypes.float0:
            return x
        return (x * factor).astype(x.dtype)

    return jax.tree.map(scale, cotangent), None


_scale_cotangent.defvjp(_forward, _backward)


def all_finite(tree: Any) -> jax.Array:
    """Whether all numbers in a tree of arrays are finite; a boolean scalar."""
    return stay_finite(tree, optax.tree.zeros_like(tree))


def stay_finite(new: Any, old: Any) -> jax.Array:
    """Whether no number of a tree that was finite is so no longer; a boolean scalar.

    An optimizer's state can take up an infinity that its updates don't show: an
    accumulator of micro-batches, a momentum behind a sign.
    """
    lost = [
        jnp.sum(~jnp.isfinite(n) & jnp.isfinite(o), dtype=jnp.float32)
        for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        if jnp.issubdtype(n.dtype, jnp.inexact)  # not counters and keys
    ]
    # A root, which every select of the new state then shares: see _base/numerics.
    return jnp.sqrt(sum(lost, start=jnp.zeros([]))) == 0
