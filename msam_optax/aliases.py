"""The methods by their names, each assembled from the blocks in a few lines."""

from typing import Any

import jax.numpy as jnp
import optax

from msam_optax._hyperparams import ScalarOrSchedule, check_real, static_value
from msam_optax.ascent import adaptive_ascent, normalized_ascent
from msam_optax.employ import employ
from msam_optax.momentum import scaled_momentum_perturbation
from msam_optax.policy import adaptive, bernoulli
from msam_optax.sharpness_aware import sharpness_aware_gradient


def msam(
    learning_rate: ScalarOrSchedule,
    momentum: float = 0.9,
    rho: ScalarOrSchedule = 0.3,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM with SGD: a drop-in replacement of ``optax.sgd``.

    .. math::
      \begin{align*}
        g &= \nabla L_B(\tilde w_t), \qquad v_{t+1} = \mu v_t + g, \qquad
          w_{t+1} = w_t - \eta v_{t+1}, \\
        \tilde w_{t+1} &= w_{t+1} - \rho\, v_{t+1} / \|v_{t+1}\| .
      \end{align*}

    The parameters in use are :math:`\tilde w`; evaluate and save
    ``msam_optax.eval_params(state, params)``.

    *Cost*: no extra gradient. *State*: that of ``optax.sgd`` and one scalar (two where
    rho is a schedule). *Position*: last in a chain. ``optax.add_decayed_weights``
    before it decays the perturbed parameters, as the authors do.

    It equals ``momentum_perturbation(optax.sgd(learning_rate, momentum), rho)``, state
    and all, but moves fewer bytes.

    Args:
      learning_rate: eta; a float or a schedule.
      momentum: mu, decay of the momentum.
      rho: length of the perturbation, in the unit of the parameters; a float or a
        schedule. Search on a log grid around ten times SAM's.
      nesterov: use Nesterov's momentum for the step.
      accumulator_dtype: dtype of the momentum, by default the gradient's.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if momentum is not a finite number, or rho neither that nor a
        schedule.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> tx = msam_optax.msam(learning_rate=0.1, momentum=0.9, rho=0.3)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...     grads = jax.grad(lambda w: jnp.sum(w**2))(params)
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> weights = msam_optax.eval_params(state, params)

    References:
      Becker, Altrock and Risse, `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024. See
      :func:`msam_optax.momentum_perturbation` for how it differs from their code.
    """
    check_real("momentum", momentum)
    inner = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return scaled_momentum_perturbation(inner, rho, _previous(momentum, gain=1.0))


def adamw_msam(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Any = None,
    rho: ScalarOrSchedule = 1.0,
    *,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM with AdamW: a drop-in replacement of ``optax.adamw``.

    AdamW steps from the unperturbed :math:`w` with the gradient at
    :math:`\tilde w = w - \rho\, m / \|m\|`, m its raw first moment. The parameters in
    use are :math:`\tilde w`; evaluate and save
    ``msam_optax.eval_params(state, params)``.

    *Cost*: no extra gradient. *State*: that of ``optax.adamw`` and one scalar (two
    where rho is a schedule). *Position*: last in a chain.

    It equals ``momentum_perturbation(optax.adamw(...), rho)``, state and all, but moves
    fewer bytes. The authors decay after Adam's step instead,
    :math:`(w - \eta\,\hat m/(\sqrt{\hat v}+e))(1 - \eta\lambda)`, which is this with
    the learning rate :math:`\eta(1-\eta\lambda)` and the weight decay
    :math:`\lambda/(1-\eta\lambda)`.

    Args:
      learning_rate: eta; a float or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the square root.
      weight_decay: lambda, multiplied with the learning rate.
      mask: which parameters decay; a tree of booleans or a function of the parameters.
      rho: length of the perturbation, in the unit of the parameters; a float or a
        schedule.
      eps_root: added inside the square root.
      mu_dtype: dtype of the first moment, by default the gradient's.
      nesterov: use Nesterov's momentum for the step.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if b1 is not a finite number, or rho neither that nor a schedule.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> tx = msam_optax.adamw_msam(learning_rate=1e-3, weight_decay=0.1, rho=1.0)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> grads = jax.grad(lambda w: jnp.sum(w**2))(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> params = optax.apply_updates(params, updates)

    References:
      Becker, Altrock and Risse, `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024.
    """
    check_real("b1", b1)
    inner = optax.adamw(
        learning_rate,
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        weight_decay,
        mask,
        nesterov=nesterov,
    )
    return scaled_momentum_perturbation(inner, rho, _previous(b1, gain=1 - b1))


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
      :func:`msam_optax.sharpness_aware_gradient`.

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
    return optax.chain(sharpness_aware_gradient(normalized_ascent(rho)), optimizer)


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
      rho: relative radius; a float or a schedule. 0.5 to 2 in the paper.
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
    return optax.chain(sharpness_aware_gradient(ascent), optimizer)


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
    return optax.chain(employ(bernoulli(probability, seed), transform), optimizer)


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
    return optax.chain(employ(policy, transform), optimizer)


def _previous(decay: Any, gain: Any):
    """The recursion v' = decay v + gain g solved for v, leaf by leaf.

    Rounding is amplified by 1/decay, and by the eps of the momentum's dtype: where
    either is large, the old momentum itself serves, at the cost of keeping it.
    """
    known = static_value(decay)
    if known is None or known < 0.1:
        return None

    def previous(new_momentum, update, momentum):
        if jnp.finfo(new_momentum.dtype).bits < 32:
            return momentum
        return ((new_momentum - gain * update) / decay).astype(momentum.dtype)

    return previous
