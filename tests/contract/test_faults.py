"""What goes wrong in training: NaN, zeros, odd trees, killed processes, long runs."""

import functools
import signal
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import msam_optax as mo
from tests import resuming, resuming_processes
from tests.every_method import EMPLOYING, MSAM, falling
from tests.faults import HEALTHY, POISONS, guarded, method, poisoned, run, step_of, tree
from tests.resuming import ALIASES, METHODS, STEPS, build, digest, sgd

AROUND = [name for name in METHODS if name not in MSAM]
MOMENTUM = [name for name in METHODS if name in MSAM]
all_methods = pytest.mark.parametrize("name", METHODS)


def fields(state: Any, *names: str) -> list[Any]:
    """All entries of some names, wherever in a state they stand."""
    found = [optax.tree.get_all_with_path(state, name) for name in names]
    return [entry for entries in found for _, entry in entries]


# --- Gradients that are not finite ----------------------------------------------------


@all_methods
def test_a_clean_gradient_that_is_not_finite_leaves_no_trace(name):
    expected, state = run(guarded(name), *HEALTHY)[-1]
    pairs = list(HEALTHY)
    for t, (value, leaf) in zip((5, 2, 0), POISONS, strict=True):
        pairs.insert(t, (poisoned(value, leaf), poisoned(value, leaf)))
    ours, our_state = run(guarded(name), *pairs)[-1]
    # The weights, the momentum, the statistics, the memory and the perturbation.
    assert digest(ours) == digest(expected)
    assert digest(our_state.inner_state) == digest(state.inner_state)
    assert our_state.total_notfinite == len(POISONS)
    chex.assert_tree_all_finite((ours, our_state, mo.eval_params(our_state, ours)))
    assert not np.array_equal(ours["matrix"], tree()["matrix"])


# The decoupled form adds the perturbed gradient behind its optimizer: there only the
# loss_scaling of make_train_step stops what is not finite.
@pytest.mark.parametrize("name", [n for n in AROUND if "decoupled" not in n])
def test_a_perturbed_gradient_that_is_not_finite_moves_no_weight(name):
    healthy = run(guarded(name), *HEALTHY)
    rejected = 0
    for t in range(5):
        pairs = list(HEALTHY)
        pairs[t] = (pairs[t][0], poisoned(*POISONS[t % len(POISONS)]))
        carries = run(guarded(name), *pairs)
        (before, state_before), (p, state) = carries[t : t + 2]
        if digest(p) == digest(before):
            rejected += 1
            base = ("trace", "count")  # the momentum and the learning rate's count
            assert digest(fields(state, *base)) == digest(fields(state_before, *base))
        else:  # not employed on this step
            assert digest(p) == digest(healthy[t + 1][0])
        # The statistics are of the clean gradients, which were as ever.
        statistics = ("mean", "variance")
        assert digest(fields(state, *statistics)) == digest(
            fields(healthy[t + 1][1], *statistics)
        )
        last, _ = carries[-1]
        chex.assert_tree_all_finite(last)
        # The training goes on; LookSAM's when its memory is next refreshed.
        assert digest(last) != digest(p)
    assert rejected > (0 if name in EMPLOYING else 4)


def test_a_shard_that_is_not_finite_stays_out_of_the_weights_and_the_other_shards():
    ascent = mo.ascents.friendly(0.1)
    sharded = mo.m_sharpness(mo.sharpness_aware_gradient(ascent), shards=2)
    base = optax.apply_if_finite(sgd(), 9)
    p = jnp.ones(3)
    state, base_state = sharded.init(p), base.init(p)

    def grad_fn(p: Any, samples: Any) -> Any:
        return jnp.mean(samples, axis=0) * p

    batch = jnp.arange(12.0).reshape(4, 3).at[3].set(jnp.nan)
    gradient, after = sharded.gradient(grad_fn, state, p, batch)
    updates, base_state = base.update(gradient, base_state, p)
    np.testing.assert_array_equal(updates, 0)
    norms = after.perturbation_norm
    assert np.isfinite(norms[0])
    assert np.isnan(norms[1])
    np.testing.assert_array_equal(after.ascent_state.average[0], grad_fn(p, batch[:2]))


# --- Gradients that are zero ----------------------------------------------------------

ZEROS = optax.tree.zeros_like(tree())


@all_methods
def test_all_zero_gradients_perturb_nothing_and_harm_nothing(name):
    *still, last = run(method(name), *[(ZEROS, ZEROS)] * 3, HEALTHY[0])
    for p, state in still:
        assert not any(fields(state, "perturbation_norm"))
        assert digest(mo.eval_params(state, p)) == digest(p)
        chex.assert_tree_all_finite(state)
        # Weight decay apart, which is 1e-4 of the weights times the learning rate.
        chex.assert_trees_all_close(p, tree(), rtol=1e-4, atol=0)
    chex.assert_tree_all_finite(last)
    assert np.max(np.abs(last[0]["matrix"] - tree()["matrix"])) > 5e-3


@pytest.mark.parametrize("name", MOMENTUM)
def test_a_momentum_that_dies_out_harms_nothing(name):
    @jax.jit
    def long_pause(carry: Any) -> Any:
        def body(carry: Any, _: Any) -> Any:
            return step_of(method(name))(*carry, ZEROS, ZEROS), None

        return jax.lax.scan(body, carry, length=3000)[0]

    p, state = long_pause(run(method(name), *HEALTHY)[-1])
    chex.assert_tree_all_finite((p, state, mo.eval_params(state, p)))
    chex.assert_tree_all_finite(step_of(method(name))(p, state, *HEALTHY[0]))


# --- Trees without entries ------------------------------------------------------------


@pytest.mark.parametrize("name", [a for a in ALIASES if a != "m_sharpness"])
def test_a_tree_without_parameters_trains(name):
    def loss_fn(p: Any, model_state: Any, inputs: Any, key: Any) -> Any:
        return inputs, (model_state, {})

    scaling = resuming.SCALING if name == "loss scaling" else None
    tx = method("msam" if scaling else name)
    step = mo.make_train_step(loss_fn, tx, dispatch="in_graph", loss_scaling=scaling)
    loss_scale = scaling.init() if scaling else ()
    state = mo.TrainState({}, tx.init({}), loss_scale=loss_scale)
    for t in range(2):
        state, metrics = step(state, jnp.full(4, 1.0 + t), None)
        chex.assert_tree_all_finite((state, metrics))
        assert metrics.loss == 1 + t
        assert metrics.grad_norm == metrics.perturbation_norm == 0
    assert state.params == {} == mo.eval_params(state.opt_state, state.params)


@all_methods
def test_scalars_and_leaves_of_size_zero_train_like_any(name):
    carries = run(method(name), *HEALTHY)
    chex.assert_trees_all_equal_shapes_and_dtypes(*carries)
    chex.assert_tree_all_finite(carries)
    for leaf in ("matrix", "vector", "scalar"):
        assert len({digest(p[leaf]) for p, _ in carries}) > 3


# --- Frozen parameters ----------------------------------------------------------------

IS_FROZEN = {"matrix": False, "vector": True, "scalar": True, "hollow": False}


def freeze() -> optax.GradientTransformation:
    return optax.masked(optax.set_to_zero(), IS_FROZEN)


def split(base: Any) -> Any:
    """The base for the parameters that are trained, and nothing for the others."""
    labels = {k: "frozen" if frozen else "trained" for k, frozen in IS_FROZEN.items()}
    return optax.partition({"trained": base, "frozen": optax.set_to_zero()}, labels)


def around_split(name: str) -> Any:
    return build(name, split(sgd()))


DECOUPLED = "wsam, decoupled, schedules"
FREEZING: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(around_split, name) for name in AROUND},
    # It adds to its optimizer's updates: freeze behind it.
    DECOUPLED: lambda: optax.chain(build(DECOUPLED), freeze()),
    "msam of the others": lambda: split(mo.msam(0.05, rho=falling)),
    "msam around": lambda: mo.momentum_perturbation(split(sgd()), falling),
    "msam behind": lambda: optax.chain(freeze(), mo.msam(0.05, rho=falling)),
}


@pytest.mark.parametrize("name", FREEZING)
def test_frozen_parameters_do_not_move_and_the_others_do(name):
    p, state = run(FREEZING[name](), *HEALTHY)[-1]
    weights = mo.eval_params(state, p)
    for leaf, is_frozen in IS_FROZEN.items():
        moved = digest(p[leaf]) != digest(tree()[leaf])
        assert moved == (not is_frozen and leaf != "hollow")
        perturbed = digest(weights[leaf]) != digest(p[leaf])
        assert perturbed == ("msam" in name and moved)
    if "msam" in name:  # rho is the length of what is perturbed, not of a share of it
        epsilon = np.linalg.norm(weights["matrix"] - p["matrix"])
        np.testing.assert_allclose(epsilon, falling(len(HEALTHY) - 1), rtol=1e-4)


def test_freezing_after_msam_is_refused_where_the_weights_are_read():
    # Why the table above has no such entry.
    p, state = run(optax.chain(mo.msam(0.05, rho=0.3), freeze()), HEALTHY[0])[-1]
    assert digest(p["vector"]) == digest(tree()["vector"])
    with pytest.raises(ValueError, match="stands behind MSAM"):
        mo.eval_params(state, p)


# --- A killed process -----------------------------------------------------------------


def test_a_killed_run_resumes_from_its_checkpoint_bit_for_bit(tmp_path):
    done = resuming_processes.run_task("killed_in_a_step", tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        latest = checkpoints.latest_step()
    assert latest in (2, 4)  # the second may still have been written
    names = resuming_processes.KILLED_IN_A_STEP
    fresh = {n: resuming.training(n).start(resuming.params()) for n in names}
    for name, state in resuming.restore(tmp_path, fresh).items():
        ours = resuming.advance(resuming.training(name), state, latest, STEPS)
        expected = resuming.uninterrupted(name)[latest:]
        chex.assert_trees_all_equal(ours, expected)
        assert digest(ours) == digest(expected)


# --- Long runs ------------------------------------------------------------------------


def long_run(tx: Any, dtype: Any) -> np.ndarray:
    """Weights after 10,000 steps; nothing pulls a rounding error back to zero.

    The gradients do not depend on the weights, so that they are the base optimizer's.
    """
    rng = np.random.default_rng(0)
    start = rng.normal(size=64).astype(np.float32)
    noise = rng.normal(size=(10_000, 64)).astype(np.float32)
    with jax.enable_x64(dtype == jnp.float64):

        @jax.jit
        def train(w: Any, noise: Any) -> Any:
            def body(carry: Any, g: Any) -> Any:
                w, state = carry
                updates, state = tx.update(g.astype(dtype), state, w)
                return (optax.apply_updates(w, updates), state), None

            (w, state), _ = jax.lax.scan(body, (w, tx.init(w)), noise)
            return mo.eval_params(state, w)

        return np.asarray(train(jnp.asarray(start, dtype), noise), np.float64)


def wave(t: Any) -> Any:
    """A rho that changes on every step, and its sign on some."""
    return 0.3 * jnp.cos(0.1 * t)


@functools.cache
def base_run(dtype: Any) -> np.ndarray:
    return long_run(optax.sgd(1e-3, momentum=0.9), dtype)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


@pytest.mark.parametrize(
    "tx",
    [
        mo.msam(1e-3, rho=0.3),
        mo.msam(1e-3, rho=wave),
        mo.momentum_perturbation(optax.sgd(1e-3, momentum=0.9), 0.3),
        mo.momentum_perturbation(
            optax.sgd(1e-3, momentum=0.9), ascent=mo.ascents.normalized(wave)
        ),
    ],
    ids=["msam", "msam, changing rho", "around sgd", "stored, changing rho"],
)
def test_ten_thousand_steps_of_msam_do_not_drift(tx):
    exact, in_bfloat16 = base_run(jnp.float64), base_run(jnp.bfloat16)
    assert rms(exact) > 1
    assert rms(long_run(tx, jnp.float64) - exact) < 1e-12
    assert rms(long_run(tx, jnp.float32) - exact) < 4e-6
    # In bfloat16 as much as the base optimizer does, or less: what is perturbed rounds
    # at random, while a small update to the same weight is lost again and again.
    assert rms(long_run(tx, jnp.bfloat16) - exact) < 1.25 * rms(in_bfloat16 - exact)


@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_stays_out_of_friendly_sams_mean(first):
    ascent = mo.ascents.friendly(0.1)
    broken, gradient = jnp.array([jnp.nan, 1.0]), jnp.array([3.0, 4.0])
    state = ascent.init(gradient)
    if not first:
        _, state = ascent.update(gradient, state, gradient)
    _, after = ascent.update(broken, state, gradient)
    chex.assert_trees_all_equal(after, state)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_what_is_remembered_stays_finite(per_tensor):
    # A single bad batch on a SAM step would else be in every step up to the next.
    tx = mo.looksam(
        optax.apply_if_finite(optax.sgd(0.05), 3), 0.05, k=5, per_tensor=per_tensor
    )
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5], [3.0]])}
    state = tx.init(params)

    def gradient(params, scale):
        return jax.tree.map(lambda w: scale * w**3, params)

    for t in range(20):
        before, scale = params, jnp.nan if t == 10 else 0.1
        grad_fn = functools.partial(gradient, scale=scale)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params = optax.apply_updates(params, updates)
        chex.assert_tree_all_finite(params)
        moved = not np.array_equal(before["a"], params["a"])
        assert moved == (t != 10)
