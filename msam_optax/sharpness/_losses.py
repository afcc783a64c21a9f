"""Losses, gradients and sharpness over a whole data set; arguments as in the folder."""

import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.layers import AxesLike, Layout, layouts
from msam_optax._base.numerics import (
    add_scaled,
    global_norm,
    safe_divide,
    scale,
)
from msam_optax._base.over_batches import (
    MeanLoss,
    OnBatch,
    batch_gradient,
    batch_loss,
    like,
    mean_number,
    mean_tree,
    over,
    wide,
)


class WorstCase(NamedTuple):
    """The largest rise of the loss that was found in a ball.

    Attributes:
      value: the rise, at least 0.
      perturbation: tree like the parameters, where it was found.
    """

    value: float
    perturbation: Any


def mean_loss(
    loss_fn: MeanLoss,
    params: Any,
    batches: Iterable[Any],
    *,
    on_batch: OnBatch | None = None,
) -> float:
    """The loss over all examples.

    Args:
      loss_fn: mean loss over a batch. More about the arguments stands above.
      params: where the loss is taken.
      batches: all of the data.
      on_batch: called once a batch.

    Returns:
      The mean loss, a float.

    Raises:
      ValueError: if there are no batches, they can be read only once, or the loss is
        not a scalar.

    >>> import jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> batches = [jnp.ones(3), 5 * jnp.ones(1)]  # four examples
    >>> sharpness.mean_loss(lambda w, batch: jnp.mean(w * batch), 1.0, batches)
    2.0
    """
    params = wide(params)
    return mean_number(
        functools.partial(batch_loss, loss_fn, params),
        over(loss_fn, params, batches, on_batch),
    )


def mean_gradient(
    loss_fn: MeanLoss,
    params: Any,
    batches: Iterable[Any],
    *,
    on_batch: OnBatch | None = None,
) -> Any:
    """The gradient of the loss over all examples.

    Args:
      loss_fn: mean loss over a batch.
      params: where the gradient is taken.
      batches: all of the data.
      on_batch: called once a batch.

    Returns:
      The mean gradient, a tree like the parameters.

    Raises:
      ValueError: as :func:`mean_loss`.

    >>> import jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> batches = [jnp.ones(3), 5 * jnp.ones(1)]
    >>> print(sharpness.mean_gradient(lambda w, b: jnp.mean(w**2 * b), 1.0, batches))
    4.0
    """
    params = wide(params)
    return mean_tree(
        functools.partial(batch_gradient, loss_fn, params),
        over(loss_fn, params, batches, on_batch),
    )


def sharpness_along(
    loss_fn: MeanLoss,
    params: Any,
    perturbation: Any,
    batches: Iterable[Any],
    *,
    on_batch: OnBatch | None = None,
) -> float:
    r"""Directional sharpness :math:`L(w + \varepsilon) - L(w)`.

    The difference is taken batch by batch. What remains is the rounding of each batch's
    loss, about 1e-7 of its size in float32, and that of :math:`w + \varepsilon`, 1e-7
    of the weights'. Where this is too much, give float64 parameters under
    ``jax.enable_x64``.

    Args:
      loss_fn: mean loss over a batch.
      params: w.
      perturbation: :math:`\varepsilon`, a tree like the parameters, in their unit.
      batches: all of the data.
      on_batch: called once a batch.

    Returns:
      The rise of the loss, a float.

    Raises:
      ValueError: if the perturbation is unlike the parameters, or as
        :func:`mean_loss`.

    >>> import jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return 0.5 * jnp.mean((batch @ w) ** 2)
    >>> sharpness.sharpness_along(loss, jnp.ones(2), -jnp.ones(2), [jnp.eye(2)])
    -0.5

    References:
      Becker, Altrock and Risse, `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_,
      2024, equation 3.
    """
    params = wide(params)
    perturbed = _sum(params, like("perturbation", perturbation, params))

    def rise(batch: Any) -> float:
        return float(batch_loss(loss_fn, perturbed, batch)) - float(
            batch_loss(loss_fn, params, batch)
        )

    return mean_number(rise, over(loss_fn, params, batches, on_batch))


def worst_case_sharpness(
    loss_fn: MeanLoss,
    params: Any,
    batches: Iterable[Any],
    rho: float,
    *,
    steps: int = 10,
    on_batch: OnBatch | None = None,
) -> WorstCase:
    r"""SAM's inner problem: the largest rise of the loss in a ball.

    .. math:: \max_{\|\varepsilon\| \le \rho} L(w + \varepsilon) - L(w)

    By projected gradient ascent over all data, whose steps are as long as the radius:
    :math:`\varepsilon \leftarrow P(\varepsilon + \rho\,g / \|g\|)` with g the gradient
    at :math:`w + \varepsilon`, P the projection to the ball, and 0 at the start. So the
    first step is SAM's perturbation. The best of the points passed is returned, the
    start included; it is a lower bound of the maximum. From a point whose gradient is
    exactly zero the ascent does not move.

    Args:
      loss_fn: mean loss over a batch.
      params: w.
      batches: all of the data.
      rho: radius of the ball, in the unit of the parameters.
      steps: of the ascent. Each costs a gradient and two losses.
      on_batch: called twice a batch and step.

    Returns:
      A :class:`WorstCase`.

    Raises:
      ValueError: if rho is not a positive number, there are no steps, or as
        :func:`mean_loss`.

    >>> import jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return 0.5 * jnp.mean((batch @ w) ** 2)
    >>> w = jnp.array([1.0, 0.0])
    >>> worst = sharpness.worst_case_sharpness(loss, w, [jnp.eye(2)], rho=1.0)
    >>> worst.value
    0.75

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021.
    """
    if not (rho > 0 and math.isfinite(rho)):
        raise ValueError(f"rho must be a positive number, but {rho!r} was given.")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, but {steps!r} was given.")
    params = wide(params)
    epsilon = jax.tree.map(jnp.zeros_like, params)
    best = WorstCase(0.0, epsilon)
    for _ in range(steps):
        gradient = mean_gradient(
            loss_fn, _sum(params, epsilon), batches, on_batch=on_batch
        )
        epsilon = _ascend(epsilon, gradient, rho)
        value = sharpness_along(loss_fn, params, epsilon, batches, on_batch=on_batch)
        if value > best.value:
            best = WorstCase(value, epsilon)
    return best


@jax.jit
def _ascend(epsilon: Any, gradient: Any, rho: Any) -> Any:
    """A step of length rho along the gradient, back into the ball of that radius."""
    step = safe_divide(rho, global_norm(gradient))
    epsilon = add_scaled(epsilon, step, gradient)
    length = global_norm(epsilon)
    return scale(jnp.where(length > rho, safe_divide(rho, length), 1), epsilon)


@jax.jit
def _sum(params: Any, epsilon: Any) -> Any:
    return jax.tree.map(jnp.add, params, epsilon)


def filter_normalized_direction(
    key: jax.Array, params: Any, *, axes: AxesLike = None
) -> Any:
    r"""A Gaussian direction, each filter of which is as long as the weights' filter.

    :math:`d_{ij} \leftarrow d_{ij} \|w_{ij}\| / \|d_{ij}\|` for the filters j of layer
    i: the slices of a leaf of two or more dimensions along its last axis, which is
    where Flax keeps the outputs of dense layers and convolutions, or along those that
    axes names. Biases, scales and other leaves of fewer dimensions are not perturbed.

    Args:
      key: random key.
      params: tree of arrays, the weights.
      axes: which axes of a parameter count its filters, and which stacked layers: an
        :class:`msam_optax.ascents.Axes`, a tree of them like the parameters, or a
        function ``axes(path, parameter)``.

    Returns:
      A tree like the parameters, in float32, or float64 if a parameter is.

    Raises:
      ValueError: if a parameter has no such axes.

    >>> import jax, jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
    >>> direction = sharpness.filter_normalized_direction(jax.random.key(0), params)
    >>> print(jnp.linalg.norm(direction["kernel"], axis=0).round(4), direction["bias"])
    [5. 1.] [0. 0.]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018.
    """
    params = wide(params)
    return _filter_normalized(
        tuple(jax.tree.leaves(layouts(axes, params))), key, params
    )


@functools.partial(jax.jit, static_argnums=0)
def _filter_normalized(
    layout_of_each: tuple[Layout, ...], key: jax.Array, params: Any
) -> Any:
    def direction(layout: Layout, w: jax.Array, noise: jax.Array) -> jax.Array:
        if not layout.is_weight:
            return jnp.zeros_like(w)
        return noise * safe_divide(layout.filter_norm(w), layout.filter_norm(noise))

    of_params = jax.tree.unflatten(jax.tree.structure(params), layout_of_each)
    noise = optax.tree.random_like(key, params)
    return jax.tree.map(direction, of_params, params, noise)
