"""A run goes on from its Orbax checkpoint as if it had never been stopped."""

import functools
import json
import signal
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
from tests import resuming, resuming_processes
from tests.every_method import EMPLOYING
from tests.problems import Problem, mlp, quadratic
from tests.reference import recursions
from tests.resuming import ALIASES, SAVED, STEPS, digest, restore, save


def assert_same_bits(tree: Any, other: Any) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
    chex.assert_trees_all_equal(tree, other)  # which names the leaf that differs
    assert digest(tree) == digest(other)


# --- Every method on one device -------------------------------------------------------


@pytest.mark.parametrize(
    "name, dispatch",
    [(name, "auto") for name in ALIASES] + [(name, "in_graph") for name in EMPLOYING],
)
def test_a_resumed_run_is_the_uninterrupted_one(name, dispatch, tmp_path):
    expected = resuming.uninterrupted(name, dispatch)
    run = resuming.training(name, dispatch)
    save(tmp_path, SAVED, jax.device_put(expected[SAVED - 1][0]))
    state = restore(tmp_path, run.start(resuming.params()))
    assert_same_bits(state, expected[SAVED - 1][0])
    # The states, and the metrics with the decisions of the policies.
    assert_same_bits(resuming.advance(run, state, SAVED, STEPS), expected[SAVED:])
    moved = optax.tree.sub(expected[-1][0].params, expected[SAVED - 1][0].params)
    assert optax.tree.norm(optax.tree.cast(moved, jnp.float32)) > 0.01


@pytest.mark.parametrize("name", ["msam", "ae_sam", "looksam"])
def test_a_run_resumed_by_orbaxs_newer_interface_is_the_uninterrupted_one(
    name, tmp_path
):
    if not hasattr(ocp, "v1") or not hasattr(ocp.v1.training.Checkpointer, "save"):
        pytest.skip(f"Orbax {ocp.__version__} has no v1.training.Checkpointer.save")
    steps = resuming.uninterrupted(name)
    saved, _ = steps[SAVED - 1]
    with ocp.v1.training.Checkpointer(tmp_path / "run") as checkpoints:
        checkpoints.save(SAVED, jax.tree.map(jnp.asarray, saved))
    like = jax.device_put(
        resuming.training(name).start(resuming.params()), jax.local_devices()[0]
    )
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    with ocp.v1.training.Checkpointer(tmp_path / "run") as checkpoints:
        state = checkpoints.load(checkpoints.latest.step, target)
    rest = resuming.advance(resuming.training(name), state, SAVED, STEPS)
    assert_same_bits(rest, steps[SAVED:])


@pytest.mark.parametrize("name", EMPLOYING)
def test_what_was_resumed_decided_both_ways(name):
    seen = resuming.uninterrupted(name)[SAVED:]
    assert {bool(metrics.employed) for _, metrics in seen} == {True, False}


def test_a_save_in_the_background_sees_nothing_of_the_next_steps(tmp_path):
    start = jnp.arange(2e6)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = step(jnp.copy(start))
    with ocp.CheckpointManager(tmp_path) as checkpoints:
        for i in range(2):
            checkpoints.save(i, args=ocp.args.StandardSave({"x": state}))
            for _ in range(5):
                state = step(state)
    for i in range(2):
        saved = restore(tmp_path, {"x": state}, step=i)
        np.testing.assert_array_equal(saved["x"], start + 1 + 5 * i)


# --- Every method on four simulated devices -------------------------------------------


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("simulated")
    done = resuming_processes.run_task("simulate", directory)
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ALIASES)
def test_a_sharded_run_resumes_bit_for_bit_and_keeps_its_shardings(name, simulated):
    directory, report = simulated
    found = report["methods"][name]
    assert found["restored"] == found["saved"]
    assert found["resumed"] == found["uninterrupted"]
    assert len({found["saved"], *found["resumed"]}) == 1 + STEPS - SAVED  # it moved
    before, after = found["shardings"]
    assert after == before
    assert set(before) == {"()", "('devices',)", "(None, 'devices')"}

    # The same checkpoint on one device, for instance to evaluate it.
    alone = restore(directory / name, resuming.training(name).start(resuming.params()))
    assert digest(alone) == found["saved"]
    assert {len(x.devices()) for x in jax.tree.leaves(alone)} == {1}


# --- A checkpoint that was cut off ----------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("killed")
    done = resuming_processes.run_task("killed_in_a_save", directory)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return directory


def expected_states(step: int) -> dict[str, Any]:
    names = resuming_processes.KILLED_IN_A_SAVE
    return {name: resuming.uninterrupted(name)[step - 1][0] for name in names}


def fresh_states() -> dict[str, Any]:
    names = resuming_processes.KILLED_IN_A_SAVE
    return {name: resuming.training(name).start(resuming.params()) for name in names}


def resume_to_the_end(directory: Any, latest: int) -> None:
    """Resumes a run left behind and compares it with the uninterrupted one."""
    with ocp.CheckpointManager(directory) as checkpoints:
        assert checkpoints.latest_step() == latest
    restored = restore(directory, fresh_states())
    assert_same_bits(restored, expected_states(latest))
    last = {
        name: resuming.advance(resuming.training(name), state, latest, STEPS)[-1][0]
        for name, state in restored.items()
    }
    assert_same_bits(last, expected_states(STEPS))


def test_a_save_cut_off_at_any_moment_is_never_taken_for_a_good_one(killed):
    moments = sorted((killed / "moments").iterdir())
    torn = [m for m in moments if not (m / "4").exists() and len(list(m.iterdir())) > 1]
    written = {sum(f.is_file() for f in moment.rglob("*")) for moment in torn}
    assert len(written) > 4  # from hardly anything to nearly all
    for moment in moments:
        resume_to_the_end(moment, latest=4 if (moment / "4").exists() else 2)


def test_a_process_killed_in_a_save_resumes_from_the_one_before(killed):
    left = {path.name for path in (killed / "run").iterdir()}
    assert {"2", "4"} < left
    assert "6" not in left
    assert any(name.startswith("6.") for name in left)  # written, not committed
    resume_to_the_end(killed / "run", latest=4)
    save(killed / "run", 6, expected_states(6))  # over what the killed process left
    resume_to_the_end(killed / "run", latest=6)


def test_damage_after_the_commit_is_an_error_and_never_another_state(simulated):
    # The commit says that all was written, not that the disk kept it.
    outcomes = simulated[1]["damage"]
    assert outcomes.keys() == {"refused", "restored"}  # the latter from other files
    assert outcomes["refused"] >= 6


# --- From MSAM to the plain optimizer and back ----------------------------------------


class Pair(NamedTuple):
    """A plain optimizer, MSAM around it, and MSAM's recursion from the papers."""

    plain: Callable[[], Any]
    perturbed: Callable[[], Any]
    reference: Callable[..., Any]


RHO = 0.3
LR = optax.cosine_decay_schedule(0.1, 40)  # whose count goes on through both changes
PAIRS = {
    "sgd": Pair(
        lambda: optax.sgd(LR, momentum=0.9),
        lambda: mo.msam(LR, rho=RHO),
        functools.partial(recursions.msam, lr=LR, momentum=0.9),
    ),
    "adamw": Pair(
        lambda: optax.adamw(0.02, weight_decay=0.1),
        lambda: mo.adamw_msam(0.02, weight_decay=0.1, rho=RHO),
        functools.partial(recursions.adamw_msam, lr=0.02, weight_decay=0.1),
    ),
}
TO_MSAM, TO_PLAIN, END = 6, 14, 20  # of the training's steps


def trainer(tx: Any, problem: Problem) -> Callable[..., mo.TrainState]:
    def loss_fn(params: Any, model_state: Any, t: Any, key: Any) -> Any:
        return problem.loss(params, t), (model_state, {})

    step = mo.make_train_step(loss_fn, tx, donate=False)

    def train(state: mo.TrainState, start: int, stop: int) -> mo.TrainState:
        for t in range(start, stop):
            state, _ = step(state, t, None)
        return state

    return train


@pytest.mark.parametrize(
    "pair, problem", [("sgd", mlp()), ("adamw", quadratic())], ids=["sgd", "adamw"]
)
def test_msam_takes_over_a_plain_run_and_hands_it_back(pair, problem, x64, tmp_path):
    plain, perturbed = PAIRS[pair].plain(), PAIRS[pair].perturbed()
    train, train_perturbed = trainer(plain, problem), trainer(perturbed, problem)
    params = jax.device_put(problem.params, jax.local_devices()[0])
    start = mo.TrainState(params, plain.init(params))

    state = train(start, 0, TO_MSAM)
    save(tmp_path, TO_MSAM, state)
    state = restore(tmp_path, start)
    opt_state = perturbed.init(params)._replace(inner_state=state.opt_state)
    state = mo.TrainState(state.params, opt_state)

    state = train_perturbed(state, TO_MSAM, TO_PLAIN)
    carried = state.params
    weights = mo.eval_params(state.opt_state, state.params)
    save(tmp_path, TO_PLAIN, mo.TrainState(weights, state.opt_state.inner_state))
    state = restore(tmp_path, start)
    gap = optax.tree.norm(optax.tree.sub(state.params, carried))
    np.testing.assert_allclose(gap, RHO)

    # One recursion for all of it: without a radius MSAM is the plain optimizer. The
    # first gradient of each phase is taken where the last step of the other left off.
    def rho(t: int) -> float:
        return RHO * (TO_MSAM <= t < TO_PLAIN - 1)

    _, clean = PAIRS[pair].reference(
        problem.named_grad, problem.named_params, END, rho=rho
    )

    def assert_at(step: int, params: Any) -> None:
        chex.assert_trees_all_close(
            jax.tree.leaves(params), list(clean[step - 1].values()), rtol=0, atol=1e-10
        )

    assert_at(TO_PLAIN, state.params)
    end = train(state, TO_PLAIN, END)
    assert_at(END, end.params)

    # What the recipe avoids: the perturbed parameters, or a momentum of zero.
    for wrong in (
        mo.TrainState(carried, state.opt_state),
        mo.TrainState(state.params, plain.init(params)),
    ):
        other = train(wrong, TO_PLAIN, END)
        assert optax.tree.norm(optax.tree.sub(other.params, end.params)) > 1e-3


def test_a_plain_optimizer_does_not_take_msams_own_checkpoint_for_its_own(tmp_path):
    params = resuming.params()
    for trained, target in (
        (mo.msam(0.1, rho=0.3), optax.sgd(0.1, momentum=0.9)),
        (optax.sgd(0.1, momentum=0.9), mo.msam(0.1, rho=0.3)),
    ):
        directory = tmp_path / type(trained.init(params)).__name__
        save(directory, 1, mo.TrainState(params, trained.init(params)))
        with pytest.raises(ValueError):
            restore(directory, mo.TrainState(params, target.init(params)))
