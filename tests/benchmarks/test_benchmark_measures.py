"""Tests of benchmarks/radius.py, sharpness.py and shares.py."""

import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.container import ErrorbarContainer
from scipy import stats

import msam_optax
from benchmarks import normality, page, radius, sharpness
from benchmarks.reports import report
from benchmarks.tasks import optimizers, problems, runs


def test_variants_differ_as_their_names_say() -> None:
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([2.0])}  # of length 3
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}  # of length 13
    epsilons = {}
    for name, variant in radius.VARIANTS.items():
        tx = variant.wrap(optax.sgd(1e-4, 0.9), 0.5)
        updates, state = tx.update(grads, tx.init(params), params)
        perturbed = optax.apply_updates(params, updates)
        weights = msam_optax.eval_params(state, perturbed)
        epsilons[name] = optax.tree.sub(perturbed, weights)
    whole = jax.tree.map(lambda g: -0.5 * g / 13, grads)
    each = {"a": -0.5 * grads["a"] / 5, "b": -0.5 * grads["b"] / 12}
    expected = {
        "msam": whole,
        "sign reversed": optax.tree.scale(-1, whole),
        "norm of each tensor": each,
        "relative to the weights": optax.tree.scale(3, whole),
        "multiple of the last update": optax.tree.scale(-0.5e-4, grads),
    }
    assert expected.keys() == radius.VARIANTS.keys()
    for name, tree in expected.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            epsilons[name],
            tree,
        )


@pytest.mark.parametrize("task", radius.TASKS)
def test_points_keep_the_size_of_a_step_over_momentums(task: str) -> None:
    found = radius.points(task, 0.03)
    assert len(found) == len(set(found))
    steps = {p.learning_rate / (1 - p.momentum) for p in found if p.axis == "momentum"}
    np.testing.assert_allclose(sorted(steps), 0.3)


def test_radius_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = radius.points("digits", 0.03)[:2]
    monkeypatch.setattr(radius, "points", lambda task, learning_rate: few)
    argv = ["--quick", "--tasks", "digits", "--seeds", "1", "--out", str(tmp_path)]
    assert radius.main(argv) == 0
    rows = (tmp_path / "validation.jsonl").read_text()
    assert rows.count("\n") == 2
    assert "| digits | msam | " in (tmp_path / "table.md").read_text()
    assert radius.main(argv) == 0
    assert (tmp_path / "validation.jsonl").read_text() == rows


def test_measures_on_a_quadratic() -> None:
    """L = w' diag(3, 1) w / 2 at (1, 0): the gradient is (3, 0), the eigenvalue 3."""

    def loss(params, batch):
        return jnp.mean(batch) * 0.5 * jnp.sum(jnp.array([3.0, 1.0]) * params**2)

    # hessian_eigenvalues takes no more vectors than there are parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharpness, "_LANCZOS_STEPS", 2)
        found = sharpness.measures(loss, jnp.array([1.0, 0.0]), jnp.ones(4))
    assert found["loss_there"] == pytest.approx(1.5)
    assert found["gradient_norm"] == pytest.approx(3.0)
    assert found["eigenvalue"] == pytest.approx(3.0, rel=1e-5)
    assert found["rise"] == pytest.approx(1.5 * (1.1**2 - 1), rel=1e-5)
    assert found["relative_rise"] == pytest.approx(1.5 * (1.01**2 - 1), rel=1e-4)


def test_run_takes_a_decision_for_each_of_a_sweep() -> None:
    """`make_run` under vmap is the runs one by one, AE-SAM's decisions included."""
    problem = problems.digits(epochs=1, dataset="digits")
    run = runs.make_run(problem, optimizers.METHODS["ae_sam"].build)
    inputs = problem.inputs(0, True)
    rhos = np.array([0.05, 1.0], np.float32)
    sweep = jax.jit(jax.vmap(run, in_axes=(runs.Traced(None, 0, None), None)))
    swept, _ = sweep(runs.Traced(0.03, rhos, 0.01), inputs)
    single = jax.jit(run)
    for number, rho in enumerate(rhos):
        one, _ = single(runs.Traced(0.03, rho, 0.01), inputs)
        assert float(swept.loss[number]) == pytest.approx(float(one.loss), rel=1e-3)
        assert float(swept.sam_fraction[number]) == float(one.sam_fraction)


def test_squared_norms_without_their_line() -> None:
    """A trend over an epoch is no deviation from normality; a skewed noise is."""
    rng = np.random.default_rng(0)

    def rows(noise: np.ndarray) -> list[dict[str, str]]:
        return [
            {
                "seed": str(seed),
                "epoch": str((step + 1) / 50),
                "squared_norm": str(10 - 0.05 * step + noise[seed, step]),
            }
            for seed in range(4)
            for step in range(200)
        ]

    normal = normality.standardised(rows(rng.normal(size=(4, 200))))
    assert len(normal) == 800 and np.std(normal) == pytest.approx(1, abs=0.03)
    assert abs(stats.skew(normal)) < 0.2
    skewed = normality.standardised(rows(rng.exponential(size=(4, 200))))
    assert stats.skew(skewed) > 1
    assert any("Skewness" in line for line in normality.table(skewed))


def _study(folder: Path, methods: dict[str, tuple[str | None, float, float]]) -> None:
    """Files of a study: each method with its base, its gain and its share of SAM."""
    folder.mkdir()
    chosen = {"learning_rate": 0.1, "rho": None, "weight_decay": 0.0}
    found = {name: {"chosen": chosen, "base": own[0]} for name, own in methods.items()}
    (folder / "chosen.json").write_text(json.dumps({"methods": found}))
    with (folder / "test.jsonl").open("w") as file:
        for name, (_, gain, share) in methods.items():
            for seed in (100, 101, 102):
                row: dict[str, Any] = {**chosen, "method": name, "seed": seed}
                # Seeds differ by more than the methods: the gain is paired.
                accuracy = 0.5 + 0.1 * (seed - 100) + gain
                row |= {"accuracy": accuracy, "sam_fraction": share}
                file.write(json.dumps(row) + "\n")
            # Another setting's tests do not count.
            row = {**row, "learning_rate": 0.3, "accuracy": 0.0}
            file.write(json.dumps(row) + "\n")


def test_page_replaces_its_table_alone(tmp_path: Path) -> None:
    _study(tmp_path / "digits", {"sgd": (None, 0.0, 0.0), "sam": (None, 0.02, 1.0)})
    text = f"Before.\n\n{page.START}\nold\n{page.END}\n\nAfter.\n"
    made = page.page(text, page.table(tmp_path))
    assert made.startswith("Before.\n") and made.endswith("After.\n")
    assert "old" not in made
    assert "| `sam` | 2.00 | +2.00 ± 0.00 points | `sgd` | 3 |" in made
    assert page.page(made, page.table(tmp_path)) == made


def test_gain_is_over_the_own_base(tmp_path: Path) -> None:
    """The second base is compared with nothing, and what is around it with it."""
    methods: dict[str, tuple[str | None, float, float]] = {
        "adamw": ("adamw", 0.0, 0.0),
        "adamw_msam": ("adamw", 0.01, 0.0),
        "lion": ("lion", 0.1, 0.0),
        "lion_msam": ("lion", 0.13, 0.0),
        "muon_msam": ("muon", 0.2, 0.0),
    }
    _study(tmp_path / "directions", methods)
    lines = page.table(tmp_path)[2:]
    assert [line.partition("| `")[2] for line in lines] == [
        "adamw` | 1.00 |  |  | 3 |",
        "adamw_msam` | 1.00 | +1.00 ± 0.00 points | `adamw` | 3 |",
        "lion` | 1.00 |  |  | 3 |",
        "lion_msam` | 1.00 | +3.00 ± 0.00 points | `lion` | 3 |",
        # Its base was not tested.
        "muon_msam` | 1.00 |  |  | 3 |",
    ]


def test_figure_has_one_row_a_policy_at_every_share() -> None:
    """Also where a share lacks one, and in colour only what differs from the coin."""

    def result(name: str, mean: float) -> page.Result:
        return page.Result(name, 1.25, report.Estimate(mean, 0.2), "coin", 30)

    few = [result("coin", 0.0), result("ae_sam", 0.1)]
    all_of_them = [result("coin", 0.0), result("first", -0.7), result("ae_sam", 0.3)]
    shares = {"25": few, "50": all_of_them}
    drawn = page.policies({"digits": shares, "clothes": {"50": few}})
    left, right, below, nothing = drawn.axes
    assert len(below.containers) == 2
    assert not nothing.axison
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["coin", "ae_sam", "first"]
    for axes, own in ((left, few), (right, all_of_them)):
        for bars, expected in zip(axes.containers, own, strict=True):
            line = cast(ErrorbarContainer, bars).lines[0]
            assert line is not None
            (x,), (place,) = cast(Any, line.get_data())
            assert (x, labels[place]) == (expected.gain.mean, expected.method)
            assert (line.get_color() == "C0") == (abs(x) > 0.2)


def test_page_of_the_studies_is_that_of_their_rows() -> None:
    folder = optimizers.RESULTS / "studies"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert page.page(text, page.table(folder)) == text
