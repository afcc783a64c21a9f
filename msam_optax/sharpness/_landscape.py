r"""The loss along lines and on planes through a point: arrays out.

``msam_optax.sharpness`` says what ``loss_fn``, ``params`` and ``batches`` must be, and
``filter_normalized_direction`` there makes directions that can be compared between
networks. ``msam_optax.plotting`` draws the arrays.

The points are visited one after the other on the device, and every batch is read once
for all of them.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from msam_optax._base.numerics import add_scaled
from msam_optax._base.over_batches import (
    MeanLoss,
    OnBatch,
    batch_loss,
    like,
    mean_tree,
    over,
    wide,
)


def loss_on_line(
    loss_fn: MeanLoss,
    params: Any,
    direction: Any,
    distances: ArrayLike,
    batches: Iterable[Any],
    *,
    on_batch: OnBatch | None = None,
) -> np.ndarray:
    r"""The loss :math:`L(w + t\,d)` at distances t along a direction d.

    *Cost*: n losses over all data.

    Args:
      loss_fn: mean loss over a batch.
      params: w, a tree of arrays.
      direction: d, a tree like the parameters, of any length: the distances are in its
        unit.
      distances: float[n], of either sign.
      batches: all of the data.
      on_batch: called once a batch.

    Returns:
      float[n], float32, or float64 if a parameter is: the mean over all examples.

    Raises:
      ValueError: if the direction is unlike the parameters, the distances are not one
        axis of numbers, or as :func:`msam_optax.sharpness.mean_loss`.

    >>> import jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return 0.5 * jnp.mean((batch @ w) ** 2)
    >>> w, direction = jnp.zeros(2), jnp.array([2.0, 0.0])
    >>> print(sharpness.loss_on_line(loss, w, direction, [-1, 0, 1], [jnp.eye(2)]))
    [1. 0. 1.]

    References:
      Goodfellow, Vinyals and Saxe, `Qualitatively characterizing neural network
      optimization problems <https://arxiv.org/abs/1412.6544>`_, 2015.
    """
    at = one_axis("distances", distances)
    return losses_at(loss_fn, params, (direction,), at[:, None], batches, on_batch)


def loss_on_plane(
    loss_fn: MeanLoss,
    params: Any,
    directions: Sequence[Any],
    xs: ArrayLike,
    ys: ArrayLike,
    batches: Iterable[Any],
    *,
    on_batch: OnBatch | None = None,
) -> np.ndarray:
    r"""The loss :math:`L(w + x\,d_1 + y\,d_2)` on a grid in a plane.

    The directions are taken as they are: where the plane should not be distorted, make
    them orthogonal and of one length.

    *Cost*: n m losses over all data.

    Args:
      loss_fn: mean loss over a batch.
      params: w, a tree of arrays.
      directions: :math:`d_1` and :math:`d_2`, trees like the parameters.
      xs: float[n], distances along the first direction, in its unit.
      ys: float[m], distances along the second one, in its unit.
      batches: all of the data.
      on_batch: called once a batch.

    Returns:
      float[m, n] in the dtype of :func:`loss_on_line`: a row for each y, a column for
      each x, as matplotlib's contours take it.

    Raises:
      ValueError: if there are not two directions, or as :func:`loss_on_line`.

    >>> import jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return jnp.mean(batch @ w)
    >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> w, batches = jnp.zeros(2), [jnp.array([[1.0, 10.0]])]
    >>> print(sharpness.loss_on_plane(loss, w, axes, [0, 1, 2], [0, 1], batches))
    [[ 0.  1.  2.]
     [10. 11. 12.]]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018.
    """
    directions = tuple(directions)
    if len(directions) != 2:
        raise ValueError(
            f"A plane has two directions, but {len(directions)} were given."
        )
    x, y = one_axis("xs", xs), one_axis("ys", ys)
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    losses = losses_at(
        loss_fn, params, directions, grid.reshape(-1, 2), batches, on_batch
    )
    return losses.reshape(grid.shape[:2])


def one_axis(name: str, values: ArrayLike) -> np.ndarray:
    """The values as float64[n]; ValueError if they are not one axis of numbers."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"{name} must be one axis of at least one number, but their shape is "
            f"{array.shape}."
        )
    return array


def losses_at(
    loss_fn: MeanLoss,
    params: Any,
    directions: tuple[Any, ...],
    coordinates: np.ndarray,
    batches: Iterable[Any],
    on_batch: OnBatch | None,
) -> np.ndarray:
    """The losses [n] at points with coordinates [n, len(directions)]."""
    params = wide(params)
    directions = tuple(like("direction", d, params) for d in directions)
    losses_of = functools.partial(
        _batch_losses, loss_fn, params, directions, coordinates
    )
    data = over(loss_fn, params, batches, on_batch)
    return np.asarray(mean_tree(losses_of, data))


@functools.partial(jax.jit, static_argnums=0)
def _batch_losses(
    loss_fn: MeanLoss, params: Any, directions: Any, coordinates: Any, batch: Any
) -> jax.Array:
    def at(place: jax.Array) -> jax.Array:
        point = params
        for distance, direction in zip(place, directions, strict=True):
            point = add_scaled(point, distance, direction)
        return batch_loss(loss_fn, point, batch)

    # One after the other: a vmap would hold as many networks as there are points.
    return jax.lax.map(at, coordinates)
