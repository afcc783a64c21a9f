"""Tracing: one compilation for all steps, and states that keep their dtypes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from tests.every_method import (
    MSAM,
    STEPS,
    all_dtypes,
    all_methods,
    build,
    leaves,
    loss,
    losses,
    method,
    params,
    scanned,
    start,
    trajectory,
)


@all_methods
def test_every_step_runs_the_same_compilation(name):
    assert len(trajectory(name)) == STEPS + 1  # a second trace raises in there
    chex.assert_trees_all_equal_shapes_and_dtypes(*trajectory(name))


@all_dtypes
@all_methods
def test_dtypes_and_shapes_last_from_step_to_step(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx = build(name)
        carry = start(tx, dtype)
        grads = params(dtype)

        def update(p: Any, state: Any) -> tuple[Any, Any]:
            return tx.update(
                grads,
                state,
                p,
                grad_fn=lambda q: jax.grad(loss)(q, jnp.int32(0)),
                per_example_losses=losses(p, jnp.int32(0)),
                per_example_loss_fn=lambda q, i: losses(q, jnp.int32(0), i),
            )

        updates, state = jax.eval_shape(update, *carry)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, carry.params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, carry.state)

        def sometimes(p: Any, state: Any) -> Any:
            return jax.lax.cond(
                jnp.asarray(True),
                update,
                lambda p, state: (optax.tree.zeros_like(p), state),
                *(p, state),
            )

        # Both raise where a dtype, a shape or a weak type changes.
        last = jax.eval_shape(lambda c: scanned(tx, c), carry)
        chex.assert_trees_all_equal_shapes_and_dtypes(last, carry)
        jax.eval_shape(sometimes, *carry)


@all_dtypes
@all_methods
def test_scalars_are_single_precision_whatever_the_parameters_are(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        state = start(build(name), dtype).state
    scalars = {str(x.dtype) for x in leaves(state) if x.ndim == 0}
    floating = "float64" if dtype == jnp.float64 else "float32"
    assert scalars <= {floating, "int32", "bool"}
    # These have counters at most, MSAM on short parameters too.
    counters = ("no momentum", "adaptive", "stochastic", "along the update")
    short = jnp.finfo(dtype).bits < 32
    if not (name.endswith(counters) or (short and name in MSAM)):
        assert floating in scalars


@all_methods
def test_scan_is_the_loop(name):
    last = jax.jit(lambda c: scanned(method(name), c))(trajectory(name)[0])
    chex.assert_trees_all_close(last, trajectory(name)[-1], rtol=1e-4, atol=1e-5)


@all_methods
def test_low_precision_runs_follow_the_single_precision_one(name):
    last = scanned(method(name), start(method(name), jnp.bfloat16), steps=2)
    expected = trajectory(name)[2]
    moved = optax.tree.norm(optax.tree.sub(expected.params, params()))
    wrong = optax.tree.norm(
        optax.tree.sub(optax.tree.cast(last.params, jnp.float32), expected.params)
    )
    assert wrong < 0.05 * moved


@all_methods
def test_init_needs_no_values(name):
    tx, concrete = method(name), params()
    abstract = jax.eval_shape(lambda: concrete)
    expected = jax.eval_shape(tx.init, concrete)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(concrete), expected)
    chex.assert_trees_all_equal(tx.init(abstract), tx.init(concrete))
