"""ESAM: some of the weights, and some of the samples."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax as mo
from tests.against_recursions import DECAYED_SGD, RHO, decayed_sgd, distance, ramp, x64
from tests.problems import (
    STEPS,
    named,
)
from tests.reference import family, recursions
from tests.reference.recursions import Tree, norm
from tests.samples import BATCH, Samples, classes, on_both_samples, train


@functools.cache
def drawn_masks(
    samples: Samples, beta: float, seed: int, by_coordinate: bool, steps: int = STEPS
) -> list[Tree]:
    """What takes part in the library's ascent, step by step."""
    ascent = mo.ascents.stochastic(1.0, beta, seed, by_coordinate)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), samples.params)
    state, masks = ascent.init(ones), []
    update = jax.jit(ascent.update)
    for _ in range(steps):
        epsilon, state = update(ones, state)
        masks.append(Tree({k: 1.0 * (x != 0) for k, x in named(epsilon).items()}))
    return masks


ESAM_CASES: dict[str, dict[str, Any]] = {
    "by tensor": dict(rho=ramp, beta=0.6, gamma=0.5, seed=0, by_coordinate=False),
    "by coordinate": dict(rho=ramp, beta=0.5, gamma=0.5, seed=1, by_coordinate=True),
    "uneven": dict(rho=RHO, beta=0.8, gamma=0.37, seed=2, by_coordinate=True),
    "weights only": dict(rho=ramp, beta=0.5, gamma=1.0, seed=1, by_coordinate=True),
    "samples only": dict(rho=ramp, beta=1.0, gamma=0.2, seed=0, by_coordinate=False),
}


@functools.cache
def esam(name: str, samples: Samples) -> list[Any]:
    """The library's iterates in one of ESAM_CASES."""
    return train(mo.esam(decayed_sgd(), **ESAM_CASES[name]), samples)


@x64
@on_both_samples
@pytest.mark.parametrize("name", ESAM_CASES)
def test_esam_is_its_recursion(name, samples):
    options = dict(ESAM_CASES[name])
    draw = options.pop("seed"), options.pop("by_coordinate")
    expected = family.esam(
        samples.named_losses,
        samples.named_grad,
        named(samples.params),
        STEPS,
        masks=drawn_masks(samples, options["beta"], *draw),
        **options,
        **DECAYED_SGD,
    )
    assert distance(esam(name, samples), expected) < 1e-10


def twisted_esam(
    samples: Samples,
    name: str = "by coordinate",
    *,
    fewer: int = 0,
    order: Callable[[Any, Any], Any] = lambda clean, there: clean - there,
    grad_at: str = "there",
    of_all: bool = False,
    scale: float = 1.0,
    expected_rho: bool = True,
    norm_of_all: bool = False,
    flip_masks: bool = False,
) -> list[Tree]:
    """ESAM with schedules and weight decay; samples are kept in `order`."""
    options = ESAM_CASES[name]
    beta, by_coordinate = options["beta"], options["by_coordinate"]
    masks = drawn_masks(samples, beta, options["seed"], by_coordinate)

    def gradient(w: Tree, t: int) -> Tree:
        everything = np.arange(BATCH)
        g = Tree(samples.named_grad(w, t, everything))
        chosen = (masks[t] * -1.0 + 1.0 if flip_masks else masks[t]) * g
        epsilon = chosen / (norm(g if norm_of_all else chosen) or 1.0)
        there = w + ramp(t) / (beta if expected_rho else 1.0) * epsilon
        losses = samples.named_losses(w, t), samples.named_losses(there, t)
        count = math.floor(options["gamma"] * BATCH) - fewer
        kept = np.argsort(order(*losses))[:count]
        at = w if grad_at == "here" else there
        mean = samples.named_grad(at, t, everything if of_all else kept)
        return scale * Tree(mean)

    return recursions.sgd(gradient, named(samples.params), STEPS, **DECAYED_SGD)


WRONG_ESAM: dict[str, dict[str, Any]] = {
    "one sample fewer": dict(fewer=1),
    "one sample more": dict(fewer=-1),
    "by loss": dict(order=lambda clean, there: -there),
    "by clean loss": dict(order=lambda clean, there: -clean),
    "smallest rise": dict(order=lambda clean, there: there - clean),
    "by relative rise": dict(order=lambda clean, there: -there / clean),
    "first samples": dict(order=lambda clean, there: np.arange(BATCH)),
    "at the clean weights": dict(grad_at="here"),
    "all samples": dict(of_all=True),
    "mean over the batch": dict(scale=0.5),
    "no 1/beta": dict(expected_rho=False),
    "norm of all": dict(norm_of_all=True),
    "the other weights": dict(flip_masks=True),
}


@x64
@on_both_samples
@pytest.mark.parametrize("name", ["by tensor", "by coordinate"])
def test_nothing_wrong_with_esam(name, samples):
    assert distance(esam(name, samples), twisted_esam(samples, name)) < 1e-10


@x64
@on_both_samples
@pytest.mark.parametrize("wrong", WRONG_ESAM)
def test_wrong_esam_is_far_away(wrong, samples):
    others = twisted_esam(samples, **WRONG_ESAM[wrong])
    assert distance(esam("by coordinate", samples), others) > 1e-6


@x64
@pytest.mark.parametrize("by_coordinate, draws", [(False, 4), (True, 75)])
def test_each_weight_takes_part_with_probability_beta(by_coordinate, draws):
    masks = drawn_masks(classes(), 0.3, 7, by_coordinate, steps=400)
    shares = np.array([[np.mean(x) for x in mask.values()] for mask in masks])
    if not by_coordinate:
        assert set(np.unique(shares)) == {0.0, 1.0}  # a tensor as a whole or not at all
    else:
        assert np.mean((shares > 0) & (shares < 1)) > 0.5
    sizes = [x.size if by_coordinate else 1 for x in masks[0].values()]
    assert sum(sizes) == draws
    assert np.average(np.mean(shares, axis=0), weights=sizes) == pytest.approx(
        0.3, abs=4 * np.sqrt(0.3 * 0.7 / (400 * draws))
    )
    # Tensors, and steps, are drawn independently.
    correlations = np.corrcoef(shares.T) - np.eye(len(sizes))
    assert np.max(np.abs(correlations)) < 4.5 / np.sqrt(400)
    assert abs(np.corrcoef(shares[1:, 0], shares[:-1, 0])[0, 1]) < 4.5 / np.sqrt(400)
