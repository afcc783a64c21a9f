"""Mixed precision: bfloat16, float16 with a loss scale, and steps that are skipped."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from msam_optax import LossScaling, TrainState, make_train_step
from tests.every_method import ONE_EACH, build

SGD = optax.sgd(0.1, momentum=0.9)
# Where no parameter is drawn, rounding alone would select ESAM's samples: draw all.
NAMES = [name for name in ONE_EACH if name != "esam"] + ["esam, every parameter"]
OPTIMIZERS = {
    "sgd": SGD,
    **{name: build(name, SGD, 0.01) for name in NAMES},
    "unnormalized": optax.chain(
        msam_optax.sharpness_aware_gradient(msam_optax.ascents.unnormalized(0.1)), SGD
    ),
}
SKIPPING = LossScaling(1.0, factor=1.0)


def losses(params, model_state, batch, key, compute_dtype=jnp.float32, size=1.0):
    inputs, targets = (x.astype(compute_dtype) for x in batch)
    kernels = jax.tree.map(lambda x: x.astype(compute_dtype), params)
    hidden = jnp.tanh(inputs @ kernels["hidden"])
    outputs = (hidden @ kernels["out"]).astype(jnp.float32)
    count = jax.tree.map(lambda x: x + 1, model_state)
    return size * (outputs - targets.astype(jnp.float32)) ** 2, (count, {})


def problem(dtype=jnp.float32, steps=6):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {"hidden": draw(3, 5), "out": draw(5)}
    return params, [(draw(16, 3), draw(16)) for _ in range(steps)]


def begin(optimizer, params, scaling):
    scale = () if scaling is None else scaling.init()
    return TrainState(params, optimizer.init(params), jnp.zeros([], jnp.int32), scale)


def train(loss_fn, optimizer, params, batches, scaling=None, **kwargs):
    step = make_train_step(
        loss_fn, optimizer, donate=False, loss_scaling=scaling, **kwargs
    )
    state = begin(optimizer, params, scaling)
    for batch in batches:
        state, metrics = step(state, batch, None)
    return state, metrics


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected):
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, actual, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_power_of_two_changes_nothing(name):
    """All methods get unscaled gradients, those that depend on the scale as well."""
    params, batches = problem()
    optimizer = OPTIMIZERS[name]
    state, metrics = train(losses, optimizer, params, batches, LossScaling(2.0**10))
    plain, plain_metrics = train(losses, optimizer, params, batches)
    assert_close((state[:3], metrics.loss), (plain[:3], plain_metrics.loss))


@pytest.mark.parametrize("name", ["sgd", "sam", "msam", "fisher_sam", NAMES[-1]])
def test_small_float16_gradients_do_not_underflow(name):
    params, batches = problem()
    tiny = partial(losses, compute_dtype=jnp.float16, size=1e-7)
    exact = partial(losses, size=1e-7)
    optimizer = OPTIMIZERS[name]

    # Weights can't move by 1e-8 in float32, but the momentum can.
    def momentum(loss_fn, scaling=None):
        state, _ = train(loss_fn, optimizer, params, batches[:1], scaling)
        return optax.tree.get(state.opt_state, "trace")["hidden"]

    expected = momentum(exact)
    scaled = momentum(tiny, LossScaling())
    np.testing.assert_allclose(scaled, expected, rtol=0.1, atol=2e-10)
    lost = momentum(tiny)
    assert np.linalg.norm(lost - expected) > 0.2 * np.linalg.norm(expected)


@pytest.mark.parametrize("dispatch", ["in_graph", "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_that_is_not_finite_is_skipped_whole(name, dispatch):
    """Weights, momentum, policy statistics, perturbation, model state: all stay."""
    params, batches = problem()
    optimizer = OPTIMIZERS[name]
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), batches[3])
    scaling = LossScaling(2.0**8)
    step = make_train_step(
        losses, optimizer, donate=False, loss_scaling=scaling, dispatch=dispatch
    )
    state = begin(optimizer, params, scaling)
    for batch in batches[:3]:
        state, metrics = step(state, batch, None)
        assert not metrics.skipped
    after, metrics = step(state, broken, None)
    assert metrics.skipped
    assert_equal(after[:3], state[:3])
    assert float(after.loss_scale.scale) == 2.0**7
    # Training goes on as if the batch had not been.
    resumed, metrics = step(after, batches[4], None)
    straight, _ = step(state, batches[4], None)
    assert not metrics.skipped
    assert_close(resumed[:3], straight[:3])


def test_an_overflow_in_the_second_gradient_alone_is_skipped():
    def quartic(params, model_state, batch, key):
        return jnp.sum(params**4), (model_state, {})

    optimizer = msam_optax.sam(SGD, rho=1e20)
    state, metrics = train(quartic, optimizer, jnp.ones(3), [()], SKIPPING)
    assert metrics.skipped and jnp.isfinite(metrics.loss)
    assert_equal(state.params, jnp.ones(3))
    # Without: the weights are lost.
    state, _ = train(quartic, optimizer, jnp.ones(3), [()])
    assert not jnp.isfinite(state.params).any()


@pytest.mark.parametrize("kind", ["MultiSteps", "lion"])
def test_an_infinity_that_the_updates_do_not_show_is_skipped(kind):
    """An accumulator's updates are zeros, Lion's are signs."""

    def steep(params, model_state, batch, key):
        return jnp.sum(batch * params**4), (model_state, {})

    base = {
        "MultiSteps": optax.MultiSteps(SGD, 2).gradient_transformation(),
        "lion": optax.lion(0.1),
    }[kind]
    ascent = msam_optax.sharpness_aware_gradient(msam_optax.ascents.normalized(1e20))
    batches = [jnp.float32(1.0), jnp.float32(0.0), jnp.float32(0.0)]
    state, _ = train(
        steep, optax.chain(ascent, base), jnp.ones(3), batches[:1], SKIPPING
    )
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))
    state, metrics = train(
        steep, optax.chain(ascent, base), jnp.ones(3), batches, SKIPPING
    )
    assert not metrics.skipped


def test_the_scale_halves_and_grows_within_its_bounds():
    scaling = LossScaling(4.0, growth_interval=3, minimum=1.0)
    state, scales = scaling.init(), []
    for finite in [True, True, True, True, True, False, True, True, True]:
        state = scaling.adjust(state, jnp.asarray(finite))
        scales.append(float(state.scale))
    # Growth after three in a row; an overflow starts the count anew.
    assert scales == [4, 4, 8, 8, 8, 4, 4, 4, 8]
    for _ in range(5):
        state = scaling.adjust(state, jnp.asarray(False))
    assert state.scale == 1.0
    largest = state._replace(scale=jnp.float32(3e38), finite_steps=jnp.int32(2))
    assert jnp.isfinite(scaling.adjust(largest, jnp.asarray(True)).scale)


def test_a_scale_of_one_only_skips():
    params, batches = problem()
    state, _ = train(losses, OPTIMIZERS["sam"], params, batches, SKIPPING)
    plain, _ = train(losses, OPTIMIZERS["sam"], params, batches)
    assert_close(state[:3], plain[:3])
    assert state.loss_scale.scale == 1.0


def test_float16_training_finds_its_scale():
    """The first scale overflows; training comes out where float32's does."""
    params, batches = problem(steps=40)
    half = partial(losses, compute_dtype=jnp.float16)
    step = make_train_step(
        half, OPTIMIZERS["ae_sam"], donate=False, loss_scaling=LossScaling(2.0**24)
    )
    state = begin(OPTIMIZERS["ae_sam"], params, LossScaling(2.0**24))
    skipped = 0
    while int(state.model_state) < 40:
        state, metrics = step(state, batches[int(state.model_state)], None)
        skipped += int(metrics.skipped)
    assert 0 < skipped < 15
    exact, _ = train(losses, OPTIMIZERS["sam"], params, batches)
    last = batches[-1]
    assert losses(state.params, 0, last, None)[0].mean() < 1.3 * (
        losses(exact.params, 0, last, None)[0].mean() + 0.1
    )


@pytest.mark.parametrize("name", ["msam", "adamw_msam", "sam", "ae_sam", "looksam"])
def test_bfloat16_compute_keeps_float32_state(name):
    params, batches = problem()
    mixed = partial(losses, compute_dtype=jnp.bfloat16)
    state, metrics = train(mixed, OPTIMIZERS[name], params, batches)
    for leaf in jax.tree.leaves((state.params, state.opt_state, metrics.grad_norm)):
        assert leaf.dtype != jnp.bfloat16
    exact, _ = train(losses, OPTIMIZERS[name], params, batches)
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=0.05), state.params, exact.params
    )


@pytest.mark.parametrize("name", ["msam", "adamw_msam", "sam", "ae_sam", "looksam"])
def test_bfloat16_parameters_have_float32_statistics(name):
    params, batches = problem(jnp.bfloat16)
    state, metrics = train(losses, OPTIMIZERS[name], params, batches)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.params))
    assert metrics.grad_norm.dtype == jnp.float32
    scalars = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
    assert all(x.dtype != jnp.bfloat16 for x in scalars)


def test_the_scale_is_carried_through_a_scan():
    params, batches = problem()
    step = make_train_step(losses, OPTIMIZERS["ae_sam"], loss_scaling=LossScaling())
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    state, _ = jax.lax.scan(
        lambda state, batch: step(state, batch, None),
        begin(OPTIMIZERS["ae_sam"], params, LossScaling()),
        stacked,
    )
    assert state.loss_scale.finite_steps == len(batches)


@pytest.mark.parametrize("given", [None, LossScaling()])
def test_a_scale_without_its_state_or_a_state_without_scale_is_named(given):
    params, batches = problem()
    step = make_train_step(losses, SGD, loss_scaling=given)
    state = begin(SGD, params, None if given else LossScaling())
    with pytest.raises(ValueError, match=r"loss_scaling.init\(\)"):
        step(state, batches[0], None)


@pytest.mark.parametrize(
    "senseless",
    [
        dict(initial=0.5),
        dict(initial=-1.0),
        dict(initial=jnp.inf),
        dict(factor=0.5),
        dict(growth_interval=0),
        dict(minimum=0.0),
    ],
)
def test_a_senseless_scaling_is_refused_when_it_is_built(senseless):
    with pytest.raises(ValueError, match="must be"):
        LossScaling(**senseless)


def test_only_a_loss_scaling_will_do():
    scale: Any = 1024.0
    with pytest.raises(ValueError, match="must be a LossScaling"):
        make_train_step(losses, SGD, loss_scaling=scale)
