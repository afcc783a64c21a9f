"""Means that say what they are taken over."""

from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from msam_optax._base.numerics import safe_divide


class WeightedMean(NamedTuple):
    r"""A mean over units that a batch does not hold equally many of.

    .. math:: L = \frac{\sum_i t_i}{\sum_i w_i}

    over tokens that are not padding, for instance, or over classes with weights. A loss
    that returns it, and not the quotient, can be put together from parts of a batch
    (``microbatches``) or of a data set (:mod:`msam_optax.sharpness`): totals and
    weights are added up apart, and divided once. The mean of the parts' quotients would
    count a token of a short part for more than one of a long part.

    The weight counts as a constant when the gradient is taken. Where it is zero, so
    are the mean and its gradient.

    Attributes:
      total: the sum of weight times value, or an array of these, of any shape.
      weight: the sum of the weights, or an array of these, of any shape.

    >>> import jax.numpy as jnp, msam_optax
    >>> losses, mask = jnp.array([3.0, 5.0, 7.0]), jnp.array([1, 1, 0])
    >>> print(msam_optax.WeightedMean(mask * losses, mask).mean())
    4.0
    """

    total: Any
    weight: Any

    def summed(self) -> "WeightedMean":
        """The same mean by two numbers, in float32 at least."""
        dtype = jnp.promote_types(jnp.result_type(*self), jnp.float32)
        total, weight = (jnp.sum(x, dtype=dtype) for x in self)
        return WeightedMean(total, jax.lax.stop_gradient(weight))

    def mean(self) -> jax.Array:
        """The quotient, a scalar."""
        return safe_divide(*self.summed())


def is_weighted(x: Any) -> TypeGuard[WeightedMean]:
    """Whether a node of a tree is a `WeightedMean`."""
    return isinstance(x, WeightedMean)


def mean_of(values: Any) -> jax.Array:
    """The mean of an array, or of what knows its own weights."""
    return values.mean() if is_weighted(values) else jnp.mean(values)


def divided(tree: Any) -> Any:
    """A tree with each `WeightedMean` in it divided."""
    return jax.tree.map(
        lambda x: x.mean() if is_weighted(x) else x, tree, is_leaf=is_weighted
    )


def summed(tree: Any) -> Any:
    """A tree with each `WeightedMean` in it by two numbers, ready to be averaged."""
    return jax.tree.map(
        lambda x: x.summed() if is_weighted(x) else x, tree, is_leaf=is_weighted
    )
