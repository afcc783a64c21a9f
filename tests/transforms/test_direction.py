"""On which side of the step an optimizer's momentum is: recognised or refused."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.problems import mlp

LR, RHO = 0.01, 0.1


def factories() -> dict[str, Callable[[], Any]]:
    """Every optimizer of Optax that takes a learning rate, in its variants."""
    found: dict[str, Callable[[], Any]] = {}
    for space in (optax, optax.contrib):
        for name in sorted(dir(space)):
            factory = getattr(space, name)
            if not inspect.isfunction(factory) or name.startswith(("_", "scale_by")):
                continue
            parameters = inspect.signature(factory).parameters
            required = [p for p in parameters.values() if p.default is p.empty]
            if "learning_rate" not in parameters or len(required) > 1:
                continue
            if name == "optimistic_adam":  # deprecated
                continue
            common = {"learning_rate": LR}
            if "key" in parameters:
                common["key"] = 0
            found[name] = functools.partial(factory, **common)
            for option, value in (("momentum", 0.9), ("nesterov", True)):
                if option in parameters:
                    options = {**common, option: value}
                    if option == "nesterov" and "momentum" in parameters:
                        options["momentum"] = 0.9
                    found[f"{name}, {option}"] = functools.partial(factory, **options)
    return found


FACTORIES = factories()
REFUSED = {
    "galore",  # its momentum is turned into other coordinates
    "lars",
    "lars, momentum",
    "lars, nesterov",
    "rmsprop, momentum",
    "rmsprop, nesterov",
}


def test_the_table_holds_optax():
    assert {"sgd, momentum", "adamw", "muon", "sophia", "noisy_sgd"} <= set(FACTORIES)
    assert set(FACTORIES) > REFUSED
    assert len(FACTORIES) > 50


@pytest.mark.parametrize("name", FACTORIES)
def test_every_optimizer_of_optax_is_perturbed_to_the_side_of_its_step_or_refused(name):
    base = optax.with_extra_args_support(FACTORIES[name]())
    params = {"m": jnp.asarray([[1.0, -0.5], [0.3, 2.0]]), "v": jnp.ones(2)}
    tx = mo.momentum_perturbation(base, RHO)
    try:
        state = tx.init(params)
    except ValueError as error:
        message = str(error)
        assert 'along="update"' in message
        assert "momentum_fn" in message
        assert ("wrong side" in message) == (name in REFUSED)
        return
    assert name not in REFUSED
    clean = params
    for t in range(2):
        g = params  # of half the squared norm
        extra = {"obj_fn": lambda p: 0.5 * optax.tree.norm(p, squared=True)}
        step, inner_state = base.update(g, state.inner_state, clean, **extra)
        v = mo.find_momentum(inner_state, params)
        # ADOPT's first step is none.
        assert optax.tree.vdot(v, step) < 0 or (t == 0 and "adopt" in name)
        updates, state = tx.update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
        clean = mo.eval_params(state, params)


def warm_up(t: Any) -> Any:
    return LR * jnp.minimum(t / 10, 1.0)


WRONG: dict[str, Callable[[], Any]] = {
    "trace behind the learning rate": lambda: optax.chain(
        optax.scale(-LR), optax.trace(0.9)
    ),
    "learning rate outside": lambda: optax.scale_by_adam(),
    "learning rate outside, trace": lambda: optax.trace(0.9, nesterov=True),
    "a negative learning rate": lambda: optax.adam(-LR),
    "a warm-up from 0": lambda: optax.rmsprop(warm_up, momentum=0.9),
    "one group of two": lambda: optax.partition(
        {"a": optax.sgd(LR, 0.9), "b": optax.rmsprop(LR, momentum=0.9)},
        {"hidden": "a", "output": "b"},
    ),
    "groups by shape": lambda: optax.partition(
        {"a": optax.sgd(LR, 0.9), "b": optax.lars(LR)},
        lambda p: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", p),
    ),
    "masked": lambda: optax.masked(
        optax.rmsprop(LR, momentum=0.9), {"hidden": True, "output": False}
    ),
    "clipped and decayed": lambda: optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.add_decayed_weights(10.0),
        optax.rmsprop(LR, momentum=0.9),
    ),
    "with a value": lambda: optax.chain(
        optax.rmsprop(LR, momentum=0.9), optax.contrib.reduce_on_plateau()
    ),
    "injected": lambda: optax.inject_hyperparams(optax.rmsprop)(
        learning_rate=LR, momentum=0.9
    ),
    "micro-batches": lambda: optax.MultiSteps(
        optax.rmsprop(LR, momentum=0.9), 4
    ).gradient_transformation(),
    "around SAM": lambda: mo.sam(optax.rmsprop(LR, momentum=0.9), 0.05),
}

RIGHT: dict[str, Callable[[], Any]] = {
    "a warm-up from 0": lambda: optax.sgd(warm_up, 0.9),
    "no learning rate at all": lambda: optax.sgd(0.0, 0.9),
    "centralised": lambda: optax.chain(optax.centralize(), optax.sgd(LR, 0.9)),
    "noise behind": lambda: optax.chain(
        optax.trace(0.9), optax.add_noise(0.01, 0.55, 0), optax.scale(-LR)
    ),
    "weight decay": lambda: optax.adamw(LR, weight_decay=10.0),
    "climbing": lambda: optax.chain(optax.scale(-1.0), optax.sgd(LR, 0.9)),
    "micro-batches": lambda: optax.MultiSteps(
        optax.sgd(LR, 0.9), 4
    ).gradient_transformation(),
    "with an argument of its own": lambda: optax.chain(
        optax.sgd(LR, 0.9), asks_for_more()
    ),
}


def asks_for_more() -> Any:
    def update(updates: Any, state: Any, params: Any = None, *, more: Any) -> Any:
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update)


@pytest.mark.parametrize("along", ["init", "traced", "abstract"])
@pytest.mark.parametrize("name", WRONG)
def test_a_momentum_on_the_wrong_side_is_refused(name, along):
    if along != "init" and name not in ("masked", "a warm-up from 0"):
        return
    params = jax.tree.map(jnp.float32, mlp().params)
    init = mo.momentum_perturbation(WRONG[name](), RHO).init
    call = {"init": init, "traced": jax.jit(init), "abstract": None}[along]
    with pytest.raises(ValueError, match=r"wrong side.*optax\.rmsprop.*along=.update"):
        if call is None:
            jax.eval_shape(init, params)
        else:
            call(params)


@pytest.mark.parametrize("name", RIGHT)
def test_a_momentum_on_the_right_side_is_not(name):
    params = jax.tree.map(jnp.float32, mlp().params)
    mo.momentum_perturbation(RIGHT[name](), RHO).init(params)


def test_a_momentum_fn_is_looked_at_too():
    params = jax.tree.map(jnp.float32, mlp().params)
    base = optax.rmsprop(LR, momentum=0.9)
    with pytest.raises(ValueError, match=r"momentum_fn.* wrong side"):
        mo.momentum_perturbation(base, RHO, momentum_fn=lambda s: s[2].trace).init(
            params
        )
    turned = mo.momentum_perturbation(
        base, RHO, momentum_fn=lambda s: jax.tree.map(jnp.negative, s[2].trace)
    )
    update = mo.momentum_perturbation(base, RHO, along="update")
    for tx in (turned, update):
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(params, state, params)
        found = state.perturbation
    np.testing.assert_allclose(
        found["hidden"]["bias"], state.perturbation["hidden"]["bias"]
    )


def test_the_step_is_small_whatever_the_parameters():
    """A parameter of 1e12 numbers stands in for itself by its shape alone."""
    params = {"w": jax.ShapeDtypeStruct((10**6, 10**6), jnp.bfloat16)}
    seen: list[Any] = []

    def look(updates: Any, state: Any, params: Any = None) -> Any:
        seen.append(updates["w"])
        return updates, state

    spy = optax.GradientTransformation(lambda p: optax.EmptyState(), look)
    tx = mo.momentum_perturbation(optax.chain(spy, optax.sgd(LR, 0.9)), RHO)
    jax.eval_shape(tx.init, params)
    assert [x.shape for x in seen] == [(2, 2)]
    assert not isinstance(seen[0], jax.core.Tracer)
