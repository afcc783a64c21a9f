"""Supported beyond training: gradients through training, and steps sent elsewhere."""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import msam_optax as mo
from tests.every_method import (
    ONE_EACH,
    Carry,
    build,
    leaves,
    loss,
    params,
    scanned,
)

STEPS, H = 3, 1e-5


@pytest.mark.parametrize("name", [*ONE_EACH, "wsam, decoupled", "sam, second order"])
def test_gradients_through_training_are_finite_differences(name, x64):
    """Of the loss after three steps, by the point from which they started."""
    tx, start = build(name), params(jnp.float64)

    @jax.jit
    @jax.value_and_grad
    def after_training(shift: jax.Array) -> jax.Array:
        p = jax.tree.map(lambda x: x + shift * jnp.sin(3 * x), start)
        return loss(scanned(tx, Carry(p, tx.init(p)), STEPS).params, STEPS)

    (ahead, _), (behind, _) = after_training(H), after_training(-H)
    _, gradient = after_training(0.0)
    assert abs(gradient) > 1e-3
    np.testing.assert_allclose(gradient, (ahead - behind) / (2 * H), rtol=0, atol=1e-6)


def loss_fn(p: Any, model_state: Any, batch: Any, key: Any) -> Any:
    outputs = batch @ p["kernel"] + p["bias"][None]
    return jnp.mean(jnp.cos(outputs)), (model_state, {})


@pytest.mark.parametrize("name", ["msam", "ae_sam"])
def test_a_training_step_compiles_ahead_of_time_and_is_exported(name):
    tx, batch = build(name), jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
    step = mo.make_train_step(loss_fn, tx, dispatch="in_graph", donate=False)
    state = mo.TrainState(params(), tx.init(params()))
    structure = jax.tree.structure(state)

    # As arrays in a row: a file knows nothing of the classes of an optimizer's state.
    @jax.jit
    def flat_step(flat: Any, batch: Any) -> Any:
        return leaves(step(jax.tree.unflatten(structure, flat), batch, None)[0])

    abstract = jax.eval_shape(lambda: (leaves(state), batch))
    compiled = flat_step.lower(*abstract).compile()
    file = jax.export.export(flat_step)(*abstract).serialize()
    elsewhere = jax.export.deserialize(file)

    expected = ahead = sent = leaves(state)
    for _ in range(3):
        expected = leaves(step(jax.tree.unflatten(structure, expected), batch, None)[0])
        ahead, sent = compiled(ahead, batch), elsewhere.call(sent, batch)
    for x, y, z in zip(expected, ahead, sent, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(x, z, rtol=1e-5, atol=1e-6)
    assert not np.allclose(expected[0], leaves(state)[0])
