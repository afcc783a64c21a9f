"""One random key for both gradients, as JAX's check for reused keys sees it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import msam_optax as mo

BASE = optax.sgd(0.1)
ASCENT = mo.ascents.normalized(0.1)


def dropout_losses(p: Any, model_state: Any, batch: Any, key: Any) -> Any:
    kept = jax.random.bernoulli(key, 0.5, p.shape)
    return (batch @ (p * kept)) ** 2, (model_state, {})


@pytest.mark.parametrize(
    "tx, dispatch",
    [
        (mo.sam(BASE), "in_graph"),
        (
            optax.chain(mo.sharpness_aware_gradient(ASCENT, second_order=True), BASE),
            "in_graph",
        ),
        (mo.esam(BASE), "in_graph"),
        (mo.ae_sam(BASE, 0.1, 5), "in_graph"),
        (mo.ss_sam(BASE), "host"),
    ],
    ids=["sam", "second order", "esam", "ae_sam", "ss_sam from the host"],
)
def test_the_second_gradient_may_use_the_key_again(tx, dispatch):
    params, batch = jnp.ones(3), jnp.eye(4, 3)
    with jax.debug_key_reuse(True):
        step = mo.make_train_step(dropout_losses, tx, dispatch=dispatch, donate=False)
        state = mo.TrainState(params, tx.init(params))
        for seed in range(3):
            state, _ = step(state, batch, jax.random.key(seed))


def test_a_key_that_is_no_typed_one_serves_as_it_is():
    tx = mo.sam(BASE)
    step = mo.make_train_step(dropout_losses, tx, donate=False)
    state = mo.TrainState(jnp.ones(3), tx.init(jnp.ones(3)))
    old, _ = step(state, jnp.eye(4, 3), jax.random.PRNGKey(0))
    new, _ = step(state, jnp.eye(4, 3), jax.random.key(0))
    assert jnp.array_equal(old.params, new.params)
