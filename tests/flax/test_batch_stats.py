"""Batch statistics taken anew at given parameters, in Linen and NNX."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import msam_optax
from msam_optax.flax.linen import init_linen, linen_loss, recalibrate_batch_stats
from msam_optax.flax.nnx import recalibrate_batch_stats as recalibrate_nnx_batch_stats


class Net(nn.Module):
    """As an NNX user would write it, too: `NNXNet`."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train):
        for _ in range(2):
            x = nn.Dense(32)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
            x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(10)(x)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(
            [nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, momentum=0.97, rngs=rngs)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.dropout(x)


def batches_of_four_features():
    rng = np.random.default_rng(0)
    return [jnp.asarray(3 + rng.normal(size=(n, 4)), jnp.float32) for n in (8, 8, 4)]


def exact_statistics(batches):
    """Mean and variance of each batch, averaged over the examples."""
    arrays, sizes = [np.asarray(x, np.float64) for x in batches], [8, 8, 4]
    mean = np.average([x.mean(0) for x in arrays], 0, sizes)
    variance = np.average([x.var(0) for x in arrays], 0, sizes)
    return mean, variance


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.5, 0.0])
def test_linen_statistics_are_the_exact_average(momentum):
    model = nn.BatchNorm(
        use_running_average=False, momentum=momentum, use_fast_variance=False
    )
    batches = batches_of_four_features()
    state = dict(model.init(jax.random.key(0), batches[0]))
    params = state.pop("params")
    state["batch_stats"]["mean"] += 100.0  # of long ago
    new = recalibrate_batch_stats(model, params, state, iter(batches))["batch_stats"]
    mean, variance = exact_statistics(batches)
    np.testing.assert_allclose(new["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(new["var"], variance, rtol=1e-5)


def test_nnx_statistics_are_the_exact_average():
    batches = batches_of_four_features()
    model = nnx.BatchNorm(4, momentum=0.99, use_fast_variance=False, rngs=nnx.Rngs(0))
    model.mean[...] += 100.0
    recalibrate_nnx_batch_stats(model, batches)
    mean, variance = exact_statistics(batches)
    np.testing.assert_allclose(model.mean[...], mean, rtol=1e-6)
    np.testing.assert_allclose(model.var[...], variance, rtol=1e-5)


def test_nnx_recalibration_changes_statistics_alone():
    model = NNXNet(nnx.Rngs(0, dropout=1))
    model.eval()

    def all_else():
        others = nnx.state(model, nnx.Not(nnx.BatchStat))
        leaves = jax.tree.leaves(others)
        return [
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
            for x in leaves
        ]

    before = [np.array(x) for x in all_else()]
    recalibrate_nnx_batch_stats(model, batches_of_four_features())
    jax.tree.map(np.testing.assert_array_equal, all_else(), before)
    norm: Any = model.layers[1]
    assert norm.use_running_average and norm.momentum == 0.97
    assert jnp.all(norm.mean[...] != 0)


def test_a_model_without_statistics_stays():
    state = {"cache": jnp.ones(2)}
    assert recalibrate_batch_stats(nn.Dense(2), {}, state, []) is state
    recalibrate_nnx_batch_stats(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [])


class TwoNorms(nn.Module):
    """Batch norm before and after a dense layer, of different decays."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.BatchNorm(not train, momentum=0.5, name="first")(images)
        x = nn.Dense(3, name="dense")(x)
        return nn.BatchNorm(not train, momentum=0.99, name="second")(x)


def test_recalibrated_statistics_equal_those_by_hand():
    rng = np.random.default_rng(0)
    batches = jnp.asarray(rng.normal(5.0, 30.0, (4, 20, 6)), jnp.float32)
    model = TwoNorms()
    variables = dict(model.init(jax.random.key(0), batches[0], train=False))
    params = variables.pop("params")
    stale = jax.tree.map(lambda s: s + 7.0, variables["batch_stats"])

    found = recalibrate_batch_stats(
        model, params, {"batch_stats": stale, "other": {}}, batches, train=True
    )

    def statistics(x):
        return {"mean": x.mean(1).mean(0), "var": x.var(1).mean(0)}

    x = np.asarray(batches, np.float64)
    by_hand = {"first": statistics(x)}
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    dense = jax.tree.map(np.asarray, params["dense"])
    by_hand["second"] = statistics(x @ dense["kernel"] + dense["bias"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        found["batch_stats"],
        by_hand,
    )
    assert found["other"] == {}


class HalfFrozen(nn.Module):
    """A pretrained norm whose statistics stay, and a new one."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x)
        # A bounded activation that is not 0 at 0, before a norm.
        x = nn.sigmoid(x)
        return nn.BatchNorm(use_running_average=False, momentum=0.9)(x)


def test_a_frozen_layer_keeps_its_statistics_and_is_applied_with_them():
    model, batches = HalfFrozen(), batches_of_four_features()
    state = dict(model.init(jax.random.key(0), batches[0]))
    params = state.pop("params")
    frozen = {"mean": jnp.full(4, 3.0), "var": jnp.full(4, 4.0)}
    state["batch_stats"]["BatchNorm_0"] = frozen
    new = recalibrate_batch_stats(model, params, state, batches)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, new["BatchNorm_0"], frozen)
    activations = [jax.nn.sigmoid((x - 3.0) / jnp.sqrt(4.0 + 1e-5)) for x in batches]
    mean, variance = exact_statistics(activations)
    np.testing.assert_allclose(new["BatchNorm_1"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(new["BatchNorm_1"]["var"], variance, rtol=1e-3)


def test_it_changes_the_accuracy():
    """Running averages of momentum 0.999 are far behind after 150 steps."""
    digits = load_digits()
    images = jnp.asarray(digits.data / 16, jnp.float32)
    labels = jnp.asarray(digits.target)
    train, test = slice(0, 1200), slice(1200, None)
    model, optimizer = Net(momentum=0.999), msam_optax.msam(0.1, rho=1.0)

    def loss(logits, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean(), {}

    step = msam_optax.make_train_step(linen_loss(model, loss, train=True), optimizer)
    state = init_linen(model, optimizer, jax.random.key(0), images[:1], train=False)
    rng = np.random.default_rng(0)
    for i in range(150):
        rows = rng.choice(1200, 100, replace=False)
        state, _ = step(state, (images[rows], labels[rows]), jax.random.key(i))
    weights = msam_optax.eval_params(state.opt_state, state.params)

    def accuracy(model_state):
        variables = {"params": weights, **model_state}
        logits: Any = model.apply(variables, images[test], train=False)
        return float(jnp.mean(logits.argmax(-1) == labels[test]))

    batches = images[train].reshape(12, 100, 64)
    new = recalibrate_batch_stats(
        model, weights, state.model_state, batches, train=True
    )
    assert accuracy(new) > accuracy(state.model_state) + 0.1
    assert accuracy(new) > 0.85


def test_no_batches_are_named():
    model = nn.BatchNorm(use_running_average=False)
    state = dict(model.init(jax.random.key(0), jnp.ones((2, 3))))
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batch_stats(model, state.pop("params"), state, [])
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_nnx_batch_stats(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), [])


def test_a_module_called_as_in_evaluation_is_named():
    model, x = Net(), jnp.ones((2, 3))
    state = dict(model.init(jax.random.key(0), x, train=False))
    with pytest.raises(ValueError, match="train=True"):
        recalibrate_batch_stats(model, state.pop("params"), state, [x], train=False)


def test_one_batch_in_the_place_of_batches_is_refused():
    inputs = jnp.ones((4, 3))
    model = nn.BatchNorm(use_running_average=False)
    state = model.init(jax.random.key(0), inputs)
    params = state.pop("params")
    with pytest.raises(ValueError, match=r"shape \(4, 3\) was given: give \[batch\]"):
        recalibrate_batch_stats(model, params, state, inputs)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) was given: give \[batch\]"):
        recalibrate_nnx_batch_stats(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), inputs)
