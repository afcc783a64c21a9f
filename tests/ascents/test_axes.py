"""Layers, weights and filters: a network's layout does not matter once it is told.

Each layout below holds the same layers as a list of plain ones, whose filters lie along
the last axis. What depends on layers or filters must be the same for both.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from msam_optax import sharpness
from msam_optax.ascents import Axes

pytestmark = pytest.mark.usefixtures("x64")


class Layout(NamedTuple):
    """How layers are kept.

    Attributes:
      kernels: shape of the array.
      axes: what is told about it.
      plain: from the array to a list of kernels of two axes, the last for outputs.
      biases: shape of biases beside it, a layer's along the last axis; None for none.
    """

    kernels: tuple[int, ...]
    axes: Axes | None
    plain: Callable[[Any], list[Any]]
    biases: tuple[int, ...] | None = None


def listed(x: Any) -> list[Any]:
    return list(x)


LAYOUTS: dict[str, Layout] = {
    "dense": Layout((4, 5), None, lambda x: [x], (5,)),
    "scan over layers": Layout((3, 4, 5), Axes(stacked=0), listed, (3, 5)),
    "scan along the last axis": Layout(
        (4, 5, 3), Axes(stacked=-1), lambda x: [x[..., i] for i in range(3)]
    ),
    "scan along axis 1": Layout(
        (4, 3, 5), Axes(stacked=1), lambda x: [x[:, i] for i in range(3)]
    ),
    "two scans": Layout(
        (2, 3, 4, 5), Axes(stacked=(0, 1)), lambda x: listed(x.reshape(6, 4, 5))
    ),
    "two scans, apart": Layout(
        (4, 2, 5, 3),
        Axes(stacked=(3, 1)),
        lambda x: [x[:, i, :, j] for i in range(2) for j in range(3)],
    ),
    "experts": Layout((2, 4, 5), Axes(stacked=0), listed, (2, 5)),
    "into heads": Layout(
        (6, 2, 3), Axes(filters=(1, 2)), lambda x: [x.reshape(6, 6)], None
    ),
    "scanned, into heads": Layout(
        (3, 6, 2, 2),
        Axes(stacked=0, filters=(-2, -1)),
        lambda x: listed(x.reshape(3, 6, 4)),
    ),
    "out of heads": Layout((2, 3, 6), None, lambda x: [x.reshape(6, 6)]),
    "convolution": Layout((3, 3, 2, 4), None, lambda x: [x.reshape(18, 4)]),
    "scanned convolution": Layout(
        (2, 3, 3, 2, 4), Axes(stacked=0), lambda x: listed(x.reshape(2, 18, 4))
    ),
    "transposed convolution": Layout(
        (3, 3, 4, 2),
        Axes(filters=-2),
        lambda x: [jnp.moveaxis(x, 2, 3).reshape(18, 4)],
    ),
    "embedding": Layout((7, 4), Axes(filters=0), lambda x: [x.T]),
}


def told(layout: Layout) -> Any:
    return lambda path, leaf: layout.axes


def kept(layout: Layout, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    tree = {"kernels": rng.normal(size=layout.kernels)}
    if layout.biases is not None:
        tree["biases"] = rng.normal(size=layout.biases)
    return jax.tree.map(jnp.asarray, tree)


def plain(layout: Layout, tree: dict[str, Any]) -> dict[str, Any]:
    """The same layers in a list."""
    lists = {"kernels": layout.plain(tree["kernels"])}
    if layout.biases is not None:
        biases = tree["biases"]
        lists["biases"] = listed(biases) if biases.ndim == 2 else [biases]
    return lists


def epsilon(ascent: Any) -> Callable[[Any, Any], Any]:
    return lambda g, w: ascent.update(g, ascent.init(w), w)[0]


def remembered(axes: Any) -> Callable[[Any, Any], Any]:
    """LookSAM's remembered part after one step, and what is made of it."""
    ascent = mo.ascents.layerwise(0.1, axes=axes)
    transform = mo.remembered_gradient(ascent, per_tensor=True, axes=axes)
    reuse = mo.reuse_remembered(0.7, per_tensor=True, axes=axes)

    def after(g, w):
        def grad_fn(w):
            return jax.tree.map(lambda g, w: g * jnp.cos(w), g, w)

        _, state = transform.update(g, transform.init(w), w, grad_fn=grad_fn)
        return state.orthogonal, reuse(g, state)

    return after


RULES: dict[str, Callable[[Any], Callable[[Any, Any], Any]]] = {
    "adaptive": lambda axes: epsilon(mo.ascents.adaptive(0.5, 0.01, axes=axes)),
    "filterwise": lambda axes: epsilon(mo.ascents.filterwise(0.5, axes=axes)),
    "layerwise": lambda axes: epsilon(mo.ascents.layerwise(0.5, axes=axes)),
    "looksam": remembered,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RULES)
def test_layers_as_they_are_kept_and_in_a_list_are_the_same(name, layout):
    case = LAYOUTS[layout]
    g, w = kept(case, 0), kept(case, 1)
    found = RULES[name](told(case))(g, w)
    expected = RULES[name](None)(plain(case, g), plain(case, w))
    for one, other in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True
    ):
        chex.assert_trees_all_equal_shapes_and_dtypes(one, w)
        chex.assert_trees_all_close(plain(case, one), other, rtol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_filter_of_the_direction_is_as_long_as_the_weights(layout):
    case = LAYOUTS[layout]
    w = kept(case, 1)
    direction = sharpness.filter_normalized_direction(
        jax.random.key(0), w, axes=told(case)
    )
    found, weights = (plain(case, tree) for tree in (direction, w))
    for d, x in zip(found["kernels"], weights["kernels"], strict=True):
        np.testing.assert_allclose(*(jnp.linalg.norm(y, axis=0) for y in (d, x)))
    assert not any(np.any(b) for b in found.get("biases", []))


@pytest.mark.parametrize("name", ["adaptive", "filterwise", "layerwise"])
def test_layers_that_are_not_told_are_something_else(name):
    """As it was before there were axes: the tests above can fail."""
    case = LAYOUTS["scan over layers"]
    g, w = kept(case, 0), kept(case, 1)
    found = plain(case, RULES[name](None)(g, w))
    expected = RULES[name](told(case))(g, w)
    difference = optax.tree.sub(found, plain(case, expected))
    assert optax.tree.norm(difference) > 0.02 * optax.tree.norm(expected)


def test_axes_are_a_function_a_tree_a_prefix_or_one_for_all():
    w = {"scanned": {"w": jnp.ones((3, 4, 5)), "b": jnp.ones((3, 5))}, "out": None}
    w["out"] = {"w": jnp.ones((5, 2))}
    g = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), w)

    def of_path(path, leaf):
        return Axes(stacked=0) if path[0].key == "scanned" else None

    scanned = Axes(stacked=0)
    ways = [
        of_path,
        {"scanned": {"w": scanned, "b": scanned}, "out": {"w": Axes()}},
        {"scanned": scanned, "out": None},
    ]
    expected, *others = [
        epsilon(mo.ascents.filterwise(0.5, axes=axes))(g, w) for axes in ways
    ]
    for other in others:
        chex.assert_trees_all_equal(other, expected)
    for axes in (None, Axes(), {"scanned": None, "out": Axes()}):
        other = epsilon(mo.ascents.filterwise(0.5, axes=axes))(g, w)
        assert not np.allclose(other["out"]["w"], expected["out"]["w"])


def test_axes_reach_the_methods():
    case = LAYOUTS["scan over layers"]
    g, w = kept(case, 0), kept(case, 1)

    def step(make, g, w, axes):
        tx = make(optax.sgd(0.1), 0.5, axes=axes)
        # The second gradient is the point where it is taken.
        return tx.update(g, tx.init(w), w, grad_fn=lambda w: w)[0]

    makes: list[Callable[..., Any]] = [
        mo.asam,
        functools.partial(mo.looksam, layerwise=True),
        functools.partial(mo.ae_looksam, total_steps=10, layerwise=True, lambda_2=-9.0),
    ]
    for make in makes:
        found = plain(case, step(make, g, w, told(case)))
        expected = step(make, plain(case, g), plain(case, w), None)
        chex.assert_trees_all_close(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "axes, message",
    [
        (Axes(stacked=2), r"stacked must be different axes of the parameter \['w'\], "),
        (Axes(stacked=(0, -2)), r"has shape \[3, 4\], but \(0, -2\) was given"),
        (Axes(filters=2), r"\['w'\], which has a layer's tensor of shape \[3, 4\]"),
        (Axes(filters=(1, 1)), r"filters must be different axes"),
        (lambda path, leaf: 0, r"axes must be ascents.Axes, .* \['w'\] 0 was given"),
        ({"w": "last"}, r"'last' was given"),
    ],
)
def test_axes_that_a_parameter_has_not_are_refused(axes, message):
    w = {"w": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=message):
        epsilon(mo.ascents.filterwise(0.5, axes=axes))(w, w)


def test_axes_that_nothing_would_ask_for_are_refused():
    with pytest.raises(ValueError, match="neither per_tensor nor layerwise was given"):
        mo.looksam(optax.sgd(0.1), axes=Axes(stacked=0))
