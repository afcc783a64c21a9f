r"""Curvature of a loss at a point: the Hessian over a whole data set in batches.

``msam_optax.sharpness`` holds these functions too, and its docstring says what
``loss_fn``, ``params``, ``batches`` and ``on_batch`` must be. Where ``loss_fn`` is a
``GaussNewton``, all of them take that matrix in the place of the Hessian.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from msam_optax._base.numerics import global_norm, safe_divide, scale, vdot
from msam_optax._base.over_batches import (
    MeanLoss,
    OnBatch,
    like,
    mean_number,
    mean_tree,
    over,
    wide,
)
from msam_optax.sharpness._gauss_newton import product_with
from msam_optax.sharpness._lanczos import extreme_eigenpairs


class HessianEigenvalues(NamedTuple):
    r"""The largest or the smallest eigenvalues of the Hessian.

    Attributes:
      values: float64 numpy array [k], the outermost first: the largest ones in falling,
        the smallest ones in rising order.
      errors: float64 numpy array [k], :math:`\|H v - \lambda v\|` of each pair, so that
        an eigenvalue is no further away. A well separated one is much nearer: by the
        square of this over the gap to the next one. Rounding comes on top, 1e-6 of the
        largest value or so in float32.
      vectors: tree like the parameters with a leading axis of length k, orthonormal.
    """

    values: np.ndarray
    errors: np.ndarray
    vectors: Any


class HessianTrace(NamedTuple):
    """An estimate of the Hessian's trace.

    Attributes:
      value: the estimate.
      standard_error: its standard deviation, estimated from the samples' spread.
    """

    value: float
    standard_error: float


def curvature_along(
    loss_fn: MeanLoss,
    params: Any,
    direction: Any,
    batches: Iterable[Any],
    *,
    on_batch: OnBatch | None = None,
) -> float:
    r"""Curvature :math:`u^T H u / \|u\|^2` of the loss along a direction.

    *Cost*: a Hessian-vector product for each batch, forward over reverse: the time of
    two to four gradients.

    Args:
      loss_fn: mean loss over a batch, twice differentiable.
      params: where the Hessian H is taken.
      direction: u, a tree like the parameters, of any length. Along zeros the curvature
        is 0.
      batches: all of the data.
      on_batch: called once a batch.

    Returns:
      The curvature, a float.

    Raises:
      ValueError: if the direction is unlike the parameters, or as
        :func:`msam_optax.sharpness.mean_loss`.

    >>> import jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return 0.5 * jnp.mean((batch @ w) ** 2)
    >>> u = jnp.array([0.0, 3.0])
    >>> sharpness.curvature_along(loss, jnp.ones(2), u, [jnp.eye(2)])
    0.5
    """
    params = wide(params)
    unit = _unit(like("direction", direction, params))
    return mean_number(
        functools.partial(_quadratic_form, product_with(loss_fn), params, unit),
        over(loss_fn, params, batches, on_batch),
    )


def hessian_trace(
    loss_fn: MeanLoss,
    params: Any,
    batches: Iterable[Any],
    key: jax.Array,
    *,
    num_samples: int = 30,
    on_batch: OnBatch | None = None,
) -> HessianTrace:
    r"""Hutchinson's estimate of the Hessian's trace, with its standard error.

    The mean of :math:`s^T H s` over vectors s of independent random signs. Its variance
    is :math:`2 \sum_{i \ne j} H_{ij}^2` over the number of samples.

    *Cost*: a Hessian-vector product for each sample and batch. *Memory*: two trees like
    the parameters besides the product.

    Args:
      loss_fn: mean loss over a batch, twice differentiable.
      params: where the Hessian is taken.
      batches: all of the data.
      key: random key of the signs.
      num_samples: at least 2. Two hundred know the standard error to 5%, thirty to 13%.
      on_batch: called once a batch and sample.

    Returns:
      A :class:`HessianTrace`.

    Raises:
      ValueError: if there are fewer than two samples, or as
        :func:`msam_optax.sharpness.mean_loss`.

    >>> import jax, jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return 0.5 * jnp.mean((batch @ w) ** 2)
    >>> w, key = jnp.ones(2), jax.random.key(0)
    >>> sharpness.hessian_trace(loss, w, [jnp.eye(2)], key)  # of a diagonal: exact
    HessianTrace(value=1.0, standard_error=0.0)

    References:
      Hutchinson, `A stochastic estimator of the trace of the influence matrix
      <https://doi.org/10.1080/03610918908812806>`_, 1989.
    """
    if num_samples < 2:
        raise ValueError(
            "num_samples must be at least 2 to tell a standard error, but "
            f"{num_samples!r} was given."
        )
    params = wide(params)
    data, samples = over(loss_fn, params, batches, on_batch), []
    for sample_key in jax.random.split(key, num_samples):
        form = functools.partial(
            _quadratic_form, product_with(loss_fn), params, signs(sample_key, params)
        )
        samples.append(mean_number(form, data))
    standard_deviation = np.std(samples, ddof=1)
    return HessianTrace(
        value=float(np.mean(samples)),
        standard_error=float(standard_deviation / np.sqrt(num_samples)),
    )


def hessian_eigenvalues(
    loss_fn: MeanLoss,
    params: Any,
    batches: Iterable[Any],
    k: int,
    key: jax.Array,
    *,
    which: Literal["largest", "smallest"] = "largest",
    num_matvecs: int | None = None,
    on_batch: OnBatch | None = None,
) -> HessianEigenvalues:
    r"""The k largest eigenvalues of the Hessian and their vectors, by Lanczos' method.

    Or the k smallest: at a point that is no minimum the most negative ones.

    With full reorthogonalisation, so that rounding brings no value twice. A value that
    is twice in the spectrum may come once, and the errors do not tell.

    *Cost*: ``num_matvecs`` Hessian-vector products for each batch. *Memory*: as many
    trees like the parameters, and k more at the end.

    Args:
      loss_fn: mean loss over a batch, twice differentiable.
      params: where the Hessian is taken.
      batches: all of the data.
      k: how many eigenvalues.
      key: random key of the first vector.
      which: "largest" or "smallest", by sign and not by size.
      num_matvecs: dimension of the Krylov space, from k to the number of parameters.
        The default is 4 k + 20 or the number of parameters, whichever is less. Take
        more where the ``errors`` are too large.
      on_batch: called once a batch and ``num_matvecs``.

    Returns:
      A :class:`HessianEigenvalues`.

    Raises:
      ValueError: if k or ``num_matvecs`` is out of range, ``which`` is neither, the
        Hessian is not finite, or as :func:`msam_optax.sharpness.mean_loss`.

    >>> import jax, jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return 0.5 * jnp.mean((batch @ w) ** 2)
    >>> w, data = jnp.ones(3), jnp.diag(jnp.array([3.0, 1.0, 2.0]))
    >>> top = sharpness.hessian_eigenvalues(loss, w, [data], 2, jax.random.key(0))
    >>> print(top.values.round(4))
    [3.     1.3333]
    >>> least = sharpness.hessian_eigenvalues(
    ...     loss, w, [data], 1, jax.random.key(0), which="smallest"
    ... )
    >>> print(least.values.round(4))
    [0.3333]

    References:
      Lanczos, `An iteration method for the solution of the eigenvalue problem of linear
      differential and integral operators <https://doi.org/10.6028/jres.045.026>`_,
      1950.
    """
    if which not in ("largest", "smallest"):
        raise ValueError(f'which must be "largest" or "smallest", not {which!r}.')
    params = wide(params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if num_matvecs is None:
        num_matvecs = min(4 * k + 20, size)
    if not 1 <= k <= num_matvecs <= size:
        raise ValueError(
            "k must be at least 1, and num_matvecs at least k and at most the number "
            f"of parameters, {size}, but k={k} and num_matvecs={num_matvecs} were "
            "given."
        )
    matvec = over_all(loss_fn, params, batches, on_batch)
    return HessianEigenvalues(
        *extreme_eigenpairs(matvec, params, k, key, num_matvecs, which == "largest")
    )


def over_all(
    loss_fn: MeanLoss, params: Any, batches: Iterable[Any], on_batch: OnBatch | None
) -> Callable[[Any], Any]:
    """The product with the Hessian over all examples, a function of the vector."""
    product, data = product_with(loss_fn), over(loss_fn, params, batches, on_batch)
    return lambda vector: mean_tree(functools.partial(product, params, vector), data)


def _quadratic_form(product: Any, params: Any, vector: Any, batch: Any) -> jax.Array:
    return _vdot(vector, product(params, vector, batch))


_vdot = jax.jit(vdot)


@jax.jit
def signs(key: jax.Array, params: Any) -> Any:
    """A tree like the parameters, of independent random signs."""
    return optax.tree.random_like(key, params, jax.random.rademacher)


@jax.jit
def _unit(tree: Any) -> Any:
    return scale(safe_divide(1.0, global_norm(tree)), tree)
