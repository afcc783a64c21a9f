"""Tests of the figures on SAM itself: epochs, second order, norms, m, convergence."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.figures import (
    chosen,
    common,
    convergence,
    m_sharpness,
    more_epochs,
    p_norms,
    second_order,
)
from benchmarks.tasks import optimizers, problems, runs
from tests.figure_scripts import FAST, run


def study(*flags: str) -> common.Study:
    return common.open_study("x.py", "", [*FAST, "--epochs", "1", *flags])


def test_radius_is_chosen_on_validation_and_tested_with_other_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_order, "RHOS", (0.05, 0.1))
    rows = run(second_order, tmp_path)
    assert {row["variant"] for row in rows} == {*second_order.ORDERS}
    for name in second_order.ORDERS:
        of = [row for row in rows if row["variant"] == name]
        validation = [row for row in of if row["part"] == "validation"]
        tested = [row for row in of if row["part"] == "test"]
        assert [row["seed"] for row in validation] == [0, 1] * 2
        assert [row["seed"] for row in tested] == [100, 101]
        mean = {
            rho: np.mean([r["accuracy"] for r in validation if r["rho"] == rho])
            for rho in (0.05, 0.1)
        }
        assert {row["rho"] for row in tested} == {max(mean, key=lambda r: mean[r])}
    # The term through the perturbation makes a difference.
    first, second = (
        [row["accuracy"] for row in rows if row["variant"] == name]
        for name in second_order.ORDERS
    )
    assert first != second


def test_more_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(more_epochs, "METHODS", ("sgd",))
    monkeypatch.setattr(more_epochs, "SHARES", (1.0, 2.0))
    rows = run(more_epochs, tmp_path)
    assert [row["epochs"] for row in rows] == [1, 1, 2, 2]


def test_convergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "METHODS", ("sgd", "sam"))
    rows = run(convergence, tmp_path, "--epochs", "2")
    sgd, sam = ([r for r in rows if r["method"] == m] for m in ("sgd", "sam"))
    assert [row["steps"] for row in sgd] == [row["steps"] for row in sam]
    for plain, second in zip(sgd, sam, strict=True):
        assert plain["gradients"] == plain["steps"]
        assert second["gradients"] == 2 * second["steps"]
        same = ("learning_rate", "rho", "weight_decay")
        assert [plain[key] for key in same] == [second[key] for key in same]


def test_one_shard_is_sam() -> None:
    problem = problems.digits(1, "digits", 0.4)
    inputs = problem.inputs(0, False)
    values = runs.Traced(*map(np.float32, (0.05, 0.2, 0.01)))
    expected, params = jax.jit(runs.make_run(problem, optimizers.METHODS["sam"].build))(
        values, inputs
    )

    def distance(examples: int) -> float:
        made = jax.jit(m_sharpness.make_run(problem, examples))
        _, other = made(values, inputs)
        differences = jax.tree.map(lambda a, b: abs(a - b).max(), params, other)
        return float(max(jax.tree.leaves(differences)))

    assert float(expected.accuracy) > 0.1
    assert distance(128) < 1e-4 < distance(32)


def test_every_norm_has_its_own_radii() -> None:
    assert {*p_norms.RHOS} == {1, 2, math.inf}
    setting = optimizers.Setting(0.1, 0.3, 0.0, 10)
    params = {"w": np.array([3.0, -4.0], np.float32)}

    def at(rho: float, p: float) -> Any:
        seen = []

        def grad_fn(w: Any) -> Any:
            seen.append(w["w"] - params["w"])
            return w

        tx = p_norms.build(p, setting._replace(rho=rho))
        tx.update(params, tx.init(params), params, grad_fn=grad_fn)
        return seen[-1]

    np.testing.assert_allclose(at(0.3, 1), [0.0, -0.3], rtol=1e-5)
    np.testing.assert_allclose(at(0.5, 2), [0.3, -0.4], rtol=1e-5)
    np.testing.assert_allclose(at(0.3, math.inf), [0.3, -0.3], rtol=1e-5)


def test_best_is_of_the_mean() -> None:
    rows = [
        {"rho": rho, "accuracy": accuracy}
        for rho, accuracies in {0.1: (0.9, 0.1), 0.2: (0.6, 0.6)}.items()
        for accuracy in accuracies
    ]
    assert chosen.best(rows) == 0.2
