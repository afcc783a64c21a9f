"""Means over what a batch does not hold equally many of, in one part or in several."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo

PARTS, BATCH, LENGTH = 4, 8, 6
SGD = optax.sgd(0.1, momentum=0.9)
OPTIMIZERS = {
    "sgd": SGD,
    "msam": mo.msam(0.1, rho=0.3),
    "sam": mo.sam(SGD, rho=0.5),
    "ae_sam": mo.ae_sam(SGD, rho=0.5, total_steps=6),
    "gsam": mo.gsam(SGD, rho=0.5),
}


def token_losses(params: Any, batch: Any) -> jax.Array:
    inputs, targets, _ = batch
    return (jnp.tanh(inputs @ params["hidden"]) @ params["out"] - targets) ** 2


def quotient(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    losses, mask = token_losses(params, batch), batch[2]
    mean = jnp.sum(mask * losses) / jnp.sum(mask)
    return mean, (model_state, {"rms": jnp.sum(mask * losses**2) / jnp.sum(mask)})


def weighted(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    losses, mask = token_losses(params, batch), batch[2]
    mean = mo.WeightedMean(mask * losses, mask)
    aux = {"rms": mo.WeightedMean(mask * losses**2, mask)}
    return mean, (model_state, aux)


def summed(*args: Any) -> Any:
    """Two numbers in the place of two arrays."""
    (total, weight), others = weighted(*args)
    return mo.WeightedMean(jnp.sum(total), jnp.sum(weight)), others


def problem(dtype: Any = float) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    params = {"hidden": rng.normal(size=(3, 5)), "out": rng.normal(size=5)}
    batches = []
    for _ in range(4):
        lengths = rng.integers(1, LENGTH + 1, size=(BATCH, 1))
        mask = (np.arange(LENGTH) < lengths).astype(np.int32)
        mask[1::PARTS] = 0  # a part without any token
        inputs = rng.normal(size=(BATCH, LENGTH, 3))
        batches.append((inputs, rng.normal(size=(BATCH, LENGTH)), mask))
    as_arrays = jax.tree.map(
        lambda x: jnp.asarray(x, dtype if x.dtype == float else x.dtype),
        (params, batches),
    )
    return as_arrays


def train(loss_fn: Any, tx: Any, params: Any, batches: Any, **kwargs: Any) -> Any:
    step = mo.make_train_step(loss_fn, tx, donate=False, **kwargs)
    scaling = kwargs.get("loss_scaling")
    state = mo.TrainState(params, tx.init(params))
    if scaling is not None:
        state = state._replace(loss_scale=scaling.init())
    for batch in batches:
        state, metrics = step(state, batch, None)
    return state.params, state.opt_state, metrics


def assert_close(actual: Any, expected: Any, atol: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
        actual,
        expected,
    )


@pytest.mark.parametrize("loss_fn", [weighted, summed])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parts_by_their_weights_equal_the_large_batch(x64, name, loss_fn):
    params, batches = problem()
    expected = train(quotient, OPTIMIZERS[name], params, batches)
    assert_close(train(loss_fn, OPTIMIZERS[name], params, batches), expected, 1e-12)
    parts = train(loss_fn, OPTIMIZERS[name], params, batches, microbatches=PARTS)
    assert_close(parts, expected, 1e-12)


def test_a_quotient_in_parts_is_off():
    """Which is why there is a `WeightedMean`; in float32 that one is not."""
    params, batches = problem(jnp.float32)
    batches = [jax.tree.map(lambda x: x[jnp.array([0, 2, 3, 4])], b) for b in batches]
    expected, *_ = train(quotient, SGD, params, batches[:1])
    off, *_ = train(quotient, SGD, params, batches[:1], microbatches=2)
    right, *_ = train(weighted, SGD, params, batches[:1], microbatches=2)
    assert optax.tree.norm(optax.tree.sub(off, expected)) > 1e-3
    assert_close(right, expected, 1e-7)


@pytest.mark.parametrize("parts", [1, PARTS])
def test_a_batch_of_no_weight_moves_nothing(parts):
    params, batches = problem(jnp.float32)
    inputs, targets, mask = batches[0]
    empty = [(inputs, targets, jnp.zeros_like(mask))]
    after, _, metrics = train(weighted, SGD, params, empty, microbatches=parts)
    assert_close(after, params, 0)
    assert metrics.loss == metrics.grad_norm == metrics.aux["rms"] == 0


@pytest.mark.parametrize("parts", [1, PARTS])
def test_the_weight_counts_as_a_constant(x64, parts):
    """As in the parts, so in the whole."""

    def by_size(params, model_state, batch, key):
        weight = batch[2] * jnp.sum(params["out"] ** 2)
        total = weight * token_losses(params, batch)
        return mo.WeightedMean(total, weight), (model_state, {})

    def with_constant(params, model_state, batch, key):
        weight = batch[2] * jnp.sum(params["out"] ** 2)
        total = weight * token_losses(params, batch)
        mean = jnp.sum(total) / jax.lax.stop_gradient(jnp.sum(weight))
        return mean, (model_state, {})

    params, batches = problem()
    expected = train(with_constant, SGD, params, batches)
    found = train(by_size, SGD, params, batches, microbatches=parts)
    assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("parts", [1, PARTS])
def test_weights_and_a_scaled_loss_go_together(parts):
    params, batches = problem(jnp.float32)

    def half(params, model_state, batch, key):
        params, inputs = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch))
        losses = token_losses(params, (*inputs[:2], batch[2])).astype(jnp.float32)
        return mo.WeightedMean(batch[2] * losses * 1e-4, batch[2]), (model_state, {})

    def exact(params, model_state, batch, key):
        loss, others = quotient(params, model_state, batch, key)
        return loss * 1e-4, (others[0], {})

    scaling = mo.LossScaling(2.0**12)
    found, _, metrics = train(
        half, SGD, params, batches, microbatches=parts, loss_scaling=scaling
    )
    assert not metrics.skipped
    expected, *_ = train(exact, SGD, params, batches)
    gap = optax.tree.norm(optax.tree.sub(found, expected))
    assert gap < 0.02 * optax.tree.norm(optax.tree.sub(expected, params))


def test_methods_that_select_samples_say_what_they_need():
    params, batches = problem(jnp.float32)
    with pytest.raises(ValueError, match="one loss for each example"):
        train(weighted, mo.esam(SGD), params, batches)
