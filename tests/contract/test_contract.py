"""What every method promises to Optax and JAX, over one table of them all."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import msam_optax as mo

STEPS = 6


def falling(t: Any) -> Any:
    """A schedule of rho that changes on every step."""
    return 0.3 / (1 + 0.5 * t)


def sharpness_aware(rho: Any = 0.2) -> optax.GradientTransformationExtraArgs:
    return mo.sharpness_aware_gradient(mo.ascents.normalized(rho))


Base = Callable[[], optax.GradientTransformation]


def sgd() -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


# Each method takes the base optimizer that it stands around.
AROUND: dict[str, Callable[[optax.GradientTransformation], Any]] = {
    "momentum_perturbation": lambda base: mo.momentum_perturbation(base, 0.2),
    "momentum_perturbation, adaptive": lambda base: mo.momentum_perturbation(
        base, ascent=mo.ascents.adaptive(falling, eta=0.01)
    ),
    "sam": lambda base: mo.sam(base, 0.2),
    "sam, second order": lambda base: optax.chain(
        mo.sharpness_aware_gradient(mo.ascents.normalized(0.2), second_order=True), base
    ),
    "asam": lambda base: mo.asam(base, 0.5),
    "ss_sam": lambda base: mo.ss_sam(base, 0.2),
    "ae_sam": lambda base: mo.ae_sam(base, 0.2, total_steps=STEPS),
    "ae_sam, rho schedule": lambda base: mo.ae_sam(base, falling, total_steps=STEPS),
    "looksam": lambda base: mo.looksam(base, 0.2, k=2),
    "looksam, per tensor and layer-wise": lambda base: mo.looksam(
        base, falling, k=3, per_tensor=True, layerwise=True
    ),
    "ae_looksam": lambda base: mo.ae_looksam(base, 0.2, total_steps=STEPS),
    "ae_looksam, asked on every second step": lambda base: mo.ae_looksam(
        base, falling, total_steps=STEPS, k=2
    ),
    "gsam": lambda base: mo.gsam(base, falling),
    "gradient_norm_penalty": lambda base: mo.gradient_norm_penalty(base, 0.2),
    "wsam": lambda base: mo.wsam(base, 0.2),
    "wsam, decoupled": lambda base: mo.wsam(base, 0.2, learning_rate=0.1),
    "wsam, decoupled, schedules": lambda base: mo.wsam(
        base, falling, gamma=0.6, learning_rate=falling
    ),
    "friendly_sam": lambda base: mo.friendly_sam(base, 0.2),
    "friendly_sam, rho schedule": lambda base: mo.friendly_sam(base, falling),
    "fisher_sam": lambda base: mo.fisher_sam(base, 0.2),
    "employ every second": lambda base: optax.chain(
        mo.employ(mo.policies.every(2), sharpness_aware()), base
    ),
    "employ late, halved otherwise": lambda base: optax.chain(
        mo.employ(
            mo.policies.between(3),
            sharpness_aware(falling),
            otherwise=lambda updates, _: optax.tree.scale(0.5, updates),
        ),
        base,
    ),
}

METHODS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "msam": lambda: mo.msam(0.1, rho=0.2),
    "msam, rho schedule": lambda: mo.msam(0.1, rho=falling),
    "msam, nesterov": lambda: mo.msam(0.1, rho=0.2, nesterov=True),
    "msam, no momentum": lambda: mo.msam(0.1, momentum=0.0, rho=0.2),
    "adamw_msam": lambda: mo.adamw_msam(0.1, rho=0.2),
    "adamw_msam, rho schedule": lambda: mo.adamw_msam(0.1, rho=falling),
    "momentum_perturbation around adam": lambda: mo.momentum_perturbation(
        optax.adam(0.1), 0.2
    ),
    "momentum_perturbation around lion": lambda: mo.momentum_perturbation(
        optax.lion(0.1), 0.2
    ),
    **{name: functools.partial(around, sgd()) for name, around in AROUND.items()},
}

MSAM = [name for name in METHODS if "msam" in name or "momentum_pert" in name]

all_methods = pytest.mark.parametrize("name", METHODS)


def params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {
        "kernel": jnp.linspace(-1.0, 2.0, 12, dtype=dtype).reshape(3, 4),
        "bias": jnp.linspace(0.5, 1.0, 4, dtype=dtype),
    }


def loss(p: Any, t: Any) -> jax.Array:
    """A loss that differs from step to step, for parameters of any structure."""
    terms = (jnp.sum(jnp.cos(x * (1 + 0.2 * t) + i)) for i, x in enumerate(leaves(p)))
    return sum(terms, start=jnp.zeros([]))


def leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def one_step(tx: Any, p: Any, state: Any, t: Any, **extra_args: Any) -> tuple[Any, Any]:
    def grad_fn(q: Any) -> Any:
        return jax.grad(loss)(q, t)

    updates, state = tx.update(grad_fn(p), state, p, grad_fn=grad_fn, **extra_args)
    return optax.apply_updates(p, updates), state


@functools.cache
def method(name: str) -> optax.GradientTransformationExtraArgs:
    return METHODS[name]()


@functools.cache
def compiled_step(name: str) -> Callable[..., tuple[Any, Any]]:
    """One compilation of a method's step for all the tests here, and no second one."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p: Any, state: Any, t: Any) -> tuple[Any, Any]:
        return one_step(method(name), p, state, t)

    return step


@functools.cache
def donating_step(name: str) -> Callable[..., tuple[Any, Any]]:
    return jax.jit(functools.partial(one_step, method(name)), donate_argnums=(0, 1))


class Carry(NamedTuple):
    params: Any
    state: Any


def start(tx: Any, dtype: Any = jnp.float32) -> Carry:
    p = params(dtype)
    return Carry(p, tx.init(p))


@functools.cache
def trajectory(name: str) -> list[Carry]:
    """The carries before the first step and after each."""
    chex.clear_trace_counter()  # chex counts by the source line, so for all methods
    carries = [start(method(name))]
    for t in range(STEPS):
        carries.append(Carry(*compiled_step(name)(*carries[-1], jnp.int32(t))))
    return carries


# --- Extra arguments ------------------------------------------------------------------


@all_methods
def test_unrelated_extra_arguments_change_nothing(name):
    def program(**extra_args: Any) -> str:
        step = functools.partial(one_step, method(name), **extra_args)
        return str(jax.make_jaxpr(step)(*start(method(name)), jnp.int32(0)))

    unrelated = {"value": 3.0, "key": jnp.ones([]), "unrelated": {"a": "string"}}
    assert program(**unrelated) == program()


def spy(seen: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """A transformation that records the extra arguments it is handed."""

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


@pytest.mark.parametrize("name", AROUND)
def test_extra_arguments_reach_the_base_optimizer(name):
    seen: dict[str, Any] = {}
    tx = AROUND[name](optax.chain(spy(seen), sgd()))
    jax.eval_shape(
        lambda p, s: one_step(tx, p, s, 0, unrelated="yes", value=3.0), *start(tx)
    )
    assert seen["unrelated"] == "yes"
    assert seen["value"] == 3.0
    assert callable(seen["grad_fn"])


def test_extra_arguments_reach_the_ascent_and_the_policy():
    ascent_saw: dict[str, Any] = {}
    policy_saw: dict[str, Any] = {}

    def decide(updates, state, params, **extra_args):
        policy_saw.update(extra_args)
        return jnp.asarray(True), state

    policy = mo.policies.Policy(lambda params: (), decide)
    ascent = optax.chain(spy(ascent_saw), mo.ascents.normalized(0.1))
    tx = mo.employ(policy, mo.sharpness_aware_gradient(ascent))
    jax.eval_shape(lambda p, s: one_step(tx, p, s, 0, unrelated="yes"), *start(tx))
    assert ascent_saw["unrelated"] == policy_saw["unrelated"] == "yes"

    ascent_saw.clear()
    tx = mo.momentum_perturbation(sgd(), ascent=ascent)
    jax.eval_shape(lambda p, s: one_step(tx, p, s, 0, unrelated="yes"), *start(tx))
    assert ascent_saw["unrelated"] == "yes"


# --- Tracing --------------------------------------------------------------------------


@all_methods
def test_every_step_runs_the_same_compilation(name):
    assert len(trajectory(name)) == STEPS + 1  # a second trace raises in there
    chex.assert_trees_all_equal_shapes_and_dtypes(*trajectory(name))


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)


@all_dtypes
@all_methods
def test_dtypes_and_shapes_last_from_step_to_step(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx = METHODS[name]()
        carry = start(tx, dtype)
        grads = params(dtype)

        def update(p: Any, state: Any) -> tuple[Any, Any]:
            return tx.update(
                grads, state, p, grad_fn=lambda q: jax.grad(loss)(q, jnp.int32(0))
            )

        updates, state = jax.eval_shape(update, *carry)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, carry.params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, carry.state)

        def scanned(c: Carry, t: Any) -> tuple[Carry, None]:
            return Carry(*one_step(tx, *c, t)), None

        def sometimes(p: Any, state: Any) -> Any:
            return jax.lax.cond(
                jnp.asarray(True),
                update,
                lambda p, state: (optax.tree.zeros_like(p), state),
                *(p, state),
            )

        # Both raise where a dtype, a shape or a weak type changes.
        last, _ = jax.eval_shape(
            lambda c: jax.lax.scan(scanned, c, jnp.arange(STEPS)), carry
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(last, carry)
        jax.eval_shape(sometimes, *carry)


@all_dtypes
@all_methods
def test_scalars_are_single_precision_whatever_the_parameters_are(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        state = start(METHODS[name](), dtype).state
    scalars = {str(x.dtype) for x in leaves(state) if x.ndim == 0}
    floating = "float64" if dtype == jnp.float64 else "float32"
    assert scalars <= {floating, "int32", "bool"}
    has_statistics = name not in ("msam, no momentum",) and "adaptive" not in name
    if has_statistics:
        assert floating in scalars


@all_methods
def test_scan_is_the_loop(name):
    def body(c: Carry, t: Any) -> tuple[Carry, None]:
        return Carry(*one_step(method(name), *c, t)), None

    scanned, _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(STEPS)))(
        trajectory(name)[0]
    )
    chex.assert_trees_all_close(scanned, trajectory(name)[-1], rtol=1e-4, atol=1e-5)


@all_methods
def test_low_precision_runs_follow_the_single_precision_one(name):
    def body(c: Carry, t: Any) -> tuple[Carry, None]:
        return Carry(*one_step(method(name), *c, t)), None

    last, _ = jax.lax.scan(body, start(method(name), jnp.bfloat16), jnp.arange(2))
    expected = trajectory(name)[2]
    moved = optax.tree.norm(optax.tree.sub(expected.params, params()))
    wrong = optax.tree.norm(
        optax.tree.sub(optax.tree.cast(last.params, jnp.float32), expected.params)
    )
    assert wrong < 0.05 * moved


@all_methods
def test_init_needs_no_values(name):
    tx, concrete = method(name), params()
    abstract = jax.eval_shape(lambda: concrete)
    expected = jax.eval_shape(tx.init, concrete)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(concrete), expected)
    chex.assert_trees_all_equal(tx.init(abstract), tx.init(concrete))


# --- Memory ---------------------------------------------------------------------------


@all_methods
def test_params_and_state_can_both_be_donated(name):
    tx = method(name)
    carry = start(tx)
    pointers = [x.unsafe_buffer_pointer() for x in leaves(carry)]
    assert len(set(pointers)) == len(pointers), "two arrays share their memory"

    for t in range(2):
        # A scalar that the step does not read, such as the last norm, is not donated.
        given = [x for x in leaves(carry) if x.ndim > 0]
        carry = Carry(
            *donating_step(name)(*carry, jnp.int32(t))
        )  # a warning is an error here
        assert all(x.is_deleted() for x in given)
    chex.assert_trees_all_close(carry, trajectory(name)[2], rtol=1e-5, atol=1e-6)


@all_methods
def test_a_second_init_survives_the_donation_of_the_first(name):
    tx = method(name)
    fresh = start(tx)
    donating_step(name)(*start(tx), jnp.int32(0))
    chex.assert_trees_all_equal(fresh, trajectory(name)[0])
    chex.assert_trees_all_equal(start(tx), fresh)


def test_a_run_resumed_from_a_checkpoint_continues_bit_for_bit(tmp_path):
    saved = {name: trajectory(name)[3] for name in METHODS}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", saved)
        checkpointer.wait_until_finished()
        target = {name: start(method(name)) for name in METHODS}
        restored = checkpointer.restore(
            tmp_path / "run", jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        )
    chex.assert_trees_all_equal(restored, saved)
    for name in METHODS:
        carry = restored[name]
        for t in range(3, STEPS):
            carry = Carry(*compiled_step(name)(*carry, jnp.int32(t)))
        chex.assert_trees_all_equal(carry, trajectory(name)[-1])


# --- Optax's wrappers and tools -------------------------------------------------------

# name: (factory, its arguments, those that are not numbers)
INJECTED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "msam": (mo.msam, dict(learning_rate=0.1)),
    "msam, nesterov": (mo.msam, dict(learning_rate=0.1, nesterov=True)),
    "adamw_msam": (mo.adamw_msam, dict(learning_rate=0.1, weight_decay=0.01)),
    "momentum_perturbation": (mo.momentum_perturbation, dict(inner=sgd())),
    "sam": (mo.sam, dict(optimizer=sgd())),
    "asam": (mo.asam, dict(optimizer=sgd(), eta=0.01)),
    "ss_sam": (mo.ss_sam, dict(optimizer=sgd(), probability=0.5, seed=3)),
    "ae_sam": (mo.ae_sam, dict(optimizer=sgd(), total_steps=STEPS, delta=0.8)),
    "looksam": (mo.looksam, dict(optimizer=sgd(), k=2, alpha=0.7)),
    "ae_looksam": (mo.ae_looksam, dict(optimizer=sgd(), total_steps=STEPS, alpha=0.7)),
    "gsam": (mo.gsam, dict(optimizer=sgd(), alpha=0.4)),
    "gradient_norm_penalty": (
        mo.gradient_norm_penalty,
        dict(optimizer=sgd(), alpha=0.8),
    ),
    "wsam": (mo.wsam, dict(optimizer=sgd(), gamma=0.9)),
    "wsam, decoupled": (mo.wsam, dict(optimizer=sgd(), gamma=0.9, learning_rate=0.1)),
    "friendly_sam": (mo.friendly_sam, dict(optimizer=sgd(), sigma=1.0, decay=0.8)),
    "fisher_sam": (mo.fisher_sam, dict(optimizer=sgd(), eta=0.5)),
    "normalized_ascent": (
        lambda rho: optax.chain(sharpness_aware(rho), sgd()),
        dict(),
    ),
    "unnormalized_ascent": (
        lambda rho: optax.chain(
            mo.sharpness_aware_gradient(mo.ascents.unnormalized(rho)), sgd()
        ),
        dict(),
    ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_rho_changed_between_steps_is_a_schedule_of_rho(name):
    factory, options = INJECTED[name]
    injected = optax.inject_hyperparams(factory)(rho=0.2, **options)
    scheduled = factory(rho=lambda t: jnp.where(t < 2, 0.2, -0.4), **options)

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(p: Any, state: Any, t: Any) -> tuple[Any, Any]:
        return one_step(injected, p, state, t)

    carry, expected = start(injected), start(scheduled)
    expected_step = jax.jit(functools.partial(one_step, scheduled))
    for t in range(4):
        if t == 2:
            carry.state.hyperparams["rho"] = jnp.float32(-0.4)
        carry = Carry(*step(*carry, jnp.int32(t)))
        expected = Carry(*expected_step(*expected, jnp.int32(t)))
    chex.assert_trees_all_close(carry.params, expected.params, rtol=1e-4, atol=1e-5)
    unchanged = optax.inject_hyperparams(factory)(rho=0.2, **options)
    other = start(unchanged)
    for t in range(4):
        other = Carry(*step(*other, jnp.int32(t)))
    assert not np.allclose(other.params["kernel"], carry.params["kernel"], atol=1e-3)


@all_dtypes
@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_keep_the_state_stable(name, dtype):
    factory, options = INJECTED[name]
    with jax.enable_x64(dtype == jnp.float64):
        tx = optax.inject_hyperparams(factory)(rho=0.2, **options)
        carry = start(tx, dtype)
        after = jax.eval_shape(lambda p, s: Carry(*one_step(tx, p, s, 0)), *carry)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, carry)


@pytest.mark.parametrize("name", MSAM)
def test_masked_restricts_a_momentum_method_to_its_own_parameters(name):
    # The loss is a sum over leaves: the kernel alone would move as it does here.
    mask = {"kernel": True, "bias": False}
    tx = optax.masked(method(name), mask)
    alone = method(name)

    def run(tx: Any, p: Any) -> Carry:
        def body(c: Carry, t: Any) -> tuple[Carry, None]:
            return Carry(*one_step(tx, *c, t)), None

        carry = Carry(p, tx.init(p))
        return jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(4))[0])(carry)

    def kernel_loss_order(p: Any) -> Any:
        # As in the full tree, the kernel is leaf 1.
        return {"a": jnp.zeros((0,)), "kernel": p["kernel"]}

    both = run(tx, params())
    single = run(alone, kernel_loss_order(params()))
    chex.assert_trees_all_close(
        both.params["kernel"], single.params["kernel"], rtol=1e-5, atol=1e-6
    )
    clean = mo.eval_params(both.state, both.params)
    chex.assert_trees_all_equal(clean["bias"], both.params["bias"])
    chex.assert_trees_all_close(
        clean["kernel"],
        mo.eval_params(single.state, single.params)["kernel"],
        rtol=1e-5,
        atol=1e-6,
    )
    assert not np.allclose(clean["kernel"], both.params["kernel"], atol=1e-3)


def batch_loss(p: Any, batch: Any) -> jax.Array:
    return jnp.mean(jnp.cos(batch @ p["kernel"] + p["bias"]) ** 2)


def batches(steps: int, micro: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(steps, micro, 8, 3)).astype(np.float32)


def batch_step(tx: Any) -> Callable[..., Any]:
    @jax.jit
    def step(p: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        def grad_fn(q: Any) -> Any:
            return jax.grad(batch_loss)(q, batch)

        updates, state = tx.update(grad_fn(p), state, p, grad_fn=grad_fn)
        return optax.apply_updates(p, updates), state

    return step


@pytest.mark.parametrize(
    "element, ascent",
    [
        (sharpness_aware(), mo.ascents.normalized(0.2)),
        (
            mo.sharpness_aware_gradient(mo.ascents.adaptive(0.5, eta=0.01)),
            mo.ascents.adaptive(0.5, eta=0.01),
        ),
    ],
    ids=["sam", "asam"],
)
def test_multi_steps_behind_sam_takes_the_mean_of_the_sam_gradients(element, ascent):
    accumulate = optax.MultiSteps(sgd(), 3).gradient_transformation()
    tx = optax.chain(element, accumulate)
    step = batch_step(tx)
    base = sgd()

    @jax.jit
    def expected_step(p: Any, state: Any, micro_batches: Any) -> tuple[Any, Any]:
        def sam_gradient(batch: Any) -> Any:
            g = jax.grad(batch_loss)(p, batch)
            epsilon, _ = ascent.update(g, ascent.init(p), p)
            return jax.grad(batch_loss)(optax.apply_updates(p, epsilon), batch)

        each = jax.vmap(sam_gradient)(micro_batches)
        mean = jax.tree.map(lambda g: g.mean(0), each)
        updates, state = base.update(mean, state, p)
        return optax.apply_updates(p, updates), state

    carry = start(tx)
    expected = start(base)
    for micro_batches in batches(3, 3):
        for batch in micro_batches:
            carry = Carry(*step(*carry, batch))
        expected = Carry(*expected_step(*expected, micro_batches))
        chex.assert_trees_all_close(carry.params, expected.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MSAM)
def test_multi_steps_around_msam_is_the_large_batch(name):
    large = method(name)
    accumulated = optax.MultiSteps(method(name), 3).gradient_transformation()
    large_step, step = batch_step(large), batch_step(accumulated)
    expected, carry = start(large), start(accumulated)
    for micro_batches in batches(3, 3):
        expected = Carry(*large_step(*expected, micro_batches.reshape(-1, 3)))
        for batch in micro_batches:
            carry = Carry(*step(*carry, batch))
        if "lion" not in name:  # the sign of a rounding error is no rounding error
            chex.assert_trees_all_close(
                carry.params, expected.params, rtol=1e-4, atol=1e-5
            )
        chex.assert_trees_all_close(
            mo.eval_params(carry.state, carry.params),
            mo.eval_params(expected.state, expected.params),
            rtol=1e-4,
            atol=1e-5,
        )


@all_methods
def test_optax_finds_every_field_of_our_states_by_its_name(name):
    for base in (sgd(), optax.adam(optax.cosine_decay_schedule(0.1, STEPS))):
        tx = AROUND[name](base) if name in AROUND else method(name)
        state = jax.eval_shape(tx.init, params())
        for field in fields_of_ours(state):
            optax.tree.get(state, field)  # KeyError where two are called so


def fields_of_ours(state: Any) -> set[str]:
    """The names of all fields of this package's states inside an optimizer's."""
    children = jax.tree.leaves(state, is_leaf=lambda x: x is not state)
    found = {
        name
        for child in children
        if child is not state
        for name in fields_of_ours(child)
    }
    ours = type(state).__module__.startswith("msam_optax.")
    return found | set(getattr(state, "_fields", ()) if ours else ())


@all_methods
def test_tree_map_params_tells_parameters_from_scalars(name):
    state = trajectory(name)[1].state
    mapped = optax.tree_map_params(
        method(name),
        lambda x: "like a parameter",
        state,
        transform_non_params=lambda x: "scalar",
    )
    expected = ["like a parameter" if x.ndim else "scalar" for x in leaves(state)]
    assert leaves(mapped) == expected
    assert "like a parameter" in expected


# --- Ensembles ------------------------------------------------------------------------


@all_methods
def test_an_ensemble_under_vmap_is_a_loop_over_its_members(name):
    tx = method(name)
    members = [jax.tree.map(lambda x, k=k: x * (1 + k) - k, params()) for k in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    step = jax.jit(jax.vmap(functools.partial(one_step, tx), in_axes=(0, 0, None)))

    ensemble = Carry(stacked, jax.vmap(tx.init)(stacked))
    loop = [Carry(p, tx.init(p)) for p in members]
    for t in range(4):
        ensemble = Carry(*step(*ensemble, jnp.int32(t)))
        loop = [Carry(*compiled_step(name)(*c, jnp.int32(t))) for c in loop]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *loop)
    chex.assert_trees_all_close(ensemble, expected, rtol=2e-4, atol=1e-5)
    if name in MSAM:
        chex.assert_trees_all_close(
            jax.vmap(mo.eval_params)(ensemble.state, ensemble.params),
            jax.tree.map(
                lambda *x: jnp.stack(x),
                *[mo.eval_params(c.state, c.params) for c in loop],
            ),
            rtol=2e-4,
            atol=1e-5,
        )


# --- Trees of any shape ---------------------------------------------------------------


class Named(NamedTuple):
    """Parameters whose names are those of optimizers' states."""

    mu: Any
    trace: Any


SHAPES: dict[str, Any] = {
    "an array": (3, 2),
    "a scalar": (),
    "scalars and arrays": {"a": (), "b": (2,), "c": [(1, 1), ()]},
    "leaves of size zero": {"a": (0,), "b": (2, 0), "c": (3,)},
    "only a leaf of size zero": {"a": (0, 3)},
    "nothing": {},
    "nothing inside": {"a": {}, "b": (2,), "c": ({}, [])},
    "None leaves": {"a": None, "b": (2, 2), "c": [None, (1,)]},
    "fields called mu and trace": Named(mu=(2, 2), trace=(3,)),
    "nested fields called mu and trace": Named(mu=Named((2,), ()), trace={"mu": (2,)}),
    "keys called mu and trace": {"mu": {"mu": (2,), "nu": (2,)}, "trace": {"mu": (3,)}},
}


def is_shape(x: Any) -> bool:
    return type(x) is tuple and all(isinstance(n, int) for n in x)


def tree_of(shapes: Any) -> Any:
    sizes = iter(range(100))
    return jax.tree.map(
        lambda shape: jnp.full(shape, 0.3 + 0.2 * next(sizes)), shapes, is_leaf=is_shape
    )


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    "name",
    [
        "msam, rho schedule",
        "adamw_msam",
        "momentum_perturbation, adaptive",
        "ae_sam",
    ],
)
def test_the_structure_of_the_parameters_does_not_matter(name, shapes):
    tx, tree = method(name), tree_of(SHAPES[shapes])
    flat = {f"{i:02}": leaf for i, leaf in enumerate(leaves(tree))}

    @jax.jit
    def run(tree: Any) -> tuple[Carry, Any]:
        carry = Carry(tree, tx.init(tree))
        for t in range(2):
            carry = Carry(*one_step(tx, *carry, t))
        return carry, mo.eval_params(carry.state, carry.params)

    (carry, clean), (expected, expected_clean) = run(tree), run(flat)
    chex.assert_trees_all_equal_shapes_and_dtypes(carry.params, tree)
    for x, y in ((carry.params, expected.params), (clean, expected_clean)):
        chex.assert_trees_all_close(leaves(x), leaves(y), rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(carry)
    for x, y in zip(leaves(carry.params), leaves(tree), strict=True):
        assert x.size == 0 or not np.array_equal(x, y)
