"""ESAM: perturbs some of the weights, and descends on some of the samples."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax.transforms._selected import selected_gradient
from msam_optax.transforms._sharpness_aware import chained


def esam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    beta: float = 0.6,
    gamma: float = 0.5,
    seed: int = 0,
    *,
    by_coordinate: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Efficient SAM: stochastic weight perturbation and data selection.

    *Cost*: one forward pass over the batch, and gamma extra gradients a step. *State*:
    the optimizer's, and three scalars. *Position*: ``update`` needs ``params``,
    ``per_example_losses`` and ``per_example_loss_fn``, see :func:`selected_gradient`.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: beta times the radius; a float or a schedule.
      beta: probability with which a parameter is perturbed, in (0, 1].
      gamma: share of the samples kept, in (0, 1].
      seed: of the draws.
      by_coordinate: draw for each single weight and not for each parameter tensor.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`selected_gradient` and :func:`msam_optax.ascents.stochastic`.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> def loss_fn(params, model_state, batch, key):  # one loss for each example
    ...     return (batch @ params) ** 2, (model_state, {})
    >>> tx = msam_optax.esam(optax.sgd(0.1), rho=0.05, gamma=0.5)
    >>> step = msam_optax.make_train_step(loss_fn, tx)
    >>> params = jnp.ones(3)
    >>> state = msam_optax.TrainState(params, tx.init(params))
    >>> state, metrics = step(state, jnp.eye(4, 3), None)

    References:
      Du et al., `Efficient Sharpness-Aware Minimization for Improved Training of Neural
      Networks <https://arxiv.org/abs/2110.03141>`_, ICLR 2022.
    """
    ascent = ascents.stochastic(rho, beta, seed, by_coordinate)
    return chained(selected_gradient(ascent, gamma), optimizer)
