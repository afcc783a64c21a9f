"""Remembers what SAM adds to the gradient, and adds it on the other steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import check_real
from msam_optax._base.layers import AxesLike, layouts
from msam_optax._base.numerics import (
    add_scaled,
    global_norm,
    plus_scaled,
    projection,
    safe_divide,
)
from msam_optax._base.trees import check_state
from msam_optax.transforms._sharpness_aware import (
    SharpnessAwareState,
    sharpness_aware_gradient,
)


class RememberedGradientState(NamedTuple):
    """State of `remembered_gradient`.

    Attributes:
      sharpness_aware_state: state of the sharpness-aware gradient.
      orthogonal: tree like the parameters, the part g_v of the last perturbed gradient
        that is orthogonal to the clean one; zeros before the first. Where one of the
        two is not finite the last stays, or all steps up to the next would be lost.
    """

    sharpness_aware_state: SharpnessAwareState
    orthogonal: optax.Updates


# reuse(updates, inner_state) -> updates
Reuse = Callable[[optax.Updates, RememberedGradientState], optax.Updates]


def remembered_gradient(
    ascent: optax.GradientTransformation,
    per_tensor: bool = False,
    *,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A sharpness-aware gradient that keeps its part orthogonal to the clean one.

    With the clean gradient :math:`g` and the perturbed one :math:`g_s`, which is
    returned,

    .. math::
      g_v = g_s - \frac{\langle g, g_s \rangle}{\|g\|^2}\, g .

    *Cost*: one extra gradient. *State*: one tree like the parameters, the ascent's and
    two scalars. *Position*: in an ``employ`` with
    ``otherwise=``:func:`reuse_remembered`, first in a chain.

    Args:
      ascent: what makes epsilon of the gradient.
      per_tensor: project each parameter tensor on its own, as some ports do, and not
        all together.
      axes: which axes of a parameter count stacked layers, each of which is a tensor of
        its own then; see :class:`msam_optax.ascents.Axes`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params`` and
      ``grad_fn``; its errors are those of ``sharpness_aware_gradient``.

    >>> import msam_optax, optax
    >>> looksam = msam_optax.employ(
    ...     msam_optax.policies.every(5),
    ...     msam_optax.remembered_gradient(msam_optax.ascents.normalized(0.05)),
    ...     otherwise=msam_optax.reuse_remembered(alpha=0.7),
    ... )
    >>> tx = optax.chain(looksam, optax.sgd(0.1, momentum=0.9))
    """
    sharpness_aware = sharpness_aware_gradient(ascent)

    def init_fn(params: Any) -> Any:
        return RememberedGradientState(
            sharpness_aware_state=sharpness_aware.init(params),
            orthogonal=optax.tree.zeros_like(params),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        check_state(state, RememberedGradientState)
        perturbed, sharpness_aware_state = sharpness_aware.update(
            updates, state.sharpness_aware_state, params, **extra_args
        )
        orthogonal = _by_tensor(_orthogonal_or_last, per_tensor, axes)(
            perturbed, updates, state.orthogonal
        )
        return perturbed, RememberedGradientState(sharpness_aware_state, orthogonal)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def reuse_remembered(
    alpha: float, per_tensor: bool = False, *, axes: AxesLike = None
) -> Reuse:
    r"""The gradient of the steps between: :math:`g + \alpha (\|g\|/\|g_v\|)\, g_v`.

    Before the first refresh :math:`g_v` is zero and this is the plain gradient.

    Args:
      alpha: weight of the remembered component, in units of the gradient's norm.
      per_tensor: take the norms of each parameter tensor on its own.
      axes: see :func:`remembered_gradient`.

    Returns:
      A function for the ``otherwise`` of :func:`msam_optax.employ` around
      :func:`remembered_gradient`, which has an example.

    Raises:
      ValueError: if alpha is not a finite number.
    """
    check_real("alpha", alpha)

    def extend(updates: Any, orthogonal: Any) -> Any:
        ratio = safe_divide(global_norm(updates), global_norm(orthogonal))
        return add_scaled(updates, alpha * ratio, orthogonal)

    def otherwise(updates: Any, inner_state: Any) -> Any:
        return _by_tensor(extend, per_tensor, axes)(updates, inner_state.orthogonal)

    return otherwise


def _orthogonal_or_last(perturbed: Any, clean: Any, last: Any) -> Any:
    """The part of the perturbed gradient that is orthogonal to the clean one."""
    share = projection(perturbed, clean)
    # What is not finite in one of the two makes the inner product so.
    return jax.tree.map(
        lambda x, y, old: jnp.where(
            jnp.isfinite(share), plus_scaled(x, -share, y).astype(old.dtype), old
        ),
        perturbed,
        clean,
        last,
    )


def _by_tensor(rule: Any, per_tensor: bool, axes: AxesLike) -> Any:
    """A rule for two trees, applied to them layer by layer or as wholes."""
    if not per_tensor:
        return rule
    return lambda tree, *rest: jax.tree.map(
        lambda layout, *xs: layout.each_layer(rule, *xs),
        layouts(axes, tree),
        tree,
        *rest,
    )
