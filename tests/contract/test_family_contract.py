"""What the family promises beyond the table of every method in ``test_contract``."""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax as mo
from tests.contract import test_contract as contract
from tests.contract.test_contract import Carry, falling, leaves, params, sgd, spy, start

STEPS = 6

# --- ESAM, which needs the loss of each example in place of grad_fn -------------------

ESAM: dict[str, Callable[[optax.GradientTransformation], Any]] = {
    "esam": lambda base: mo.esam(base, 0.2),
    "esam, rho schedule": lambda base: mo.esam(base, falling, beta=0.8, gamma=0.3),
    "esam, by coordinate": lambda base: mo.esam(base, 0.2, by_coordinate=True, seed=3),
}

all_esam = pytest.mark.parametrize("name", ESAM)


@pytest.fixture(autouse=True)
def fresh_trace_counts():
    """chex counts the traces of a function by its source line, across tests."""
    chex.clear_trace_counter()


def losses(p: Any, t: Any, indices: Any = None) -> jax.Array:
    """Losses of eight examples, which differ from step to step."""
    inputs = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3) * (1 + 0.2 * t)
    inputs = inputs if indices is None else inputs[indices]
    outputs = inputs.astype(p["kernel"].dtype) @ p["kernel"] + p["bias"]
    return jnp.sum(jnp.cos(outputs), axis=-1)


def esam_step(tx: Any, p: Any, state: Any, t: Any, **extra_args: Any) -> Carry:
    updates, state = tx.update(
        jax.grad(lambda p: jnp.mean(losses(p, t)))(p),
        state,
        p,
        per_example_losses=losses(p, t),
        per_example_loss_fn=lambda p, indices: losses(p, t, indices),
        **extra_args,
    )
    return Carry(optax.apply_updates(p, updates), state)


@functools.cache
def esam(name: str) -> Any:
    return ESAM[name](sgd())


@functools.cache
def compiled_step(name: str) -> Callable[..., Carry]:
    return jax.jit(functools.partial(esam_step, esam(name)))


@functools.cache
def trajectory(name: str) -> list[Carry]:
    """The carries before the first step and after each."""
    carries = [start(esam(name))]
    for t in range(STEPS):
        carries.append(compiled_step(name)(*carries[-1], jnp.int32(t)))
    return carries


@all_esam
def test_unrelated_extra_arguments_change_nothing_and_are_passed_on(name):
    seen: dict[str, Any] = {}
    tx = ESAM[name](optax.chain(spy(seen), sgd()))
    unrelated = jax.jit(
        lambda p, state, t: esam_step(
            tx, p, state, t, value=3.0, grad_fn=len, unrelated={"a": "string"}
        )
    )
    last = start(tx)
    for t in range(2):
        last = unrelated(*last, jnp.int32(t))
    chex.assert_trees_all_equal(last.params, trajectory(name)[2].params)
    assert seen["unrelated"] == {"a": "string"}
    assert seen["value"] == 3.0
    assert seen["grad_fn"] is len


@all_esam
def test_every_step_runs_the_same_compilation(name):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p: Any, state: Any, t: Any) -> Carry:
        return esam_step(esam(name), p, state, t)

    carry = start(esam(name))
    for t in range(3):
        carry = step(*carry, jnp.int32(t))


@contract.all_dtypes
@all_esam
def test_dtypes_and_shapes_last_from_step_to_step(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx = ESAM[name](sgd())
        carry = start(tx, dtype)

        def body(c: Carry, t: Any) -> tuple[Carry, None]:
            return esam_step(tx, *c, t), None

        # Raises where a dtype, a shape or a weak type changes.
        last, _ = jax.eval_shape(
            lambda c: jax.lax.scan(body, c, jnp.arange(STEPS)), carry
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(last, carry)
        scalars = {str(x.dtype) for x in leaves(carry.state) if x.ndim == 0}
        assert scalars == {"float64" if dtype == jnp.float64 else "float32", "int32"}


@all_esam
def test_scan_is_the_loop(name):
    def body(c: Carry, t: Any) -> tuple[Carry, None]:
        return esam_step(esam(name), *c, t), None

    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(STEPS)))(
        trajectory(name)[0]
    )
    chex.assert_trees_all_close(scanned, trajectory(name)[-1], rtol=1e-4, atol=1e-5)


@all_esam
def test_init_needs_no_values(name):
    abstract = jax.eval_shape(params)
    expected = jax.eval_shape(esam(name).init, abstract)
    concrete = esam(name).init(params())
    chex.assert_trees_all_equal_shapes_and_dtypes(concrete, expected)
    chex.assert_trees_all_equal(esam(name).init(abstract), concrete)


@all_esam
def test_params_and_state_can_both_be_donated(name):
    carry = start(esam(name))
    pointers = [x.unsafe_buffer_pointer() for x in leaves(carry)]
    assert len(set(pointers)) == len(pointers), "two arrays share their memory"
    donating = jax.jit(functools.partial(esam_step, esam(name)), donate_argnums=(0, 1))
    for t in range(2):
        given = [x for x in leaves(carry) if x.ndim > 0]
        carry = donating(*carry, jnp.int32(t))
        assert all(x.is_deleted() for x in given)
    chex.assert_trees_all_close(carry, trajectory(name)[2], rtol=1e-5, atol=1e-6)


@all_esam
def test_a_run_resumed_from_a_pickle_continues_bit_for_bit(name):
    saved = pickle.dumps(jax.device_get(trajectory(name)[3]))
    carry = jax.tree.map(jnp.asarray, pickle.loads(saved))
    for t in range(3, STEPS):
        carry = compiled_step(name)(*carry, jnp.int32(t))
    chex.assert_trees_all_equal(carry, trajectory(name)[-1])


# --- Numbers that optax.inject_hyperparams changes while training ---------------------

Build = Callable[..., optax.GradientTransformationExtraArgs]

# name: (factory, its other arguments, the number and two values of it)
NUMBERS: dict[str, tuple[Build, dict[str, Any], str, Any, Any]] = {
    "looksam alpha": (mo.looksam, dict(rho=0.2, k=2), "alpha", 0.7, 0.1),
    "looksam k": (mo.looksam, dict(rho=0.2), "k", 2, 3),
    "ae_looksam alpha": (
        mo.ae_looksam,
        dict(rho=0.2, total_steps=STEPS, lambda_1=3.0, lambda_2=3.0),
        "alpha",
        0.7,
        0.1,
    ),
    "ae_looksam lambda_2": (
        mo.ae_looksam,
        dict(rho=0.2, total_steps=STEPS, lambda_1=0.5),
        "lambda_2",
        3.0,
        -3.0,
    ),
    "gsam alpha": (mo.gsam, dict(rho=0.2), "alpha", 0.4, -0.8),
    "gradient_norm_penalty alpha": (
        mo.gradient_norm_penalty,
        dict(rho=0.2),
        "alpha",
        0.8,
        0.1,
    ),
    "wsam gamma": (mo.wsam, dict(rho=0.2), "gamma", 0.8, 0.3),
    "wsam decoupled gamma": (
        mo.wsam,
        dict(rho=0.2, learning_rate=0.1),
        "gamma",
        0.8,
        0.3,
    ),
    "wsam decoupled learning_rate": (
        mo.wsam,
        dict(rho=0.2),
        "learning_rate",
        0.1,
        0.02,
    ),
    "friendly_sam sigma": (mo.friendly_sam, dict(rho=0.2), "sigma", 1.0, 0.5),
    "friendly_sam decay": (mo.friendly_sam, dict(rho=0.2), "decay", 0.9, 0.3),
    "fisher_sam eta": (mo.fisher_sam, dict(rho=0.2), "eta", 1.0, 30.0),
    "esam beta": (mo.esam, dict(rho=0.2, by_coordinate=True), "beta", 0.3, 0.9),
    "esam rho": (mo.esam, dict(), "rho", 0.2, 0.6),
    "esam seed": (mo.esam, dict(rho=0.2), "seed", 0, 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_an_injected_number_is_read_from_the_state(name):
    factory, others, number, value, other = NUMBERS[name]
    static = ("gamma",) if factory is mo.esam else ()  # ESAM's shapes follow from it
    one_step: Any = esam_step if factory is mo.esam else contract.one_step
    build = functools.partial(factory, sgd(), **others)
    injected = optax.inject_hyperparams(factory, static_args=static)(
        sgd(), **others, **{number: value}
    )

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p: Any, state: Any, t: Any) -> Any:
        return one_step(injected, p, state, t)

    def run(value: Any) -> Any:
        carry = start(injected)
        kept = carry.state.hyperparams[number]
        carry.state.hyperparams[number] = jnp.asarray(value, kept.dtype)
        for t in range(5):
            carry = Carry(*step(*carry, jnp.int32(t)))
        return carry.params

    def built(value: Any) -> Any:
        tx = build(**{number: value})
        step = jax.jit(functools.partial(one_step, tx))
        carry = start(tx)
        for t in range(5):
            carry = Carry(*step(*carry, jnp.int32(t)))
        return carry.params

    before, after = run(value), run(other)
    chex.assert_trees_all_close(after, built(other), rtol=1e-5, atol=1e-6)
    assert not np.allclose(before["kernel"], after["kernel"], atol=1e-4)


# --- Training steps -------------------------------------------------------------------

DISPATCHED: dict[str, Callable[[], Any]] = {
    "looksam": lambda: mo.looksam(sgd(), 0.2, k=3),
    "looksam, per tensor and layer-wise": lambda: mo.looksam(
        sgd(), falling, k=2, per_tensor=True, layerwise=True
    ),
    "ae_looksam": lambda: mo.ae_looksam(sgd(), 0.2, total_steps=12, delta=0.5),
    "ae_looksam, asked on every second step": lambda: mo.ae_looksam(
        sgd(), falling, total_steps=12, delta=0.5, k=2
    ),
}


def loss_fn(p: Any, model_state: Any, batch: Any, key: Any) -> Any:
    outputs = jnp.cos(batch @ p["kernel"] + p["bias"])
    return jnp.mean(outputs**2), (model_state + 1, {"outputs": outputs})


@pytest.mark.parametrize("name", DISPATCHED)
def test_both_dispatches_make_the_same_steps(name):
    batches = np.random.default_rng(0).normal(size=(12, 8, 3)).astype(np.float32)
    tx = DISPATCHED[name]()

    def train(dispatch: Any) -> list[Any]:
        step = mo.make_train_step(loss_fn, tx, dispatch=dispatch)
        state = mo.TrainState(params(), tx.init(params()), jnp.int32(0))
        seen = []
        for batch in batches:
            state, metrics = step(state, batch, None)
            seen.append(jax.device_get((state, metrics)))
        return seen

    from_host, in_graph = train("host"), train("in_graph")
    chex.assert_trees_all_close(from_host, in_graph, rtol=1e-4, atol=1e-5)
    employed = [bool(metrics.employed) for _, metrics in from_host]
    assert 0 < sum(employed) < 12
    for state, metrics in from_host:
        norm = metrics.perturbation_norm
        assert (norm > 0) == metrics.employed
        assert state.model_state == int(state.opt_state[0].step)
