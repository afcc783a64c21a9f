"""SAM."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax.transforms._sharpness_aware import chained, sharpness_aware_gradient


def sam(
    optimizer: optax.GradientTransformation, rho: ScalarOrSchedule = 0.05
) -> optax.GradientTransformationExtraArgs:
    r"""SAM around any optimizer: steps with :math:`\nabla L(w + \rho\,g/\|g\|)`.

    *Cost*: one extra gradient a step. *State*: two scalars. *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius, in the unit of the parameters; a float or a schedule.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> tx = msam_optax.sam(optax.sgd(0.1, momentum=0.9), rho=0.05)
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
    >>> params = jnp.array([3.0, 4.0])
    >>> state = tx.init(params)
    >>> updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    >>> print(updates)
    [-0.606 -0.808]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021.
    """
    return chained(sharpness_aware_gradient(ascents.normalized(rho)), optimizer)
