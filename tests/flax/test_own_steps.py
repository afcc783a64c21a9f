"""Steps of one's own: what `nnx_update` and `LinenTrainState` know of the optimizer."""

import contextlib
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import dynamic_scale as scaling
from flax.training.train_state import TrainState

import msam_optax
from msam_optax.flax import linen
from msam_optax.flax import nnx as glue
from msam_optax.flax.linen import LinenTrainState
from msam_optax.flax.nnx import nnx_loss, nnx_update

RNG = np.random.default_rng(0)
BATCH = (
    jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
    jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32),
)


def new_model():
    """Two layers; its parameters as a plain tree are those of `params_of`."""
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(3, 4, rngs=rngs), nnx.tanh, nnx.Linear(4, 2, rngs=rngs)
    )


def params_of(model: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def outputs_of(params: Any, inputs: jax.Array) -> jax.Array:
    first, last = params["layers"][0], params["layers"][2]
    hidden = jnp.tanh(inputs @ first["kernel"] + first["bias"][None])
    return hidden @ last["kernel"] + last["bias"][None]


def losses(outputs: jax.Array, batch: Any) -> jax.Array:
    return jnp.sum((outputs - batch[1]) ** 2, axis=-1)


def loss_at(params: Any) -> jax.Array:
    return losses(outputs_of(params, BATCH[0]), BATCH).mean()


def by_nnx_update(tx, model, wrt=nnx.Param):
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    def loss(model, batch):
        return losses(model(batch[0]), batch), {}

    for _ in range(2):
        nnx_update(model, optimizer, loss, BATCH)
    return params_of(model)


def by_train_state(tx, model):
    state = LinenTrainState.create(apply_fn=None, params=params_of(model), tx=tx)
    grad_fn = jax.grad(loss_at)
    for _ in range(2):
        state = state.apply_gradients(grads=grad_fn(state.params), grad_fn=grad_fn)
    return state.params


def by_make_train_step(tx, model):
    def loss_fn(params, model_state, batch, key):
        return losses(outputs_of(params, batch[0]), batch), (model_state, {})

    params = params_of(model)
    state = msam_optax.TrainState(params, tx.init(params))
    step = msam_optax.make_train_step(loss_fn, tx, donate=False)
    for _ in range(2):
        state, _ = step(state, BATCH, None)
    return state.params


STEPS = {
    "nnx_update": by_nnx_update,
    "LinenTrainState": by_train_state,
    "make_train_step": by_make_train_step,
}


def labels(params: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: "first" if "[0]" in jax.tree_util.keystr(path) else "rest",
        params,
    )


def is_first(params: Any) -> Any:
    return jax.tree.map(lambda label: label == "first", labels(params))


def is_rest(params: Any) -> Any:
    return jax.tree.map(lambda label: label == "rest", labels(params))


SAM = msam_optax.sam(optax.sgd(0.1), rho=0.3)
AROUND = {
    "partition": optax.partition({"first": SAM, "rest": optax.sgd(0.1)}, labels),
    "masked": optax.chain(
        optax.masked(SAM, is_first), optax.masked(optax.sgd(0.1), is_rest)
    ),
}


def by_hand(rest_is_trained: bool = True) -> Any:
    """SAM of the first layer, at the other's parameters as they are."""
    params = params_of(new_model())
    for _ in range(2):
        mask = is_first(params)
        grads = jax.grad(loss_at)(params)
        chosen = jax.tree.map(lambda m, g: m * g, mask, grads)
        norm = optax.tree.norm(chosen)
        epsilon = optax.tree.scale(0.3 / norm, chosen)
        perturbed = optax.tree.add(params, epsilon)
        second = jax.grad(loss_at)(perturbed)
        params = jax.tree.map(
            lambda m, w, g, s: w - 0.1 * (s if m else rest_is_trained * g),
            *(mask, params, grads, second),
        )
    return params


def assert_near(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)  # type: ignore
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected
    )


@pytest.mark.parametrize("way", STEPS)
@pytest.mark.parametrize("around", AROUND)
def test_sam_of_a_part_of_the_parameters_sees_all_of_them(way, around):
    assert_near(STEPS[way](AROUND[around], new_model()), by_hand())


def test_a_filter_of_the_parameters_leaves_the_others_alone():
    """`wrt` tells the part, as for fine-tuning."""
    wrt = nnx.All(nnx.Param, lambda path, _: path[1] == 0)
    found = by_nnx_update(SAM, new_model(), wrt)
    assert_near(found, by_hand(rest_is_trained=False))


@pytest.mark.parametrize("way", STEPS)
def test_what_stands_before_a_second_gradient_is_seen(way):
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), SAM)
    with pytest.raises(ValueError, match="no longer the clean one"):
        STEPS[way](clipped, new_model())


@pytest.mark.parametrize("way", STEPS)
def test_a_guard_around_a_second_gradient_is_seen(way):
    with pytest.raises(ValueError, match=r"apply_if_finite stands around"):
        STEPS[way](optax.apply_if_finite(SAM, 3), new_model())


def test_methods_that_select_samples_train_an_nnx_module_too():
    tx = msam_optax.esam(optax.sgd(0.1), rho=0.3, gamma=0.5)
    assert_near(by_nnx_update(tx, new_model()), by_make_train_step(tx, new_model()))


def test_a_weighted_mean_is_a_loss_of_nnx_update():
    weights = jnp.arange(8.0)

    def weighted(model, batch):
        found = losses(model(batch[0]), batch)
        mean = msam_optax.WeightedMean(weights * found, weights)
        return mean, {"accuracy": mean}

    def quotient(model, batch):
        mean = jnp.average(losses(model(batch[0]), batch), weights=weights)
        return mean, {"accuracy": mean}

    found = []
    for loss in (weighted, quotient):
        model = new_model()
        optimizer = nnx.Optimizer(model, SAM, wrt=nnx.Param)
        value, aux = nnx_update(model, optimizer, loss, BATCH)
        found.append((value, aux, params_of(model)))
    assert_near(found[0], found[1])


def test_step_metrics_of_an_nnx_module_are_those_of_the_trees():
    model, tx = new_model(), msam_optax.msam(0.1, rho=0.3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        nnx_update(model, optimizer, lambda m, b: (losses(m(b[0]), b), {}), BATCH)
        return glue.step_metrics(model, optimizer)

    for _ in range(2):
        metrics = step(model, optimizer)
    np.testing.assert_allclose(metrics.perturbation_norm, 0.3, rtol=1e-5)
    norm = optax.tree.norm(params_of(model))
    np.testing.assert_allclose(metrics.relative_perturbation, 0.3 / norm, rtol=1e-5)
    with pytest.raises(TypeError, match="is a Sequential; it must be"):
        swapped: Any = optimizer, model
        glue.step_metrics(*swapped)


# --- Flax's own entry points ----------------------------------------------------------


def test_flax_own_train_state_names_the_one_that_is_needed():
    params = params_of(new_model())
    state = TrainState.create(apply_fn=None, params=params, tx=SAM)
    for kwargs in ({}, {"grad_fn": jax.grad(loss_at)}):
        with pytest.raises(ValueError, match="LinenTrainState"):
            state.apply_gradients(grads=params, **kwargs)


def test_flax_own_optimizer_names_the_update_that_is_needed():
    model = new_model()
    optimizer = nnx.Optimizer(model, SAM, wrt=nnx.Param)
    with pytest.raises(ValueError, match="nnx_update"):
        optimizer.update(model, nnx.state(model, nnx.Param))


MODEL: Any = new_model()
TX = optax.sgd(0.1)
LINEN: Any = nn.BatchNorm(use_running_average=False)
ANY: Any = None
WRONG: Any = [BATCH[0]]
LOSSES: Any = losses
OPTIMIZER = nnx.Optimizer(MODEL, TX, wrt=nnx.Param)
SWAPPED = {
    "linen_loss": (lambda: linen.linen_loss(LOSSES, LINEN), "flax's Linen as model"),
    "linen_loss of nnx": (lambda: linen.linen_loss(MODEL, LOSSES), "flax's Linen"),
    "linen_loss of a batch": (lambda: linen.linen_loss(LINEN, ANY), "as loss"),
    "init_linen": (
        lambda: linen.init_linen(TX, LINEN, jax.random.key(0), BATCH),
        "flax's Linen as model",
    ),
    "recalibrated states": (
        lambda: linen.recalibrate_batch_stats(
            LINEN, {"batch_stats": {}}, {}, [BATCH[0]]
        ),
        "were params and model_state swapped",
    ),
    "recalibrated model": (
        lambda: linen.recalibrate_batch_stats(WRONG, LINEN, {}, [BATCH[0]]),
        "flax's Linen as model",
    ),
    "recalibrated nnx": (
        lambda: glue.recalibrate_batch_stats(WRONG, MODEL),
        "flax's NNX as model",
    ),
    "nnx_loss": (lambda: nnx_loss(LOSSES, MODEL), "flax's NNX as model"),
    "init_nnx": (lambda: glue.init_nnx(TX, MODEL), "flax's NNX as model"),
    "init_nnx of nnx": (lambda: glue.init_nnx(MODEL, OPTIMIZER), "optimizer must be"),
    "nnx_update": (
        lambda: nnx_update(MODEL, OPTIMIZER, WRONG, losses),
        "needs a function as loss",
    ),
}


@pytest.mark.parametrize("call", SWAPPED)
def test_arguments_in_each_others_place_are_named(call):
    function: Any
    function, message = SWAPPED[call]
    with pytest.raises(ValueError, match=message):
        function()


# --- Convolutions on CPU --------------------------------------------------------------


class Convolution(nnx.Module):
    def __init__(self):
        self.layer = nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


AE_SAM = msam_optax.ae_sam(optax.sgd(0.1), rho=0.1, total_steps=10)
# Which optimizer and which module, and whether there is something to warn of.
SLOW = {
    "ae_sam": (AE_SAM, Convolution, True),
    "sam on every step": (SAM, Convolution, False),
    "a dense module": (AE_SAM, lambda: nnx.Linear(4, 2, rngs=nnx.Rngs(0)), False),
}


@pytest.mark.parametrize("case", SLOW)
@pytest.mark.parametrize("way", ["nnx_update", "LinenTrainState"])
def test_a_convolution_in_a_cond_on_cpu_is_warned_of(case, way):
    tx, make, is_slow = SLOW[case]
    model, batch = make(), jnp.ones((1, 4, 4, 1) if make is Convolution else (1, 4))
    graphdef, params = nnx.split(model)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    tree = nnx.to_pure_dict(params)
    state = LinenTrainState.create(apply_fn=None, params=tree, tx=tx)

    def loss(model, batch):
        return jnp.mean(model(batch) ** 2), {}

    def step(state):
        if way == "nnx_update":
            inside = nnx.clone(model)
            nnx_update(inside, nnx.clone(optimizer), loss, batch)
            return params_of(inside)
        grad_fn = jax.grad(lambda p: loss(nnx.merge(graphdef, p), batch)[0])
        return state.apply_gradients(grads=grad_fn(tree), grad_fn=grad_fn)

    expected: Any = contextlib.nullcontext()
    if is_slow:
        expected = pytest.warns(UserWarning, match="make_train_step, with .*_loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with expected:
            jax.eval_shape(step, state)


# --- Flax's own loss scaling and its own kinds of parameters --------------------------


def test_dynamic_scale_skips_a_step_whose_second_gradient_is_not_finite():
    """The recipe of LinenTrainState's docstring."""

    def loss(params):  # finite at 1, and not where SAM goes from there
        return -jnp.sum(jnp.sqrt(1.1 - params["w"]))

    state = LinenTrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=SAM)
    scale = scaling.DynamicScale(scale=8.0)

    def step(state, scale):
        new_scale, is_finite, _, grads = scale.value_and_grad(loss)(state.params)
        new = state.apply_gradients(
            grads=grads, grad_fn=lambda p: scale.value_and_grad(loss)(p)[-1]
        )
        finite = is_finite & jnp.isfinite(optax.tree.norm(new.params))
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
        return new, kept, new_scale, is_finite

    new, kept, _, is_finite = jax.jit(step)(state, scale)
    assert is_finite and not np.isfinite(new.params["w"]).any()
    np.testing.assert_array_equal(kept.params["w"], np.ones(3))
    small = state.replace(params={"w": jnp.full(3, 0.5)})
    new, kept, _, _ = jax.jit(step)(small, scale)
    assert_near(new.params, kept.params)
    perturbed = 0.5 + 0.3 / np.sqrt(3)
    expected = 0.5 - 0.05 / np.sqrt(1.1 - perturbed)
    np.testing.assert_allclose(new.params["w"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "tx", [SAM, msam_optax.msam(0.1, rho=0.3)], ids=["sam", "msam"]
)
def test_what_is_overwritten_with_its_gradient_has_no_optimizer(tx):
    """As the maxima of float8 layers in Flax are."""
    trained = {"w": jnp.array([3.0, 4.0])}
    params = {"params": trained, OVERWRITE_WITH_GRADIENT: {"amax": jnp.zeros(())}}

    def grad_fn(params):
        return {
            "params": jax.tree.map(lambda w: 2 * w, params["params"]),
            OVERWRITE_WITH_GRADIENT: {"amax": jnp.max(params["params"]["w"])},
        }

    state = LinenTrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads=grad_fn(params), grad_fn=grad_fn)
    assert state.params[OVERWRITE_WITH_GRADIENT]["amax"] == 4  # of the clean pass
    alone = LinenTrainState.create(apply_fn=None, params=trained, tx=tx)
    double = jax.grad(lambda p: jnp.sum(p["w"] ** 2))
    alone = alone.apply_gradients(grads=double(trained), grad_fn=double)
    assert_near(state.params["params"], alone.params)
    assert_near(state.eval_params["params"], alone.eval_params)


# --- What a donated step has taken over, and keys that serve twice --------------------


def test_what_a_step_has_taken_over_is_named_wherever_it_is_given():
    def deleted():
        array = jnp.ones(3)
        array.delete()
        return array

    batches, taken = [BATCH[0]], r"\['mean'\] was given to a training step, which took"
    state = {"batch_stats": {"mean": deleted(), "var": jnp.ones(3)}}
    with pytest.raises(ValueError, match=taken):
        linen.recalibrate_batch_stats(LINEN, {}, state, batches)
    tx = msam_optax.msam(0.1, rho=0.1)
    for name in ("eval_params", "train_params"):
        moved, old = getattr(msam_optax, name), tx.init({"w": jnp.ones(3)})
        with pytest.raises(ValueError, match=r"params\['w'\] was given to a training"):
            moved(old, {"w": deleted()})
        jax.tree.map(lambda x: x.delete(), old)
        with pytest.raises(ValueError, match=r"state\S+ was given to a training step"):
            moved(old, {"w": jnp.ones(3)})
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    norm.mean = nnx.BatchStat(deleted())
    with pytest.raises(ValueError, match=taken):
        glue.recalibrate_batch_stats(norm, batches)
    with pytest.raises(ValueError, match=r"params\['w'\] was given to a training step"):
        msam_optax.sharpness.mean_loss(
            lambda w, batch: jnp.mean(batch @ w["w"]), {"w": deleted()}, batches
        )


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(False)(nn.Dropout(0.5, deterministic=False)(x))


def test_jax_does_not_take_the_second_use_of_a_key_for_a_mistake():
    rngs, inputs = nnx.Rngs(0), BATCH[0]
    model = nnx.Sequential(
        nnx.Linear(3, 2, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.BatchNorm(2, rngs=rngs),
    )
    optimizer = nnx.Optimizer(model, SAM, wrt=nnx.Param)
    dropout = LinenDropout()
    variables = dict(dropout.init(jax.random.key(0), inputs))
    params = variables.pop("params")
    with jax.debug_key_reuse(True):
        for _ in range(2):
            nnx_update(model, optimizer, lambda m, b: (losses(m(b[0]), b), {}), BATCH)
        glue.recalibrate_batch_stats(model, [inputs, inputs])
        linen.recalibrate_batch_stats(dropout, params, variables, [inputs, inputs])
