r"""The loss between two solutions: along the line, or along a bent curve.

Two solutions of a network are mostly apart by a barrier of the loss on the straight
line, and connected without one by a curve that is bent once.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from msam_optax._base.over_batches import MeanLoss, OnBatch, like, wide
from msam_optax.sharpness._landscape import losses_at, one_axis


def point_on_curve(start: Any, end: Any, t: Any, bend: Any = None) -> Any:
    r"""A point of the line or the quadratic Bezier curve between two solutions.

    .. math::
      w(t) = (1 - t)^2 w_0 + 2 t (1 - t)\, \theta + t^2 w_1 ,
      \qquad 0 \le t \le 1 ,

    with the bend :math:`\theta`; without one :math:`(1 - t)\, w_0 + t\, w_1`. It can be
    differentiated, and traced in t: the bend is trained on the loss at points of random
    t, by any optimizer, and the curve connects the solutions if the loss along it stays
    low.

    Args:
      start: :math:`w_0`, a tree of arrays.
      end: :math:`w_1`, a tree like it.
      t: where.
      bend: :math:`\theta`, a tree like them.

    Returns:
      A tree like the start.

    >>> import jax, jax.numpy as jnp, optax
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):  # solutions lie on a circle
    ...     return (jnp.sum(w**2) - 1.0) ** 2
    >>> start, end = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> def loss_of_bend(bend, key):
    ...     at = sharpness.point_on_curve(start, end, jax.random.uniform(key), bend)
    ...     return loss(at, None)
    >>> tx, bend = optax.adam(0.05), sharpness.point_on_curve(start, end, 0.5)
    >>> state = tx.init(bend)
    >>> for key in jax.random.split(jax.random.key(0), 200):
    ...     updates, state = tx.update(jax.grad(loss_of_bend)(bend, key), state)
    ...     bend = optax.apply_updates(bend, updates)
    >>> ts, batches = [0.0, 0.5, 1.0], [jnp.zeros(1)]
    >>> print(sharpness.loss_on_curve(loss, start, end, ts, batches).round(2))
    [0.   0.25 0.  ]
    >>> print(sharpness.loss_on_curve(loss, start, end, ts, batches, bend=bend).max())
    0.0...

    References:
      Garipov et al., `Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs
      <https://arxiv.org/abs/1802.10026>`_, 2018.
    """
    if bend is None:
        return jax.tree.map(lambda a, b: (1 - t) * a + t * b, start, end)
    return jax.tree.map(
        lambda a, b, c: (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b,
        start,
        end,
        bend,
    )


def loss_on_curve(
    loss_fn: MeanLoss,
    start: Any,
    end: Any,
    ts: ArrayLike,
    batches: Iterable[Any],
    *,
    bend: Any = None,
    on_batch: OnBatch | None = None,
) -> np.ndarray:
    """The loss at points of the line or the curve between two solutions.

    The points are those of :func:`point_on_curve`. Batch statistics of a network are of
    no point but their own: take them anew at each, and the mean loss there.

    *Cost*: n losses over all data.

    Args:
      loss_fn: mean loss over a batch.
      start: a solution, a tree of arrays.
      end: another one, a tree like it.
      ts: float[n], the places, from 0 at the start to 1 at the end.
      batches: all of the data.
      bend: the point that the curve is bent towards, a tree like them; None for the
        straight line.
      on_batch: called once a batch.

    Returns:
      float[n], float32, or float64 if a parameter is: the mean over all examples.

    Raises:
      ValueError: if the trees are unlike, the places are not one axis of numbers, or as
        :func:`msam_optax.sharpness.mean_loss`.

    >>> import jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return jnp.mean(batch * w**2)
    >>> batches = [jnp.ones(4)]
    >>> print(sharpness.loss_on_curve(loss, -1.0, 1.0, [0, 0.5, 1], batches))
    [1. 0. 1.]
    """
    t = one_axis("ts", ts)
    start = wide(start)
    directions = [jax.tree.map(lambda a, b: b - a, start, like("end", end, start))]
    coordinates = [t]
    if bend is not None:
        bent = like("bend", bend, start)
        directions.append(jax.tree.map(lambda a, b: b - a, start, bent))
        coordinates = [t**2, 2 * t * (1 - t)]
    return losses_at(
        loss_fn,
        start,
        tuple(directions),
        np.stack(coordinates, axis=1),
        batches,
        on_batch,
    )
