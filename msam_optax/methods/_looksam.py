"""LookSAM and AE-LookSAM: SAM on some steps, what it adds on the others too."""

import optax

from msam_optax import ascents
from msam_optax._base.hyperparams import ScalarOrSchedule
from msam_optax._base.layers import AxesLike
from msam_optax.policies import Policy, adaptive, every
from msam_optax.transforms._employ import employ
from msam_optax.transforms._remembered import remembered_gradient, reuse_remembered
from msam_optax.transforms._sharpness_aware import chained


def looksam(
    optimizer: optax.GradientTransformation,
    rho: ScalarOrSchedule = 0.05,
    k: int = 5,
    alpha: float = 0.7,
    *,
    per_tensor: bool = False,
    layerwise: bool = False,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM on every k-th step, and its remembered direction between.

    On steps 0, k, 2k, ... SAM's gradient is taken, and its part :math:`g_v` orthogonal
    to the clean gradient remembered. The others step with
    :math:`g + \alpha (\|g\|/\|g_v\|)\, g_v`.

    *Cost*: 1/k extra gradients a step. *State*: one tree like the parameters and five
    scalars. *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius; a float or a schedule over training steps.
      k: period of the SAM steps.
      alpha: weight of the remembered direction. 0.7 in the paper; CIFAR's ResNets
        needed 0.1.
      per_tensor: project and normalise each parameter tensor on its own, as some ports
        do.
      layerwise: perturb with :func:`msam_optax.ascents.layerwise`, the paper's variant
        for large batches.
      axes: for these two, which axes of a parameter count stacked layers: see
        :class:`msam_optax.ascents.Axes`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: if k is not an integer of at least 1 or alpha not a finite number.

    >>> import msam_optax, optax
    >>> tx = msam_optax.looksam(optax.sgd(0.1, momentum=0.9), rho=0.05, k=5)

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, CVPR 2022.
    """
    return chained(
        _employ_and_reuse(every(k), rho, alpha, per_tensor, layerwise, axes), optimizer
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
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    """AE-LookSAM: SAM where AE-SAM's policy says so, its remembered part elsewhere.

    The paper leaves open who is asked when. Here the policy decides on every step, or,
    where k is given, on LookSAM's steps 0, k, 2k, ... alone. Its statistics see every
    gradient either way.

    *Cost*: the policy's share of extra gradients. *State*: one tree like the
    parameters and eight scalars. *Position*: outermost.

    Args:
      optimizer: the whole base optimizer, clipping and weight decay included.
      rho: radius; a float or a schedule over training steps.
      total_steps: number of steps of the whole training.
      alpha: weight of the remembered direction.
      delta: decay rate of the policy's statistics, in [0, 1).
      lambda_1: threshold at the end, in standard deviations.
      lambda_2: threshold at the start, in standard deviations.
      k: period of the steps on which the policy is asked; None for every step.
      per_tensor: see :func:`looksam`.
      layerwise: see :func:`looksam`.
      axes: see :func:`looksam`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs`.

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
        _employ_and_reuse(policy, rho, alpha, per_tensor, layerwise, axes), optimizer
    )


def _employ_and_reuse(
    policy: Policy,
    rho: ScalarOrSchedule,
    alpha: float,
    per_tensor: bool,
    layerwise: bool,
    axes: AxesLike,
) -> optax.GradientTransformationExtraArgs:
    if axes is not None and not (per_tensor or layerwise):
        raise ValueError(
            "axes say what a layer is, but neither per_tensor nor layerwise was given, "
            "without which norms go over all parameters."
        )
    ascent = ascents.normalized(rho)
    if layerwise:
        ascent = ascents.layerwise(rho, axes=axes)
    return employ(
        policy,
        remembered_gradient(ascent, per_tensor, axes=axes),
        otherwise=reuse_remembered(alpha, per_tensor, axes=axes),
    )
