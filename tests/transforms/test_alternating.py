"""SAM by two calls of update."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo

RHO = 0.3
PARAMS = {"w": jnp.linspace(-1.0, 2.0, 6).reshape(2, 3), "b": jnp.array([0.5, -1.0])}


def loss(p: Any, t: Any = 0) -> Any:
    return jnp.sum(jnp.cos(p["w"] * (1 + 0.3 * t))) + jnp.sum(p["b"] ** 2 * (t + 1))


def base() -> optax.GradientTransformation:
    """Its schedule and its decay show which parameters and which step it sees."""
    rate = optax.linear_schedule(0.2, 0.05, 4)
    return optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate, momentum=0.9))


def alternating() -> optax.GradientTransformationExtraArgs:
    return mo.alternating_ascent(base(), mo.ascents.normalized(RHO))


def call(tx: Any, p: Any, state: Any, t: Any) -> tuple[Any, Any]:
    updates, state = tx.update(jax.grad(loss)(p, t), state, p)
    return optax.apply_updates(p, updates), state


@pytest.mark.usefixtures("x64")
def test_two_calls_on_one_batch_are_a_step_of_sam():
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    tx, sam = alternating(), mo.sam(base(), RHO)
    p, state = params, tx.init(params)
    q, sam_state = params, sam.init(params)
    step = jax.jit(lambda p, s, t: call(tx, p, s, t))
    for t in range(5):
        ascended, state = step(p, state, t)
        chex.assert_trees_all_close(mo.eval_params(state, ascended), q, rtol=1e-12)
        assert abs(optax.tree.norm(optax.tree.sub(ascended, q)) - RHO) < 1e-12
        p, state = step(ascended, state, t)
        updates, sam_state = sam.update(
            jax.grad(loss)(q, t),
            sam_state,
            q,
            grad_fn=lambda p, t=t: jax.grad(loss)(p, t),
        )
        q = optax.apply_updates(q, updates)
        chex.assert_trees_all_close(p, q, rtol=1e-12)
        chex.assert_trees_all_equal(mo.eval_params(state, p), p)
        assert not state.ascended


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_weights_come_back_without_drift(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    tx = mo.alternating_ascent(optax.sgd(0.0), mo.ascents.normalized(RHO))

    def body(carry: Any, _: Any) -> Any:
        params, state = carry
        return call(tx, params, state, 1), None

    start = params, tx.init(params)
    (p, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, None, length=200))(start)
    chex.assert_trees_all_equal(p, params)
    odd, state = call(tx, p, tx.init(params), 1)
    chex.assert_trees_all_equal(mo.eval_params(state, odd), params)


def test_only_one_of_climbing_and_stepping_is_computed():
    tx = alternating()
    jaxpr = jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS).jaxpr
    outside = {equation.primitive.name for equation in jaxpr.eqns}
    assert outside == {"cond", "convert_element_type", "not"}


def test_the_state_is_donated_with_the_parameters():
    tx = alternating()
    params = jax.tree.map(jnp.copy, PARAMS)
    step = jax.jit(lambda p, s: call(tx, p, s, 0), donate_argnums=(0, 1))
    p, state = step(params, tx.init(params))
    step(p, state)
    leaves = jax.tree.leaves(tx.init(PARAMS).perturbed.perturbation)
    assert [x.shape for x in leaves] == [x.shape for x in jax.tree.leaves(PARAMS)]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="optimizer must be an optax"):
        mo.alternating_ascent(0.1, mo.ascents.normalized(RHO))
    with pytest.raises(ValueError, match="ascent must be an optax"):
        mo.alternating_ascent(base(), RHO)
    tx = alternating()
    with pytest.raises(ValueError, match="params were None"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="were state and params swapped"):
        tx.update(PARAMS, PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"employ was given MSAM, a whole optimizer"):
        mo.employ(mo.policies.every(2), tx).init(PARAMS)


def test_outside_of_jit_it_is_the_same():
    tx = mo.alternating_ascent(optax.sgd(0.1, 0.9), mo.ascents.normalized(0.05))
    params = jnp.array([3.0, 4.0])
    by_hand, state = params, tx.init(params)
    jitted, jitted_state = params, tx.init(params)
    for _ in range(5):
        updates, state = tx.update(2 * by_hand, state, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
        updates, jitted_state = jax.jit(tx.update)(2 * jitted, jitted_state, jitted)
        jitted = optax.apply_updates(jitted, updates)
        chex.assert_trees_all_close(by_hand, jitted, rtol=1e-6)
