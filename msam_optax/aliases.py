"""The methods by their names, each assembled from the blocks in a few lines.

Methods with a block of their own stand beside it: `msam`, `looksam`, `esam`,
`friendly_sam` and `wsam` in the files of those names.
"""

from typing import Any

import optax

from msam_optax._hyperparams import ScalarOrSchedule
from msam_optax.ascent import fisher_ascent, normalized_ascent
from msam_optax.ascent_scaled import adaptive_ascent
from msam_optax.combine import interpolate, surrogate_gap
from msam_optax.employ import employ
from msam_optax.policy import adaptive, bernoulli
from msam_optax.sharpness_aware import chained, sharpness_aware_gradient


def sam(
    optimizer: optax.GradientTransformation, rho: ScalarOrSchedule = 0.05
) -> optax.GradientTransformationExtraArgs:
    r"""SAM around any optimizer: steps with :math:`\nabla L(w + \rho\,g/\|g\|)`.

    *Cost*: one extra gradient a step. *State*: the optimizer's, and one scalar (two
    where rho is a schedule). *Position*: ``update`` needs ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius, in the unit of the parameters; a float or a schedule.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`msam_optax.normalized_ascent` and ``sharpness_aware_gradient``.

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
    return chained(sharpness_aware_gradient(normalized_ascent(rho)), optimizer)


def asam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.5,
    eta: float = 0.01,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adaptive SAM around any optimizer: SAM with a radius relative to each weight.

    *Cost*: one extra gradient a step. *State*: the optimizer's, and one scalar (two
    where rho is a schedule). *Position*: ``update`` needs ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: relative radius; a float or a schedule. 0.5 (CIFAR-10) and 1
        (CIFAR-100) in the paper.
      eta: added to the weights' absolute values.
      mask: see :func:`msam_optax.adaptive_ascent`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`msam_optax.sharpness_aware_gradient` and ``adaptive_ascent``.

    >>> import msam_optax, optax
    >>> tx = msam_optax.asam(optax.adamw(1e-3), rho=0.5)

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    ascent = adaptive_ascent(rho, eta, mask)
    return chained(sharpness_aware_gradient(ascent), optimizer)


def fisher_sam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    eta: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """SAM in the ellipsoid of an empirical Fisher information.

    *Cost*: one extra gradient a step. *State*: the optimizer's, and one scalar (two
    where rho is a schedule). *Position*: ``update`` needs ``params`` and ``grad_fn``,
    with gradients of the unscaled loss.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius in the Fisher metric; a float or a schedule.
      eta: see :func:`msam_optax.fisher_ascent`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`msam_optax.sharpness_aware_gradient` and ``fisher_ascent``.

    >>> import msam_optax, optax
    >>> tx = msam_optax.fisher_sam(optax.sgd(0.1, momentum=0.9), rho=0.1)

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware Minimisation
      <https://arxiv.org/abs/2206.04920>`_, 2022.
    """
    return chained(sharpness_aware_gradient(fisher_ascent(rho, eta)), optimizer)


def gsam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    alpha: float = 0.4,
) -> optax.GradientTransformationExtraArgs:
    """GSAM: minimises the perturbed loss and its gap to the clean one.

    *Cost*: one extra gradient a step. *State*: the optimizer's, and one scalar (two
    where rho is a schedule). *Position*: ``update`` needs ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius; a float or a schedule. The paper's follows the learning rate:
        :func:`msam_optax.rho_like_learning_rate`.
      alpha: weight of the gap, see :func:`msam_optax.surrogate_gap`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`msam_optax.sharpness_aware_gradient` and ``surrogate_gap``.

    >>> import msam_optax, optax
    >>> learning_rate = optax.cosine_decay_schedule(0.1, 1000)
    >>> rho = msam_optax.rho_like_learning_rate(
    ...     learning_rate, rho_max=0.2, rho_min=0.02, learning_rate_max=0.1
    ... )
    >>> tx = msam_optax.gsam(optax.sgd(learning_rate, momentum=0.9), rho, alpha=0.4)

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, ICLR 2022.
    """
    transform = sharpness_aware_gradient(normalized_ascent(rho), surrogate_gap(alpha))
    return chained(transform, optimizer)


def gradient_norm_penalty(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.1,
    alpha: float = 0.8,
) -> optax.GradientTransformationExtraArgs:
    r"""Penalises the gradient's norm: steps with :math:`(1-\alpha) g + \alpha\tilde g`.

    *Cost*: one extra gradient a step. *State*: the optimizer's, and one scalar (two
    where rho is a schedule). *Position*: ``update`` needs ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius, the paper's r; a float or a schedule.
      alpha: the penalty's coefficient over the radius.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`msam_optax.sharpness_aware_gradient` and ``interpolate``.

    >>> import msam_optax, optax
    >>> tx = msam_optax.gradient_norm_penalty(optax.sgd(0.1, momentum=0.9))

    References:
      Zhao et al., `Penalizing Gradient Norm for Efficiently Improving Generalization in
      Deep Learning <https://arxiv.org/abs/2202.03599>`_, ICML 2022.
    """
    transform = sharpness_aware_gradient(normalized_ascent(rho), interpolate(alpha))
    return chained(transform, optimizer)


def ss_sam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    probability: float = 0.5,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic scheduled SAM: SAM on random steps, the plain gradient on the others.

    *Cost*: ``probability`` extra gradients a step on average. *State*: the optimizer's,
    and five scalars (six where rho is a schedule). *Position*: ``update`` needs
    ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius; a float or a schedule over training steps.
      probability: of a SAM step, in [0, 1].
      seed: of the draws.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`msam_optax.sharpness_aware_gradient` and ``bernoulli``.

    >>> import msam_optax, optax
    >>> tx = msam_optax.ss_sam(optax.sgd(0.1, momentum=0.9), rho=0.05)

    References:
      Zhao et al., `SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization for
      Efficiently Training Deep Neural Networks <https://arxiv.org/abs/2203.09962>`_,
      2022.
    """
    transform = sharpness_aware_gradient(normalized_ascent(rho))
    return chained(employ(bernoulli(probability, seed), transform), optimizer)


def ae_sam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    total_steps: int,
    delta: float = 0.9,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Adaptively employed SAM: SAM in sharp regions, the plain gradient elsewhere.

    *Cost*: about half an extra gradient a step with the defaults. *State*: the
    optimizer's, and seven scalars (eight where rho is a schedule). *Position*:
    ``update`` needs ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius; a float or a schedule over training steps.
      total_steps: number of steps of the whole training.
      delta: decay rate of the statistics, in [0, 1).
      lambda_1: threshold at the end, in standard deviations.
      lambda_2: threshold at the start, in standard deviations.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`msam_optax.sharpness_aware_gradient` and ``adaptive``, which also has the
      mathematics.

    >>> import msam_optax, optax
    >>> tx = msam_optax.ae_sam(optax.sgd(0.1, momentum=0.9), rho=0.05, total_steps=1000)

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023.
    """
    policy = adaptive(total_steps, delta, lambda_1, lambda_2)
    transform = sharpness_aware_gradient(normalized_ascent(rho))
    return chained(employ(policy, transform), optimizer)
