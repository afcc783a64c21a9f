"""Tests of benchmarks/compare.py, and of what they are made of."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import msam_optax
from benchmarks import compare
from benchmarks.reports import report
from benchmarks.reports.comparison import Contender, Run, summarise
from benchmarks.tasks import data, models, optimizers, training
from benchmarks.tasks.search import Hyperparameters

FAST = ["--dataset", "digits", "--epochs", "2", "--batch-size", "256"]


def small_task(**changes: Any) -> training.Task:
    options = {"label_noise": 0.4, "epochs": 2, "batch_size": 256, **changes}
    model = models.build("mlp", 10, widths=(16,))
    return training.Task(data.load("digits"), model, **options)


def trainer(task: training.Task, name: str, rho: float = 0.1) -> training.Trainer:
    setting = optimizers.Setting(0.1, rho, 5e-4, task.total_steps)
    return training.Trainer(task, optimizers.METHODS[name].build(setting))


# The command, end to end.


class Output:
    """What the command printed and wrote."""

    def __init__(self, out: Path, printed: str) -> None:
        self.out = out
        self.printed = printed
        self.results = json.loads((out / "results.json").read_text())

    def csv(self, name: str) -> list[dict[str, str]]:
        with (self.out / name).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    out = tmp_path_factory.mktemp("compare")
    rhos = ["--rho", "msam=0.1", "msam=0.3,", "--rho", "ae_sam=1e30"]
    contenders = ["--optimizers", "sgd,sam", "msam", "ae_sam", *rhos]
    with pytest.MonkeyPatch.context() as patch:
        # The terminal's width must not matter.
        patch.setenv("COLUMNS", "40")
        with (out / "printed.txt").open("w", encoding="utf-8") as file:
            patch.setattr("sys.stdout", file)
            code = compare.main([*FAST, "--seeds", "2", *contenders, "--out", str(out)])
    assert code == 0
    return Output(out, (out / "printed.txt").read_text(encoding="utf-8"))


def test_table_and_files_agree(output: Output) -> None:
    table = output.results["table"]
    names = [(row["optimizer"], row["rho"]) for row in table]
    assert names == [
        ("sgd", None),
        ("sam", optimizers.METHODS["sam"].default),
        ("msam", 0.1),
        ("msam", 0.3),
        ("ae_sam", 1e30),
    ]
    lines = output.printed.splitlines()
    start = next(i for i, line in enumerate(lines) if "─────" in line)
    for printed, row, csv_row in zip(
        lines[start + 1 :], table, output.csv("table.csv"), strict=False
    ):
        cells = printed.split()
        assert cells[0] == row["optimizer"] == csv_row["optimizer"]
        accuracy = report.Estimate(
            row["final_accuracy_mean"], row["final_accuracy_interval"]
        )
        assert accuracy.percent() in printed
        assert f"{row['gradients']:.0f}" in cells
        assert f"{row['relative_time']:.2f}" in cells
        assert float(csv_row["final_accuracy_mean"]) == accuracy.mean
    assert "accuracy_gradients.png" in lines[-2]
    assert "accuracy_rho.png" in lines[-1]
    assert (output.out / "table.txt").read_text(encoding="utf-8") in output.printed
    for figure in ("accuracy_gradients.png", "accuracy_rho.png"):
        assert (output.out / figure).read_bytes().startswith(b"\x89PNG")


def test_files_hold_every_run_and_setting(output: Output) -> None:
    results, rows = output.results, output.csv("runs.csv")
    assert [run["seed"] for run in results["runs"]] == [0] * 5 + [1] * 5
    for run, row in zip(results["runs"], rows, strict=True):
        assert len(run["test_accuracies"]) == 2
        assert float(row["final_accuracy"]) == run["test_accuracies"][-1]
        assert float(row["best_accuracy"]) == max(run["test_accuracies"])
        assert row["epochs"] == "2" and row["dataset"] == "digits"
        assert row["jax"] == jax.__version__
    expected = {"label_noise": 0.4, "batch_size": 256, "momentum": 0.9, "seeds": 2}
    assert results["settings"].items() >= expected.items()
    versions = {"python", "jax", "jaxlib", "optax", "flax", "msam_optax"}
    assert versions <= set(results["versions"])
    assert {"cpu", "cores", "device"} <= set(results["machine"])
    assert results["command"].startswith(
        "python benchmarks/compare.py --dataset digits"
    )
    assert "--rho" in results["settings"]["hyperparameters"]


def test_counts_gradients(output: Output) -> None:
    steps = 2 * (1437 // 256)
    rows = {row["optimizer"]: row for row in output.results["table"]}
    assert rows["sgd"]["gradients"] == rows["msam"]["gradients"] == steps
    assert rows["sam"]["gradients"] == 2 * steps
    ae_sam = rows["ae_sam"]
    assert steps < ae_sam["gradients"] < 2 * steps
    assert ae_sam["gradients"] == pytest.approx(steps * (1 + ae_sam["sam_fraction"]))


def test_diverged_runs_are_reported(output: Output) -> None:
    assert output.results["table"][-1]["diverged"] == 2
    assert output.results["table"][-1]["test_loss_mean"] is None
    assert "ae_sam ρ=1e+30: 2 of 2 runs diverged" in output.printed
    assert output.results["table"][0]["diverged"] == 0


def test_interrupt_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, calls = compare._measure, []

    def interrupted_in_the_second_run(*args: Any) -> Run:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(compare, "_measure", interrupted_in_the_second_run)
    argv = [*FAST, "--seeds", "2", "--optimizers", "sgd", "nag", "--out", str(tmp_path)]
    assert compare.main(argv) == 130
    printed = capsys.readouterr().out
    assert "Interrupted: 1 of 4 runs are finished and kept." in printed
    assert "sgd: only 1 of 2 runs." in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["contender"]["optimizer"] for run in results["runs"]] == ["sgd"]
    assert (tmp_path / "table.csv").is_file()


def test_interrupt_before_the_first_run_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> Run:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_trainer", interrupted)
    assert compare.main([*FAST, "--seeds", "2", "--out", str(tmp_path)]) == 130
    assert "0 of 14 runs" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--optimizers", "sdg"],
            "argument --optimizers: no optimizer is called 'sdg'",
        ),
        (["--rho", "msam"], "name=value is needed, for instance msam=1"),
        (["--rho", "mam=1"], "no optimizer is called 'mam': choose from sgd, "),
        (["--rho", "sgd=1"], "argument --rho: sgd has no rho"),
        (["--optimizers", "sgd,no_such:make"], "'no_such:make' can't be imported"),
        (["--optimizers", "json:no_such"], "'json:no_such' can't be imported"),
        (["--optimizers", ","], "argument --optimizers: expected at least one"),
        (["--rho", "msam=nan"], "argument --rho: a finite number is needed"),
        (["--rho", "asam=1"], "argument --rho: asam is not among the --optimizers"),
        (["--dataset", "mnist"], "argument --dataset: invalid choice: 'mnist'"),
        (["--dataset", "cifar10"], "pass the folder that you put it in as --data-dir"),
        (["--model", "gpt"], "argument --model: invalid choice: 'gpt'"),
        (["--label-noise", "1.5"], "argument --label-noise: a number in [0, 1] is"),
        (["--label-noise", "nan"], "argument --label-noise: a finite number is needed"),
        (["--seeds", "0"], "argument --seeds: a whole number of at least 1 is needed"),
        (["--epochs", "1.5"], "argument --epochs: a whole number of at least 1 is"),
        (["--batch-size", "1438"], "argument --batch-size: 1438 was given, but there"),
        (["--learning-rate", "0"], "argument --learning-rate: a number above 0 is"),
        (["--weight-decay", "-1"], "argument --weight-decay: a number of at least 0"),
        (["--out", __file__], f"argument --out: {__file__} is no folder to write to"),
        (["--speed", "2"], "unrecognized arguments: --speed 2"),
    ],
)
def test_bad_arguments_get_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        compare.main(["--dataset", "digits", *argv])
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert printed.out == ""


# Statistics.


def test_interval_is_student_t() -> None:
    # With two degrees of freedom the quantile has a closed form.
    quantile = 0.68 * math.sqrt(2 / (1 - 0.68**2))
    mean, interval = report.estimate([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert interval == pytest.approx(quantile * math.sqrt(7 / 3))


def test_single_run_has_no_interval() -> None:
    assert report.estimate([0.5]).percent() == "50.0"
    assert report.estimate([0.5, 0.5]).percent() == "50.0 ± 0.0"


def test_runs_are_compared_with_sgd_of_the_same_seed() -> None:
    def run(name: str, seed: int, seconds: float, accuracy: float) -> Run:
        return Run(
            contender=Contender(name, 0.1, None, 0.0),
            seed=seed,
            test_accuracies=[accuracy],
            gradients=[1],
            train_accuracy=0.5,
            clean_train_accuracy=0.5,
            test_loss=1.0,
            sharpness=0.1,
            sam_fraction=0.0,
            seconds=seconds,
            diverged=False,
        )

    # The machine is slow during the second seed; SGD of the fourth is missing.
    sgd = zip([1.0, 9.0, 2.0], [0.5, 0.7, 0.9], strict=True)
    nag = zip([1.5, 9.9, 2.4, 7.0], [0.6, 0.8, 1.0, 0.0], strict=True)
    runs = [run("sgd", seed, *values) for seed, values in enumerate(sgd)]
    runs += [run("nag", seed, *values) for seed, values in enumerate(nag)]
    rows = summarise(runs)
    assert [row.relative_time for row in rows] == [1.0, pytest.approx(1.2)]
    assert rows[1].gain == pytest.approx((0.1, 0.0))
    assert rows[1].gain.percent(sign="+") == "+10.0 ± 0.0"
    (alone,) = summarise(runs[3:])
    assert math.isnan(alone.relative_time) and math.isnan(alone.gain.mean)


# Optimizers.


def test_one_of_your_own_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "of_mine.py").write_text(
        "import optax\n"
        "def make(setting):\n"
        "    assert setting.rho in (0, 0.5) and setting.weight_decay == 0.25\n"
        "    return optax.adam(setting.schedule)\n"
    )
    monkeypatch.chdir(tmp_path)
    name = "of_mine:make"
    flags = ["--optimizers", f"{name},sgd", "--epochs", "1", "--weight-decay", "0.25"]
    argv = [*FAST, *flags, "--learning-rate", "0.001", "--seeds", "1", "--out", "out"]
    assert compare.main(argv) == 0
    assert name in capsys.readouterr().out
    table = json.loads(Path("out/results.json").read_text())["table"]
    assert [(row["optimizer"], row["rho"]) for row in table] == [
        (name, None),
        ("sgd", None),
    ]
    given, _ = compare._contenders(
        compare._parser(),
        compare._parser().parse_args(["--optimizers", name, "--rho", f"{name}=0.5"]),
    )
    assert [contender.rho for contender in given] == [0.5]


@pytest.mark.parametrize("name", optimizers.METHODS)
def test_method_builds(name: str) -> None:
    setting = optimizers.Setting(0.1, 0.1, 5e-4, 10)
    params = {"w": jnp.ones((2, 3))}
    state = optimizers.METHODS[name].build(setting).init(params)
    found = msam_optax.eval_params(state, params)
    np.testing.assert_array_equal(found["w"], params["w"])


def test_studied_values_are_read_from_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(optimizers, "RESULTS", tmp_path)
    assert optimizers.load_studied("mnist5k", "mlp")[0] == {}
    folder = tmp_path / "studies" / "digits"
    folder.mkdir(parents=True)
    chosen = Hyperparameters(learning_rate=0.5, rho=None, weight_decay=0.25)
    results = {"methods": {"sgd": {"chosen": chosen._asdict()}}}
    (folder / "chosen.json").write_text(json.dumps(results))
    found, source = optimizers.load_studied("mnist5k", "mlp")
    assert found == {"sgd": chosen}
    assert source.startswith("studies/digits, tuned with label noise 0.4")
    assert optimizers.load_studied("digits", "mlp")[0] == {}
    rho = optimizers.METHODS["msam"].default
    rate = optimizers.METHODS["sgd"].default
    # A method around another takes over its learning rate.
    assert optimizers.untuned("msam") == (rate, rho, optimizers.WEIGHT_DECAY)
    assert optimizers.untuned("sgd") == (rate, None, optimizers.WEIGHT_DECAY)


# Training.


def test_run_depends_on_the_seed_alone() -> None:
    task = small_task()
    sgd = trainer(task, "sgd")
    sgd.warm_up()
    # A state is gone when the run goes on: keep what is compared.
    first, again, other = (
        [jax.tree.map(np.asarray, e.state.params) for e in sgd.epochs(seed)][-1]
        for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, first, other)


def test_weights_are_the_unperturbed_ones() -> None:
    task = small_task(epochs=1)
    (epoch,) = trainer(task, "msam", rho=3.0).epochs(0)
    distance = optax.tree.norm(
        optax.tree.sub(task.weights(epoch.state).params, epoch.state.params)
    )
    np.testing.assert_allclose(distance, 3.0, rtol=1e-5)


def test_evaluation_equals_one_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_EVALUATION_BATCH", 100)
    task = small_task(epochs=1)
    (epoch,) = trainer(task, "sgd").epochs(0)
    weights = task.weights(epoch.state)
    images, labels = task.test_images, np.asarray(task.test_labels)
    logits = task.model.apply({"params": weights.params}, images, train=False)
    logits = np.asarray(logits, np.float64)
    chosen = logits[np.arange(len(labels)), labels]
    found = training.evaluate(task.model, weights, images, task.test_labels)
    assert found.accuracy == (logits.argmax(1) == labels).mean()
    log_sum = np.log(np.exp(logits).sum(1))
    assert found.loss == pytest.approx((log_sum - chosen).mean(), rel=1e-5)


def test_largest_eigenvalue_of_logistic_regression() -> None:
    """At zero weights the Hessian is (I - 11'/10)/10 times E[x x']."""
    model = models.build("mlp", 10, widths=())
    digits = data.load("digits")
    images = digits.train_images[:1000]
    params = model.init(jax.random.key(0), images[:1], train=False)["params"]
    weights = training.Weights(optax.tree.zeros_like(params), {})
    examples = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    found = training.largest_eigenvalue(model, weights, *examples)
    flat = np.append(images.reshape(1000, -1), np.ones((1000, 1)), axis=1)
    expected = 0.1 * np.linalg.eigvalsh(flat.T @ flat / 1000)[-1]
    assert found == pytest.approx(expected, rel=0.01)
    infinite = weights._replace(params=jax.tree.map(lambda x: x / 0, weights.params))
    assert math.isnan(training.largest_eigenvalue(model, infinite, *examples))


def test_sharpness_of_logistic_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    """At zero weights and a small radius it is the radius times the gradient's norm."""
    monkeypatch.setattr(training, "_EVALUATION_BATCH", 100)
    model = models.build("mlp", 10, widths=())
    digits = data.load("digits")
    images, labels = jnp.asarray(digits.test_images), jnp.asarray(digits.test_labels)
    params = model.init(jax.random.key(0), images[:1], train=False)["params"]
    weights = training.Weights(optax.tree.zeros_like(params), {})
    residual = 0.1 - np.eye(10)[digits.test_labels]
    flat = digits.test_images.reshape(len(labels), -1)
    kernel = flat.T @ residual / len(labels)
    norm = math.hypot(np.linalg.norm(kernel), np.linalg.norm(residual.mean(0)))
    found = training.sharpness(model, weights, images, labels, 0.01)
    assert found == pytest.approx(0.01 * norm, rel=0.05)
