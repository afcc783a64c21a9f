"""Lanczos' iteration with full reorthogonalisation, as a loop on the host.

It is written out because that of matfree 0.6.3 falls short here. It traces the product
with the matrix into a ``lax.fori_loop`` (by ``jax.closure_convert``, even under
``jax.disable_jit``): batches can't be read from the host while it runs, and on CPU a
convolution's gradient is tens of times slower in such a loop. A ``pure_callback`` would
run the product on the CPU, and JAX inside a callback may hang. Where the Krylov space
is exhausted it divides by rounding errors: of an 8 x 8 identity matrix it finds an
eigenvalue 2.1, of zeros NaN.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from msam_optax._base.numerics import global_norm, safe_divide, scale, vdot

# Otherwise some accelerators multiply float32 matrices in less than float32.
_tensordot = functools.partial(
    jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST
)


class Tridiagonal(NamedTuple):
    """A symmetric matrix in a Krylov space: Q' A Q, up to its last column.

    Attributes:
      values: float64 numpy array [m], its eigenvalues in rising order.
      coefficients: float64 numpy array [m, m], an eigenvector a column.
      last: length of what the last product leaves outside of the space.
      basis: the orthonormal vectors Q, a tree with a leading axis of length m.
    """

    values: np.ndarray
    coefficients: np.ndarray
    last: float
    basis: Any


def tridiagonal(
    matvec: Callable[[Any], Any], first: Any, key: jax.Array, num_matvecs: int
) -> Tridiagonal:
    """Runs the iteration.

    Args:
      matvec: the product with the matrix, of a tree like `first`.
      first: where the space starts, a tree of arrays of one dtype, not zero.
      key: random key of the vectors it goes on from where it is exhausted.
      num_matvecs: m, dimension of the space.
    """
    basis = jax.tree.map(lambda w: jnp.zeros((num_matvecs, *w.shape), w.dtype), first)
    diagonal, off_diagonal = np.zeros(num_matvecs), np.zeros(num_matvecs)
    vector, _ = _orthonormal_part(basis, first)
    for j in range(num_matvecs):
        basis = _store(basis, j, vector)
        image = matvec(vector)
        diagonal[j] = vdot(vector, image)
        if not np.isfinite(diagonal[j]):
            raise ValueError("The Hessian is not finite at the parameters given.")
        vector, length = _orthonormal_part(basis, image)
        off_diagonal[j] = length
        largest = max(np.max(np.abs(diagonal)), np.max(off_diagonal))
        exhausted = length <= 10 * jnp.finfo(length.dtype).eps * largest
        if exhausted and j + 1 < num_matvecs:
            # The space so far is invariant and what leads out of it is rounding: go on
            # in a random direction. This also finds further copies of an eigenvalue.
            off_diagonal[j] = 0
            random = _gaussian(jax.random.fold_in(key, j + 1), first)
            vector, _ = _orthonormal_part(basis, random)
    beside = np.diag(off_diagonal[:-1], 1)
    values, coefficients = np.linalg.eigh(np.diag(diagonal) + beside + beside.T)
    return Tridiagonal(values, coefficients, float(off_diagonal[-1]), basis)


def extreme_eigenpairs(
    matvec: Callable[[Any], Any],
    like: Any,
    k: int,
    key: jax.Array,
    num_matvecs: int,
    largest: bool,
) -> tuple[np.ndarray, np.ndarray, Any]:
    """The k largest or smallest Ritz pairs of a symmetric matrix.

    Args:
      matvec: the product with the matrix, of a tree like `like`.
      like: tree of arrays of one dtype, only for its shapes and dtype.
      k: how many pairs.
      key: random key of the start vector.
      num_matvecs: dimension of the Krylov space.
      largest: whether the largest ones, by sign.

    Returns:
      The values and the norms of A v - value v, float64 numpy arrays [k], the outermost
      value first; the orthonormal vectors v, a tree like `like` with a leading axis of
      length k.
    """
    first = _gaussian(jax.random.fold_in(key, 0), like)
    found = tridiagonal(matvec, first, key, num_matvecs)
    places = np.arange(num_matvecs)[:: -1 if largest else 1][:k]
    coefficients = found.coefficients[:, places]
    errors = np.abs(found.last * coefficients[-1])
    vectors = jax.tree.map(
        lambda q: _tensordot(coefficients.T.astype(q.dtype), q), found.basis
    )
    return found.values[places], errors, vectors


_gaussian = jax.jit(optax.tree.random_like)


@functools.partial(jax.jit, donate_argnums=0)
def _store(basis: Any, j: Any, vector: Any) -> Any:
    return jax.tree.map(lambda q, x: q.at[j].set(x), basis, vector)


@jax.jit
def _orthonormal_part(basis: Any, vector: Any) -> tuple[Any, jax.Array]:
    """The part orthogonal to the basis: its unit vector, and its length."""
    for _ in range(2):  # a second time takes away what rounding left
        shares = jax.vmap(vdot, in_axes=(0, None))(basis, vector)
        inside = jax.tree.map(functools.partial(_tensordot, shares), basis)
        vector = jax.tree.map(jnp.subtract, vector, inside)
    length = global_norm(vector)
    return scale(safe_divide(1.0, length), vector), length
