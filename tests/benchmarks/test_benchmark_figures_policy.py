"""Tests of the figures on policies, cost, label noise and MSAM's stability."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from benchmarks import run_figures
from benchmarks.figures import (
    accuracy_against_cost,
    common,
    label_noise,
    policy_trace,
    stability,
    stability_ranges,
    stability_variants,
)
from benchmarks.figures.stability_variants import Base, Point
from benchmarks.tasks import optimizers
from benchmarks.tasks.search import Hyperparameters
from tests.figure_scripts import FAST, run

STEPS = 5


# AE-SAM's policy.


def test_policy_trace_is_that_of_ae_sam(tmp_path: Path) -> None:
    rows = run(policy_trace, tmp_path, "--epochs", "2")
    assert len(rows) == 2 * 2 * STEPS
    for seed in (0, 1):
        trace = [row for row in rows if row["seed"] == seed]
        mean = variance = 0.0
        employed = []
        for step, row in enumerate(trace):
            norm = row["squared_norm"]
            mean = 0.9 * mean + 0.1 * norm
            variance = 0.9 * variance + 0.1 * (norm - mean) ** 2
            threshold = mean + (1 - step / STEPS) * math.sqrt(variance)
            assert row["step"] == step and row["epoch"] == (step + 1) / STEPS
            assert row["mean"] == pytest.approx(mean, rel=1e-5)
            assert row["threshold"] == pytest.approx(threshold, rel=1e-5)
            employed.append(row["employed"])
            assert employed[-1] == (norm >= threshold)
            assert row["fraction_so_far"] == pytest.approx(np.mean(employed))
        for epoch in (0, 1):
            of_epoch = trace[epoch * STEPS : (epoch + 1) * STEPS]
            share = np.mean([row["employed"] for row in of_epoch])
            assert [row["epoch_fraction"] for row in of_epoch] == [share] * STEPS
    assert len({row["employed"] for row in rows}) == 2


def test_recorded_policy_decides_alike() -> None:
    policy = msam_optax.policies.adaptive(4)
    recorded = policy_trace.recorded(policy, 4)
    state, record = policy.init(jnp.zeros(2)), recorded.init(jnp.zeros(2))
    for step, size in enumerate((1.0, 3.0, 1.0, 2.0)):
        gradient = jnp.array([3.0, 4.0]) * size
        decision, state = policy.decide(gradient, state, step=step)
        again, record = recorded.decide(gradient, record, step=step)
        assert again == decision
        row = record.trace[step]
        np.testing.assert_allclose(
            row, [25 * size**2, state.mean, state.threshold, decision], rtol=1e-6
        )


# Cost.


def test_cost_is_in_gradients_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ("sgd", "esam")
    monkeypatch.setattr(accuracy_against_cost, "METHODS", methods)
    studied = {
        "sgd": Hyperparameters(0.02, None, 0.01),
        "sam": Hyperparameters(0.05, 0.3, 0.002),
    }
    monkeypatch.setattr(optimizers, "load_studied", lambda *_: (studied, ""))
    rows = run(accuracy_against_cost, tmp_path)
    assert [row["method"] for row in rows] == ["sgd", "sgd", "esam", "esam"]
    for row in rows:
        is_esam = row["method"] == "esam"
        # The second gradient is of half of the batch.
        assert row["cost"] == (1.5 if is_esam else 1.0)
        columns = [row[key] for key in ("learning_rate", "rho", "weight_decay")]
        assert columns == ([0.05, 0.3, 0.002] if is_esam else [0.02, 0.0, 0.01])
        assert row["hyperparameters"] == ("taken over" if is_esam else "tuned")
        assert 0 <= row["test_accuracy"] <= 1 and 0 <= row["train_accuracy"] <= 1


# Label noise.


def test_label_noise_writes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_noise, "METHODS", ("sgd", "msam"))
    monkeypatch.setattr(label_noise, "NOISES", (0.0, 0.8))
    rows = run(label_noise, tmp_path, "--epochs", "2")
    assert len(rows) == 2 * 2 * 2
    final: dict[tuple[Any, ...], float] = {}
    for row in rows:
        assert row["learning_rate"] == 0.1
        assert row["rho"] == {"sgd": 0.0, "msam": 1.0}[row["method"]]
        # A fifth is held out, on which the epoch is chosen.
        assert row["early_epoch"] in (1, 2) and row["gradients"] == 2 * (STEPS - 1)
        if row["early_epoch"] == 2:
            assert row["early_accuracy"] == row["final_accuracy"]
        key = row["method"], row["label_noise"], row["seed"]
        final[key] = row["final_accuracy"]
    # The same weights and batches, but other labels.
    for method in ("sgd", "msam"):
        assert final[method, 0.0, 0] != final[method, 0.8, 0]
    table = (tmp_path / "label_noise.md").read_text(encoding="utf-8")
    cells = common.summarise(rows, ("method", "label_noise"), "final_accuracy")
    line = [cells["msam", noise].percent() for noise in (0.0, 0.8)]
    assert f"| msam | {' | '.join(line)} |" in table
    assert "- msam: learning rate 0.1, rho 1, weight decay 0.0005" in table
    assert "python benchmarks/figures/label_" in table


# Stability.


def test_stability_maps_and_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(name: str, first: Any) -> Any:
        """The same images in another order, without a second data set's files."""
        other = first.__class__.__new__(first.__class__)
        other.__dict__.update(first.__dict__, test_labels=first.test_labels[::-1])
        return other

    monkeypatch.setattr(stability, "second_task", swapped)
    for name, values in {
        "LEARNING_RATES": (0.03, 0.1),
        "MOMENTA": (0.9,),
        "MAP_RHOS": (0.5,),
        "VARIANT_RHOS": (0.5, 1.0),
        "VARIANTS": ("constant", "clipped"),
    }.items():
        monkeypatch.setattr(stability, name, values)
    rows = run(stability, tmp_path)
    points = {
        tuple(row[key] for key in ("dataset", "variant", *Point._fields))
        for row in rows
    }
    usual = {
        (dataset, variant, 0.03, 0.9, rho)
        for dataset in ("digits", "fashion_mnist")
        for variant in ("constant", "clipped")
        for rho in (0.0, 0.5, 1.0)
        if rho or variant == "constant"
    }
    other = {("digits", "constant", 0.1, 0.9, rho) for rho in (0.0, 0.5)}
    assert points == usual | other and len(rows) == 2 * len(points)
    assert all(row["diverged"] in (0, 1) for row in rows)
    table = (tmp_path / "stability.md").read_text(encoding="utf-8")
    assert table.count("| clipped |") == 2


def test_grid_run_equals_a_trainer() -> None:
    study = common.open_study("x.py", "", [*FAST, "--epochs", "2"])
    *_, expected = study.trainer("msam").epochs(3)
    setting = study.setting("msam")
    compiled = stability_variants.compiled(
        study.task.model, "constant", setting.weight_decay
    )
    found = stability_variants.final_state(
        compiled,
        study.task,
        Point(setting.learning_rate, setting.momentum, setting.rho),
        seed=3,
    )
    for a, b in zip(
        jax.tree.leaves(study.task.weights(found).params),
        jax.tree.leaves(study.task.weights(expected.state).params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("variant", "lengths"),
    [
        ("constant", [0.5] * 5),
        ("zero in warm-up", [0.0, 0.5, 0.5, 0.5, 0.5]),
        ("ramp", [0.0, 0.1, 0.2, 0.3, 0.4]),
        ("like learning rate", [0.5, 0.4, 0.3, 0.2, 0.1]),
        ("adaptive", [0.5] * 5),
    ],
)
def test_perturbation_has_the_length_of_the_variant(
    variant: str, lengths: list[float]
) -> None:
    found = [
        float(optax.tree.norm(epsilon)) for epsilon, _ in _perturbations(variant, 0.5)
    ]
    np.testing.assert_allclose(found, lengths, atol=1e-6)


def test_clipped_perturbation_is_a_share_of_the_weights() -> None:
    for rho in (0.01, 7.0):
        for epsilon, weights in _perturbations("clipped", rho):
            limit = stability_variants.CLIP_SHARE * float(optax.tree.norm(weights))
            assert limit > 0.01
            length = float(optax.tree.norm(epsilon))
            assert length == pytest.approx(min(rho, limit), rel=1e-4)


def test_layerwise_perturbation_is_relative_to_the_first_weights() -> None:
    for epsilon, weights in _perturbations("layer-wise", 0.5):
        for name, weight in weights.items():
            share = jnp.linalg.norm(epsilon[name]) / jnp.linalg.norm(weight)
            assert share == pytest.approx(0.5 / 13.0, rel=1e-4)


def _perturbations(variant: str, rho: float) -> list[tuple[Any, Any]]:
    """Those of five steps on a quadratic, and the weights that they belong to."""
    params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
    base = Base(optax.sgd(0.01, 0.9), lambda t: 1 - t / 5, 5, jnp.float32(13.0))
    tx = stability_variants.VARIANTS[variant](base, rho)
    state, found = tx.init(params), []
    for _ in range(5):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
        weights = msam_optax.eval_params(state, params)
        found.append((optax.tree.sub(params, weights), weights))
    return found


def test_good_range_by_hand() -> None:
    accuracies = {  # by seed, at rho 1, 2, 4 and 8
        0: [0.80, 0.90, 0.89, 0.10],
        1: [0.88, 0.885, 0.86, 0.50],
    }
    rows = [
        {"seed": seed, "rho": rho, "validation_accuracy": a, "diverged": int(a < 0.4)}
        for seed, values in accuracies.items()
        for rho, a in zip((1.0, 2.0, 4.0, 8.0), values, strict=True)
    ]
    found = stability_ranges.good_range(rows)
    assert found.best_rho == 2.0 and found.accuracy.mean == pytest.approx(0.8925)
    assert (found.smallest.mean, found.largest.mean) == (1.5, 3.0)
    assert (found.ratio.mean, found.stable.mean) == (2.0, 6.0)


# All of them.


def test_run_figures_finds_scripts_and_reports_failures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = 'if __name__ == "__main__":\n    '
    (tmp_path / "good.py").write_text(
        f"import sys\n{main}open(sys.argv[2], 'w').write(' '.join(sys.argv[1:]))"
    )
    (tmp_path / "shared.py").write_text("raise ValueError")
    flags = ["--out", str(tmp_path / "flags.txt")]
    assert run_figures.main(["--jobs", "2", *flags], tmp_path) == 0
    assert (tmp_path / "flags.txt").read_text() == " ".join(flags)
    assert "shared" not in capsys.readouterr().out
    (tmp_path / "bad.py").write_text(f"{main}raise SystemExit('no [such] data')")
    assert run_figures.main(flags, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "good" in printed and "bad ended with 1" in printed
    assert "no [such] data" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell the cores")
def test_run_figures_shares_out_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5})
    assert run_figures.shares(1) == [{1, 3, 5}]
    assert run_figures.shares(2) == [{1}, {3}]  # as many for each
    assert run_figures.shares(4) == [{1, 3, 5}] * 4
    monkeypatch.undo()
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(run_figures, "shares", lambda jobs: [{core}])
    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        'if __name__ == "__main__":\n'
        "    open(sys.argv[1], 'w').write(str(os.sched_getaffinity(0)))"
    )
    assert run_figures.main([str(tmp_path / "cores.txt")], tmp_path) == 0
    assert (tmp_path / "cores.txt").read_text() == str({core})


def test_run_figures_lists_this_folder() -> None:
    names = [path.stem for path in run_figures.scripts(run_figures.FOLDER)]
    assert {*names[: len(run_figures.LONGEST)]} == {*run_figures.LONGEST}
    assert "policy_trace" in names and "common" not in names
    assert not any(name.startswith("stability_") for name in names)
