"""The Gauss-Newton matrix of a loss, in the place of its Hessian."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from msam_optax._base.over_batches import MeanLoss, batch_hessian_vector
from msam_optax._base.weighted import WeightedMean, mean_of


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    r"""A loss in two parts, whose curvature is taken as its Gauss-Newton matrix.

    With outputs f(w) of the network, their Jacobian J and a loss :math:`\ell` of the
    outputs,

    .. math::
      H = J^T \nabla^2_f \ell \, J + \sum_i \frac{\partial \ell}{\partial f_i}
      \nabla^2_w f_i , \qquad G = J^T \nabla^2_f \ell \, J .

    G is positive semi-definite where :math:`\ell` is convex in the outputs, as cross
    entropy and the squared error are; for cross entropy it is the Fisher information.
    What H has besides vanishes where the network fits every example.

    Wherever a ``loss_fn`` is taken this may be given. It is the loss,
    ``loss_fn(outputs_fn(params, batch), batch)``, and :func:`hessian_eigenvalues`,
    :func:`hessian_trace`, :func:`curvature_along` and :func:`spectral_density` take G
    in the place of H.

    *Cost* of a product with a vector: a forward pass with tangents and a backward pass,
    less than the Hessian's.

    Attributes:
      outputs_fn: ``outputs_fn(params, batch) -> outputs``, any tree of float arrays.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, the mean loss over the batch. As
        for any loss, define both once: what is compiled is kept for these two.

    >>> import jax, jax.numpy as jnp
    >>> from msam_optax import sharpness
    >>> loss = sharpness.GaussNewton(
    ...     lambda w, batch: jnp.sin(batch @ w),
    ...     lambda outputs, batch: 0.5 * jnp.mean((outputs - 3.0) ** 2),
    ... )
    >>> w, key = jnp.zeros(2), jax.random.key(0)
    >>> print(sharpness.hessian_trace(loss, w, [2.0 * jnp.eye(2)], key).value)
    4.0

    References:
      Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order Gradient
      Descent <https://doi.org/10.1162/08997660260028683>`_, 2002.
    """

    outputs_fn: Callable[[Any, Any], Any]
    loss_fn: Callable[[Any, Any], jax.Array | WeightedMean]

    def __call__(self, params: Any, batch: Any) -> jax.Array | WeightedMean:
        """The loss."""
        return self.loss_fn(self.outputs_fn(params, batch), batch)


def product_with(loss_fn: MeanLoss) -> Callable[[Any, Any, Any], Any]:
    """The loss's ``product(params, vector, batch)`` with its matrix of curvature."""
    gauss_newton = isinstance(loss_fn, GaussNewton)
    product = _batch_gauss_newton_vector if gauss_newton else batch_hessian_vector
    return functools.partial(product, loss_fn)


@functools.partial(jax.jit, static_argnums=0)
def _batch_gauss_newton_vector(
    loss: GaussNewton, params: Any, vector: Any, batch: Any
) -> Any:
    """G · vector for the Gauss-Newton matrix of one batch."""

    def outputs_at(params: Any) -> Any:
        return loss.outputs_fn(params, batch)

    def output_gradient(outputs: Any) -> Any:
        return jax.grad(lambda f: mean_of(loss.loss_fn(f, batch)))(outputs)

    outputs, tangent = jax.jvp(outputs_at, (params,), (vector,))
    _, curved = jax.jvp(output_gradient, (outputs,), (tangent,))
    _, pull_back = jax.vjp(outputs_at, params)
    return pull_back(curved)[0]
