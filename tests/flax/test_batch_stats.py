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

needs_flax_0_12 = pytest.mark.skipif(
    not hasattr(nnx, "List"), reason="Flax 0.11 lacks nnx.List, Dict, SpectralNorm"
)


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


@needs_flax_0_12
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
        model, params, {"batch_stats": stale, "other": {}}, list(batches), train=True
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

    batches = list(images[train].reshape(12, 100, 64))
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


def test_labels_among_the_inputs_are_told_of():
    both, says = [(jnp.ones((4, 3)), jnp.ones(4, jnp.int32))], "inputs=lambda batch"
    state = {"batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=says):
        recalibrate_batch_stats(nn.BatchNorm(False), {}, state, both)
    with pytest.raises(ValueError, match=says):
        recalibrate_nnx_batch_stats(norm, both)
    recalibrate_nnx_batch_stats(norm, both, inputs=lambda batch: batch[0])
    np.testing.assert_allclose(norm.mean[...], 1)


ONE_BATCH = {
    "features": jnp.ones((4, 3)),
    "images": np.ones((2, 8, 8, 3), np.float32),
    "inputs_and_labels": (jnp.ones((4, 3)), jnp.ones(4)),
    "dict": {"image": jnp.ones((4, 3))},
    "one_number": 3,
}


@pytest.mark.parametrize("batch", ONE_BATCH.values(), ids=ONE_BATCH)
def test_one_batch_in_the_place_of_batches_is_refused(batch):
    """A convolution takes a single image too, and there would be no error."""
    with pytest.raises(ValueError, match=r"was given: give \[batch\]"):
        recalibrate_batch_stats(nn.BatchNorm(False), {}, {"batch_stats": {}}, batch)
    with pytest.raises(ValueError, match=r"was given: give \[batch\]"):
        recalibrate_nnx_batch_stats(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), batch)


class Beside(nn.Module):
    """A batch norm beside something else in its collection, by `keep(self, x)`."""

    keep: Any

    @nn.compact
    def __call__(self, x):
        self.keep(self, x)
        return nn.BatchNorm(False, momentum=0.99, use_fast_variance=False)(x)


def statistic(module, name, start, new):
    found = module.variable("batch_stats", name, lambda: start)
    if not module.is_initializing():
        found.value = new(found.value)
    return found.value


def counter(module, x):
    statistic(module, "steps", jnp.asarray(0), lambda n: n + 1)


def maximum(module, x):
    statistic(module, "amax", jnp.asarray(0.0), lambda m: jnp.maximum(m, x.max()))


def other_average(module, x):
    statistic(module, "ema", jnp.zeros(4), lambda e: 0.5 * e + 0.5 * x.mean(0))


def flag(module, x):
    statistic(module, "seen", jnp.asarray(False), lambda _: jnp.asarray(True))


# What is left after batches of 8, 8 and 4 examples, of the batches' numbers.
CARRIED = {
    "steps": (counter, lambda batches: 3),
    "amax": (maximum, lambda batches: max(float(x.max()) for x in batches)),
    "ema": (
        other_average,
        lambda batches: sum(x.mean(0) / 2 ** (3 - i) for i, x in enumerate(batches)),
    ),
    "seen": (flag, lambda batches: True),
}


@pytest.mark.parametrize("name", CARRIED)
def test_linen_carries_on_what_is_no_batch_norm(name):
    keep, expected = CARRIED[name]
    model, batches = Beside(keep), batches_of_four_features()
    state = dict(model.init(jax.random.key(0), batches[0]))
    dtype = state["batch_stats"][name].dtype
    params = state.pop("params")
    new = recalibrate_batch_stats(model, params, state, batches)["batch_stats"]
    mean, variance = exact_statistics(batches)
    np.testing.assert_allclose(new["BatchNorm_0"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(new["BatchNorm_0"]["var"], variance, rtol=1e-5)
    np.testing.assert_allclose(new[name], expected(batches), rtol=1e-6)
    assert new[name].dtype == dtype


class NNXBeside(nnx.Module):
    def __init__(self, name, start, new):
        self.norm = nnx.BatchNorm(4, use_fast_variance=False, rngs=nnx.Rngs(0))
        self.kept = nnx.Dict({name: nnx.BatchStat(start)})
        self.name, self.new = name, new

    def __call__(self, x):
        kept = self.kept[self.name]
        kept[...] = self.new(kept[...], x)
        return self.norm(x)


class Amax(nnx.BatchStat):
    """A type of statistics of one's own."""


@needs_flax_0_12
def test_nnx_carries_on_what_is_no_batch_norm():
    batches = batches_of_four_features()
    model = NNXBeside("amax", jnp.asarray(0.0), lambda m, x: jnp.maximum(m, x.max()))
    model.kept = nnx.Dict(amax=Amax(jnp.asarray(0.0)))
    recalibrate_nnx_batch_stats(model, batches)
    mean, variance = exact_statistics(batches)
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-6)
    np.testing.assert_allclose(model.norm.var[...], variance, rtol=1e-5)
    assert model.kept["amax"][...] == max(x.max() for x in batches)
    counting = NNXBeside("steps", jnp.asarray(0), lambda n, x: n + 1)
    recalibrate_nnx_batch_stats(counting, batches)
    assert counting.kept["steps"][...] == 3


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.SpectralNorm(nn.Dense(2))(x, update_stats=train)
        return nn.BatchNorm(not train, momentum=0.99)(x)


class NNXSpectral(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layer = nnx.SpectralNorm(nnx.Linear(4, 2, rngs=rngs), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.layer(x))


@needs_flax_0_12
def test_spectral_norm_stays_the_norm_of_its_kernel():
    """Else sigma and u would be 0, and the outputs those of no network."""
    batches = batches_of_four_features() * 10
    model = Spectral()
    state = dict(model.init(jax.random.key(0), batches[0], train=False))
    params = state.pop("params")
    state = recalibrate_batch_stats(model, params, state, batches, train=True)
    (kernel,) = [x for x in jax.tree.leaves(params) if x.ndim == 2]
    found = state["batch_stats"]["SpectralNorm_0"]
    sigma = np.linalg.norm(kernel, 2)
    np.testing.assert_allclose(found["Dense_0/kernel/sigma"], sigma, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(found["Dense_0/kernel/u"]), 1, rtol=1e-5)
    evaluated: Any = model.apply({"params": params, **state}, batches[0], train=False)
    trained: Any = model.apply(
        {"params": params, **state}, batches[0], train=True, mutable=["batch_stats"]
    )[0]
    assert jnp.max(jnp.abs(evaluated - trained)) < 2  # in standard deviations

    net: Any = NNXSpectral()
    recalibrate_nnx_batch_stats(net, batches)
    sigma = np.linalg.norm(net.layer.layer_instance.kernel[...], 2)
    found = nnx.to_pure_dict(nnx.state(net.layer, nnx.BatchStat))["batch_stats"]
    np.testing.assert_allclose(found["kernel", "sigma"], sigma, rtol=1e-5)


class OwnNorm(nn.Module):
    """A batch norm of one's own: names, and the decay as a function of the step."""

    names: tuple[str, str] = ("mean", "var")
    decay: Any = 0.9
    renormalise: bool = False

    @nn.compact
    def __call__(self, x):
        steps = self.variable("batch_stats", "steps", lambda: jnp.asarray(0))
        moments = x.mean(0), x.var(0)
        running = []
        for name, start, now in zip(self.names, (0.0, 1.0), moments, strict=True):
            found = self.variable("batch_stats", name, jnp.full, 4, start)
            decay = self.decay(steps.value) if callable(self.decay) else self.decay
            if not self.is_initializing():
                found.value = decay * found.value + (1 - decay) * now
            running.append(found.value)
        steps.value += 1
        mean, var = running if self.renormalise else moments
        return (x - mean[None]) / jnp.sqrt(var + 1e-5)[None]


def own_norm(**kwargs):
    model, batches = OwnNorm(**kwargs), batches_of_four_features()
    state = model.init(jax.random.key(0), batches[0])
    return recalibrate_batch_stats(model, {}, state, batches)["batch_stats"]


@pytest.mark.parametrize(
    "names", [("mean", "var"), ("running_mean", "running_var"), ("mean", "variance")]
)
def test_a_batch_norm_of_ones_own_is_known_by_how_it_moves(names):
    new, (mean, var) = (
        own_norm(names=names),
        exact_statistics(batches_of_four_features()),
    )
    np.testing.assert_allclose(new[names[0]], mean, rtol=1e-6)
    np.testing.assert_allclose(new[names[1]], var, rtol=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"decay": lambda step: jnp.minimum(0.9, (1 + step) / (10 + step))},
        {"decay": jnp.array([0.9, 0.9, 0.9, 0.5])},
        {"renormalise": True},
    ],
    ids=["warm-up", "several decays", "renormalisation"],
)
def test_what_is_named_so_and_moves_otherwise_is_refused_by_name(kwargs):
    with pytest.raises(
        ValueError, match=r"statistics \['mean'\] and \['var'\] are named"
    ):
        own_norm(**kwargs)


def test_a_mean_alone_goes_on():
    """It may be anything; `other_average` says what comes out."""
    found = own_norm(names=("mean", "spread"), decay=0.5)["mean"]
    moments = [x.mean(0) for x in batches_of_four_features()]
    expected = moments[0] / 8 + moments[1] / 4 + moments[2] / 2
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_statistics_of_low_precision_keep_their_dtype(dtype):
    model, batches = OwnNorm(decay=0.99), batches_of_four_features()
    state = model.init(jax.random.key(0), batches[0])
    state = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    lower = [x.astype(dtype) for x in batches]
    new = recalibrate_batch_stats(model, {}, state, lower)["batch_stats"]
    mean, _ = exact_statistics(batches)
    assert new["mean"].dtype == dtype
    np.testing.assert_allclose(new["mean"].astype(float), mean, rtol=0.03)


@needs_flax_0_12
def test_an_nnx_norm_that_is_frozen_stays_so():
    model: Any = NNXNet(nnx.Rngs(0))
    model.layers.append(nnx.BatchNorm(8, use_running_average=True, rngs=nnx.Rngs(0)))
    recalibrate_nnx_batch_stats(model, batches_of_four_features())
    assert jnp.all(model.layers[1].mean[...] != 0)
    np.testing.assert_array_equal(model.layers[2].mean[...], np.zeros(8))
    model.eval()  # all of them now, which tells nothing
    recalibrate_nnx_batch_stats(model, batches_of_four_features())
    assert jnp.all(model.layers[2].mean[...] != 0)


def test_parameters_among_the_other_collections_are_refused():
    model = nn.Dense(1)
    x = jnp.ones((4, 2))
    variables = model.init(jax.random.key(0), x)
    tx = optax.sgd(0.5)
    params = variables["params"]
    state = msam_optax.TrainState(params, tx.init(params), variables)

    def loss(outputs, batch):
        return jnp.mean(outputs**2), {}

    loss_fn = linen_loss(model, loss)
    step = msam_optax.make_train_step(loss_fn, tx, donate=False)
    with pytest.raises(ValueError, match='it holds "params"'):
        step(state, (x,), None)
    with pytest.raises(ValueError, match='it holds "params"'):
        recalibrate_batch_stats(model, params, variables, [x])
