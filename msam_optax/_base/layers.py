"""What the axes of a parameter are: layers that lie stacked, and filters.

Some formulas speak of weights, layers and filters. A tree of arrays does not say which
these are: a scan over layers stacks the kernels of all, whose biases have two axes
then, and a filter need not lie along the last axis.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msam_optax._base.numerics import safe_sqrt


class Axes(NamedTuple):
    """Which axes of a parameter count layers, and which of a layer's count filters.

    ============================================  ==================================
    kernel                                        Axes
    ============================================  ==================================
    dense (in, out), convolution (h, w, in, out)  ``Axes()``
    the same of scanned layers, (layer, ...)      ``Axes(stacked=0)``
    experts (expert, in, out)                     ``Axes(stacked=0)``
    scanned experts (layer, expert, in, out)      ``Axes(stacked=(0, 1))``
    attention, into heads (in, head, size)        ``Axes(filters=(-2, -1))``
    attention, out of heads (head, size, out)     ``Axes()``
    transposed convolution (h, w, out, in)        ``Axes(filters=-2)``
    embedding (token, size), a filter a token     ``Axes(filters=0)``
    ============================================  ==================================

    Attributes:
      stacked: axes of the parameter along which whole layers lie, an integer or a
        tuple. Each layer is then a tensor of its own, without these axes.
      filters: axes *of a layer's tensor* that count its filters, that is the outputs.
        What produces one output is a filter. Without meaning for vectors.
    """

    stacked: int | tuple[int, ...] = ()
    filters: int | tuple[int, ...] = -1


# Axes for each parameter: one for all, a tree (or a prefix) of them like the
# parameters, or axes(path, parameter) -> Axes. None, also for a part, is `Axes()`.
AxesLike = Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of one parameter, counted from 0.

    Attributes:
      stacked: axes along which layers lie.
      within: axes of the parameter that a norm over a filter goes over.
      is_weight: whether a layer's tensor has two dimensions or more; else it is a bias
        or a scale.
    """

    stacked: tuple[int, ...]
    within: tuple[int, ...]
    is_weight: bool

    def filter_norm(self, x: jax.Array) -> jax.Array:
        """The l2 norm of each filter, of one entry along the axes within a filter."""
        return safe_sqrt(jnp.sum(jnp.square(x), axis=self.within, keepdims=True))

    def filter_size(self, x: jax.Array) -> int:
        """The number of entries of a filter."""
        return math.prod(x.shape[i] for i in self.within)

    def each_layer(self, rule: Callable[..., Any], *xs: jax.Array) -> jax.Array:
        """A rule from tensors of one layer to one like them, for all layers."""
        if not self.stacked:
            return rule(*xs)
        front = range(len(self.stacked))
        for _ in front:
            rule = jax.vmap(rule)
        moved = rule(*(jnp.moveaxis(x, self.stacked, front) for x in xs))
        return jnp.moveaxis(moved, front, self.stacked)

    def each_matrix(
        self, rule: Callable[[jax.Array], jax.Array], x: jax.Array
    ) -> jax.Array:
        """A rule for matrices, for each layer's tensor as [within a filter, filters].

        It keeps their shape. For weights only.
        """
        spoken_for = (*self.stacked, *self.within)
        filters = [i for i in range(x.ndim) if i not in spoken_for]
        order = (*spoken_for, *filters)
        ordered = jnp.transpose(x, order)
        layers = [x.shape[i] for i in self.stacked]
        rows = self.filter_size(x)
        for _ in layers:
            rule = jax.vmap(rule)
        columns = math.prod(x.shape[i] for i in filters)
        result = rule(ordered.reshape(*layers, rows, columns))
        return jnp.transpose(result.reshape(ordered.shape), np.argsort(order).tolist())


def layouts(axes: AxesLike, params: Any) -> Any:
    """The `Layout` of each parameter, a tree like them."""

    def one_or_none(x: Any) -> bool:
        return x is None or isinstance(x, Axes)

    def layout(path: Any, given: Any, leaf: Any) -> Layout:
        return _layout(jax.tree_util.keystr(path), given, np.shape(leaf))

    if callable(axes):
        return jax.tree.map_with_path(
            lambda path, leaf: layout(path, axes(path, leaf), leaf), params
        )
    given = jax.tree.map(  # a prefix, brought to the parameters' tree
        lambda one, part: jax.tree.map(lambda _: (one,), part),
        axes,
        params,
        is_leaf=one_or_none,
    )
    return jax.tree.map_with_path(
        lambda path, leaf, one: layout(path, one[0], leaf), params, given
    )


def _layout(name: str, given: Any, shape: tuple[int, ...]) -> Layout:
    given = Axes() if given is None else given
    if not isinstance(given, Axes):
        raise ValueError(
            "axes must be ascents.Axes, a tree of them like the parameters, or a "
            f"function axes(path, parameter) -> Axes, but for the parameter {name} "
            f"{given!r} was given."
        )
    stacked = _counted("stacked", given.stacked, shape, name)
    rest = [i for i in range(len(shape)) if i not in stacked]
    within: tuple[int, ...] = ()
    if len(rest) >= 2:
        layer = tuple(shape[i] for i in rest)
        filters = _counted("filters", given.filters, layer, name)
        within = tuple(axis for i, axis in enumerate(rest) if i not in filters)
    return Layout(stacked, within, len(rest) >= 2)


def _counted(
    field: str, axes: int | tuple[int, ...], shape: tuple[int, ...], name: str
) -> tuple[int, ...]:
    """The axes counted from 0; ValueError where the shape has no such axes."""
    given = axes if isinstance(axes, tuple) else (axes,)
    counted = tuple(
        int(i) % len(shape) if shape and -len(shape) <= i < len(shape) else -1
        for i in given
    )
    if -1 in counted or len(set(counted)) < len(counted):
        what = "a layer's tensor of shape" if field == "filters" else "shape"
        raise ValueError(
            f"{field} must be different axes of the parameter {name}, which has {what} "
            f"{list(shape)}, but {axes!r} was given."
        )
    return counted
