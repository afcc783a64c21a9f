"""LookSAM: remembers what SAM adds to the gradient, and adds it on the other steps."""

from typing import Any, NamedTuple

import jax
import optax

from msam_optax._hyperparams import ScalarOrSchedule, check_real
from msam_optax._numerics import (
    add_scaled,
    cast_like,
    global_norm,
    orthogonal_part,
    safe_divide,
)
from msam_optax.ascent import normalized_ascent
from msam_optax.ascent_scaled import layerwise_ascent
from msam_optax.employ import Otherwise, employ
from msam_optax.policy import Policy, adaptive, every
from msam_optax.sharpness_aware import (
    SharpnessAwareState,
    chained,
    sharpness_aware_gradient,
)


class RememberedGradientState(NamedTuple):
    """State of `remembered_gradient`.

    Attributes:
      sharpness_aware_state: state of the sharpness-aware gradient.
      orthogonal: tree like the parameters, the part g_v of the last perturbed gradient
        that is orthogonal to the clean one; zeros before the first.
    """

    sharpness_aware_state: SharpnessAwareState
    orthogonal: optax.Updates


def remembered_gradient(
    ascent: optax.GradientTransformation, per_tensor: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""A sharpness-aware gradient that keeps its part orthogonal to the clean one.

    With the clean gradient :math:`g` and the perturbed one :math:`g_s`, which is
    returned,

    .. math::
      g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|^2}\, g .

    *Cost*: one extra gradient. *State*: one tree like the parameters, the ascent's and
    one scalar. *Position*: in an ``employ`` with ``otherwise=``:func:`reuse`, first in
    a chain.

    Args:
      ascent: what makes epsilon of the gradient.
      per_tensor: project each parameter tensor on its own, as some ports do, and not
        all together.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params`` and
      ``grad_fn``; its errors are those of ``sharpness_aware_gradient``.

    >>> import msam_optax, optax
    >>> looksam = msam_optax.employ(
    ...     msam_optax.every(5),
    ...     msam_optax.remembered_gradient(msam_optax.normalized_ascent(0.05)),
    ...     otherwise=msam_optax.reuse(alpha=0.7),
    ... )
    >>> tx = optax.chain(looksam, optax.sgd(0.1, momentum=0.9))
    """
    sharpness_aware = sharpness_aware_gradient(ascent)

    def init_fn(params):
        return RememberedGradientState(
            sharpness_aware_state=sharpness_aware.init(params),
            orthogonal=optax.tree.zeros_like(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        perturbed, sharpness_aware_state = sharpness_aware.update(
            updates, state.sharpness_aware_state, params, **extra_args
        )
        orthogonal = _by_tensor(orthogonal_part, per_tensor)(perturbed, updates)
        return perturbed, RememberedGradientState(
            sharpness_aware_state=sharpness_aware_state,
            orthogonal=cast_like(orthogonal, state.orthogonal),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def reuse(alpha: float, per_tensor: bool = False) -> Otherwise:
    r"""The gradient of the steps between: :math:`g + \alpha (\|g\|/\|g_v\|)\, g_v`.

    Before the first refresh :math:`g_v` is zero and this is the plain gradient.

    Args:
      alpha: weight of the remembered component, in units of the gradient's norm.
      per_tensor: take the norms of each parameter tensor on its own.

    Returns:
      A function for the ``otherwise`` of :func:`msam_optax.employ` around
      :func:`remembered_gradient`, which has an example.

    Raises:
      ValueError: if alpha is not a finite number.
    """
    check_real("alpha", alpha)

    def extend(updates, orthogonal):
        ratio = safe_divide(global_norm(updates), global_norm(orthogonal))
        return add_scaled(updates, alpha * ratio, orthogonal)

    def otherwise(updates, inner_state):
        return _by_tensor(extend, per_tensor)(updates, inner_state.orthogonal)

    return otherwise


def _by_tensor(rule: Any, per_tensor: bool) -> Any:
    """A rule for two trees, applied to them leaf by leaf or as wholes."""
    return (lambda *trees: jax.tree.map(rule, *trees)) if per_tensor else rule


def looksam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    k: int = 5,
    alpha: float = 0.7,
    *,
    per_tensor: bool = False,
    layerwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM on every k-th step, and its remembered direction between.

    On steps 0, k, 2k, ... SAM's gradient is taken, and its part :math:`g_v` orthogonal
    to the clean gradient remembered. The others step with
    :math:`g + \alpha (\|g\|/\|g_v\|)\, g_v`.

    *Cost*: 1/k extra gradients a step. *State*: the optimizer's, one tree like the
    parameters and five scalars (six where rho is a schedule). *Position*: ``update``
    needs ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius; a float or a schedule over training steps.
      k: period of the SAM steps.
      alpha: weight of the remembered direction. 0.7 in the paper; CIFAR's ResNets
        needed 0.1.
      per_tensor: project and normalise each parameter tensor on its own, as some ports
        do.
      layerwise: perturb with :func:`msam_optax.layerwise_ascent`, the paper's variant
        for large batches.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if k is not an integer of at least 1 or alpha not a finite number;
        else as :func:`msam_optax.sharpness_aware_gradient`.

    >>> import msam_optax, optax
    >>> tx = msam_optax.looksam(optax.sgd(0.1, momentum=0.9), rho=0.05, k=5)

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022.
    """
    return chained(
        _employ_and_reuse(every(k), rho, alpha, per_tensor, layerwise), optimizer
    )


def ae_looksam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    total_steps: int,
    alpha: float = 0.7,
    delta: float = 0.9,
    lambda_1: float = -1.0,
    lambda_2: float = 1.0,
    *,
    k: int | None = None,
    per_tensor: bool = False,
    layerwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AE-LookSAM: SAM where AE-SAM's policy says so, its remembered part elsewhere.

    The paper leaves open who is asked when. Here the policy decides on every step, or,
    where k is given, on LookSAM's steps 0, k, 2k, ... alone. Its statistics see every
    gradient either way.

    *Cost*: the policy's share of extra gradients. *State*: the optimizer's, one tree
    like the parameters and seven scalars (eight where rho is a schedule, one more with
    k). *Position*: ``update`` needs ``params`` and ``grad_fn``.

    Args:
      optimizer: the whole base optimizer, weight decay included.
      rho: radius; a float or a schedule over training steps.
      total_steps: number of steps of the whole training.
      alpha: weight of the remembered direction.
      delta: decay rate of the policy's statistics, in [0, 1).
      lambda_1: threshold at the end, in standard deviations.
      lambda_2: threshold at the start, in standard deviations.
      k: period of the steps on which the policy is asked; None for every step.
      per_tensor: see :func:`looksam`.
      layerwise: see :func:`looksam`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`; its errors are those of
      :func:`looksam` and :func:`msam_optax.adaptive`.

    >>> import msam_optax, optax
    >>> base = optax.sgd(0.1, momentum=0.9)
    >>> tx = msam_optax.ae_looksam(base, rho=0.05, total_steps=1000)

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, ICLR 2023.
    """
    policy = adaptive(total_steps, delta, lambda_1, lambda_2)
    if k is not None:
        policy = every(k) & policy
    return chained(
        _employ_and_reuse(policy, rho, alpha, per_tensor, layerwise), optimizer
    )


def _employ_and_reuse(
    policy: Policy,
    rho: ScalarOrSchedule,
    alpha: float,
    per_tensor: bool,
    layerwise: bool,
) -> optax.GradientTransformationExtraArgs:
    ascent = layerwise_ascent(rho) if layerwise else normalized_ascent(rho)
    return employ(
        policy,
        remembered_gradient(ascent, per_tensor),
        otherwise=reuse(alpha, per_tensor),
    )
