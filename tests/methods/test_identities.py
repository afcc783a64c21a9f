"""Methods that are the same, where their numbers say so."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.against_recursions import (
    ADAPTIVE,
    adaptive,
    composed,
    decayed_sgd,
    distance,
    element,
    lr,
    ramp,
    x64,
)
from tests.problems import (
    quadratic,
    run,
)
from tests.samples import on_both_samples, train


def sam(rho: Any = ramp) -> Any:
    return optax.chain(element(mo.ascents.normalized(rho)), decayed_sgd())


def looking(policy: mo.policies.Policy, alpha: float = 0.7) -> Any:
    """LookSAM with a policy of one's own."""
    remembered = mo.remembered_gradient(mo.ascents.normalized(ramp))
    return optax.chain(
        mo.employ(policy, remembered, mo.reuse_remembered(alpha)), decayed_sgd()
    )


IDENTITIES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "looksam alpha=0 is SAM on every k-th step": (
        lambda: mo.looksam(decayed_sgd(), ramp, k=4, alpha=0.0),
        lambda: composed(mo.policies.every(4)),
    ),
    "looksam k=1 is SAM": (lambda: mo.looksam(decayed_sgd(), ramp, k=1), sam),
    "looksam is its blocks": (
        lambda: mo.looksam(decayed_sgd(), ramp),
        lambda: looking(mo.policies.every(5)),
    ),
    "ae_looksam is its blocks": (
        lambda: mo.ae_looksam(decayed_sgd(), ramp, **ADAPTIVE),
        lambda: looking(adaptive()),
    ),
    "ae_looksam k=1 asks on every step": (
        lambda: mo.ae_looksam(decayed_sgd(), ramp, k=1, **ADAPTIVE),
        lambda: mo.ae_looksam(decayed_sgd(), ramp, **ADAPTIVE),
    ),
    "before the first refresh reuse is the plain gradient": (
        lambda: looking(mo.policies.between(25)),
        lambda: composed(mo.policies.between(25)),
    ),
    "gsam alpha=0 is SAM": (lambda: mo.gsam(decayed_sgd(), ramp, alpha=0.0), sam),
    "gradient_norm_penalty alpha=1 is SAM": (
        lambda: mo.gradient_norm_penalty(decayed_sgd(), ramp, alpha=1.0),
        sam,
    ),
    "gradient_norm_penalty alpha=0 is SGD": (
        lambda: mo.gradient_norm_penalty(decayed_sgd(), ramp, alpha=0.0),
        decayed_sgd,
    ),
    "wsam gamma=0.5 is SAM": (lambda: mo.wsam(decayed_sgd(), ramp, gamma=0.5), sam),
    "wsam gamma=0 is SGD": (
        lambda: mo.wsam(decayed_sgd(), ramp, gamma=0.0),
        decayed_sgd,
    ),
    "wsam decoupled gamma=0 is SGD": (
        lambda: mo.wsam(decayed_sgd(), ramp, gamma=0.0, learning_rate=lr),
        decayed_sgd,
    ),
    "wsam decoupled is coupled without a momentum": (
        lambda: mo.wsam(decayed_sgd(momentum=None), ramp, gamma=0.8, learning_rate=lr),
        lambda: mo.wsam(decayed_sgd(momentum=None), ramp, gamma=0.8),
    ),
    "friendly_sam sigma=0 is SAM": (
        lambda: mo.friendly_sam(decayed_sgd(), ramp, sigma=0.0),
        sam,
    ),
    "fisher_sam eta=0 is SAM": (
        lambda: mo.fisher_sam(decayed_sgd(), ramp, eta=0.0),
        sam,
    ),
    "second order without rho is SGD": (
        lambda: optax.chain(
            element(mo.ascents.normalized(0.0), second_order=True), decayed_sgd()
        ),
        decayed_sgd,
    ),
    "employ(always(), gsam) is gsam": (
        lambda: composed(mo.policies.always(), mo.combine.surrogate_gap(0.4)),
        lambda: mo.gsam(decayed_sgd(), ramp, alpha=0.4),
    ),
}


@functools.cache
def small_run(build: Callable[[], Any]) -> list[Any]:
    # What is equal is equal everywhere, so the smaller problem does.
    return run(build(), quadratic()).params


@x64
@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name):
    one, other = IDENTITIES[name]
    assert distance(small_run(one), small_run(other)) < 1e-12


@x64
@on_both_samples
def test_esam_of_all_weights_and_all_samples_is_sam(samples):
    everything = mo.esam(decayed_sgd(), ramp, beta=1.0, gamma=1.0)
    assert distance(train(everything, samples), train(sam(), samples)) < 1e-12


@x64
def test_the_radius_of_a_p_norm_is_rho():
    direction = quadratic().params
    for p in (1, 1.5, 2, 3, math.inf):
        ascent = mo.ascents.normalized(0.3, p)
        epsilon = jax.jit(ascent.update)(direction, ascent.init(direction))[0]
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(epsilon)])
        assert np.linalg.norm(flat, p) == pytest.approx(0.3, rel=1e-12)


def test_p_1_finds_the_largest_entry_of_any_direction_under_jit():
    ascent = mo.ascents.normalized(0.5, p=1)
    update = jax.jit(lambda g: ascent.update(g, ascent.init(g))[0])
    directions = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32)
    directions[:, 0] += 4 * np.sign(directions[:, 0])
    for direction in directions:
        epsilon = update(direction)
        expected = [0.5 * np.sign(direction[0]), 0, 0, 0, 0, 0, 0]
        np.testing.assert_allclose(epsilon, expected, rtol=1e-6)


def test_decoupled_sharpness_refuses_what_it_would_undo():
    labels = {"backbone": "freeze", "head": "train"}
    params = {"backbone": jnp.ones(2), "head": jnp.ones(2)}
    parts = {"freeze": optax.set_to_zero(), "train": optax.sgd(0.1)}
    frozen = mo.wsam(optax.partition(parts, labels), learning_rate=0.1)
    with pytest.raises(ValueError, match="leaves some of the parameters alone"):
        frozen.init(params)
    accumulated = optax.MultiSteps(optax.sgd(0.1), 4).gradient_transformation()
    with pytest.raises(ValueError, match="microbatches"):
        mo.wsam(accumulated, learning_rate=0.1).init(params)
    parts["train"] = mo.wsam(optax.sgd(0.1), learning_rate=0.1)
    optax.partition(parts, labels).init(params)  # around
    mo.wsam(optax.sgd(lambda step: 0.1 * step), learning_rate=0.1).init(params)
    centered = optax.chain(optax.centralize(), optax.sgd(0.1))
    mo.wsam(centered, learning_rate=0.1).init({"k": jnp.ones((2, 3)), "b": jnp.ones(3)})
    every = optax.chain(optax.sgd(0.1), optax.apply_every(4))
    with pytest.raises(ValueError, match="on some steps only"):
        mo.wsam(every, learning_rate=0.1).init(params)
