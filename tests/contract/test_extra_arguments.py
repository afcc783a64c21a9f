"""Extra arguments: what a method does not know changes nothing, and is handed on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo
from tests.every_method import (
    AROUND,
    all_methods,
    method,
    one_step,
    sgd,
    spy,
    start,
)


@all_methods
def test_unrelated_extra_arguments_change_nothing(name):
    def program(**extra_args: Any) -> str:
        step = functools.partial(one_step, method(name), **extra_args)
        return str(jax.make_jaxpr(step)(*start(method(name)), jnp.int32(0)))

    unrelated = {"value": 3.0, "key": jnp.ones([]), "unrelated": {"a": "string"}}
    assert program(**unrelated) == program()


@pytest.mark.parametrize("name", AROUND)
def test_extra_arguments_reach_the_base_optimizer(name):
    seen: dict[str, Any] = {}
    tx = AROUND[name](optax.chain(spy(seen), sgd()))
    jax.eval_shape(
        lambda p, s: one_step(tx, p, s, 0, unrelated="yes", value=3.0), *start(tx)
    )
    assert seen["unrelated"] == "yes"
    assert seen["value"] == 3.0
    assert callable(seen["grad_fn"])


def test_extra_arguments_reach_the_ascent_and_the_policy():
    ascent_saw: dict[str, Any] = {}
    policy_saw: dict[str, Any] = {}

    def decide(updates, state, params, **extra_args):
        policy_saw.update(extra_args)
        return jnp.asarray(True), state

    policy = mo.policies.Policy(lambda params: (), decide)
    ascent = optax.chain(spy(ascent_saw), mo.ascents.normalized(0.1))
    tx = mo.employ(policy, mo.sharpness_aware_gradient(ascent))
    jax.eval_shape(lambda p, s: one_step(tx, p, s, 0, unrelated="yes"), *start(tx))
    assert ascent_saw["unrelated"] == policy_saw["unrelated"] == "yes"

    ascent_saw.clear()
    tx = mo.momentum_perturbation(sgd(), ascent=ascent)
    jax.eval_shape(lambda p, s: one_step(tx, p, s, 0, unrelated="yes"), *start(tx))
    assert ascent_saw["unrelated"] == "yes"
