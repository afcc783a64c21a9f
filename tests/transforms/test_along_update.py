"""MSAM along the update: its recursion, wrong versions, identities, and bad input."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.problems import STEPS, Problem, mlp, named, quadratic, run
from tests.reference import along_update
from tests.reference.recursions import Tree, at, norm, unit

LR, MU, RHO, DECAY = 0.05, 0.9, 0.2, 0.1

x64 = pytest.mark.usefixtures("x64")


def ramp(t: Any) -> Any:
    """A rho that changes on every step, and its sign once."""
    return 0.3 - 0.01 * t


def lr(t: Any) -> Any:
    return 0.02 / (1 + 0.1 * t)


BASES: dict[str, tuple[Callable[[], Any], along_update.Base]] = {
    "sgd without momentum": (lambda: optax.sgd(lr), along_update.sgd(lr)),
    "sgd with decay": (
        lambda: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LR, MU)),
        along_update.sgd(LR, MU, DECAY),
    ),
    "rmsprop with momentum": (
        lambda: optax.rmsprop(lr, momentum=MU),
        along_update.rmsprop(lr, MU),
    ),
    "lion": (
        lambda: optax.lion(0.01, weight_decay=DECAY),
        along_update.lion(0.01, DECAY),
    ),
}


def distance(iterates: Any, others: Any) -> float:
    assert len(iterates) == len(others) == STEPS
    return max(
        float(np.max(np.abs(x - y)))
        for tree, other in zip(iterates, others, strict=True)
        for x, y in zip(named(tree).values(), other.values(), strict=True)
    )


@x64
@pytest.mark.parametrize("problem", [mlp(), quadratic()], ids=repr)
@pytest.mark.parametrize("name", BASES)
def test_along_the_update_is_its_recursion(name, problem):
    make, base = BASES[name]
    tx = mo.momentum_perturbation(make(), ramp, along="update")
    perturbed, clean = run(tx, problem, observe=mo.eval_params)
    expected = along_update.msam_along_update(
        problem.named_grad, problem.named_params, STEPS, base=base, rho=ramp
    )
    assert distance(perturbed, expected[0]) < 1e-10
    assert distance(clean, expected[1]) < 1e-10


def per_tensor(u: Tree) -> Tree:
    return Tree({name: unit(Tree({name: x}))[name] for name, x in u.items()})


def twisted(problem: Problem, base: along_update.Base, twist: str) -> list[Tree]:
    """The clean iterates of a plausible wrong version."""
    w = perturbed = Tree(problem.named_params)
    memory, iterates = None, []
    last = 0.0 * w
    for t in range(STEPS):
        u, memory = base(Tree(problem.named_grad(perturbed, t)), w, memory, t)
        w = w + u
        before = perturbed
        direction = {
            "wrong sign": -1.0 * unit(u),
            "the previous update": unit(last),
            "norm per tensor": per_tensor(u),
            "with its own shift": unit(w - before),
            "not normalised": u,
        }[twist]
        perturbed, last = w + at(RHO, t) * direction, u
        iterates.append(w)
    return iterates


@x64
@pytest.mark.parametrize(
    "twist",
    [
        "wrong sign",
        "the previous update",
        "norm per tensor",
        "with its own shift",
        "not normalised",
    ],
)
def test_wrong_versions_are_told_apart(twist):
    make, base = BASES["rmsprop with momentum"]
    tx = mo.momentum_perturbation(make(), RHO, along="update")
    clean = run(tx, mlp(), observe=mo.eval_params).observed
    assert distance(clean, twisted(mlp(), base, twist)) > 1e-4


@x64
@pytest.mark.parametrize("nesterov", [False, True])
def test_for_sgd_with_momentum_it_is_msam_without_nesterov(nesterov):
    sgd = optax.sgd(LR, MU, nesterov=nesterov)
    msam = run(mo.momentum_perturbation(sgd, ramp), mlp()).params
    update = run(mo.momentum_perturbation(sgd, ramp, along="update"), mlp()).params
    gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), msam[-1], update[-1])
    assert (max(jax.tree.leaves(gaps)) < 1e-12) != nesterov


@x64
def test_unnormalised_it_looks_a_number_of_steps_ahead():
    problem, k = mlp(), 1.5
    tx = mo.momentum_perturbation(
        optax.sgd(lr), along="update", ascent=mo.ascents.unnormalized(k)
    )
    w = ahead = Tree(problem.named_params)
    expected = []
    for t in range(STEPS):
        u = -lr(t) * Tree(problem.named_grad(ahead, t))
        w = w + u
        ahead = w + k * u
        expected.append(w)
    assert distance(run(tx, problem, observe=mo.eval_params).observed, expected) < 1e-10


EVERY = {
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "lars": lambda: optax.lars(1e-2),
    "muon": lambda: optax.contrib.muon(1e-2),
    "sophia": lambda: optax.contrib.sophia(1e-2),
    "sgd": lambda: optax.sgd(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "injected": lambda: optax.inject_hyperparams(optax.adagrad)(learning_rate=0.1),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_perturbation_is_along_the_update_whatever_made_it(name):
    base = EVERY[name]()
    tx = mo.momentum_perturbation(base, RHO, along="update")
    params = {"m": jnp.asarray([[1.0, -0.5], [0.3, 2.0]]), "v": jnp.ones(2)}
    state, clean = tx.init(params), params
    inner = optax.with_extra_args_support(base)
    for _ in range(2):
        g = params  # of half the squared norm
        extra = {"obj_fn": lambda p: 0.5 * optax.tree.norm(p, squared=True)}
        step, _ = inner.update(g, state.inner_state, clean, **extra)
        updates, state = tx.update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
        clean = mo.eval_params(state, params)
        epsilon, u = Tree(named(state.perturbation)), Tree(named(step))
        assert norm(epsilon) == pytest.approx(RHO, rel=1e-5)
        assert norm(unit(epsilon) - unit(u)) < 1e-4


def test_its_memory_is_one_tree():
    params = jax.tree.map(jnp.asarray, mlp().params)
    tx = mo.momentum_perturbation(optax.sgd(0.1), RHO, along="update")
    (extra,) = [jax.eval_shape(tx.init, params).perturbation]
    chex.assert_trees_all_equal_shapes_and_dtypes(extra, params)
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    assert len(state) == len(jax.tree.leaves(params))


@pytest.mark.parametrize("along", ["momentum", "update"])
def test_frozen_parameters_stay_exactly_where_they_are(along):
    params = {"a": jnp.ones(3), "b": jnp.full(3, 10.1)}
    base = optax.partition(
        {"train": optax.sgd(0.1, MU), "freeze": optax.set_to_zero()},
        {"a": "train", "b": "freeze"},
    )
    tx = mo.momentum_perturbation(base, RHO, along=along)
    p, state = params, tx.init(params)
    for _ in range(3):
        updates, state = tx.update(p, state, p)
        p = optax.apply_updates(p, updates)
        for tree in (p, mo.eval_params(state, p)):
            np.testing.assert_array_equal(tree["b"], params["b"])
            assert not np.array_equal(tree["a"], params["a"])


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: mo.momentum_perturbation(
                optax.sgd(0.1),
                RHO,
                along="gradient",  # type: ignore[arg-type]
            ),
            'along must be "momentum" or "update", but \'gradient\'',
        ),
        (
            lambda: mo.momentum_perturbation(
                optax.sgd(0.1), RHO, along="update", momentum_fn=lambda s: s
            ),
            "leave out one of the two",
        ),
        (
            lambda: mo.momentum_perturbation(optax.sgd(0.1), along="update"),
            "either rho or an ascent",
        ),
        (
            lambda: mo.momentum_perturbation(
                optax.scale_by_rms(), RHO, along="update"
            ).init(jnp.ones(2)),
            "must stand inside",
        ),
        (
            lambda: mo.momentum_perturbation(
                optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
                RHO,
                along="update",
            ).init(jnp.ones(2)),
            "put MultiSteps around",
        ),
        (
            lambda: mo.momentum_perturbation(
                mo.msam(0.1, rho=RHO), RHO, along="update"
            ).init(jnp.ones(2)),
            "must not be nested",
        ),
    ],
    ids=["another word", "momentum_fn", "no rho", "no learning rate", "steps", "msam"],
)
def test_what_can_not_be_meant_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_without_rho_it_is_the_base_itself():
    base = optax.with_extra_args_support(optax.sgd(0.1))
    assert mo.momentum_perturbation(base, 0.0, along="update") is base


def test_an_optimizer_that_updates_on_some_steps_is_refused():
    inner = optax.chain(optax.sgd(0.1), optax.apply_every(4))
    with pytest.raises(ValueError, match="needs an update on every step"):
        mo.momentum_perturbation(inner, 0.3, along="update").init(jnp.ones(3))
