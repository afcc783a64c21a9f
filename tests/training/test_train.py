"""make_train_step: both dispatches, the clean pass, the metrics and the cost."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from msam_optax.flax.linen import init_linen, linen_loss

STEPS, RHO = 8, 0.1


class Mlp(nn.Module):
    """Two layers with dropout between."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.tanh(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


class ConvNet(nn.Module):
    """One convolution with batch norm and dropout."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.3, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)


def cross_entropy(logits: Any, batch: Any) -> tuple[jax.Array, Any]:
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
    return value, {"accuracy": jnp.mean(jnp.argmax(logits, -1) == batch[1])}


MODELS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "mlp": (Mlp(), (5,)),
    "conv": (ConvNet(), (4, 4, 1)),
}


def batch_of(name: str, t: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch; its inputs' size changes, so that AE-SAM decides both ways."""
    rng = np.random.default_rng(t)
    size = 0.2 if t % 3 == 0 else 3.0
    inputs = size * rng.normal(size=(8, *MODELS[name][1]))
    return inputs.astype(np.float32), rng.integers(0, 3, size=8).astype(np.int32)


def fresh_state(name: str, tx: Any) -> mo.TrainState:
    model, shape = MODELS[name]
    return init_linen(model, tx, jax.random.key(0), jnp.ones((1, *shape)), train=False)


@functools.cache
def loss_fn_of(name: str) -> Callable[..., Any]:
    return linen_loss(MODELS[name][0], cross_entropy, train=True)


Trajectory = list[tuple[mo.TrainState, mo.StepMetrics]]


def train(step: Any, state: Any, name: str, steps: int = STEPS) -> Trajectory:
    trajectory = []
    for t in range(steps):
        state, metrics = step(state, batch_of(name, t), jax.random.key(t))
        trajectory.append((state, metrics))
    return trajectory


def ae_sam() -> optax.GradientTransformationExtraArgs:
    return mo.ae_sam(optax.sgd(0.1, momentum=0.9), RHO, total_steps=STEPS)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "ae_sam": ae_sam,
    "ss_sam": lambda: mo.ss_sam(optax.adam(0.01), RHO, seed=1),
    "every": lambda: optax.chain(
        mo.employ(
            mo.policies.every(3),
            mo.sharpness_aware_gradient(mo.ascents.adaptive(RHO, 0.01)),
        ),
        optax.clip_by_global_norm(1.0),
        optax.sgd(0.1),
    ),
    "sam": lambda: mo.sam(optax.sgd(0.1, momentum=0.9), RHO),
    "msam": lambda: mo.msam(0.1, rho=RHO),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
}


@functools.cache
def trajectory(name: str, optimizer: str, dispatch: Any) -> Trajectory:
    tx = OPTIMIZERS[optimizer]()
    step = mo.make_train_step(loss_fn_of(name), tx, dispatch=dispatch, donate=False)
    return train(step, fresh_state(name, tx), name)


# --- Dispatch -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, optimizer",
    [*(("mlp", optimizer) for optimizer in OPTIMIZERS), ("conv", "every")],
)
def test_both_dispatches_make_the_same_steps(name, optimizer):
    host = trajectory(name, optimizer, "host")
    in_graph = trajectory(name, optimizer, "in_graph")
    chex.assert_trees_all_close(host, in_graph, rtol=1e-4, atol=1e-6)
    if optimizer in ("ae_sam", "ss_sam", "every"):
        decisions = [bool(metrics.employed) for _, metrics in host]
        assert set(decisions) == {True, False}
        assert decisions == [bool(metrics.employed) for _, metrics in in_graph]


def quadratic_loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    del key
    return jnp.mean((batch @ params["w"]) ** 2), (model_state, {"seen": batch[0, 0]})


def quadratic_state(tx: Any) -> mo.TrainState:
    params = {"w": jnp.arange(1.0, 4.0)}
    return mo.TrainState(params, tx.init(params))


# --- What it costs --------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_run_are_the_steps_and_those_employed(optimizer, dispatch):
    count = 0

    def tick(_: Any) -> None:
        nonlocal count
        count += 1

    def counted_loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        value, rest = quadratic_loss(params, model_state, batch, key)
        jax.debug.callback(tick, value)
        return value, rest

    tx = OPTIMIZERS[optimizer]()
    step = mo.make_train_step(counted_loss, tx, dispatch=dispatch)
    state, employed = quadratic_state(tx), 0
    for t in range(STEPS):
        size = 0.1 if t % 3 else 2.0
        state, metrics = step(state, size * jnp.eye(3), None)
        employed += int(metrics.employed)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert count == STEPS + employed
    assert employed == {"sam": STEPS, "msam": 0, "sgd": 0}.get(optimizer, employed)
    if optimizer in ("ae_sam", "every"):
        assert 0 < employed < STEPS


# --- The clean pass -------------------------------------------------------------------


def clean_and_perturbed(
    name: str, state: Any, batch: Any, key: Any, key_2: Any = None
) -> tuple[Any, Any, Any]:
    """The clean gradient, the perturbed point, and the gradient there."""

    def grad(params: Any, key: Any) -> Any:
        loss_fn = loss_fn_of(name)
        return jax.grad(loss_fn, has_aux=True)(params, state.model_state, batch, key)[0]

    g = grad(state.params, key)
    epsilon = optax.tree.scale(RHO / optax.tree.norm(g), g)
    there = optax.tree.add(state.params, epsilon)
    return g, there, grad(there, key if key_2 is None else key_2)


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
def test_batch_statistics_come_from_the_clean_pass_alone(dispatch):
    tx = mo.ss_sam(optax.sgd(0.1), RHO, probability=1.0)
    state, key = fresh_state("conv", tx), jax.random.key(5)
    batch = batch_of("conv", 1)
    step = mo.make_train_step(loss_fn_of("conv"), tx, dispatch=dispatch, donate=False)
    new_state, metrics = step(state, batch, key)
    assert metrics.employed

    def statistics(params: Any) -> Any:
        return loss_fn_of("conv")(params, state.model_state, batch, key)[1][0]

    _, there, _ = clean_and_perturbed("conv", state, batch, key)
    chex.assert_trees_all_close(
        new_state.model_state, statistics(state.params), rtol=1e-5, atol=1e-6
    )
    for wrong in (statistics(there), state.model_state):
        gap = optax.tree.norm(optax.tree.sub(new_state.model_state, wrong))
        assert gap > 1e-3


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
def test_both_passes_drop_the_same_units(dispatch):
    tx = mo.ss_sam(optax.sgd(1.0), RHO, probability=1.0)
    state, key = fresh_state("mlp", tx), jax.random.key(5)
    batch = batch_of("mlp", 1)
    step = mo.make_train_step(loss_fn_of("mlp"), tx, dispatch=dispatch, donate=False)
    new_state, _ = step(state, batch, key)
    gradient = optax.tree.sub(state.params, new_state.params)
    *_, expected = clean_and_perturbed("mlp", state, batch, key)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)
    other = jax.random.key(6)
    *_, wrong = clean_and_perturbed("mlp", state, batch, key, other)
    assert optax.tree.norm(optax.tree.sub(gradient, wrong)) > 0.05


def test_another_key_drops_other_units():
    tx = optax.sgd(0.1)
    step = mo.make_train_step(loss_fn_of("mlp"), tx, donate=False)
    state = fresh_state("mlp", tx)
    losses = {
        float(step(state, batch_of("mlp", 1), jax.random.key(k))[1].loss)
        for k in (1, 1, 2)
    }
    assert len(losses) == 2


# --- Metrics --------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_metrics_are_those_of_the_step(optimizer, dispatch):
    tx = OPTIMIZERS[optimizer]()
    before = fresh_state("mlp", tx)
    employed_steps = 0
    for t, (after, metrics) in enumerate(trajectory("mlp", optimizer, dispatch)):
        batch, key = batch_of("mlp", t), jax.random.key(t)
        (loss, (_, aux)), g = jax.value_and_grad(loss_fn_of("mlp"), has_aux=True)(
            before.params, before.model_state, batch, key
        )
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(g), rtol=1e-4)
        chex.assert_trees_all_close(metrics.aux, aux)
        employed_steps += int(metrics.employed)
        np.testing.assert_allclose(
            metrics.employed_fraction, employed_steps / (t + 1), rtol=1e-6
        )
        if optimizer == "msam":
            epsilon = optax.tree.sub(
                after.params, mo.eval_params(after.opt_state, after.params)
            )
            expected = optax.tree.norm(epsilon)
            np.testing.assert_allclose(expected, RHO, rtol=1e-4)
        elif optimizer == "every":  # an adaptive radius has no fixed length
            assert (metrics.perturbation_norm > 0) == metrics.employed
            expected = metrics.perturbation_norm
        else:
            expected = RHO * float(metrics.employed)
        np.testing.assert_allclose(metrics.perturbation_norm, expected, rtol=1e-4)
        before = after
    if optimizer in ("sgd", "msam"):
        assert employed_steps == 0
    if optimizer == "sam":
        assert employed_steps == STEPS


def test_the_metrics_are_scalars():
    for _, metrics in trajectory("mlp", "ae_sam", "host"):
        chex.assert_shape(jax.tree.leaves(metrics), ())


# --- Memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
@pytest.mark.parametrize("optimizer", ["ae_sam", "every", "sam", "msam"])
def test_the_state_is_donated_unless_told_not_to(optimizer, dispatch):
    for donate in (True, False):
        tx = OPTIMIZERS[optimizer]()
        step = mo.make_train_step(quadratic_loss, tx, dispatch=dispatch, donate=donate)
        state = quadratic_state(tx)
        new_state = state
        for _ in range(2):
            given = [x for x in jax.tree.leaves(new_state) if x.ndim > 0]
            new_state, metrics = step(new_state, jnp.eye(3), None)
            assert all(x.is_deleted() == donate for x in given)
        chex.assert_tree_all_finite((new_state, metrics))


def test_the_step_is_compiled_once_for_each_branch():
    traces = 0

    def traced_loss(*args: Any) -> Any:
        nonlocal traces
        traces += 1
        return quadratic_loss(*args)

    tx = OPTIMIZERS["every"]()
    step = mo.make_train_step(traced_loss, tx, dispatch="host")
    state = quadratic_state(tx)
    for t in range(4):
        state, _ = step(state, jnp.eye(3), None)
        if t == 1:  # by now both branches have run
            compiled = traces
    assert traces == compiled


# --- Losses of any kind ---------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["host", "in_graph", "auto"])
def test_a_plain_loss_needs_neither_flax_nor_a_key(dispatch):
    tx = mo.sam(optax.sgd(0.1), RHO)
    step = mo.make_train_step(quadratic_loss, tx, dispatch=dispatch, donate=False)
    state = quadratic_state(tx)
    batch = jnp.eye(3) * 2
    new_state, metrics = step(state, batch, None)
    w = state.params["w"]
    g = 2 * (batch.T @ batch @ w) / 3
    there = w + RHO * g / jnp.linalg.norm(g)
    np.testing.assert_allclose(
        new_state.params["w"], w - 0.1 * 2 * (batch.T @ batch @ there) / 3, rtol=1e-5
    )
    assert metrics.aux == {"seen": 2.0}
    assert new_state.model_state == ()


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
def test_a_model_state_of_any_structure_goes_round(dispatch):
    def counting_loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        del key
        value = jnp.sum((params - batch) ** 2)
        return value, ((model_state[0] + 1, {"last": value}), [value, model_state[0]])

    tx, params = mo.ss_sam(optax.sgd(0.1), RHO, probability=1.0), jnp.ones(2)
    model_state = (jnp.int32(0), {"last": jnp.zeros([])})
    state = mo.TrainState(params, tx.init(params), model_state)
    step = mo.make_train_step(counting_loss, tx, dispatch=dispatch)
    for t in range(3):
        state, metrics = step(state, jnp.zeros(2), None)
        assert metrics.aux[1] == t
    assert state.model_state[0] == 3  # the perturbed passes did not count
    assert state.model_state[1]["last"] == metrics.loss


def test_a_linen_module_without_random_streams_takes_no_key():
    tx = mo.sam(optax.sgd(0.1), RHO)
    loss_fn = linen_loss(nn.Dense(3), cross_entropy)
    state = init_linen(nn.Dense(3), tx, jax.random.key(0), jnp.ones((1, 5)))
    step = mo.make_train_step(loss_fn, tx)
    _, metrics = step(state, batch_of("mlp", 0), None)
    assert 0 <= metrics.aux["accuracy"] <= 1


@pytest.mark.parametrize("dispatch", ["host", "in_graph"])
def test_training_recovers_from_a_batch_of_nan(dispatch):
    guarded = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 2)
    tx = mo.ae_sam(guarded, RHO, total_steps=STEPS)
    step = mo.make_train_step(quadratic_loss, tx, dispatch=dispatch, donate=False)
    state, _ = step(quadratic_state(tx), jnp.eye(3), None)
    skipped, _ = step(state, jnp.full((3, 3), jnp.nan), None)
    chex.assert_trees_all_equal(skipped.params, state.params)
    chex.assert_trees_all_equal(
        skipped.opt_state[1].inner_state, state.opt_state[1].inner_state
    )
    ours, _ = step(skipped, jnp.eye(3), None)
    expected, _ = step(state, jnp.eye(3), None)
    chex.assert_trees_all_equal(ours.params, expected.params)
    chex.assert_tree_all_finite(ours.params)


# --- Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "result", [lambda p: p.sum(), lambda p: (p.sum(), {}), lambda p: (p.sum(), 0.0)]
)
def test_a_loss_function_with_another_result_is_told_what_is_needed(result):
    tx = optax.sgd(0.1)
    step = mo.make_train_step(lambda params, *_: result(params), tx)
    state = mo.TrainState(jnp.ones(3), tx.init(jnp.ones(3)))
    with pytest.raises(ValueError, match=r"must return \(loss, \(model_state, aux\)\)"):
        step(state, None, None)


def test_the_step_says_what_it_needs_in_the_place_of_another_state():
    def loss_fn(params, model_state, batch, key):
        return jnp.sum(params), (model_state, {})

    wrong: Any = (jnp.ones(2), ())
    step = mo.make_train_step(loss_fn, optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"TrainState\(params, .* a builtins\.tuple was"
    ):
        step(wrong, None, None)


def test_counts_are_averaged_over_the_parts_too():
    def counting(params, model_state, batch, key):
        right = batch > 0
        aux = {"right": jnp.sum(right), "all": jnp.all(right), "mean": jnp.mean(right)}
        return jnp.mean(batch * params), (model_state, aux)

    tx = optax.sgd(0.1)
    # The wrong ones are all in the last of the parts, which are columns.
    batch = jnp.where(jnp.arange(16) % 4 == 3, -1.0, 1.0)
    step = mo.make_train_step(counting, tx, microbatches=4)
    state = mo.TrainState(jnp.ones([]), tx.init(jnp.ones([])))
    _, metrics = step(state, batch, None)
    assert metrics.aux == {"right": 3.0, "all": 0.75, "mean": 0.75}


def test_parts_have_keys_of_their_own_from_a_dict_of_keys():
    def noisy(params, model_state, batch, key):
        noise = jax.random.normal(key["drop"], batch.shape)
        return jnp.mean(noise * params), (model_state, {})

    tx = optax.sgd(0.1)
    state = mo.TrainState(jnp.ones([]), tx.init(jnp.ones([])))
    step = mo.make_train_step(noisy, tx, microbatches=2)
    _, metrics = step(state, jnp.ones(4), {"drop": jax.random.key(0)})
    assert jnp.isfinite(metrics.loss)


def test_examples_are_selected_where_all_of_the_batch_holds_them():
    def weighted(params, model_state, batch, key):
        losses = (batch["x"] @ params) ** 2
        return losses * batch["weights"][jnp.arange(16) % 3][: len(losses)], (
            model_state,
            {},
        )

    tx = mo.esam(optax.sgd(0.1))
    state = mo.TrainState(jnp.ones(2), tx.init(jnp.ones(2)))
    batch = {"x": jnp.ones((16, 2)), "weights": jnp.ones(3)}
    with pytest.raises(ValueError, match="what is no example"):
        mo.make_train_step(weighted, tx)(state, batch, None)
