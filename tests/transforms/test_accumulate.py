"""Gradient accumulation: one epsilon for the whole batch, or one for each part."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import msam_optax
from msam_optax.flax.nnx import init_nnx, nnx_loss
from msam_optax.training._microbatches import microbatched
from tests.every_method import build
from tests.versions import needs_microbatching

PARTS, BATCH = 4, 16
SGD = optax.sgd(0.1, momentum=0.9)
NAMES = ["msam", "sam", "ae_sam", "looksam", "sam, second order"]
OPTIMIZERS = {"sgd": SGD, **{name: build(name, SGD) for name in NAMES}}


def loss_fn(params, model_state, batch, key):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["hidden"])
    errors = (hidden @ params["out"] - targets) ** 2
    return jnp.mean(errors), (model_state, {"error": jnp.mean(jnp.abs(errors))})


def problem():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape))

    params = {"hidden": draw(3, 5), "out": draw(5)}
    return params, [(draw(BATCH, 3), draw(BATCH)) for _ in range(6)]


def train(loss_fn, optimizer, params, batches, **kwargs):
    step = msam_optax.make_train_step(loss_fn, optimizer, donate=False, **kwargs)
    state = msam_optax.TrainState(params, optimizer.init(params))
    for batch in batches:
        state, metrics = step(state, batch, None)
    return state, metrics


def assert_close(actual, expected, atol=1e-12):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
        actual,
        expected,
    )


def difference(a, b):
    return float(optax.tree.norm(optax.tree.sub(a, b)))


def parts_of(batch):
    """As `microbatched` cuts it: every fourth example."""
    return [jax.tree.map(lambda x, i=i: x[i::PARTS], batch) for i in range(PARTS)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_epsilon_for_the_whole_batch_equals_the_large_batch(x64, name):
    params, batches = problem()
    optimizer = OPTIMIZERS[name]
    state, metrics = train(loss_fn, optimizer, params, batches, microbatches=PARTS)
    large, large_metrics = train(loss_fn, optimizer, params, batches)
    assert_close(state, large)
    assert_close(metrics, large_metrics)


@needs_microbatching
def test_optax_microbatch_gives_the_same_gradient(x64):
    """The composition for a training loop of one's own."""
    params, (batch, *_) = problem()

    def loss(params, batch):
        return loss_fn(params, (), batch, None)[0]

    grad_fn = optax.microbatching.microbatch(
        jax.grad(loss),
        argnums=1,
        microbatch_size=BATCH // PARTS,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    tx = OPTIMIZERS["sam"]
    updates, _ = tx.update(
        grad_fn(params, batch),
        tx.init(params),
        params,
        grad_fn=lambda params: grad_fn(params, batch),
    )
    large, _ = train(loss_fn, tx, params, [batch])
    assert_close(optax.apply_updates(params, updates), large.params)


def test_one_epsilon_for_each_micro_batch_equals_m_sharpness(x64):
    params, (batch, *_) = problem()
    ascent = msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(0.5))
    each = optax.chain(ascent, optax.MultiSteps(SGD, PARTS).gradient_transformation())
    accumulated, _ = train(loss_fn, each, params, parts_of(batch))

    def gradient(params, part):
        return jax.grad(lambda p: loss_fn(p, (), part, None)[0])(params)

    mean = optax.tree.zeros_like(params)
    for part in parts_of(batch):
        clean = gradient(params, part)
        ascended = optax.tree.add_scale(params, 0.5 / optax.tree.norm(clean), clean)
        mean = optax.tree.add_scale(mean, 1 / PARTS, gradient(ascended, part))
    # MultiSteps divides in float32, whatever the parameters are.
    expected = optax.tree.add_scale(params, -0.1, mean)
    assert_close(accumulated.params, expected, atol=1e-7)

    # One epsilon for all is not the same.
    whole, _ = train(loss_fn, OPTIMIZERS["sam"], params, [batch], microbatches=PARTS)
    assert difference(accumulated.params, whole.params) > 1e-3


def test_multi_steps_around_the_ascent_is_refused():
    """It would see the last micro-batch's second gradient alone."""
    params, (batch, *_) = problem()
    around = optax.MultiSteps(OPTIMIZERS["sam"], PARTS).gradient_transformation()
    with pytest.raises(ValueError, match="MultiSteps stands around"):
        train(loss_fn, around, params, parts_of(batch))


def test_msam_inside_of_multi_steps_equals_the_large_batch(x64):
    params, batches = problem()
    around = optax.MultiSteps(OPTIMIZERS["msam"], PARTS).gradient_transformation()
    parts = [part for batch in batches for part in parts_of(batch)]
    state, _ = train(loss_fn, around, params, parts)
    large, _ = train(loss_fn, OPTIMIZERS["msam"], params, batches)
    weights, expected = (
        msam_optax.eval_params(s.opt_state, s.params) for s in (state, large)
    )
    assert_close((state.params, weights), (large.params, expected), atol=1e-6)
    assert difference(state.params, weights) > 0.1


@pytest.mark.parametrize("name", ["sgd", "sam"])
def test_memory_falls_with_the_micro_batch(name):
    """Activations of 2 x 4096 x 256 floats are 8 MB, the parameters half of one."""
    width, batch = 256, 4096

    def wide_loss(params, model_state, x, key):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2), (model_state, {})

    params = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * 2
    tx = OPTIMIZERS[name]
    state = jax.eval_shape(lambda p: msam_optax.TrainState(p, tx.init(p)), params)

    def bytes_needed(microbatches):
        step = msam_optax.make_train_step(
            wide_loss, tx, dispatch="in_graph", microbatches=microbatches
        )
        inputs = jax.ShapeDtypeStruct((batch, width), jnp.float32)
        compiled = jax.jit(lambda s, b: step(s, b, None)).lower(state, inputs).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes

    whole = bytes_needed(1)
    assert bytes_needed(4) < whole / 2
    assert bytes_needed(16) < whole / 8


def noisy_loss(params, model_state, batch, key):
    noise = jax.random.normal(key, params.shape)
    return jnp.sum(params * noise * jnp.mean(batch)), (model_state, {"noise": noise})


def test_micro_batches_draw_differently_but_both_gradients_alike(x64):
    params, batch, key = jnp.ones(1000), jnp.ones(PARTS), jax.random.key(0)
    _, (_, aux) = microbatched(noisy_loss, PARTS)(params, (), batch, key)
    # The mean of independent normals has a quarter of the variance.
    assert 0.2 < jnp.var(aux["noise"]) < 0.3

    def after(tx):
        step = msam_optax.make_train_step(noisy_loss, tx, microbatches=PARTS)
        state = msam_optax.TrainState(jnp.ones(1000), tx.init(params))
        return step(state, batch, key)[0].params

    # The loss is linear: the gradient is the same anywhere, for the same draws.
    assert_close(after(msam_optax.sam(optax.sgd(0.1))), after(optax.sgd(0.1)))


def test_states_are_averaged_and_counters_kept():
    def counting_loss(params, model_state, batch, key):
        mean = 0.9 * model_state["mean"] + 0.1 * jnp.mean(batch)
        state = {"mean": mean, "count": model_state["count"] + 1}
        return jnp.sum(params), (state, {})

    first = {"mean": jnp.array(1.0), "count": jnp.array(3)}
    batch = jnp.arange(8.0)
    _, (state, _) = microbatched(counting_loss, 4)(jnp.ones(2), first, batch, None)
    np.testing.assert_allclose(state["mean"], 0.9 + 0.1 * 3.5, rtol=1e-6)
    assert state["count"] == 3 + 4  # it goes on from one micro-batch to the next


def test_low_precision_gradients_are_summed_in_float32():
    """A sum of 512 ones in bfloat16 gets stuck at 256."""

    def linear(params, model_state, batch, key):
        return jnp.mean(params * batch), (model_state, {})

    params, batch = jnp.ones([], jnp.bfloat16), jnp.ones(512, jnp.bfloat16)
    gradient = jax.grad(lambda p: microbatched(linear, 512)(p, (), batch, None)[0])(
        params
    )
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), 1.0)


@pytest.mark.parametrize("parts", [0, -1, 1.5, "2"])
def test_the_number_of_micro_batches_is_checked(parts):
    with pytest.raises(ValueError, match="microbatches must be"):
        msam_optax.make_train_step(loss_fn, SGD, microbatches=parts)


@pytest.mark.parametrize(
    "batch", [jnp.ones((6, 3)), (jnp.ones((8, 3)), jnp.ones(4)), jnp.ones([])]
)
def test_a_batch_that_cannot_be_cut_is_named(batch):
    with pytest.raises(ValueError, match="into 4 micro-batches"):
        microbatched(loss_fn, 4)({}, (), batch, None)


def test_esam_says_that_it_needs_a_loss_for_each_example():
    def losses(params, model_state, batch, key):
        return (batch @ params) ** 2, (model_state, {})

    with pytest.raises(ValueError, match="one loss for each example"):
        train(
            losses,
            msam_optax.esam(SGD),
            jnp.ones(3),
            [jnp.ones((4, 3))],
            microbatches=2,
        )


def test_the_micro_batches_of_an_nnx_module_drop_different_units():
    model, optimizer = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), optax.identity()

    def loss(model, batch):
        outputs = model(jnp.broadcast_to(batch, (1, 1000)))
        return jnp.mean(outputs), {"outputs": outputs}

    step = msam_optax.make_train_step(
        nnx_loss(model, loss), optimizer, microbatches=PARTS
    )
    state, metrics = step(init_nnx(model, optimizer), jnp.ones((PARTS, 1)), None)
    # Mean of four that are 0 or 2: all alike would leave 0 and 2 alone.
    assert len(np.unique(metrics.aux["outputs"])) == PARTS + 1
    assert state.model_state["rngs"]["count"] == PARTS


def test_the_loss_is_scaled_within_each_micro_batch():
    """Else float16 gradients underflow before the scale comes in."""
    params, (batch, *_) = (
        jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in problem()
    )

    def half(params, model_state, batch, key):
        cast = jax.tree.map(lambda x: x.astype(jnp.float16), (params, batch))
        loss, others = loss_fn(cast[0], model_state, cast[1], key)
        return 1e-7 * loss.astype(jnp.float32), others

    def exact(params, model_state, batch, key):
        loss, others = loss_fn(params, model_state, batch, key)
        return 1e-7 * loss, others

    def momentum(loss_fn, scaling, microbatches):
        step = msam_optax.make_train_step(
            loss_fn, SGD, loss_scaling=scaling, microbatches=microbatches, donate=False
        )
        scale = scaling.init() if scaling else ()
        state = msam_optax.TrainState(params, SGD.init(params), (), scale)
        state, _ = step(state, batch, None)
        return optax.tree.get(state.opt_state, "trace")["hidden"]

    expected = momentum(exact, None, 1)
    scaled = momentum(half, msam_optax.LossScaling(), PARTS)
    np.testing.assert_allclose(scaled, expected, rtol=0.1, atol=1e-9)
    lost = momentum(half, None, PARTS)
    assert np.linalg.norm(lost - expected) > 0.2 * np.linalg.norm(expected)
