"""An ascent for some of the parameters, alone and in chains."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo
from msam_optax import ascents

W = {"a": {"w": jnp.array([3.0, 4.0]), "b": jnp.array([10.0])}, "c": jnp.array([2.0])}
G = {"a": {"w": jnp.array([0.0, 2.0]), "b": jnp.array([-7.0])}, "c": jnp.array([5.0])}
ZERO = jax.tree.map(jnp.zeros_like, W)

ASCENTS: dict[str, Callable[[], Any]] = {
    "normalized": lambda: ascents.normalized(0.1),
    "p=1": lambda: ascents.normalized(0.1, p=1),
    "adaptive": lambda: ascents.adaptive(0.1, mask=True),
    "layerwise": lambda: ascents.layerwise(0.1),
    "friendly": lambda: ascents.friendly(0.1),
    "gaussian": lambda: ascents.gaussian(0.1),
    "stochastic": lambda: ascents.stochastic(0.1, beta=1.0),
}
MASKS: dict[str, Any] = {
    "tree": {"a": {"w": True, "b": False}, "c": True},
    "prefix": {"a": True, "c": False},
    "function": lambda tree: jax.tree.map(lambda x: x.size == 1, tree),
    "nothing": False,
    "all": True,
}


def chosen(mask: Any) -> Any:
    """The mask as a tree of booleans like the parameters."""
    mask = mask(W) if callable(mask) else mask
    return jax.tree.map(lambda m, part: jax.tree.map(lambda _: m, part), mask, W)


def epsilon(ascent: Any) -> Any:
    state = ascent.init(W)
    _, state = ascent.update(G, state, W)
    return ascent.update(G, state, W)[0]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ASCENTS)
def test_an_ascent_sees_the_parameters_of_its_mask_alone(name, mask):
    of_mask = jax.tree.leaves(chosen(MASKS[mask]))

    def part(tree):
        kept = zip(of_mask, jax.tree.leaves(tree), strict=True)
        return [x for is_chosen, x in kept if is_chosen]

    restricted = ascents.restrict(ASCENTS[name](), MASKS[mask])
    found = epsilon(restricted)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, W)
    alone, g, w = ASCENTS[name](), part(G), part(W)
    _, state = alone.update(g, alone.init(w), w)
    chex.assert_trees_all_close(part(found), alone.update(g, state, w)[0], rtol=1e-6)
    for is_chosen, e in zip(of_mask, jax.tree.leaves(found), strict=True):
        assert is_chosen or not jnp.any(e)


MASK = MASKS["tree"]
BEHIND: dict[str, Callable[[], Any]] = {
    "scale": lambda: optax.scale(1.0),
    "clip_by_weight_norm": lambda: ascents.clip_by_weight_norm(1e3),
    "identity": optax.identity,
    "two": lambda: optax.chain(optax.scale(2.0), optax.scale(0.5)),
}


def perturbed(ascent: Any, around: str) -> Any:
    """Where the second gradient is taken, less where the parameters are."""
    if around == "sam":
        tx = mo.sharpness_aware_gradient(ascent)
        updates, _ = tx.update(G, tx.init(W), W, grad_fn=lambda point: point)
        return optax.tree.sub(updates, W)
    tx = mo.momentum_perturbation(optax.sgd(0.0, momentum=0.9), ascent=ascent)
    return optax.tree.scale(-1, tx.update(G, tx.init(W), W)[0])


@pytest.mark.parametrize("around", ["sam", "msam"])
@pytest.mark.parametrize("behind", BEHIND)
def test_what_a_mask_leaves_out_is_not_perturbed_whatever_stands_behind(behind, around):
    layerwise = ascents.layerwise(0.1)
    expected = epsilon(ascents.restrict(layerwise, MASK))
    assert not jnp.any(expected["a"]["b"])
    restricted = ascents.restrict(layerwise, MASK)
    found = perturbed(optax.chain(restricted, BEHIND[behind]()), around)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    for chain in (optax.chain, named_chain):
        ascent = chain(optax.masked(layerwise, MASK), BEHIND[behind]())
        with pytest.raises(ValueError, match=r"use ascents.restrict\(ascent, mask\)"):
            perturbed(ascent, around)


def named_chain(*elements: Any) -> Any:
    return optax.named_chain(*((str(i), e) for i, e in enumerate(elements)))


NOT = jax.tree.map(lambda m: not m, MASK)


@pytest.mark.parametrize("around", ["sam", "msam"])
def test_masked_is_right_where_nothing_is_behind_it(around):
    layerwise = ascents.layerwise(0.1)
    masked = optax.masked(layerwise, MASK)
    expected = epsilon(ascents.restrict(layerwise, MASK))
    twice = optax.chain(masked, optax.masked(optax.scale(2.0), MASK))
    for ascent, factor in ((masked, 1), (optax.chain(masked), 1), (twice, 2)):
        chex.assert_trees_all_close(
            perturbed(ascent, around), optax.tree.scale(factor, expected), atol=1e-6
        )
    both = optax.chain(masked, optax.masked(ascents.unnormalized(0.5), NOT))
    others = epsilon(ascents.restrict(ascents.unnormalized(0.5), NOT))
    chex.assert_trees_all_close(
        perturbed(both, around), optax.tree.add(expected, others), atol=1e-6
    )
    # Every parameter has its ascent here: nothing is handed through.
    labels = jax.tree.map(lambda m: "x" if m else "y", MASK)
    parts = optax.partition({"x": layerwise, "y": optax.set_to_zero()}, labels)
    found = perturbed(optax.chain(parts, optax.scale(1.0)), around)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_restricted_ascents_for_hidden_parameters():
    # An optimizer for a part of the model hands on a tree with holes.
    tx = optax.masked(
        mo.momentum_perturbation(
            optax.sgd(0.1, momentum=0.9),
            ascent=ascents.restrict(ascents.normalized(0.1), MASK),
        ),
        {"a": {"w": True, "b": True}, "c": False},
    )
    updates, _ = tx.update(G, tx.init(W), W)
    chex.assert_trees_all_equal(updates["c"], G["c"])
    chex.assert_trees_all_close(updates["a"]["b"], jnp.array([0.7]))
    chex.assert_trees_all_close(updates["a"]["w"], jnp.array([0.0, -0.3]))


@pytest.mark.parametrize(
    "mask, message",
    [
        ({"a": "w", "c": True}, r"'w' stands at \['a'\]"),
        (lambda tree: jax.tree.map(lambda x: x.size, tree), r"1 stands at .*'b'"),
        (None, "mask must be a tree of booleans"),
    ],
)
def test_masks_that_are_none_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        ascents.restrict(ascents.normalized(0.1), mask).init(W)


def test_what_is_no_ascent_is_refused():
    with pytest.raises(ValueError, match="ascent must be an optax"):
        ascents.restrict(0.1, MASK)
