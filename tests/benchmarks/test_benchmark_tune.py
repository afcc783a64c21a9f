"""Tests of benchmarks/tune.py: the search, its records, and whole runs as programs."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import tune
from benchmarks.tasks import (
    data,
    models,
    optimizers,
    policies,
    problems,
    runs,
    training,
)
from benchmarks.tasks import text as text_data
from benchmarks.tasks.fashion import fashion
from benchmarks.tasks.fine_tuning import fine_tuning
from benchmarks.tasks.records import Record
from benchmarks.tasks.search import (
    Hyperparameters,
    Plan,
    Space,
    axis,
    search,
)

SPACE = Space(axis(0.001, 0.3, (1, 3)), axis(0.001, 0.1), axis(0.05, 1.0))


# The search.


def test_axis_holds_the_numbers_of_its_range() -> None:
    found = axis(0.05, 10.0)
    numbers = [found.value(i) for i in range(found.low, found.high + 1)]
    assert numbers == [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    assert found.value(found.low - 1) == 0.02
    assert [found.draw(u) for u in (0.0, 0.999)] == [found.low, found.high]
    rates = axis(0.001, 0.3, (1, 3))
    assert [rates.value(i) for i in (-6, -5, -1, 0)] == [0.001, 0.003, 0.3, 1.0]


def _peak(learning_rate: float, rho: float, weight_decay: float) -> Any:
    def score(setting: Hyperparameters, seed: int) -> float:
        assert setting.rho is not None
        given = (setting.learning_rate, setting.rho, setting.weight_decay)
        best = (learning_rate, rho, weight_decay)
        return (
            -sum(math.log(a / b) ** 2 for a, b in zip(given, best, strict=True))
            + 1e-9 * seed
        )

    return score


def test_every_search_costs_what_the_plan_says() -> None:
    plan = Plan(first=10, near=(3, 2), rungs=((4, 3), (2, 6)), moves=0)
    calls = []

    def score(setting: Hyperparameters, seed: int) -> float:
        calls.append((setting, seed))
        return _peak(0.01, 0.2, 0.01)(setting, seed)

    found = search(SPACE, score, plan)
    assert len(calls) == len(set(calls)) == found.runs == plan.runs == 15 + 8 + 6
    assert found.settings == 15
    # Whatever is chosen has all seeds.
    assert {seed for setting, seed in calls if setting == found.chosen} == set(range(6))


def test_search_leaves_a_range_whose_edge_is_best() -> None:
    found = search(SPACE, _peak(0.3, 5.0, 0.01), Plan(moves=5))
    assert found.chosen.rho is not None and found.chosen.rho > 1.0
    assert not found.at_edge
    stays = search(SPACE, _peak(0.3, 1e4, 0.01), Plan(moves=1))
    assert stays.at_edge


def test_search_never_chooses_what_diverges() -> None:
    def score(setting: Hyperparameters, seed: int) -> float:
        return math.nan if setting.learning_rate > 0.01 else 0.5

    assert search(SPACE, score, Plan()).chosen.learning_rate <= 0.01


def test_search_without_rho_draws_distinct_settings() -> None:
    settings = set()

    def score(setting: Hyperparameters, seed: int) -> float:
        assert setting.rho is None
        settings.add(setting)
        return 0.0

    found = search(SPACE._replace(rho=None), score, Plan(moves=0))
    assert len(settings) == found.settings == 28


# The records.


def test_record_survives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    record = Record(path, ["method", "rho"])
    record.append({"method": "sam", "rho": 0.1, "loss": math.inf})
    record.append({"method": "sgd", "rho": None, "loss": 2.0})
    path.write_text(path.read_text()[:-5])
    again = Record(path, ["method", "rho"])
    assert again.rows == [{"method": "sam", "rho": 0.1, "loss": None}]
    assert again.find({"method": "sgd", "rho": None}) is None
    again.append({"method": "sgd", "rho": None, "loss": 2.0})
    assert len(Record(path, ["method", "rho"]).rows) == 2


# Runs.


@pytest.fixture(scope="module")
def small() -> runs.Problem:
    return problems.digits(epochs=1, dataset="digits")


@pytest.mark.parametrize("name", ["msam", "ae_sam"])
def test_run_equals_that_of_compare(small: runs.Problem, name: str) -> None:
    """The same steps as the Trainer's, whose hyper-parameters are Python's numbers."""
    setting = optimizers.Setting(0.03, 0.2, 0.01, small.total_steps)
    build = optimizers.METHODS[name].build
    inputs = small.inputs(3, False)
    run = jax.jit(runs.make_run(small, build))
    outcome, params = run(runs.Traced(0.03, 0.2, 0.01), inputs)

    loaded = data.load("digits")
    task = training.Task(
        loaded, models.build("mlp", 10), label_noise=0.4, epochs=1, batch_size=128
    )
    *_, epoch = training.Trainer(task, build(setting)).epochs(3)
    weights = task.weights(epoch.state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        params,
        weights.params,
    )
    test = training.evaluate(task.model, weights, task.test_images, task.test_labels)
    assert float(outcome.loss) == pytest.approx(test.loss, rel=1e-4)
    assert float(outcome.sam_fraction) == pytest.approx(epoch.sam_fraction)


def test_validation_part_is_of_the_training_part(small: runs.Problem) -> None:
    loaded = data.load("digits")
    held_out = []
    for seed in (0, 1):
        inputs = small.inputs(seed, True)
        assert len(inputs.train[1]) + len(inputs.held_out[1]) == len(
            loaded.train_labels
        )
        held_out.append(inputs.held_out[1])
    assert not np.array_equal(*held_out)
    assert len(small.inputs(0, False).train[1]) == len(loaded.train_labels)


def test_text_parts_share_nothing() -> None:
    parts = text_data.load()
    total = len(parts.train) + len(parts.validation) + len(parts.test)
    assert len(parts.train) > 0.75 * total
    decoded = "".join(text_data.ALPHABET[i] for i in parts.train[:2000])
    assert "Python" in decoded or "statement" in decoded
    assert parts.train.max() < len(text_data.ALPHABET)


def test_transformer_does_not_see_the_future() -> None:
    model = models.CharacterTransformer(7, width=8, depth=1, heads=2)
    first = jnp.array([[1, 2, 3, 4]])
    params = model.init(jax.random.key(0), first, train=False)
    second = first.at[0, 3].set(6)
    a, b = (np.asarray(model.apply(params, x, train=False)) for x in (first, second))
    np.testing.assert_allclose(a[0, :3], b[0, :3], rtol=1e-6)
    assert not np.allclose(a[0, 3], b[0, 3])


@pytest.mark.parametrize("share", policies.SHARES)
def test_policies_build_and_have_one_share(share: float) -> None:
    """Those that do not look at gradients take exactly the share, in the mean."""
    steps = 200
    setting = optimizers.Setting(0.1, 0.1, 0.0, steps)
    params = {"w": jnp.ones(3)}
    for name, build in policies.at_share(share).items():
        tx = build(setting)

        def step(carry: Any, _: Any, tx: Any = tx) -> Any:
            params, state = carry
            grad_fn = jax.grad(lambda p: jnp.sum(p["w"] ** 2))
            grads = grad_fn(params)
            updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
            return (optax.apply_updates(params, updates), state), None

        (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=steps)
        employed = optax.tree.get(state, "employed_steps") / steps
        if name in ("every", "first", "last", "tail", "looksam", "weighted"):
            assert employed == pytest.approx(share)
        elif name == "coin":
            assert employed == pytest.approx(share, abs=0.1)


# The command.


def test_command_resumes_and_tells_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    argv = ["digits", "--quick", "--methods", "sgd", "msam", "--out", str(out)]
    assert tune.main(argv) == 0
    files = {path.name: path.read_text() for path in out.iterdir()}
    chosen = json.loads(files["chosen.json"])
    assert set(chosen["methods"]) == {"sgd", "msam"}
    assert chosen["commit"] and chosen["command"].startswith("python benchmarks/tune")
    tests = [json.loads(line) for line in files["test.jsonl"].splitlines()]
    assert {row["seed"] for row in tests} == {100, 101}
    assert all(row["commit"] == chosen["commit"] for row in tests)
    assert "| msam |" in files["table.md"]

    # The same command again trains nothing, and one that was cut off what is missing.
    made = []
    train = tune.Runner._train
    monkeypatch.setattr(
        tune.Runner,
        "_train",
        lambda self, *args: made.append(args) or train(self, *args),  # type: ignore
    )
    assert tune.main(argv) == 0
    assert made == []
    kept = files["test.jsonl"].splitlines(keepends=True)[:-1]
    (out / "test.jsonl").write_text("".join(kept))
    assert tune.main([*argv, "--minutes", "1e-9"]) == 3
    assert tune.main(argv) == 0
    assert len(made) == 2 and len((out / "test.jsonl").read_text().splitlines()) == 4


def test_unknown_method_gets_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["digits", "--methods", "sdg"])
    assert "'sdg' is none of sgd, msam" in capsys.readouterr().err


def test_fine_tuning_starts_from_a_trained_network_with_few_examples() -> None:
    problem = fine_tuning(epochs=1, start_epochs=1)
    first, second = problem.inputs(0, True), problem.inputs(3, False)
    assert first.order.shape == (problem.total_steps, 50)
    assert np.bincount(first.train[1]).min() >= 9 and len(first.train[1]) == 100
    assert not np.array_equal(first.train[0], second.train[0])
    # What is validated on is not in the test.
    rows = {image.tobytes() for image in first.held_out[0]}
    assert not any(image.tobytes() in rows for image in second.held_out[0])
    state = problem.init(optax.sgd(0.1), jax.random.key(0), first.train)
    assert state.params is first.train[2] is second.train[2]


# Convolutions, trained from the host.


@pytest.fixture(scope="module")
def clothes() -> runs.Problem:
    return fashion(0.2, images=64, steps=4, validating=100, dataset="digits")


@pytest.mark.parametrize("name", ["msam", "ae_sam"])
def test_run_from_the_host_equals_the_program(small: runs.Problem, name: str) -> None:
    """At other numbers than those that it was built with, decisions included."""
    build = optimizers.METHODS[name].build
    traced = runs.Traced(*map(np.float32, (0.03, 0.2, 0.01)))
    inputs = small.inputs(3, True)
    from_host = runs.compiled(small._replace(from_host=True), build)
    found, params = from_host(traced, inputs)
    expected, in_graph = runs.compiled(small, build)(traced, inputs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        params,
        in_graph,
    )
    assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-4)
    assert float(found.sam_fraction) == float(expected.sam_fraction)


def test_clothes_are_evaluated_at_their_own_statistics(clothes: runs.Problem) -> None:
    """Those of the images that were trained on, whatever else is evaluated."""
    inputs = clothes.inputs(0, True)
    images, labels, shown = inputs.held_out
    state = clothes.init(optax.sgd(0.1), jax.random.key(0), inputs.train)
    evaluate = jax.jit(clothes.evaluate)
    _, loss = evaluate(state.params, (images, labels, shown))
    _, half = evaluate(state.params, (images[:50], labels[:50], shown))
    _, rest = evaluate(state.params, (images[50:], labels[50:], shown))
    assert float(loss) == pytest.approx((float(half) + float(rest)) / 2, rel=1e-4)
    _, other = evaluate(state.params, (images, labels, shown[:32]))
    assert abs(float(other - loss)) > 1e-4


def test_clothes_are_cropped_and_mirrored(clothes: runs.Problem) -> None:
    image = np.arange(1.0, 26.0).reshape(5, 5)
    images = np.tile(image[..., None], (64, 1, 1, 1))
    train = (images, np.arange(64), images)
    batch, labels = clothes.gather(train, np.arange(64), jax.random.key(0))
    padded = np.pad(image, 2, mode="edge")
    crops = [padded[i : i + 5, j : j + 5] for i in range(5) for j in range(5)]
    possible = {crop.tobytes() for c in crops for crop in (c, c[:, ::-1])}
    drawn = [np.asarray(b[..., 0], np.float64).tobytes() for b in batch]
    assert set(drawn) <= possible and len(set(drawn)) > 9
    np.testing.assert_array_equal(labels, np.arange(64))


def test_clothes_to_validate_are_of_the_training_part(clothes: runs.Problem) -> None:
    loaded = data.load("digits")
    of_training = {image.tobytes() for image in loaded.train_images}
    inputs = clothes.inputs(0, True)
    shown, held_out = (
        {image.tobytes() for image in part[0]}
        for part in (inputs.train, inputs.held_out)
    )
    assert shown <= of_training and held_out <= of_training
    assert not shown & held_out
    tested = clothes.inputs(0, False).held_out
    np.testing.assert_array_equal(tested[0], loaded.test_images)
