r"""Ascents whose radius follows the size of the weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from msam_optax._base.hyperparams import ScalarOrSchedule, check_real
from msam_optax._base.layers import AxesLike, Layout, layouts
from msam_optax._base.numerics import (
    global_norm,
    safe_divide,
    scale,
    statistics_dtype,
)
from msam_optax._base.trees import check_params
from msam_optax.ascents._make import along, make, make_with_norm


def adaptive(
    rho: ScalarOrSchedule,
    eta: float = 0.0,
    mask: Any = None,
    *,
    axes: AxesLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Ascent whose radius scales with each weight, so node rescaling leaves it alone.

    .. math::
      \varepsilon = \rho\,T^2 g / \|T g\|, \qquad
      T = \begin{cases} |w| + \eta & \text{where mask} \\ 1 & \text{elsewhere.}
      \end{cases}

    *Cost*: one reduction over the direction. *State*: none, or one int32 where rho is
    a schedule. *Position*: inside ``sharpness_aware_gradient`` or
    ``momentum_perturbation``.

    Args:
      rho: radius, relative to the weights' size where T is adaptive; a float or a
        schedule. About ten times SAM's.
      eta: added to :math:`|w|`, so that zero weights move too.
      mask: tree of booleans like the parameters (or a prefix), or a function of the
        parameters that returns one: where T is adaptive. The default is the tensors of
        at least two dimensions, that is weights, and not biases and scales.
      axes: which axes of a parameter count stacked layers, where there are such: an
        :class:`msam_optax.ascents.Axes`, a tree of them like the parameters, or a
        function ``axes(path, parameter)``. The dimensions are those of one layer.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if rho or eta is not a finite number (rho may be a schedule), eta is
        negative, or ``params`` are missing from ``update``.

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.adaptive(rho=0.5)
    >>> params, direction = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 1.0]])
    >>> epsilon, _ = ascent.update(direction, ascent.init(params), params)
    >>> print(epsilon)
    [[1. 0.]]

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, 2021. The authors' PyTorch code chooses
      T by parameter name; a widely used port takes :math:`|w|` everywhere, which is
      ``adaptive(rho, mask=lambda params: True)``.
    """
    check_real("eta", eta, low=0.0)
    return _sized_ascent(rho, lambda layout, w: jnp.abs(w) + eta, mask, axes)


def filterwise(
    rho: ScalarOrSchedule, mask: Any = None, *, axes: AxesLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""ASAM with one radius for each filter: T is the l2 norm of the weight's filter.

    :math:`\varepsilon = \rho\,T^2 g / \|T g\|` as in :func:`adaptive`. A filter
    is what produces one output: the slice of a weight tensor along its last axis,
    which is where Flax keeps the outputs of dense layers and convolutions, or along
    those that axes names.

    *Cost*: one reduction over the direction and one over the parameters. *State*: none,
    or one int32 where rho is a schedule. *Position*: inside
    ``sharpness_aware_gradient`` or ``momentum_perturbation``.

    Args:
      rho: radius, relative to the filters' norms; a float or a schedule.
      mask: see :func:`adaptive`.
      axes: which axes of a parameter count its filters, and which stacked layers; as
        in :func:`adaptive`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule, ``params`` are
        missing from ``update``, or a parameter has no such axes.

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.filterwise(rho=1.0)
    >>> params = jnp.array([[3.0, 0.0], [4.0, 0.0]])  # two filters, one of zeros
    >>> epsilon, _ = ascent.update(jnp.ones((2, 2)), ascent.init(params), params)
    >>> print(epsilon.round(2))
    [[3.54 0.  ]
     [3.54 0.  ]]

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    return _sized_ascent(rho, lambda layout, w: layout.filter_norm(w), mask, axes)


def weight_scaled(
    rho: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""The adaptive variant of MSAM: :math:`\varepsilon = \rho\,|w| g / \||w| g\|`.

    Its length is rho, unlike that of :func:`adaptive`, which weighs with
    :math:`|w|` once more after normalising.

    *Cost*: one reduction over the direction. *State*: none, or one int32 where rho is
    a schedule. *Position*: ``momentum_perturbation(inner, ascent=...)``, which keeps
    epsilon in its state then, or ``sharpness_aware_gradient``.

    Args:
      rho: radius, in the unit of the parameters; a float or a schedule.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule, or ``params`` are
        missing from ``update``.

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.weight_scaled(rho=0.5)
    >>> params = jnp.array([3.0, -4.0])
    >>> epsilon, _ = ascent.update(jnp.ones(2), ascent.init(params), params)
    >>> print(epsilon)
    [0.3 0.4]

    References:
      Becker, Altrock and Risse, `Momentum-SAM <https://arxiv.org/abs/2401.12033>`_,
      2024, table 3.
    """

    def perturb(
        rho: Any, direction: optax.Updates, params: Any
    ) -> tuple[optax.Updates, jax.Array]:
        check_params("This ascent scales with the weights", params)
        dtype = statistics_dtype(params)
        weighed = jax.tree.map(
            lambda g, w: g.astype(dtype) * jnp.abs(w.astype(dtype)), direction, params
        )
        epsilon, norm = along(rho, global_norm(weighed), weighed)
        return optax.tree.cast_like(epsilon, direction), norm

    return make_with_norm(rho, perturb)


def layerwise(
    rho: ScalarOrSchedule, *, axes: AxesLike = None
) -> optax.GradientTransformationExtraArgs:
    r"""One radius for each parameter tensor: :math:`\rho\,\|w_i\|\, g_i / \|g_i\|`.

    LookSAM's variant for large batches.

    *Cost*: one reduction over the direction and one over the parameters. *State*: none,
    or one int32 where rho is a schedule. *Position*: inside
    ``sharpness_aware_gradient`` or ``momentum_perturbation``.

    Args:
      rho: radius relative to each tensor's norm; a float or a schedule.
      axes: which axes of a parameter count stacked layers, each of which has its own
        radius then; as in :func:`adaptive`.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if rho is neither a finite number nor a schedule, or ``params`` are
        missing from ``update``.

    >>> import jax.numpy as jnp, msam_optax
    >>> ascent = msam_optax.ascents.layerwise(rho=0.1)
    >>> params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([10.0])}
    >>> direction = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([-7.0])}
    >>> epsilon, _ = ascent.update(direction, ascent.init(params), params)
    >>> print(epsilon["a"], epsilon["b"])
    [0.  0.5] [-1.]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022.
    """

    def perturb(rho: Any, direction: optax.Updates, params: Any) -> optax.Updates:
        check_params("This ascent scales with the weights", params)

        def tensor(g: jax.Array, w: jax.Array) -> jax.Array:
            return scale(rho * safe_divide(global_norm(w), global_norm(g)), g)

        return jax.tree.map(
            lambda layout, g, w: layout.each_layer(tensor, g, w),
            layouts(axes, params),
            direction,
            params,
        )

    return make(rho, perturb)


def clip_by_weight_norm(max_ratio: float) -> optax.GradientTransformationExtraArgs:
    r"""Shortens a perturbation to at most max_ratio times the norm of the weights.

    .. math::
      \varepsilon \to \varepsilon\,
      \min\!\left(1, \frac{\text{max\_ratio}\,\|w\|}{\|\varepsilon\|}\right),

    with the norms over all parameters together. The idea: a radius that suits the
    weights of late training may be too large for those that it starts from.

    *Cost*: no extra gradient. *State*: none, but in
    :func:`msam_optax.momentum_perturbation` an ascent costs one tree like the
    parameters. *Position*: in a chain behind an ascent.

    On MNIST-5k and Fashion-MNIST with 40% random labels (MLP, learning rate 0.03,
    momentum 0.9, 20 epochs, three seeds) MSAM with a limit of 0.04 diverged at no rho
    up to 5, the largest tried, and the rhos within a point of the best spanned a factor
    of 17 and of 14, in the place of 1.9 and 1.7. Its best accuracy was 1.1 points lower
    on the one and the same on the other, so tune it. See ``stability.md`` in
    ``benchmarks/results/figures``.

    Args:
      max_ratio: the limit, a positive number without a unit.

    Returns:
      A :class:`optax.GradientTransformationExtraArgs` that needs ``params``.

    Raises:
      ValueError: if max_ratio is not a positive finite number, or ``update`` gets no
        ``params``.

    >>> import jax.numpy as jnp, msam_optax, optax
    >>> ascent = optax.chain(
    ...     msam_optax.ascents.normalized(rho=3.0),
    ...     msam_optax.ascents.clip_by_weight_norm(0.04),
    ... )
    >>> tx = msam_optax.momentum_perturbation(optax.sgd(0.1, 0.9), ascent=ascent)
    >>> params = jnp.array([3.0, 4.0])
    >>> epsilon, _ = ascent.update(jnp.array([0.0, 1.0]), ascent.init(params), params)
    >>> print(f"{epsilon[1]:.4f}")
    0.2000

    References:
      Becker, Altrock and Risse, `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024, name what
      limits rho as open. The limit is this library's own.
    """
    check_real("max_ratio", max_ratio, 0, excluded=0)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        check_params("This ascent scales with the weights", params)
        ratio = safe_divide(max_ratio * global_norm(params), global_norm(updates))
        return scale(jnp.minimum(ratio, 1), updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )


def _sized_ascent(
    rho: ScalarOrSchedule,
    size: Callable[[Layout, jax.Array], jax.Array],
    mask: Any,
    axes: AxesLike,
) -> optax.GradientTransformationExtraArgs:
    r"""rho T^2 g / ‖T g‖ with T = size(w) where mask, and 1 elsewhere."""

    def perturb(rho: Any, direction: optax.Updates, params: Any) -> optax.Updates:
        check_params("This ascent scales with the weights", params)
        dtype = statistics_dtype(params)
        of_params = layouts(axes, params)
        chosen = mask(params) if callable(mask) else mask
        if chosen is None:
            chosen = jax.tree.map(lambda layout: layout.is_weight, of_params)
        t = jax.tree.map(  # the mask may be a prefix of the parameters
            lambda is_sized, *part: jax.tree.map(
                lambda layout, w: size(layout, w.astype(dtype)) if is_sized else 1,
                *part,
            ),
            chosen,
            of_params,
            params,
        )

        def times_t(tree: Any) -> Any:
            return jax.tree.map(lambda x, t: x.astype(dtype) * t, tree, t)

        weighed = times_t(direction)
        factor = safe_divide(rho, global_norm(weighed))
        epsilon = scale(factor, times_t(weighed))
        return optax.tree.cast_like(epsilon, direction)

    return make(rho, perturb)
