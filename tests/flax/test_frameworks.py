"""The same training in Flax Linen, Flax NNX, Equinox and plain JAX."""

from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import msam_optax
from msam_optax.flax.linen import LinenTrainState, init_linen, linen_loss
from msam_optax.flax.nnx import eval_model, init_nnx, nnx_loss, nnx_update

WIDTH, STEPS = 8, 6
OPTIMIZERS = {
    "msam": lambda: msam_optax.msam(0.1, rho=0.3),
    "sam": lambda: msam_optax.sam(optax.sgd(0.1, momentum=0.9), rho=0.1),
    "ae_sam": lambda: msam_optax.ae_sam(optax.sgd(0.1), rho=0.1, total_steps=STEPS),
}


class LinenNet(nn.Module):
    """Two layers with batch norm, and dropout where a rate is given."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(WIDTH, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            param_dtype=x.dtype,
            use_fast_variance=False,
        )(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.tanh(x))
        return nn.Dense(1, param_dtype=x.dtype)(x)


class NNXNet(nnx.Module):
    def __init__(self, params, statistics, dropout=0.0):
        rngs = nnx.Rngs(0, dropout=7)
        kernel = params["Dense_0"]["kernel"]
        self.first = nnx.Linear(
            kernel.shape[0], WIDTH, param_dtype=kernel.dtype, rngs=rngs
        )
        self.norm = nnx.BatchNorm(
            WIDTH,
            momentum=0.9,
            param_dtype=kernel.dtype,
            use_fast_variance=False,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 1, param_dtype=kernel.dtype, rngs=rngs)
        layer: Any
        for layer, name in ((self.first, "Dense_0"), (self.last, "Dense_1")):
            layer.kernel[...] = params[name]["kernel"]
            layer.bias[...] = params[name]["bias"]
        norm: Any = self.norm
        norm.scale[...] = params["BatchNorm_0"]["scale"]
        norm.bias[...] = params["BatchNorm_0"]["bias"]
        self.norm.mean = nnx.BatchStat(statistics["BatchNorm_0"]["mean"])
        self.norm.var = nnx.BatchStat(statistics["BatchNorm_0"]["var"])

    def __call__(self, x):
        x = nnx.tanh(self.norm(self.first(x)))
        return self.last(self.dropout(x))

    def as_linen(self):
        def dense(layer):
            return {"kernel": layer.kernel[...], "bias": layer.bias[...]}

        norm: Any = self.norm
        return {
            "BatchNorm_0": {"scale": norm.scale[...], "bias": norm.bias[...]},
            "Dense_0": dense(self.first),
            "Dense_1": dense(self.last),
        }


def plain_loss(params, model_state, batch, key):
    """What the two classes above compute, in plain JAX."""
    x, y = batch
    x = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    mean, var = x.mean(0), x.var(0)
    norm, running = params["BatchNorm_0"], model_state["batch_stats"]["BatchNorm_0"]
    x = (x - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    x = x * norm["scale"][None] + norm["bias"][None]
    x = jnp.tanh(x) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]
    moved = {
        "mean": 0.9 * running["mean"] + 0.1 * mean,
        "var": 0.9 * running["var"] + 0.1 * var,
    }
    return jnp.mean((x - y) ** 2), ({"batch_stats": {"BatchNorm_0": moved}}, {})


def squared_error(outputs, batch):
    return jnp.mean((outputs - batch[1]) ** 2), {}


def nnx_squared_error(model, batch):
    return squared_error(model(batch[0]), batch)


def data(steps=STEPS):
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(steps, 16, 3)))
    return list(zip(inputs, jnp.sin(inputs.sum(-1, keepdims=True)), strict=True))


def run(loss_fn, optimizer, state, batches, key=None):
    step = msam_optax.make_train_step(loss_fn, optimizer, donate=False)
    for i, batch in enumerate(batches):
        each = None if key is None else jax.random.fold_in(key, i)
        state, metrics = step(state, batch, each)
    return state, metrics


def linen_run(name):
    batches, model, optimizer = data(), LinenNet(), OPTIMIZERS[name]()
    first = init_linen(model, optimizer, jax.random.key(0), batches[0][0], train=False)
    # Flax makes statistics in float32 whatever param_dtype is: 0.9 * 1 is off by 2e-8.
    statistics = optax.tree.cast(first.model_state, jnp.float64)
    first = first._replace(model_state=statistics)
    loss_fn = linen_loss(model, squared_error, train=True)
    return first, run(loss_fn, optimizer, first, batches, jax.random.key(1))


def assert_same(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10),
        actual,
        expected,
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_linen_equals_plain_jax(x64, name):
    first, (state, metrics) = linen_run(name)
    plain, plain_metrics = run(plain_loss, OPTIMIZERS[name](), first, data())
    assert_same(plain.params, state.params)
    assert_same(plain.model_state, state.model_state)
    assert_same(plain_metrics.loss, metrics.loss)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_equals_linen(x64, name):
    first, (state, _) = linen_run(name)
    model = NNXNet(first.params, first.model_state["batch_stats"])
    optimizer = OPTIMIZERS[name]()
    nnx_state, _ = run(
        nnx_loss(model, nnx_squared_error),
        optimizer,
        init_nnx(model, optimizer),
        data(),
    )
    weights = msam_optax.eval_params(nnx_state.opt_state, nnx_state.params)
    nnx.update(model, weights, nnx_state.model_state)
    assert_same(model.as_linen(), msam_optax.eval_params(state.opt_state, state.params))
    statistics = state.model_state["batch_stats"]["BatchNorm_0"]
    assert_same(model.norm.mean[...], statistics["mean"])
    assert_same(model.norm.var[...], statistics["var"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_nnx_optimizer_equals_linen(x64, name):
    first, (state, metrics) = linen_run(name)
    model = NNXNet(first.params, first.model_state["batch_stats"])
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        return nnx_update(model, optimizer, nnx_squared_error, batch)

    for batch in data():
        loss, _ = step(model, optimizer, batch)
    assert_same(loss, metrics.loss)
    assert_same(model.as_linen(), state.params)
    weights = msam_optax.eval_params(state.opt_state, state.params)
    assert_same(eval_model(model, optimizer).as_linen(), weights)
    assert_same(
        model.norm.var[...], state.model_state["batch_stats"]["BatchNorm_0"]["var"]
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_linen_train_state_equals_make_train_step(x64, name):
    class State(LinenTrainState):
        batch_stats: object = None

    first, (expected, metrics) = linen_run(name)
    model = LinenNet()
    state = State.create(
        apply_fn=model.apply,
        params=first.params,
        tx=OPTIMIZERS[name](),
        batch_stats=first.model_state["batch_stats"],
    )

    @jax.jit
    def step(state, batch):
        def loss(params):
            outputs, changed = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                batch[0],
                train=True,
                mutable=["batch_stats"],
            )
            return squared_error(outputs, batch)[0], changed["batch_stats"]

        def grad_fn(params):
            return jax.grad(loss, has_aux=True)(params)[0]

        (value, changed), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        state = state.apply_gradients(
            grads=grads,
            grad_fn=grad_fn,
            extra_args={"value": value},
            batch_stats=changed,
        )
        return state, value

    for batch in data():
        state, value = step(state, batch)
    assert_same(value, metrics.loss)
    assert_same(state.params, expected.params)
    assert_same({"batch_stats": state.batch_stats}, expected.model_state)
    assert_same(
        state.eval_params, msam_optax.eval_params(expected.opt_state, expected.params)
    )
    assert state.step == STEPS


def test_a_linen_train_state_takes_any_optax_optimizer():
    state = LinenTrainState.create(
        apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.sgd(0.5)
    )
    tx = state.tx
    state = state.apply_gradients(grads={"w": jnp.ones(3)}, grad_fn=lambda p: p)
    assert state.tx is tx
    np.testing.assert_array_equal(state.eval_params["w"], 0.5 * np.ones(3))


def test_a_method_with_two_gradients_asks_a_train_state_for_grad_fn():
    state = LinenTrainState.create(
        apply_fn=None, params={"w": jnp.ones(3)}, tx=msam_optax.sam(optax.sgd(0.5))
    )
    with pytest.raises(ValueError, match="grad_fn"):
        state.apply_gradients(grads={"w": jnp.ones(3)})


@pytest.mark.parametrize("through", ["make_train_step", "nnx_update"])
def test_both_nnx_passes_drop_the_same_units(through):
    """Else SAM's gradient at rho -> 0 would not be the clean one."""
    batches = data(1)
    first = init_linen(
        LinenNet(), optax.sgd(1.0), jax.random.key(0), batches[0][0], train=False
    )

    def after(tx, dropout=0.5):
        model = NNXNet(first.params, first.model_state["batch_stats"], dropout)
        if through == "make_train_step":
            loss_fn = nnx_loss(model, nnx_squared_error)
            state, _ = run(loss_fn, tx, init_nnx(model, tx), batches)
            nnx.update(model, state.params, state.model_state)
        else:
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            nnx_update(model, optimizer, nnx_squared_error, batches[0])
        return model

    tx = optax.sgd(1.0)
    sgd, sam = after(tx), after(msam_optax.sam(tx, rho=1e-6))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        sgd.as_linen(),
        sam.as_linen(),
    )
    # One pass counts in the streams and the statistics, not two.
    np.testing.assert_array_equal(
        sgd.dropout.rngs.count[...], sam.dropout.rngs.count[...]
    )
    np.testing.assert_allclose(sgd.norm.mean[...], sam.norm.mean[...], rtol=1e-6)
    without, kept = (
        net.as_linen()["Dense_1"]["kernel"] for net in (after(tx, 0.0), sgd)
    )
    assert jnp.max(jnp.abs(without - kept)) > 0.01


def test_an_nnx_step_draws_anew_each_time():
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    tx = optax.identity()
    loss_fn = nnx_loss(model, nnx_squared_error)
    step = msam_optax.make_train_step(loss_fn, tx, donate=False)
    batch = (jnp.ones((16, 1)), jnp.zeros((16, 1)))
    state, first = step(init_nnx(model, tx), batch, None)
    _, second = step(state, batch, None)
    assert first.loss != second.loss


@pytest.mark.parametrize("scaling", [None, msam_optax.LossScaling()])
def test_an_nnx_state_keeps_its_structure(scaling):
    """So that it can be scanned, skipped and restored from a checkpoint."""
    first = init_linen(
        LinenNet(), optax.sgd(0.1), jax.random.key(0), jnp.ones((4, 3)), train=False
    )
    model = NNXNet(first.params, first.model_state["batch_stats"], dropout=0.5)
    tx = msam_optax.ae_sam(optax.sgd(0.1), rho=0.1, total_steps=STEPS)
    step = msam_optax.make_train_step(
        nnx_loss(model, nnx_squared_error), tx, loss_scaling=scaling
    )
    state = init_nnx(model, tx)._replace(loss_scale=scaling.init() if scaling else ())
    batches = [jax.tree.map(jnp.float32, batch) for batch in data()]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    scanned, _ = jax.lax.scan(lambda s, batch: step(s, batch, None), state, stacked)
    for batch in batches:
        state, metrics = step(state, batch, None)
        assert not metrics.skipped
    chex.assert_trees_all_equal_structs(state, scanned)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        scanned.params,
        state.params,
    )


def test_a_linen_loss_takes_a_state_without_collections():
    model, tx = nn.Dense(1), optax.sgd(0.1)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    step = msam_optax.make_train_step(linen_loss(model, squared_error), tx)
    state = msam_optax.TrainState(params, tx.init(params))
    batch = jnp.ones((4, 3)), jnp.zeros((4, 1))
    state, metrics = step(state, batch, jax.random.key(0))
    assert jnp.isfinite(metrics.loss)


def test_equinox_equals_plain_jax(x64):
    """Equinox modules are trees: partition the arrays out, and all else is Optax."""

    class Net(eqx.Module):
        first: eqx.nn.Linear
        last: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key)
            self.first = eqx.nn.Linear(3, WIDTH, key=keys[0])
            self.last = eqx.nn.Linear(WIDTH, 1, key=keys[1])

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    params, static = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)

    def loss_fn(params, model_state, batch, key):
        model = eqx.combine(params, static)
        return squared_error(jax.vmap(model)(batch[0]), batch)[0], (model_state, {})

    def by_hand(params, model_state, batch, key):
        first, bias, last, offset = params
        x = jnp.tanh(batch[0] @ first.T + bias[None]) @ last.T + offset[None]
        return squared_error(x, batch)[0], (model_state, {})

    def after(loss_fn, params):
        tx = OPTIMIZERS["ae_sam"]()
        state = msam_optax.TrainState(params, tx.init(params))
        return run(loss_fn, tx, state, data())[0]

    trained = after(loss_fn, params)
    plain = after(by_hand, tuple(jax.tree.leaves(params)))
    assert_same(tuple(jax.tree.leaves(trained.params)), plain.params)
    model = eqx.combine(
        msam_optax.eval_params(trained.opt_state, trained.params), static
    )
    assert model(jnp.ones(3)).shape == (1,)


def test_a_loss_without_aux_is_told_what_is_needed():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    batch: Any = (jnp.ones((2, 3)), jnp.zeros((2, 1)))

    def bare(model, batch):
        return jnp.mean(model(batch[0]))

    loss: Any = bare
    with pytest.raises(ValueError, match=r"must return \(loss, aux\)"):
        nnx_update(model, optimizer, loss, batch)
    net = nn.Dense(1)
    loss_fn = linen_loss(net, lambda outputs, batch: outputs.mean())
    params = net.init(jax.random.key(0), batch[0])["params"]
    with pytest.raises(ValueError, match=r"must return \(loss, aux\)"):
        loss_fn(params, {}, batch, None)


def test_linen_loss_asks_which_part_of_a_dict_is_the_input():
    model, tx = nn.Dense(1), optax.sgd(0.1)
    batch = {"image": jnp.ones((4, 3)), "label": jnp.ones((4, 1))}
    state = init_linen(model, tx, jax.random.key(0), batch["image"])

    def loss(outputs, batch):
        return jnp.mean((outputs - batch["label"]) ** 2), {}

    step = msam_optax.make_train_step(linen_loss(model, loss), tx, donate=False)
    with pytest.raises(ValueError, match=r"'image', 'label'; .*inputs="):
        step(state, batch, None)
    given = linen_loss(model, loss, inputs=lambda batch: batch["image"])
    msam_optax.make_train_step(given, tx)(state, batch, None)


def test_nnx_functions_name_what_is_not_an_optimizer():
    model, batch = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), (jnp.ones((4, 3)), jnp.ones(4))
    wrong: Any = model
    with pytest.raises(TypeError, match=r"is a Linear; it must be .*nnx\.Optimizer"):
        eval_model(model, wrong)
    with pytest.raises(TypeError, match=r"is a Linear; it must be .*nnx\.Optimizer"):
        nnx_update(model, wrong, nnx_squared_error, batch)


def test_a_donated_step_leaves_the_module_its_arrays():
    model = nnx.Linear(3, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    tx, batch = optax.sgd(0.1), (jnp.ones((4, 3)), jnp.zeros((4, 1)))
    step = msam_optax.make_train_step(nnx_loss(model, nnx_squared_error), tx)
    for _ in range(2):  # the second run starts from the same module
        step(init_nnx(model, tx), batch, None)
    assert model(batch[0]).tolist() == [[3.0]] * 4


def test_an_evaluated_module_outlives_the_next_donated_step():
    model = nnx.Linear(3, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    batch = (jnp.ones((4, 3)), jnp.zeros((4, 1)))

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer):
        return nnx_update(model, optimizer, nnx_squared_error, batch)

    evaluated = eval_model(model, optimizer)
    step(model, optimizer)
    assert evaluated(batch[0]).tolist() == [[3.0]] * 4
