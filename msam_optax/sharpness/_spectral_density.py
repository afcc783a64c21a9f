"""The spectrum of a Hessian as a density, by stochastic Lanczos quadrature."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from msam_optax._base.over_batches import MeanLoss, OnBatch, wide
from msam_optax.sharpness._hessian import over_all, signs
from msam_optax.sharpness._lanczos import tridiagonal


class SpectralDensity(NamedTuple):
    r"""A Hessian's spectrum as weighted points.

    The mean of :math:`\varphi` over all eigenvalues is about
    ``(weights * phi(values)).sum(1).mean()``, and exactly that of the samples drawn for
    a polynomial of a degree below 2 m; the standard error is the spread of the samples
    over the root of their number. Times the number of parameters it is the trace of
    :math:`\varphi(H)`.

    Attributes:
      values: float64 numpy array [num_samples, m], points in rising order.
      weights: float64 numpy array [num_samples, m], each row sums to 1.
    """

    values: np.ndarray
    weights: np.ndarray

    def on_grid(self, grid: ArrayLike, width: float) -> np.ndarray:
        """The density, each point a Gaussian bell.

        Args:
          grid: float[n], where.
          width: standard deviation of the bells, in the unit of the eigenvalues. About
            the distance of the points of the grid, and not less.

        Returns:
          float64[n]; its integral is 1, the area over an interval the share of the
          eigenvalues there.

        Raises:
          ValueError: if the width is not positive.
        """
        if not width > 0:
            raise ValueError(f"width must be positive, but {width!r} was given.")
        distances = (np.asarray(grid, float)[:, None] - self.values.ravel()) / width
        bells = np.exp(-0.5 * distances**2) / (width * np.sqrt(2 * np.pi))
        return bells @ self.weights.ravel() / len(self.weights)


def spectral_density(
    loss_fn: MeanLoss,
    params: Any,
    batches: Iterable[Any],
    key: jax.Array,
    *,
    num_samples: int = 10,
    num_matvecs: int = 80,
    on_batch: OnBatch | None = None,
) -> SpectralDensity:
    r"""The spectrum of the Hessian as a density, by stochastic Lanczos quadrature.

    For a vector s of independent random signs :math:`s^T \varphi(H) s / P` is on
    average the mean of :math:`\varphi` over all P eigenvalues. Lanczos' iteration from
    s makes a tridiagonal matrix T, whose eigenvalues and the squared first entries of
    whose eigenvectors are Gauss' quadrature of it.

    *Cost*: ``num_samples`` times ``num_matvecs`` Hessian-vector products for each
    batch. *Memory*: ``num_matvecs`` trees like the parameters.

    Args:
      loss_fn: mean loss over a batch, twice differentiable.
      params: where the Hessian is taken.
      batches: all of the data.
      key: random key of the signs; those of :func:`hessian_trace` for the same key and
        number of samples.
      num_samples: how many vectors.
      num_matvecs: m, points for each vector; no more than the parameters has an effect.
      on_batch: called once a batch, sample and matrix-vector product.

    Returns:
      A :class:`SpectralDensity`.

    Raises:
      ValueError: if ``num_samples`` or ``num_matvecs`` is not positive, the Hessian is
        not finite, or as :func:`msam_optax.sharpness.mean_loss`.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from msam_optax import sharpness
    >>> def loss(w, batch):
    ...     return 0.5 * jnp.mean((batch @ w) ** 2)
    >>> w, data = jnp.ones(3), jnp.diag(jnp.array([3.0, 0.0, 0.0]))
    >>> spectrum = sharpness.spectral_density(loss, w, [data], jax.random.key(0))
    >>> density = spectrum.on_grid(np.linspace(-1, 4, 501), width=0.1)
    >>> print((0.01 * density[:200].sum()).round(3))  # two of three eigenvalues are 0
    0.667

    References:
      Ghorbani, Krishnan and Xiao, `An Investigation into Neural Net Optimization via
      Hessian Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019.
    """
    if num_samples < 1 or num_matvecs < 1:
        raise ValueError(
            "num_samples and num_matvecs must be at least 1, but "
            f"{num_samples!r} and {num_matvecs!r} were given."
        )
    params = wide(params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    matvec = over_all(loss_fn, params, batches, on_batch)
    values, weights = [], []
    for sample_key in jax.random.split(key, num_samples):
        first = signs(sample_key, params)
        found = tridiagonal(matvec, first, sample_key, min(num_matvecs, size))
        values.append(found.values)
        weights.append(found.coefficients[0] ** 2)
    return SpectralDensity(np.stack(values), np.stack(weights))
