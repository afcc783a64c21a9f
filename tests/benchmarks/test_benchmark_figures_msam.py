"""Tests of the figures on MSAM itself: about a minute."""

import math
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from benchmarks.figures import (
    accuracy_against_rho,
    common,
    equal_budget,
    momentum_cosine,
    normalization,
    over_rho,
    perturbation_effect,
    similarity,
)
from benchmarks.figures.along_training import Moment, measured
from benchmarks.tasks import optimizers, training
from benchmarks.tasks.search import Hyperparameters
from tests import figure_scripts, problems
from tests.figure_scripts import FAST

STEPS = 5
STUDIED = {
    "sgd": Hyperparameters(0.02, None, 0.01),
    "msam": Hyperparameters(0.05, 0.3, 0.002),
    "sam": Hyperparameters(0.1, 0.2, 0.0),
}


@pytest.fixture(autouse=True)
def studied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method at a setting of its own."""
    monkeypatch.setattr(optimizers, "load_studied", lambda *_: (STUDIED, "studied"))


def study(epochs: int, seeds: int = 1) -> common.Study:
    flags = ["--epochs", str(epochs), "--seeds", str(seeds)]
    return common.open_study("test.py", "A test.", [*FAST, *flags])


def run(script: ModuleType, out: Path) -> list[figure_scripts.Row]:
    rows = figure_scripts.run(script, out)
    for row in rows:
        if row["method"] in STUDIED:
            found = STUDIED[row["method"]]
            assert row["learning_rate"] == found.learning_rate
            assert row["weight_decay"] == found.weight_decay
    return rows


# The scripts, end to end.


def test_accuracy_against_rho(tmp_path: Path) -> None:
    rows = run(accuracy_against_rho, tmp_path)
    swept = accuracy_against_rho.RHOS
    assert all(min(rhos) < 0 < max(rhos) for rhos in swept.values())
    rhos = {"sgd": (0.0,), "nag": (0.0,), **swept}
    points = Counter((row["method"], row["rho"]) for row in rows)
    assert points == {(name, rho): 2 for name, values in rhos.items() for rho in values}
    # A radius is looked for on what was held out of the training part.
    assert "test_accuracy" not in rows[0]
    for column in ("validation_accuracy", "train_accuracy"):
        assert all(0 <= row[column] <= 1 for row in rows)


def test_normalization(tmp_path: Path) -> None:
    rows = run(normalization, tmp_path)
    assert {row["method"] for row in rows} == {*over_rho.BASES, *normalization.VARIANTS}
    # Nesterov itself is among them, at MSAM's rate and decay.
    (scaled, *_) = (r for r in rows if r["method"] == "scaled by η" and r["rho"] == 1)
    assert (scaled["learning_rate"], scaled["weight_decay"]) == (0.05, 0.002)


def test_equal_budget(tmp_path: Path) -> None:
    rows = run(equal_budget, tmp_path)
    seen = {(row["method"], row["epochs"], row["gradients"]) for row in rows}
    assert seen == {
        *(("sgd", 1, STEPS), ("sgd", 2, 2 * STEPS)),
        *(("msam", 1, STEPS), ("msam", 2, 2 * STEPS)),
        ("sam", 1, 2 * STEPS),  # half an epoch is rounded up
    }
    assert {r["rho"] for r in rows if r["method"] == "msam"} == {0.3}


def test_momentum_cosine(tmp_path: Path) -> None:
    rows = run(momentum_cosine, tmp_path)
    assert Counter(row["method"] for row in rows) == {"sgd": 2, "msam": 2, "sam": 2}
    assert all(-1 <= row["cosine"] <= 1 and row["cosine"] for row in rows)


def test_perturbation_effect(tmp_path: Path) -> None:
    rows = run(perturbation_effect, tmp_path)
    assert Counter(row["method"] for row in rows) == {"msam": 2, "sam": 2}
    assert all(r["rise"] == r["loss_after"] - r["loss_before"] for r in rows)
    assert all(r["rise"] > 0 for r in rows if r["method"] == "sam")


def test_similarity(tmp_path: Path) -> None:
    rows = run(similarity, tmp_path)
    points = Counter((row["method"], row["perturbation"]) for row in rows)
    assert points == {(m, rho): 2 for m in ("sgd", "msam") for rho in similarity.RHOS}
    for row in rows:
        angle = math.radians(row["theta_degrees"])
        assert math.atan2(row["y"], row["x"]) == pytest.approx(angle)
        assert row["perturbation"] or row["y"] > 0


# What they are made of.


def test_cosine() -> None:
    vector = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    other = {"a": jnp.array([-8.0]), "b": jnp.array([[-6.0]])}
    # Of the whole trees, not the mean of the leaves' -1.
    assert momentum_cosine.cosine(vector, other) == pytest.approx(-24 / 25)
    assert momentum_cosine.cosine(vector, vector) == pytest.approx(1.0)
    assert momentum_cosine.cosine(vector, optax.tree.zeros_like(vector)) == 0.0


@pytest.mark.parametrize(
    ("vector", "angle"),
    [
        ([1.0, 0.0, 0.0], 0.0),
        ([1.0, math.sqrt(3), 5.0], 60.0),
        ([1.0, -math.sqrt(3), 5.0], -60.0),
        ([-1.0, 1.0, 0.0], 135.0),
        # `side` itself: with it in the place of e_2 this would be more than 45.
        ([1.0, 1.0, 0.0], 45.0),
    ],
)
def test_signed_angle(vector: list[float], angle: float, x64: None) -> None:
    axis, side = jnp.array([2.0, 0.0, 0.0]), jnp.array([3.0, 3.0, 0.0])
    for length in (0.1, 10.0):
        x, y = similarity.coordinates(length * jnp.array(vector), axis, side)
        assert similarity.signed_angle(x, y) == pytest.approx(angle)
        assert math.hypot(x, y) == pytest.approx(
            np.linalg.norm(vector[:2]) / np.linalg.norm(vector)
        )
    x, y = similarity.coordinates(jnp.array(vector), axis, -side)
    assert similarity.signed_angle(x, y) == pytest.approx(-angle)


def test_coordinates_go_over_all_leaves(x64: None) -> None:
    axis = {"a": jnp.array([1.0]), "b": jnp.array([1.0])}
    side = {"a": jnp.array([1.0]), "b": jnp.array([0.0])}
    found = similarity.coordinates(side, axis, side)
    assert similarity.signed_angle(*found) == pytest.approx(45.0)


@pytest.mark.parametrize(
    ("angles", "rho"),
    [
        ([30.0, 10.0, -10.0, 5.0, -5.0], 1.5),
        ([30.0, 0.0, -10.0, -10.0, -10.0], 1.0),
        # Only a fall counts.
        ([-10.0, 10.0, 20.0, 5.0, -15.0], 3.25),
        ([30.0, 20.0, 10.0, 5.0, 1.0], math.nan),
    ],
)
def test_crossing(angles: list[float], rho: float) -> None:
    found = similarity.crossing([0.0, 1.0, 2.0, 3.0, 4.0], angles)
    assert found == pytest.approx(rho, nan_ok=True)


def moment(momentum_sign: float) -> Moment:
    """On a quadratic, with a momentum along the gradient or against it."""
    scales = jnp.array([1.0, 2.0, 5.0])

    def loss(w):
        return 0.5 * jnp.sum(scales * w**2)

    weights = jnp.array([1.0, -2.0, 0.5])
    gradient = jax.grad(loss)
    momentum = momentum_sign * 7 * gradient(weights)
    params = weights - 0.3 * momentum / jnp.linalg.norm(momentum)
    return Moment(weights, params, momentum, loss, gradient)


def test_msam_against_the_gradient_is_sam(x64: None) -> None:
    at = similarity.RHOS.index(0.5)
    against = similarity.measure(moment(-1.0), sam_rho=0.5)
    assert against["x"][at] == pytest.approx(1.0)
    assert against["y"][at] == pytest.approx(0.0, abs=1e-12)
    angles = list(map(similarity.signed_angle, against["x"], against["y"]))
    assert similarity.crossing(similarity.RHOS, angles) == pytest.approx(0.5)
    along = similarity.measure(moment(1.0), sam_rho=0.5)
    assert along["y"][at] > along["y"][0] == against["y"][0] > 0


def test_losses_before_and_after(x64: None) -> None:
    measures = perturbation_effect.measures(sam_rho=0.4)
    for sign in (1.0, -1.0):
        at = moment(sign)
        unit = at.gradient(at.weights) / jnp.linalg.norm(at.gradient(at.weights))
        steps = {"sam": 0.4, "msam": -0.3 * sign}
        for method, step in steps.items():
            found = measures[method](at)
            assert found["loss_before"] == pytest.approx(at.loss(at.weights))
            after = at.loss(at.weights + step * unit)
            assert found["loss_after"] == pytest.approx(after)


def setting(rho: float, total_steps: int) -> optimizers.Setting:
    return optimizers.Setting(0.05, rho, 0.01, total_steps)


def variant(name: str, rho: float, total_steps: int = 10**9) -> problems.Run:
    """By default as with a constant learning rate."""
    tx = normalization.build(name, setting(rho, total_steps))
    return problems.run(tx, problems.mlp(), observe=lambda state, _: state)


def distance(run: problems.Run, method: str, rho: float = 1.0) -> float:
    tx = optimizers.METHODS[method].build(setting(rho, 10**9))
    other = problems.run(tx, problems.mlp())
    return max(
        float(optax.tree.norm(optax.tree.sub(p, q)))
        for p, q in zip(run.params, other.params, strict=True)
    )


def test_scaled_variant_with_rho_1_is_nesterov(x64: None) -> None:
    assert distance(variant("scaled by η", 1.0), "nag") < 1e-10
    assert distance(variant("scaled by η", 1.0), "sgd") > 1e-3
    assert distance(variant("scaled by η", 0.9), "nag") > 1e-3
    assert distance(variant("unnormalised", 0.05 * 0.9), "nag") < 1e-10


def test_normalised_variant_is_msam(x64: None) -> None:
    assert distance(variant("normalised", 0.3), "msam", 0.3) < 1e-10
    assert distance(variant("normalised", 0.3), "msam", -0.3) > 1e-3


def test_scaled_variant_follows_the_learning_rate(x64: None) -> None:
    total = problems.STEPS
    found = variant("scaled by η", 3.0, total)
    schedule = setting(3.0, total).schedule
    for step, (params, state) in enumerate(
        zip(found.params, found.observed, strict=True), start=1
    ):
        epsilon = optax.tree.sub(params, msam_optax.eval_params(state, params))
        ahead = -3.0 * schedule(step) * 0.9
        expected = optax.tree.scale(ahead, optax.tree.get(state, "trace"))
        assert optax.tree.norm(optax.tree.sub(epsilon, expected)) < 1e-10


def test_adjustable_trainer_is_the_trainer_of_these_values() -> None:
    small = study(epochs=1)
    adjustable = small.adjustable_trainer("msam")
    *_, other = adjustable.epochs(0, rho=1.0)
    *_, found = adjustable.epochs(0, rho=0.3)
    *_, expected = small.trainer("msam").epochs(0)

    def distance(epoch: training.Epoch) -> float:
        difference = optax.tree.sub(epoch.state.params, expected.state.params)
        return float(optax.tree.norm(difference))

    assert distance(found) < 1e-4 < 0.1 < distance(other)


def test_setting_is_the_studied_one() -> None:
    small = study(epochs=1)
    assert small.setting("msam")[:3] == STUDIED["msam"]
    # A variant takes over that of the method it varies.
    assert small.setting("ss_sam")[:3] == STUDIED["sam"]
    untuned = optimizers.untuned("adam")
    assert small.setting("adam")[:3] == (untuned.learning_rate, 0.0, 5e-4)
    given = common.open_study("x.py", "", [*FAST, "--weight-decay", "0.5"])
    assert given.setting("sgd").weight_decay == 0.5


def test_validation_part_is_held_out_of_the_training_part() -> None:
    part = common.open_study("x.py", "", FAST, part="validation").task
    whole = common.open_study("x.py", "", FAST).task
    held_out = len(part.test_labels)
    assert len(part.clean_labels) + held_out == len(whole.clean_labels)


def test_study_with_other_epochs() -> None:
    small = study(epochs=2)
    for changed, epochs in ((small.with_epochs(4), 4), (small, 2)):
        assert changed.task.epochs == epochs
        assert changed.setting("sgd").total_steps == epochs * STEPS


def test_measures_see_what_a_step_is_taken_from() -> None:
    seen: list[Any] = []

    def measure(moment: Moment) -> dict[str, Any]:
        # The step takes the memory of what it is taken from.
        seen.append(jax.tree.map(jnp.copy, moment[:3]))
        return {
            "count": len(seen),
            "loss": moment.loss(moment.params),
            "gradient": optax.tree.norm(moment.gradient(moment.params)),
        }

    small = study(epochs=3)
    found = list(measured(small, {"msam": measure}, looks=2, epochs=2))
    columns = [(c["learning_rate"], c["epoch"], c["seed"]) for c, _ in found]
    assert columns == [(0.05, 1, 0), (0.05, 3, 0)]
    assert [values["count"] for _, values in found] == [1.5, 3.5]
    rho = small.setting("msam").rho
    for weights, params, momentum in seen:
        epsilon = optax.tree.sub(params, weights)
        assert optax.tree.norm(epsilon) == pytest.approx(rho, rel=1e-4)
        assert momentum_cosine.cosine(epsilon, momentum) == pytest.approx(-1.0)
    assert all(values["loss"] > 0 and values["gradient"] > 0 for _, values in found)
