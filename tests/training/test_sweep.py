"""A sweep over hyper-parameters or seeds in one program equals the runs one by one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax

STEPS = 12
METHODS: dict[str, Any] = {
    "msam": lambda rate, rho: msam_optax.msam(rate, 0.9, rho=rho),
    "sam": lambda rate, rho: msam_optax.sam(optax.sgd(rate, 0.9), rho),
    # A policy: under vmap its cond is a select, and each run decides for itself.
    "ae_sam": lambda rate, rho: msam_optax.ae_sam(optax.sgd(rate, 0.9), rho, STEPS),
    "looksam": lambda rate, rho: msam_optax.looksam(optax.sgd(rate, 0.9), rho, k=3),
}


def loss_fn(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    hidden = jnp.tanh(batch @ params["in"])
    return jnp.mean((hidden @ params["out"] - 1) ** 2), (model_state, {})


def train(build: Any, rate: Any, rho: Any, seed: Any) -> Any:
    """A whole run: its weights, its last loss, and how often it took a SAM step."""
    optimizer = build(rate, rho)
    step = msam_optax.make_train_step(
        loss_fn, optimizer, dispatch="in_graph", donate=False
    )
    key, in_key, out_key = jax.random.split(jax.random.key(seed), 3)
    params = {
        "in": jax.random.normal(in_key, (4, 8)),
        "out": jax.random.normal(out_key, (8,)),
    }
    state = msam_optax.TrainState(params, optimizer.init(params))

    def body(state: Any, step_key: Any) -> Any:
        batch = jax.random.normal(step_key, (5, 4))
        state, metrics = step(state, batch, step_key)
        return state, (metrics.loss, metrics.employed_fraction)

    state, (losses, fractions) = jax.lax.scan(body, state, jax.random.split(key, STEPS))
    weights = msam_optax.eval_params(state.opt_state, state.params)
    return weights, losses[-1], fractions[-1]


@pytest.mark.parametrize("name", METHODS)
def test_sweep_equals_single_runs(name: str) -> None:
    build = METHODS[name]
    sweep = {
        "rate": np.array([0.01, 0.03, 0.03], np.float32),
        "rho": np.array([0.1, 0.1, 0.6], np.float32),
        "seed": np.array([0, 1, 1], np.int32),
    }
    swept = jax.jit(jax.vmap(partial(train, build)))(*sweep.values())
    single = jax.jit(partial(train, build))
    fractions = []
    for number, (rate, rho, seed) in enumerate(zip(*sweep.values(), strict=True)):
        one = single(rate, rho, seed)
        jax.tree.map(
            lambda a, b, n=number: np.testing.assert_allclose(
                a[n], b, rtol=2e-5, atol=1e-6
            ),
            swept,
            one,
        )
        fractions.append(float(one[2]))
    if name == "ae_sam":
        # Not the same decisions for all, so a shared one would have failed.
        assert len(set(fractions)) > 1 and min(fractions) > 0
