"""Numbers that `optax.inject_hyperparams` changes while training."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.every_method import (
    STEPS,
    Carry,
    all_dtypes,
    one_step,
    sgd,
    sharpness_aware,
    start,
)

# --- rho ----

# name: (factory, its arguments, those that are not numbers)
INJECTED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "msam": (mo.msam, dict(learning_rate=0.1)),
    "msam, nesterov": (mo.msam, dict(learning_rate=0.1, nesterov=True)),
    "adamw_msam": (mo.adamw_msam, dict(learning_rate=0.1, weight_decay=0.01)),
    "momentum_perturbation": (mo.momentum_perturbation, dict(inner=sgd())),
    "sam": (mo.sam, dict(optimizer=sgd())),
    "asam": (mo.asam, dict(optimizer=sgd(), eta=0.01)),
    "ss_sam": (mo.ss_sam, dict(optimizer=sgd(), probability=0.5, seed=3)),
    "ae_sam": (mo.ae_sam, dict(optimizer=sgd(), total_steps=STEPS, delta=0.8)),
    "looksam": (mo.looksam, dict(optimizer=sgd(), k=2, alpha=0.7)),
    "ae_looksam": (mo.ae_looksam, dict(optimizer=sgd(), total_steps=STEPS, alpha=0.7)),
    "gsam": (mo.gsam, dict(optimizer=sgd(), alpha=0.4)),
    "gradient_norm_penalty": (
        mo.gradient_norm_penalty,
        dict(optimizer=sgd(), alpha=0.8),
    ),
    "wsam": (mo.wsam, dict(optimizer=sgd(), gamma=0.9)),
    "wsam, decoupled": (mo.wsam, dict(optimizer=sgd(), gamma=0.9, learning_rate=0.1)),
    "friendly_sam": (mo.friendly_sam, dict(optimizer=sgd(), sigma=1.0, decay=0.8)),
    "fisher_sam": (mo.fisher_sam, dict(optimizer=sgd(), eta=0.5)),
    "normalized_ascent": (
        lambda rho: optax.chain(sharpness_aware(rho), sgd()),
        dict(),
    ),
    "unnormalized_ascent": (
        lambda rho: optax.chain(
            mo.sharpness_aware_gradient(mo.ascents.unnormalized(rho)), sgd()
        ),
        dict(),
    ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_rho_changed_between_steps_is_a_schedule_of_rho(name):
    factory, options = INJECTED[name]
    injected = optax.inject_hyperparams(factory)(rho=0.2, **options)
    scheduled = factory(rho=lambda t: jnp.where(t < 2, 0.2, -0.4), **options)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p: Any, state: Any, t: Any) -> tuple[Any, Any]:
        return one_step(injected, p, state, t)

    carry, expected = start(injected), start(scheduled)
    expected_step = jax.jit(functools.partial(one_step, scheduled))
    for t in range(4):
        if t == 2:
            carry.state.hyperparams["rho"] = jnp.float32(-0.4)
        carry = Carry(*step(*carry, jnp.int32(t)))
        expected = Carry(*expected_step(*expected, jnp.int32(t)))
    chex.assert_trees_all_close(carry.params, expected.params, rtol=1e-4, atol=1e-5)
    unchanged = optax.inject_hyperparams(factory)(rho=0.2, **options)
    other = start(unchanged)
    for t in range(4):
        other = Carry(*step(*other, jnp.int32(t)))
    assert not np.allclose(other.params["kernel"], carry.params["kernel"], atol=1e-3)


@all_dtypes
@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_keep_the_state_stable(name, dtype):
    factory, options = INJECTED[name]
    with jax.enable_x64(dtype == jnp.float64):
        tx = optax.inject_hyperparams(factory)(rho=0.2, **options)
        carry = start(tx, dtype)
        after = jax.eval_shape(lambda p, s: Carry(*one_step(tx, p, s, 0)), *carry)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, carry)


# --- The other numbers ---

Build = Callable[..., optax.GradientTransformationExtraArgs]

# name: (factory, its other arguments, the number and two values of it)
NUMBERS: dict[str, tuple[Build, dict[str, Any], str, Any, Any]] = {
    "looksam alpha": (mo.looksam, dict(rho=0.2, k=2), "alpha", 0.7, 0.1),
    "looksam k": (mo.looksam, dict(rho=0.2), "k", 2, 3),
    "ae_looksam alpha": (
        mo.ae_looksam,
        dict(rho=0.2, total_steps=STEPS, lambda_1=3.0, lambda_2=3.0),
        "alpha",
        0.7,
        0.1,
    ),
    "ae_looksam lambda_2": (
        mo.ae_looksam,
        dict(rho=0.2, total_steps=STEPS, lambda_1=0.5),
        "lambda_2",
        3.0,
        -3.0,
    ),
    "gsam alpha": (mo.gsam, dict(rho=0.2), "alpha", 0.4, -0.8),
    "gradient_norm_penalty alpha": (
        mo.gradient_norm_penalty,
        dict(rho=0.2),
        "alpha",
        0.8,
        0.1,
    ),
    "wsam gamma": (mo.wsam, dict(rho=0.2), "gamma", 0.8, 0.3),
    "wsam decoupled gamma": (
        mo.wsam,
        dict(rho=0.2, learning_rate=0.1),
        "gamma",
        0.8,
        0.3,
    ),
    "wsam decoupled learning_rate": (
        mo.wsam,
        dict(rho=0.2),
        "learning_rate",
        0.1,
        0.02,
    ),
    "friendly_sam sigma": (mo.friendly_sam, dict(rho=0.2), "sigma", 1.0, 0.5),
    "friendly_sam decay": (mo.friendly_sam, dict(rho=0.2), "decay", 0.9, 0.3),
    "fisher_sam eta": (mo.fisher_sam, dict(rho=0.2), "eta", 1.0, 30.0),
    "esam beta": (mo.esam, dict(rho=0.2, by_coordinate=True), "beta", 0.3, 0.9),
    "esam rho": (mo.esam, dict(), "rho", 0.2, 0.6),
    "esam seed": (mo.esam, dict(rho=0.2), "seed", 0, 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_an_injected_number_is_read_from_the_state(name):
    factory, others, number, value, other = NUMBERS[name]
    static = ("gamma",) if factory is mo.esam else ()  # ESAM's shapes follow from it
    build = functools.partial(factory, sgd(), **others)
    injected = optax.inject_hyperparams(factory, static_args=static)(
        sgd(), **others, **{number: value}
    )

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p: Any, state: Any, t: Any) -> Any:
        return one_step(injected, p, state, t)

    def run(value: Any) -> Any:
        carry = start(injected)
        kept = carry.state.hyperparams[number]
        carry.state.hyperparams[number] = jnp.asarray(value, kept.dtype)
        for t in range(5):
            carry = Carry(*step(*carry, jnp.int32(t)))
        return carry.params

    def built(value: Any) -> Any:
        tx = build(**{number: value})
        step = jax.jit(functools.partial(one_step, tx))
        carry = start(tx)
        for t in range(5):
            carry = Carry(*step(*carry, jnp.int32(t)))
        return carry.params

    before, after = run(value), run(other)
    chex.assert_trees_all_close(after, built(other), rtol=1e-5, atol=1e-6)
    assert not np.allclose(before["kernel"], after["kernel"], atol=1e-4)
