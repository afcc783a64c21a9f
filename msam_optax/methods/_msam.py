"""MSAM as drop-in replacements of SGD and AdamW, in their fast form."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import ScalarOrSchedule, check_real, static_value
from msam_optax.transforms._scaled_perturbation import scaled_momentum_perturbation


def msam(
    learning_rate: ScalarOrSchedule,
    momentum: float = 0.9,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    rho: ScalarOrSchedule,
    exact: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM with SGD: a drop-in replacement of ``optax.sgd``.

    .. math::
      \begin{align*}
        g &= \nabla L_B(\tilde w_t), \qquad v_{t+1} = \mu v_t + g, \qquad
          w_{t+1} = w_t - \eta v_{t+1}, \\
        \tilde w_{t+1} &= w_{t+1} - \rho\, v_{t+1} / \|v_{t+1}\| .
      \end{align*}

    The parameters in use are :math:`\tilde w`; evaluate and publish
    ``msam_optax.eval_params(state, params)``; to resume, save params and state. **The
    sign is a minus**: see :func:`msam_optax.momentum_perturbation`.

    *Cost*: no extra gradient. *State*: that of ``optax.sgd`` and one scalar (two where
    rho is a schedule); with ``exact``, a float32 tree like the parameters where these
    have fewer than 32 bits. *Position*: last in a chain. ``optax.add_decayed_weights``
    before it decays the perturbed parameters, as the authors do.

    It equals ``momentum_perturbation(optax.sgd(learning_rate, momentum), rho)``, state
    and all. Under ``jit``, with a Python number of at least 0.1 for the momentum and at
    least 32 bits in its dtype, it moves fewer bytes and needs no temporary memory: it
    computes the old momentum as :math:`(v_{t+1} - g)/\mu`. That leaves an error of
    about :math:`\epsilon\,\rho\,\|g\|/(\mu\|v_t\|)` in the weights, :math:`\epsilon`
    the precision of their dtype, which is below their rounding in all ordinary
    training. Where gradients vanish altogether for a hundred steps and more and then
    return, as with a sparse reward, use the ``momentum_perturbation``.

    Args:
      learning_rate: eta; a float or a schedule.
      momentum: mu, decay of the momentum.
      nesterov: use Nesterov's momentum for the step.
      accumulator_dtype: dtype of the momentum, by default the gradient's.
      rho: length of the perturbation, in the unit of the parameters; a float or a
        schedule. No value is right everywhere: the best one grows with the learning
        rate and the size of the network. Search on a log grid from SAM's rho to twenty
        times that.
      exact: as in :func:`msam_optax.momentum_perturbation`.

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
    _check_learning_rate(learning_rate)
    check_real("momentum", momentum)
    inner = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return scaled_momentum_perturbation(
        inner, rho, exact, previous=_previous(momentum, gain=1.0)
    )


def adamw_msam(
    learning_rate: ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: Any = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    *,
    nesterov: bool = False,
    rho: ScalarOrSchedule,
    exact: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM with AdamW: a drop-in replacement of ``optax.adamw``.

    AdamW steps from the unperturbed :math:`w` with the gradient at
    :math:`\tilde w = w - \rho\, m / \|m\|`, m its raw first moment. The parameters in
    use are :math:`\tilde w`; evaluate and publish
    ``msam_optax.eval_params(state, params)``; to resume, save params and state.

    *Cost*: no extra gradient. *State*: that of ``optax.adamw`` and one scalar (two
    where rho is a schedule); with ``exact``, a float32 tree like the parameters where
    these have fewer than 32 bits. *Position*: last in a chain.

    It equals ``momentum_perturbation(optax.adamw(...), rho)``, state and all, but moves
    fewer bytes; where gradients vanish for long and return, use that one, for the
    reason that :func:`msam` gives. The authors decay after Adam's step instead,
    :math:`(w - \eta\,\hat m/(\sqrt{\hat v}+e))(1 - \eta\lambda)`, which is this with
    the learning rate :math:`\eta(1-\eta\lambda)` and the weight decay
    :math:`\lambda/(1-\eta\lambda)`.

    Args:
      learning_rate: eta; a float or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added outside the square root.
      eps_root: added inside the square root.
      mu_dtype: dtype of the first moment, by default the gradient's.
      weight_decay: lambda, multiplied with the learning rate.
      mask: which parameters decay; a tree of booleans or a function of the parameters.
      nesterov: use Nesterov's momentum for the step.
      rho: length of the perturbation, in the unit of the parameters; a float or a
        schedule. No value is right everywhere: the authors take 1 for vision
        transformers, a small character language model was best at 0.1. Search on a
        log grid.
      exact: as in :func:`msam_optax.momentum_perturbation`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if b1 is not a finite number, or rho neither that nor a schedule.

    >>> import jax, jax.numpy as jnp, msam_optax, optax
    >>> tx = msam_optax.adamw_msam(learning_rate=1e-3, weight_decay=0.1, rho=0.1)
    >>> params = jnp.array([1.0, 2.0])
    >>> state = tx.init(params)
    >>> grads = jax.grad(lambda w: jnp.sum(w**2))(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> params = optax.apply_updates(params, updates)

    References:
      Becker, Altrock and Risse, `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024.
    """
    _check_learning_rate(learning_rate)
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
    return scaled_momentum_perturbation(
        inner, rho, exact, previous=_previous(b1, gain=1 - b1)
    )


def _previous(decay: Any, gain: Any) -> Callable[..., jax.Array] | None:
    """The recursion v' = decay v + gain g solved for v, leaf by leaf.

    The difference loses digits where g is far larger than v, more so for a small decay
    and a short dtype: with these two the old momentum itself serves, at the cost of
    keeping it. No test of |g| against |v| can do that, since it would have to keep v.
    """
    known = static_value(decay)
    if known is None or known < 0.1:
        return None

    @functools.partial(jax.jit, inline=True)
    def previous(update: jax.Array, momentum: jax.Array) -> jax.Array:
        if jnp.finfo(momentum.dtype).bits < 32:
            return momentum
        # As Optax computes it, so that XLA merges the two.
        new_momentum = (gain * update + decay * momentum).astype(momentum.dtype)
        return ((new_momentum - gain * update) / decay).astype(momentum.dtype)

    return previous


def _check_learning_rate(value: Any) -> None:
    if isinstance(value, optax.GradientTransformation):
        raise ValueError(
            "msam and adamw_msam take a learning rate, but an optimizer was given: to "
            "wrap one use momentum_perturbation(optimizer, rho)."
        )
