"""Optax's tools around the methods: masks, accumulation, maps over the parameters."""

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
    MSAM,
    STEPS,
    Carry,
    all_methods,
    build,
    leaves,
    method,
    params,
    scanned,
    sgd,
    sharpness_aware,
    start,
    trajectory,
)


# What is drawn at random is drawn for the tree as it is.
@pytest.mark.parametrize("name", [n for n in MSAM if "stochastic" not in n])
def test_masked_restricts_a_momentum_method_to_its_own_parameters(name):
    # The loss is a sum over leaves: the kernel alone would move as it does here.
    mask = {"kernel": True, "bias": False}
    tx = optax.masked(method(name), mask)
    alone = method(name)

    def run(tx: Any, p: Any) -> Carry:
        return jax.jit(lambda c: scanned(tx, c, 4))(Carry(p, tx.init(p)))

    def kernel_loss_order(p: Any) -> Any:
        # As in the full tree, the kernel is leaf 1.
        return {"a": jnp.zeros((0,)), "kernel": p["kernel"]}

    both = run(tx, params())
    single = run(alone, kernel_loss_order(params()))
    chex.assert_trees_all_close(
        both.params["kernel"], single.params["kernel"], rtol=1e-5, atol=1e-6
    )
    clean = mo.eval_params(both.state, both.params)
    chex.assert_trees_all_equal(clean["bias"], both.params["bias"])
    chex.assert_trees_all_close(
        clean["kernel"],
        mo.eval_params(single.state, single.params)["kernel"],
        rtol=1e-5,
        atol=1e-6,
    )
    assert not np.allclose(clean["kernel"], both.params["kernel"], atol=1e-3)


def batch_loss(p: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.cos(batch @ p["kernel"] + p["bias"][None]) ** 2)


def batches(steps: int, micro: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(steps, micro, 8, 3)).astype(np.float32)


def batch_step(tx: Any) -> Callable[..., Any]:
    @jax.jit
    def step(p: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        def grad_fn(q: Any) -> Any:
            return jax.grad(batch_loss)(q, batch)

        updates, state = tx.update(grad_fn(p), state, p, grad_fn=grad_fn)
        return optax.apply_updates(p, updates), state

    return step


@pytest.mark.parametrize(
    "element, ascent",
    [
        (sharpness_aware(), mo.ascents.normalized(0.2)),
        (
            mo.sharpness_aware_gradient(mo.ascents.adaptive(0.5, eta=0.01)),
            mo.ascents.adaptive(0.5, eta=0.01),
        ),
    ],
    ids=["sam", "asam"],
)
def test_multi_steps_behind_sam_takes_the_mean_of_the_sam_gradients(element, ascent):
    accumulate = optax.MultiSteps(sgd(), 3).gradient_transformation()
    tx = optax.chain(element, accumulate)
    step = batch_step(tx)
    base = sgd()

    @jax.jit
    def expected_step(p: Any, state: Any, micro_batches: Any) -> tuple[Any, Any]:
        def sam_gradient(batch: Any) -> Any:
            g = jax.grad(batch_loss)(p, batch)
            epsilon, _ = ascent.update(g, ascent.init(p), p)
            return jax.grad(batch_loss)(optax.apply_updates(p, epsilon), batch)

        each = jax.vmap(sam_gradient)(micro_batches)
        mean = jax.tree.map(lambda g: g.mean(0), each)
        updates, state = base.update(mean, state, p)
        return optax.apply_updates(p, updates), state

    carry = start(tx)
    expected = start(base)
    for micro_batches in batches(3, 3):
        for batch in micro_batches:
            carry = Carry(*step(*carry, batch))
        expected = Carry(*expected_step(*expected, micro_batches))
        chex.assert_trees_all_close(carry.params, expected.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MSAM)
def test_multi_steps_around_msam_is_the_large_batch(name):
    large = method(name)
    accumulated = optax.MultiSteps(method(name), 3).gradient_transformation()
    large_step, step = batch_step(large), batch_step(accumulated)
    expected, carry = start(large), start(accumulated)
    for micro_batches in batches(3, 3):
        expected = Carry(*large_step(*expected, micro_batches.reshape(-1, 3)))
        for batch in micro_batches:
            carry = Carry(*step(*carry, batch))
        if "lion" not in name:  # the sign of a rounding error is no rounding error
            chex.assert_trees_all_close(
                carry.params, expected.params, rtol=1e-4, atol=1e-5
            )
        chex.assert_trees_all_close(
            mo.eval_params(carry.state, carry.params),
            mo.eval_params(expected.state, expected.params),
            rtol=1e-4,
            atol=1e-5,
        )


@all_methods
def test_optax_finds_every_field_of_our_states_by_its_name(name):
    for base in (sgd(), optax.adam(optax.cosine_decay_schedule(0.1, STEPS))):
        state = jax.eval_shape(build(name, base).init, params())
        for field in fields_of_ours(state):
            optax.tree.get(state, field)  # KeyError where two are called so


def fields_of_ours(state: Any) -> set[str]:
    """The names of all fields of this package's states inside an optimizer's."""
    children = jax.tree.leaves(state, is_leaf=lambda x: x is not state)
    found = {
        name
        for child in children
        if child is not state
        for name in fields_of_ours(child)
    }
    ours = type(state).__module__.startswith("msam_optax.")
    return found | set(getattr(state, "_fields", ()) if ours else ())


@all_methods
def test_tree_map_params_tells_parameters_from_scalars(name):
    state = trajectory(name)[1].state
    mapped = optax.tree_map_params(
        method(name),
        lambda x: "like a parameter",
        state,
        transform_non_params=lambda x: "scalar",
    )
    expected = ["like a parameter" if x.ndim else "scalar" for x in leaves(state)]
    assert leaves(mapped) == expected
    assert "like a parameter" in expected
