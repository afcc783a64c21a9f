"""MSAM's variants, each against its recursion and wrong ones."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.against_recursions import (
    MU,
    RHO,
    Direction,
    along,
    along_last_gradient,
    around_sgd,
    by_tensor,
    distance,
    lr,
    on_both,
    ramp,
    x64,
)
from tests.problems import (
    STEPS,
    Problem,
    Run,
    mlp,
    named,
    run,
)
from tests.reference.family import (
    layerwise_direction,
    part_direction,
    weight_scaled_direction,
)
from tests.reference.recursions import Tree, norm, unit


class Variant(NamedTuple):
    """A variant of MSAM over SGD, and its perturbation of v, w, g and t."""

    tx: Callable[[], optax.GradientTransformation]
    epsilon: Callable[[Problem], Direction]


def small(name: str) -> bool:
    """Stands for the normalisation layers: the vectors."""
    return "bias" in name or "vector" in name


def vectors(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim < 2, params)


@functools.cache
def gaussian_draws(problem: Problem, seed: int) -> list[Tree]:
    """The unit vectors that the library draws, whatever the direction is."""
    ascent = mo.ascents.gaussian(1.0, seed)
    state, draws = ascent.init(problem.params), []
    update = jax.jit(ascent.update)
    for _ in range(STEPS):
        drawn, state = update(problem.params, state)
        draws.append(Tree(named(drawn)))
    return draws


VARIANTS: dict[str, Variant] = {
    "unnormalised": Variant(
        lambda: around_sgd(mo.ascents.unnormalized(0.03)),
        lambda p: lambda v, w, g, t: -0.03 * v,
    ),
    "scaled by the learning rate": Variant(
        lambda: around_sgd(mo.ascents.unnormalized(lambda t: 0.3 * lr(t))),
        lambda p: lambda v, w, g, t: -0.3 * lr(t) * v,
    ),
    "layer-wise": Variant(
        lambda: around_sgd(mo.ascents.layerwise(ramp)),
        lambda p: lambda v, w, g, t: -ramp(t) * layerwise_direction(v, w),
    ),
    "weight-scaled": Variant(
        lambda: around_sgd(mo.ascents.weight_scaled(ramp)),
        lambda p: lambda v, w, g, t: -ramp(t) * weight_scaled_direction(v, w),
    ),
    "normalisation layers only": Variant(
        lambda: around_sgd(optax.masked(mo.ascents.normalized(ramp), vectors)),
        lambda p: lambda v, w, g, t: -ramp(t) * part_direction(v, small),
    ),
    "against the last gradient": Variant(
        lambda: along_last_gradient(RHO), lambda p: lambda v, w, g, t: -RHO * unit(g)
    ),
    "along the last gradient": Variant(
        lambda: along_last_gradient(-RHO), lambda p: lambda v, w, g, t: RHO * unit(g)
    ),
    "gaussian": Variant(
        lambda: around_sgd(mo.ascents.gaussian(ramp, seed=3)),
        lambda p: lambda v, w, g, t: -ramp(t) * gaussian_draws(p, 3)[t],
    ),
}


@functools.cache
def variant(name: str, problem: Problem) -> Run:
    """The library's perturbed and clean iterates in one of VARIANTS."""
    return run(VARIANTS[name].tx(), problem, observe=mo.eval_params)


@x64
@on_both
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_msam_is_its_recursion(name, problem):
    ours = variant(name, problem)
    perturbed, clean = along(VARIANTS[name].epsilon(problem), problem)
    assert distance(ours.params, perturbed) < 1e-10
    assert distance(ours.observed, clean) < 1e-10


def abs_of(w: Tree) -> Tree:
    return (w**2) ** 0.5


class LastStep:
    """Remembers what it was given one step before, and zero before the first."""

    def __init__(self) -> None:
        self.kept: Tree | None = None

    def __call__(self, x: Tree) -> Tree:
        last, self.kept = self.kept, x
        return 0.0 * x if last is None else last


def with_last(rule: Callable[..., Tree]) -> Direction:
    last = LastStep()
    return lambda v, w, g, t: rule(v, w, g, t, last)


def other_way(name: str, problem: Problem) -> Direction:
    epsilon = VARIANTS[name].epsilon(problem)
    return lambda v, w, g, t: -1.0 * epsilon(v, w, g, t)


WRONG_VARIANTS: dict[tuple[str, str], Callable[[Problem], Direction]] = {
    **{
        (name, wrong): epsilon
        for name in VARIANTS
        for wrong, epsilon in {
            "SGD": lambda p: lambda v, w, g, t: 0.0 * v,
            "MSAM": lambda p: lambda v, w, g, t: -ramp(t) * unit(v),
        }.items()
    },
    **{(name, "sign"): functools.partial(other_way, name) for name in VARIANTS},
    ("unnormalised", "along the gradient"): lambda p: lambda v, w, g, t: -0.03 * g,
    ("scaled by the learning rate", "constant"): lambda p: (
        lambda v, w, g, t: -0.3 * lr(0) * v
    ),
    ("scaled by the learning rate", "the next step's"): lambda p: (
        lambda v, w, g, t: -0.3 * lr(t + 1) * v
    ),
    ("layer-wise", "norm per tensor alone"): lambda p: (
        lambda v, w, g, t: -ramp(t) * by_tensor(v)
    ),
    ("layer-wise", "global"): lambda p: lambda v, w, g, t: -ramp(t) * norm(w) * unit(v),
    ("layer-wise", "the old weights' norms"): lambda p: with_last(
        lambda v, w, g, t, last: -ramp(t) * layerwise_direction(v, last(w))
    ),
    ("weight-scaled", "twice, as in ASAM"): lambda p: (
        lambda v, w, g, t: -ramp(t) * abs_of(w) * weight_scaled_direction(v, w)
    ),
    ("weight-scaled", "after normalising"): lambda p: (
        lambda v, w, g, t: -ramp(t) * abs_of(w) * unit(v)
    ),
    ("weight-scaled", "signed"): lambda p: lambda v, w, g, t: -ramp(t) * unit(w * v),
    ("weight-scaled", "the old weights"): lambda p: with_last(
        lambda v, w, g, t, last: -ramp(t) * weight_scaled_direction(v, last(w))
    ),
    ("normalisation layers only", "norm over all"): lambda p: (
        lambda v, w, g, t: (
            norm(part_direction(unit(v), small))
            * norm(Tree({k: x for k, x in unit(v).items() if small(k)}))
            * -ramp(t)
            * part_direction(v, small)
        )
    ),
    ("normalisation layers only", "the others only"): lambda p: (
        lambda v, w, g, t: -ramp(t) * part_direction(v, lambda name: not small(name))
    ),
    ("normalisation layers only", "the others by their momentum"): lambda p: (
        lambda v, w, g, t: (
            -ramp(t) * part_direction(v, small)
            + Tree({k: 0 * x if small(k) else -x for k, x in v.items()})
        )
    ),
    ("against the last gradient", "the one before"): lambda p: with_last(
        lambda v, w, g, t, last: -RHO * unit(last(g))
    ),
    ("gaussian", "one draw for all steps"): lambda p: (
        lambda v, w, g, t: -ramp(t) * gaussian_draws(p, 3)[0]
    ),
    ("gaussian", "another seed"): lambda p: (
        lambda v, w, g, t: -ramp(t) * gaussian_draws(p, 4)[t]
    ),
}


@x64
@on_both
@pytest.mark.parametrize("name, wrong", WRONG_VARIANTS)
def test_wrong_variants_of_msam_are_far_away(name, wrong, problem):
    perturbed, _ = along(WRONG_VARIANTS[name, wrong](problem), problem)
    assert distance(variant(name, problem).params, perturbed) > 1e-6


@x64
@on_both
def test_msam_scaled_by_learning_rate_and_momentum_is_nesterov(problem):
    nesterov = run(optax.sgd(0.05, MU, nesterov=True), problem).params
    tx = mo.momentum_perturbation(
        optax.sgd(0.05, MU), ascent=mo.ascents.unnormalized(lambda t: MU * 0.05)
    )
    assert distance(run(tx, problem).params, nesterov) < 1e-12


@x64
def test_gaussian_draws_are_unit_vectors_without_a_preferred_direction():
    draws = [
        np.concatenate([x.ravel() for x in draw.values()])
        for seed in range(4)
        for draw in gaussian_draws(mlp(), seed)
    ]
    np.testing.assert_allclose([np.linalg.norm(d) for d in draws], 1.0, atol=1e-12)
    count, size = np.shape(draws)
    products = np.abs(np.array(draws) @ np.array(draws).T - np.eye(count))
    assert np.max(products) < 5.5 / np.sqrt(size)  # no draw comes twice
    assert np.max(np.abs(np.mean(draws, axis=0))) < 5 / np.sqrt(count * size)
    # Gaussian: the mean fourth power over the sphere is 3/(n(n + 2)).
    kurtosis = np.mean(np.array(draws) ** 4) * size * (size + 2)
    assert kurtosis == pytest.approx(3, abs=0.3)
