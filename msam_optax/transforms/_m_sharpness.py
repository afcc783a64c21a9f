r"""m-sharpness: each shard of the batch ascends along its own gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_integer, check_transformation
from msam_optax._base.numerics import add_scaled, statistics_dtype
from msam_optax.transforms._placement import check_is_no_optimizer


class MSharpness(NamedTuple):
    """A gradient over shards of a batch, as a pair of pure functions.

    Attributes:
      init: ``init(params) -> state``, the transformation's state for each shard.
      gradient: ``gradient(batch_grad_fn, state, params, batch) -> (gradient, state)``,
        where ``batch_grad_fn(params, samples)`` is the mean gradient over samples.
    """

    init: Callable[[Any], Any]
    gradient: Callable[..., tuple[Any, Any]]


def m_sharpness(
    transform: optax.GradientTransformation, shards: int, sequential: bool = False
) -> MSharpness:
    r"""Splits the batch into shards and averages their sharpness-aware gradients.

    .. math::
      \frac{1}{S} \sum_{s=1}^{S} \nabla L_s(w + \varepsilon_s), \qquad
      \varepsilon_s = \rho\, \nabla L_s(w) / \|\nabla L_s(w)\|,

    for the shards s of m = B/S examples each. A smaller m generalises better in the SAM
    paper. The result is a gradient like any other, to be given to an optimizer.

    On several devices the same is had without this function, and with one all-reduce:
    inside ``shard_map`` call the transformation's ``update`` with each device's own
    gradient, and average what it returns with ``jax.lax.pmean``. The gradient is a
    device's own only where the parameters are: ``jax.grad`` at replicated parameters
    sums over the devices, so mark them first,
    ``params = jax.lax.pcast(params, "data", to="varying")``.

    *Cost*: one extra gradient. *State*: the transformation's, times the shards.
    *Memory*: all shards at once hold one perturbed copy of the parameters and one
    gradient each; in sequence there is one of both at a time.

    Args:
      transform: what each shard does, for instance
        ``sharpness_aware_gradient(ascents.normalized(0.05))``. One that draws random
        numbers draws alike in all shards.
      shards: how many, a divisor of the batch's size.
      sequential: one shard after the other (``lax.scan``) and not all at once
        (``vmap``), for less memory. On CPU a convolution's gradient is very slow so.

    Returns:
      A :class:`MSharpness`.

    Raises:
      ValueError: if shards is not an integer of at least 1, or does not divide the
        batch.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> sam = msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(0.05))
    >>> sharded = msam_optax.m_sharpness(sam, shards=4)
    >>> grad_fn = jax.grad(lambda w, batch: jnp.mean((batch @ w) ** 2))
    >>> params, batch = jnp.ones(3), jnp.eye(8, 3)
    >>> state = sharded.init(params)
    >>> gradient, state = sharded.gradient(grad_fn, state, params, batch)

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021, section 4.1.
    """
    check_integer("shards", shards, low=1)
    transform = check_transformation("transform", transform)

    def init(params: Any) -> Any:
        state = transform.init(params)
        check_is_no_optimizer("m_sharpness", transform, state, params)
        return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * shards), state)

    def split(x: Any) -> Any:
        if jnp.ndim(x) == 0 or x.shape[0] % shards:
            raise ValueError(
                "shards must divide the first axis of all of the batch, but an array "
                f"of shape {list(jnp.shape(x))} and shards={shards} were given."
            )
        return x.reshape(shards, x.shape[0] // shards, *x.shape[1:])

    def gradient(batch_grad_fn: Any, state: Any, params: Any, batch: Any) -> Any:
        def one(state: Any, samples: Any) -> Any:
            def grad_fn(params: Any) -> Any:
                return batch_grad_fn(params, samples)

            return transform.update(grad_fn(params), state, params, grad_fn=grad_fn)

        samples = jax.tree.map(split, batch)
        if not sequential:
            gradients, state = jax.vmap(one)(state, samples)
            return jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients), state

        def accumulate(mean: Any, shard: Any) -> Any:
            gradient, state = one(*shard)
            return add_scaled(mean, 1 / shards, gradient), state

        # The mean is formed in float32 at least, as jnp.mean does above.
        zeros = optax.tree.zeros_like(params, dtype=statistics_dtype(params))
        mean, state = jax.lax.scan(accumulate, zeros, (state, samples))
        first = jax.tree.map(lambda x: x[0], samples)
        like = jax.eval_shape(batch_grad_fn, params, first)
        return optax.tree.cast_like(mean, like), state

    return MSharpness(init, gradient)
