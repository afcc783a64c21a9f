"""MSAM in bfloat16 and float16: what is put on is taken off exactly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo

RHO, STEPS, SIZE = 0.45, 1000, 128


def weights(tx: Any, dtype: Any) -> np.ndarray:
    """Clean weights after 1,000 steps whose gradients do not depend on the weights.

    They are the base optimizer's, but for rounding; an eighth of them starts at zero.
    """
    rng = np.random.default_rng(0)
    start = 0.5 * rng.normal(size=SIZE)
    start[::8] = 0
    gradients = rng.normal(size=SIZE) + rng.normal(size=(STEPS, SIZE))

    @jax.jit
    def train(w: Any, gradients: Any) -> Any:
        def body(carry: Any, g: Any) -> Any:
            w, state = carry
            updates, state = tx.update(g.astype(dtype), state, w)
            return (optax.apply_updates(w, updates), state), None

        (w, state), _ = jax.lax.scan(body, (w, tx.init(w)), gradients)
        return mo.eval_params(state, w)

    end = train(jnp.asarray(start, dtype), jnp.asarray(gradients, jnp.float32))
    return np.asarray(end, np.float64)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


@pytest.mark.parametrize("lr", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("along", ["momentum", "update"])
def test_in_bfloat16_the_weights_are_no_noisier_than_plain_adamws(lr, along):
    adamw = optax.adamw(lr)
    exact = weights(adamw, jnp.float32)
    plain = rms(weights(adamw, jnp.bfloat16) - exact)
    tx = mo.momentum_perturbation(adamw, RHO, along=along)
    ours = rms(weights(tx, jnp.bfloat16) - exact)
    assert ours < plain
    if lr == 1e-6:  # why: the perturbation's rounding piles up
        tx = mo.momentum_perturbation(adamw, RHO, along=along, exact=False)
        assert rms(weights(tx, jnp.bfloat16) - exact) > 10 * plain


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: mo.msam(1e-3, rho=RHO),
        lambda: mo.momentum_perturbation(
            optax.sgd(1e-3, 0.9), ascent=mo.ascents.normalized(RHO)
        ),
    ],
    ids=["msam", "an ascent"],
)
def test_the_weights_are_followed_in_float32(make, dtype):
    exact = weights(optax.sgd(1e-3, 0.9), jnp.float32)
    # What is left is the rounding of the gradients and of the momentum, and that of
    # the weights when they are read.
    bound = 4 * rms(exact) * float(jnp.finfo(dtype).eps)
    assert rms(weights(make(), dtype) - exact) < bound


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_perturbation_kept_is_the_one_that_came_about(dtype):
    """Also for weights below float16's smallest normal number."""
    start = w = jnp.asarray([1.0, -3.0, 1e-5, 3e-7, 0.0], dtype)
    tx = mo.msam(0.0, rho=1e-4)

    @jax.jit
    def step(w: Any, state: Any) -> Any:
        updates, state = tx.update(jnp.asarray([1e-4, 1, -1, 1, 1], dtype), state, w)
        return optax.apply_updates(w, updates), state

    state = tx.init(w)
    for _ in range(3):
        w, state = step(w, state)
        assert np.all(w[2:] != start[2:])
        found = w.astype(jnp.float32) - state.perturbation
        np.testing.assert_allclose(found, start.astype(jnp.float32), atol=1e-11)


def test_short_and_long_parameters_stand_together():
    params = {"short": jnp.ones(3, jnp.bfloat16), "long": jnp.ones(3)}
    tx = mo.msam(0.1, rho=RHO)
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.map(jnp.result_type, updates) == {
        "short": jnp.bfloat16,
        "long": jnp.float32,
    }
    clean = mo.eval_params(state, optax.apply_updates(params, updates))
    for leaf in jax.tree.leaves(clean):
        np.testing.assert_allclose(leaf.astype(jnp.float32), 0.9, rtol=4e-3)
