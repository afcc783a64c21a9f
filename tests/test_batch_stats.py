"""Batch statistics taken anew at given parameters, in Linen and NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import msam_optax
from msam_optax.batch_stats import (
    recalibrate_batch_stats,
    recalibrate_nnx_batch_stats,
)
from msam_optax.flax_linen import init_linen, linen_loss


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
        _, _, others = nnx.split(model, nnx.BatchStat, ...)
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
    norm = model.layers[1]
    assert norm.use_running_average and norm.momentum == 0.97
    assert jnp.all(norm.mean[...] != 0)


def test_a_model_without_statistics_stays():
    state = {"cache": jnp.ones(2)}
    assert recalibrate_batch_stats(nn.Dense(2), {}, state, []) is state
    recalibrate_nnx_batch_stats(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [])


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
        logits = model.apply(variables, images[test], train=False)
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
