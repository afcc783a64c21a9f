"""Supported beyond training: gradients through training, and steps sent elsewhere."""

from typing import Any, NamedTuple

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


class Stepper(NamedTuple):
    """A training step from arrays in a row to arrays in a row.

    As a file needs it: that knows nothing of the classes of an optimizer's state.
    """

    start: list[jax.Array]
    batch: jax.Array
    step: Any


def stepper(name: str) -> Stepper:
    tx, batch = build(name), jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
    step = mo.make_train_step(loss_fn, tx, dispatch="in_graph", donate=False)
    state = mo.TrainState(params(), tx.init(params()))
    structure = jax.tree.structure(state)

    def flat_step(flat: Any, batch: Any) -> Any:
        return leaves(step(jax.tree.unflatten(structure, flat), batch, None)[0])

    return Stepper(leaves(state), batch, jax.jit(flat_step))


def three_steps(step: Any, run: Stepper) -> list[jax.Array]:
    arrays = run.start
    for _ in range(3):
        arrays = step(arrays, run.batch)
    assert not np.allclose(arrays[0], run.start[0])
    return arrays


methods_of_both_kinds = pytest.mark.parametrize("name", ["msam", "ae_sam"])


@methods_of_both_kinds
def test_a_training_step_compiles_ahead_of_time(name):
    run = stepper(name)
    abstract = jax.eval_shape(lambda: (run.start, run.batch))
    ahead = three_steps(run.step.lower(*abstract).compile(), run)
    for x, y in zip(three_steps(run.step, run), ahead, strict=True):
        np.testing.assert_array_equal(x, y)


@methods_of_both_kinds
def test_a_training_step_is_exported_to_a_file_and_runs_from_it(name):
    pytest.importorskip("flatbuffers")  # of the test extra
    run = stepper(name)
    abstract = jax.eval_shape(lambda: (run.start, run.batch))
    file = jax.export.export(run.step)(*abstract).serialize()
    sent = three_steps(jax.export.deserialize(file).call, run)
    for x, y in zip(three_steps(run.step, run), sent, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
