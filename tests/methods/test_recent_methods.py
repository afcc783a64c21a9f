"""Methods of 2023 to 2026: against their recursions, wrong ones, costs, bad input."""

import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.against_recursions import (
    DECAYED_SGD,
    RHO,
    decayed_sgd,
    distance,
    element,
    lr,
    on_both,
    ramp,
    recur,
    x64,
)
from tests.problems import STEPS, Problem, mlp, named, run
from tests.reference import family, recent, recursions
from tests.reference.family import each_tensor
from tests.reference.recursions import Tree, norm, unit

Recursion = Callable[[Problem], list[Tree]]


def around_sgd(ascent: Any, combine: Any = None) -> optax.GradientTransformation:
    return optax.chain(element(ascent, combine), decayed_sgd())


def ascended(
    epsilon: Callable[..., Tree],
    combine: Callable[[Tree, Tree], Tree] = lambda g, s: s,
) -> Recursion:
    """SGD along combine(g, s), s the gradient at w + epsilon(g, w, t)."""
    return lambda problem: recur(
        family.ascend, problem, epsilon=epsilon, combine=combine, **DECAYED_SGD
    )


def along_g(g: Tree, w: Tree, t: int) -> Tree:
    return ramp(t) * unit(g)


# Held, and falling along a cosine over the last fifth, as LE-SAM's authors have it.
SIGMA = optax.join_schedules(
    [optax.constant_schedule(0.1), optax.cosine_decay_schedule(0.1, STEPS // 5)],
    [STEPS - STEPS // 5],
)


def sigma(t: int) -> float:
    start = STEPS - STEPS // 5
    progress = max(t - start, 0) / (STEPS // 5)
    return 0.05 * (1 + math.cos(math.pi * progress))


def loss_equated(sigma: Callable[[int], float], rho_max: float = 0.12) -> Recursion:
    return ascended(lambda g, w, t: recent.loss_equated_direction(g, sigma(t), rho_max))


@functools.cache
def draws(problem: Problem, seed: int) -> list[Tree]:
    """Standard normal numbers, drawn leaf by leaf."""
    leaves, structure = jax.tree.flatten(problem.params)
    drawn = []
    for t in range(STEPS):
        keys = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), t), len(leaves)
        )
        noise = [
            jax.random.normal(k, x.shape, x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ]
        drawn.append(Tree(named(jax.tree.unflatten(structure, noise))))
    return drawn


def rising(t: Any) -> Any:
    return 0.2 - optax.cosine_decay_schedule(0.2, STEPS)(t)


def noisy(rule: Callable[[Tree, Tree], Tree] = recent.filter_noise) -> Recursion:
    def of_problem(problem: Problem) -> list[Tree]:
        return ascended(
            lambda g, w, t: float(rising(t)) * rule(draws(problem, 3)[t], w)
        )(problem)

    return of_problem


SAMPA: dict[str, Any] = dict(rho=ramp, lambda_=0.3, **DECAYED_SGD)


def sampa(**options: Any) -> Recursion:
    return lambda problem: recur(recent.sampa, problem, **{**SAMPA, **options})


BSAM: dict[str, Any] = dict(
    num_examples=30, rho=ramp, b1=0.8, b2=0.9, weight_decay=0.05, damping=0.2
)


def bsam(seed: int = 5, **options: Any) -> Recursion:
    options = {"lr": lr, **BSAM, **options}
    return lambda problem: recur(
        recent.bsam, problem, draws=draws(problem, seed), **options
    )


CASES: dict[str, tuple[Callable[[], Any], Recursion]] = {
    "renormalize": (
        lambda: around_sgd(mo.ascents.normalized(ramp), mo.combine.renormalize),
        ascended(along_g, recent.renormalized),
    ),
    "loss_equated": (
        lambda: around_sgd(mo.ascents.loss_equated(SIGMA, rho_max=0.12)),
        loss_equated(sigma),
    ),
    "spectral": (
        lambda: around_sgd(mo.ascents.spectral(ramp, rho_other=0.1)),
        ascended(lambda g, w, t: recent.spectral_direction(g, ramp(t), 0.1)),
    ),
    "filter-wise noise": (
        lambda: around_sgd(mo.ascents.gaussian(rising, 3, filterwise=True)),
        noisy(),
    ),
    "sampa": (lambda: mo.sampa(decayed_sgd(), lr, ramp, lambda_=0.3), sampa()),
    "sampa, constants": (
        lambda: mo.sampa(optax.sgd(0.05, 0.9), 0.05, RHO, lambda_=0.0),
        sampa(rho=RHO, lr=0.05, lambda_=0.0, weight_decay=0.0),
    ),
    "bsam": (lambda: mo.bsam(lr, **BSAM, seed=5), bsam()),
}


@functools.cache
def library(name: str, problem: Problem) -> list[Any]:
    return run(CASES[name][0](), problem).params


@x64
@on_both
@pytest.mark.parametrize("name", CASES)
def test_a_method_is_its_recursion(name, problem):
    assert distance(library(name, problem), CASES[name][1](problem)) < 1e-10


def twisted_sampa(twist: str) -> Recursion:
    """SAMPa with one thing wrong; with nothing wrong it is the library's."""

    def iterates(problem: Problem) -> list[Tree]:
        x, grad = Tree(problem.named_params), problem.named_grad
        v, found = 0.0 * x, []
        at_y, last_at_y = 0.0 * x, 0.0 * x
        for t in range(STEPS):
            direction = unit(at_y)
            if twist == "along the clean gradient":
                direction = unit(Tree(grad(x, t)))
            elif twist == "downhill":
                direction = -1.0 * direction
            elif twist == "one step late":
                direction = unit(last_at_y)
            eta = lr(t + 1) if twist == "the next learning rate" else lr(t)
            y = x + eta * at_y if twist == "y uphill" else x - eta * at_y
            if twist == "y is x":
                y = x
            last_at_y, at_y = at_y, Tree(grad(y, t))
            there = Tree(grad(x + ramp(t) * direction, t))
            share = 0.7 if twist == "shares swapped" else 0.3
            old = last_at_y if twist == "the old gradient in the bracket" else at_y
            bracket = (1 - share) * there + share * old
            v = 0.9 * v + (bracket + DECAYED_SGD["weight_decay"] * x)
            x = x - lr(t) * v
            found.append(x)
        return found

    return iterates


SAMPA_TWISTS = [
    "along the clean gradient",
    "downhill",
    "one step late",
    "the next learning rate",
    "y uphill",
    "y is x",
    "shares swapped",
    "the old gradient in the bracket",
]

COMMON: dict[str, Recursion] = {
    "plain SGD": functools.cache(lambda p: recur(recursions.sgd, p, **DECAYED_SGD)),
    "SAM": functools.cache(lambda p: recur(recursions.sam, p, rho=ramp, **DECAYED_SGD)),
}

WRONG: dict[tuple[str, str], Recursion] = {
    **{(name, wrong): COMMON[wrong] for name in CASES for wrong in COMMON},
    ("renormalize", "per tensor"): ascended(
        along_g, lambda g, s: each_tensor(recent.renormalized, g, s)
    ),
    ("renormalize", "the other way"): ascended(along_g, lambda g, s: norm(s) * unit(g)),
    ("renormalize", "unit length"): ascended(along_g, lambda g, s: unit(s)),
    ("renormalize", "the ratio upside down"): ascended(
        along_g, lambda g, s: norm(s) / norm(g) * s
    ),
    ("loss_equated", "no limit"): loss_equated(sigma, math.inf),
    ("loss_equated", "never the loss"): ascended(lambda g, w, t: 0.12 * unit(g)),
    ("loss_equated", "sigma for rho"): ascended(
        lambda g, w, t: min(sigma(t), 0.12) * unit(g)
    ),
    ("loss_equated", "not normalised"): ascended(
        lambda g, w, t: min(sigma(t) / norm(g), 0.12) * g
    ),
    ("loss_equated", "sigma held"): loss_equated(lambda t: 0.1),
    ("loss_equated", "falls on a line"): loss_equated(
        lambda t: 0.1 * min(1.0, (STEPS - t) / (STEPS // 5))
    ),
    ("spectral", "the rest by tensors"): ascended(
        lambda g, w, t: Tree(
            {
                k: ramp(t) * recent.newton_schulz(x)
                if x.ndim == 2
                else 0.1 * x / np.linalg.norm(x)
                for k, x in g.items()
            }
        )
    ),
    ("spectral", "Frobenius length"): ascended(
        lambda g, w, t: Tree(
            {
                k: x / (np.linalg.norm(x) / ramp(t) if g[k].ndim == 2 else 1.0)
                for k, x in recent.spectral_direction(g, 1.0, 0.1).items()
            }
        )
    ),
    ("spectral", "the rest in the norm of all"): ascended(
        lambda g, w, t: Tree(
            {
                k: ramp(t) * recent.newton_schulz(x) if x.ndim == 2 else 0.1 * u
                for (k, x), u in zip(g.items(), unit(g).values(), strict=True)
            }
        )
    ),
    ("spectral", "matrices alone"): ascended(
        lambda g, w, t: recent.spectral_direction(g, ramp(t), 0.0)
    ),
    ("filter-wise noise", "not over the root of d"): noisy(
        lambda n, w: Tree(
            {
                k: math.sqrt(w[k].shape[0]) * x
                for k, x in recent.filter_noise(n, w).items()
            }
        )
    ),
    ("filter-wise noise", "rows"): noisy(
        lambda n, w: Tree(
            {
                k: (n[k].T * np.linalg.norm(x, axis=1)).T / math.sqrt(x.shape[1])
                if x.ndim == 2
                else 0 * x
                for k, x in w.items()
            }
        )
    ),
    ("filter-wise noise", "each filter at its exact length"): noisy(
        lambda n, w: Tree(
            {
                k: n[k] * np.linalg.norm(x, axis=0) / np.linalg.norm(n[k], axis=0)
                if x.ndim == 2
                else 0 * x
                for k, x in w.items()
            }
        )
    ),
    ("filter-wise noise", "vectors too"): noisy(
        lambda n, w: (
            recent.filter_noise(n, w)
            + Tree({k: x if x.ndim < 2 else 0 * x for k, x in n.items()})
        )
    ),
    **{("sampa", twist): twisted_sampa(twist) for twist in SAMPA_TWISTS},
    ("sampa", "lambda 0"): sampa(lambda_=0.0),
    ("sampa, constants", "lambda 1"): sampa(
        rho=RHO, lr=0.05, lambda_=1.0, weight_decay=0.0
    ),
    ("bsam", "another seed"): bsam(seed=6),
    ("bsam", "no noise"): bsam(deviation=lambda s, n: 0.0 * s),
    ("bsam", "N alone"): bsam(deviation=lambda s, n: 0.0 * s + n**-0.5 * s**0.0),
    ("bsam", "variance for deviation"): bsam(deviation=lambda s, n: (n * s) ** -1.0),
    ("bsam", "decay out of the momentum"): bsam(weight_decay=0.0, damping=0.25),
    ("bsam", "decay out of the precision"): bsam(damping=0.15),
    ("bsam", "decays swapped"): bsam(b1=0.9, b2=0.8),
    ("bsam", "downhill"): bsam(rho=lambda t: -ramp(t)),
}


@x64
@on_both
def test_nothing_wrong(problem):
    assert distance(library("sampa", problem), twisted_sampa("")(problem)) < 1e-10


# The quadratic has one vector alone, and gradients too long for the limit.
ON_THE_MLP_ALONE = [("spectral", "the rest by tensors"), ("loss_equated", "no limit")]


@x64
@on_both
@pytest.mark.parametrize("name, wrong", WRONG)
def test_wrong_versions_are_far_away(name, wrong, problem):
    if (name, wrong) in ON_THE_MLP_ALONE:
        problem = mlp()
    assert distance(library(name, problem), WRONG[name, wrong](problem)) > 1e-6


def test_both_branches_of_the_limit_are_taken():
    ascent = mo.ascents.loss_equated(1.0, rho_max=0.5)
    for length, expected in ((10.0, 0.1), (2.0, 0.5), (0.5, 0.5), (0.0, 0.0)):
        g = {"a": jnp.array([0.6 * length]), "b": jnp.array([0.8 * length])}
        epsilon, _ = ascent.update(g, ascent.init(g))
        assert float(optax.tree.norm(epsilon)) == pytest.approx(expected, rel=1e-6)


def test_the_spectral_norm_is_the_radius_whatever_the_shape():
    rng = np.random.default_rng(0)
    axes = {"w": None, "conv": None, "scanned": mo.ascents.Axes(stacked=0)}
    shapes = {"w": (6, 4), "conv": (3, 3, 2, 5), "scanned": (3, 4, 6)}
    g = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    ascent = mo.ascents.spectral(0.1, 0.0, axes=axes)
    epsilon, _ = ascent.update(g, ascent.init(g))
    matrices = [epsilon["w"], epsilon["conv"].reshape(18, 5), *epsilon["scanned"]]
    given = [g["w"], g["conv"].reshape(18, 5), *g["scanned"]]
    for e, x in zip(matrices, given, strict=True):
        np.testing.assert_allclose(
            e, 0.1 * recent.newton_schulz(np.asarray(x, np.float64)), atol=1e-5
        )
        values = np.linalg.svd(e, compute_uv=False)
        assert np.all((values > 0.06) & (values < 0.13))
        assert np.linalg.norm(e) == pytest.approx(
            0.1 * math.sqrt(min(x.shape)), rel=0.2
        )


# --- Costs ----------------------------------------------------------------------------


def products(tx: Any, jitted: bool = True) -> int:
    """Matrix products in the program of one step, of any number of rows."""
    params = jnp.ones((4, 4))
    grad_fn = jax.grad(lambda w: jnp.sum(jnp.tanh(jnp.ones((2, 4)) @ w) ** 2))

    def step(params, state):
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step).lower(params, tx.init(params)).compile().as_text()
    assert program is not None
    return program.count(" dot(")


def test_the_clean_gradient_is_left_out_where_it_serves_nothing():
    sgd = optax.sgd(0.1)
    one = products(sgd)
    assert products(mo.sam(sgd)) == 2 * one
    # SAMPa's are as many products, of twice the rows.
    assert products(mo.sampa(sgd, 0.1)) == one
    assert products(mo.bsam(0.1, 100)) == 2 * one
    noise = mo.ascents.gaussian(0.1, filterwise=True)
    assert products(optax.chain(element(noise), sgd)) == one


STATES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "sampa": (lambda: mo.sampa(optax.sgd(0.1, 0.9), 0.1), 2, 2),
    "sampa, schedules": (lambda: mo.sampa(optax.sgd(0.1, 0.9), lr, ramp), 2, 4),
    "bsam": (lambda: mo.bsam(0.1, 10), 2, 3),
    "bsam, schedules": (lambda: mo.bsam(lr, 10, ramp), 2, 5),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_is_as_large_as_documented(name):
    build, trees, scalars = STATES[name]
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    leaves = jax.tree.leaves(build().init(params))
    assert sum(x.size for x in leaves if x.ndim) == trees * 16
    assert sum(x.ndim == 0 for x in leaves) == scalars


PAIR = """
import jax, jax.numpy as jnp, optax
import msam_optax as mo
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(jax.devices(), ("pair",))
w, x = jnp.linspace(-1.0, 1.0, 64 * 64).reshape(64, 64), jnp.ones((32, 64))
whole = NamedSharding(mesh, PartitionSpec())
w = jax.device_put(w, whole)

def program(sharding):
    tx = mo.sampa(optax.sgd(0.1), 0.1, sharding=sharding)
    grad_fn = jax.grad(lambda w: jnp.mean(jnp.sin(x @ w) ** 2))
    state = jax.device_put(tx.init(w), whole)

    @jax.jit
    def step(w, state):
        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        return optax.apply_updates(w, updates), state

    flops = step.lower(w, state).compile().cost_analysis()["flops"]
    for _ in range(3):
        w_, state = step(w, state)
    return flops, w_

alone, expected = program(None)
shared, found = program(NamedSharding(mesh, PartitionSpec("pair")))
print(shared / alone, float(jnp.max(jnp.abs(found - expected))))
"""


def test_on_two_devices_each_takes_one_of_the_gradients():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PAIR],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert done.returncode == 0, done.stderr
    share, difference = map(float, done.stdout.split())
    assert share < 0.6  # of the operations on one device
    assert difference < 1e-6


def test_a_gradient_that_is_no_number_is_not_remembered():
    tx = mo.sampa(optax.sgd(0.0), 0.1)
    params = jnp.array([1.0, 2.0])
    state = tx.init(params)
    for grad in (jnp.ones(2), jnp.full(2, jnp.nan), jnp.ones(2)):
        updates, state = tx.update(
            grad, state, params, grad_fn=lambda w, grad=grad: grad
        )
    assert jnp.all(jnp.isfinite(updates)) and jnp.all(state[0].auxiliary == 1)


# --- Bad input ------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "sigma": (lambda: mo.ascents.loss_equated(-1.0, 0.1), "sigma must be .* -1.0"),
    "rho_max": (lambda: mo.ascents.loss_equated(1.0, 0.0), "rho_max must be .* 0.0"),
    "rho_other": (lambda: mo.ascents.spectral(0.1, -0.1), "rho_other must be .* -0.1"),
    "axes without filters": (
        lambda: mo.ascents.gaussian(0.1, axes=mo.ascents.Axes()),
        "give filterwise=True",
    ),
    "noise without weights": (
        lambda: mo.ascents.gaussian(0.1, filterwise=True).update(
            jnp.ones((2, 2)), mo.ascents.gaussian(0.1).init(None)
        ),
        "params were None",
    ),
    "lambda_": (
        lambda: mo.sampa(optax.sgd(0.1), 0.1, lambda_=1.5),
        r"lambda_ must be .* in \[0, 1\], but 1.5",
    ),
    "sampa's learning rate": (
        lambda: mo.sampa(optax.sgd(0.1), math.nan),
        "learning_rate .* nan",
    ),
    "sharding": (
        lambda: mo.sampa(optax.sgd(0.1), 0.1, sharding="pair"),  # type: ignore[arg-type]
        "sharding must be NamedSharding.* but 'pair' was given",
    ),
    "num_examples": (lambda: mo.bsam(0.1, 0), "num_examples must be .* 0 was given"),
    "half an example": (
        lambda: mo.bsam(0.1, 1.5),  # type: ignore[arg-type]
        "num_examples must be an integer",
    ),
    "b1": (lambda: mo.bsam(0.1, 10, b1=1.0), r"b1 must be .* in \[0, 1\), but 1.0"),
    "initial_precision": (
        lambda: mo.bsam(0.1, 10, initial_precision=0.0),
        "initial_precision must be .* 0.0 was given",
    ),
    "nothing that keeps s from 0": (
        lambda: mo.bsam(0.1, 10, weight_decay=0.0, damping=0.0),
        "must not both be 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_what_is_needed(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
