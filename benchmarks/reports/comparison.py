"""The runs of compare.py in summary: as a table, as files and as figures."""

import csv
import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from benchmarks.reports import comparison_figures, report, tables

# Wide enough for the table, whatever the terminal or file.
TABLE_WIDTH = 120


_estimate = partial(report.estimate, level=0.95)


class Contender(NamedTuple):
    """A row of the table: a method with its hyper-parameters.

    Attributes:
      optimizer: name of the method.
      learning_rate: at the first step.
      rho: radius; None for a method without one.
      weight_decay: lambda.
    """

    optimizer: str
    learning_rate: float
    rho: float | None
    weight_decay: float

    def __str__(self) -> str:
        rho = "" if self.rho is None else f" ρ={self.rho:g}"
        return self.optimizer + rho


class Run(NamedTuple):
    """What is measured of a contender with one seed.

    Attributes:
      contender: what was trained.
      seed: of label noise, initial parameters, order of the examples and dropout.
      test_accuracies: after each epoch.
      gradients: number of gradients of a batch, up to each epoch's end.
      train_accuracy: at the end, on the labels trained on, noise included.
      clean_train_accuracy: at the end, on the labels without the noise.
      test_loss: at the end.
      sharpness: at the end, the largest eigenvalue of the Hessian, on the labels
        trained on.
      sam_fraction: share of the steps that took a second gradient.
      seconds: of the training steps, without compiling and evaluating.
      diverged: whether a loss was not finite.
    """

    contender: Contender
    seed: int
    test_accuracies: list[float]
    gradients: list[int]
    train_accuracy: float
    clean_train_accuracy: float
    test_loss: float
    sharpness: float
    sam_fraction: float
    seconds: float
    diverged: bool


class Row(NamedTuple):
    """A contender's runs in summary.

    Attributes:
      contender: what was trained.
      runs: how many.
      final_accuracy: on the test part, after the last epoch.
      best_accuracy: on the test part, after the epoch where it was best.
      gain: final accuracy less that of SGD with the same seed, which has the same
        noise and initial parameters; NaN if SGD did not run.
      train_accuracy: on the labels trained on.
      clean_train_accuracy: on the labels without the noise.
      test_loss: after the last epoch.
      sharpness: after the last epoch.
      gradients: gradients of a batch in a run, mean.
      sam_fraction: share of the steps that took a second gradient, mean.
      relative_time: median over the seeds of the ratio to SGD's time with the same
        seed, which ran in the same minute; NaN if SGD did not run.
      diverged: how many runs did.
    """

    contender: Contender
    runs: int
    final_accuracy: report.Estimate
    best_accuracy: report.Estimate
    gain: report.Estimate
    train_accuracy: report.Estimate
    clean_train_accuracy: report.Estimate
    test_loss: report.Estimate
    sharpness: report.Estimate
    gradients: float
    sam_fraction: float
    relative_time: float
    diverged: int


def summarise(runs: Sequence[Run]) -> list[Row]:
    """The rows of the table, in the order in which the contenders first ran."""
    sgd = {run.seed: run for run in runs if run.contender.optimizer == "sgd"}
    rows = []
    for contender in dict.fromkeys(run.contender for run in runs):
        own = [run for run in runs if run.contender == contender]
        pairs = [(run, sgd[run.seed]) for run in own if run.seed in sgd]
        ratios = [run.seconds / base.seconds for run, base in pairs]
        gains = [
            run.test_accuracies[-1] - base.test_accuracies[-1] for run, base in pairs
        ]
        rows.append(
            Row(
                contender=contender,
                runs=len(own),
                final_accuracy=_estimate([r.test_accuracies[-1] for r in own]),
                best_accuracy=_estimate([max(r.test_accuracies) for r in own]),
                gain=_estimate(gains),
                train_accuracy=_estimate([r.train_accuracy for r in own]),
                clean_train_accuracy=_estimate([r.clean_train_accuracy for r in own]),
                test_loss=_estimate([r.test_loss for r in own]),
                sharpness=_estimate([r.sharpness for r in own]),
                gradients=statistics.mean(r.gradients[-1] for r in own),
                sam_fraction=statistics.mean(r.sam_fraction for r in own),
                relative_time=statistics.median(ratios) if ratios else math.nan,
                diverged=sum(r.diverged for r in own),
            )
        )
    return rows


def print_report(
    console: Console, rows: Sequence[Row], settings: dict[str, Any]
) -> None:
    """Prints the table and how to read it."""
    noise = f"{settings['label_noise']:.0%} of the training labels random"
    console.print(
        f"{settings['dataset']}, {settings['model']}, {noise}, "
        f"{settings['epochs']} epochs, {settings['seeds']} seeds"
    )
    headers = (
        "optimizer",
        "learn.\nrate",
        "ρ",
        "decay",
        "final test\nacc. %",
        "best test\nacc. %",
        "final\n- SGD",
        "train acc.\n(given) %",
        "test\nloss",
        "gra-\ndients",
        "time\n/ SGD",
        "SAM\nsteps",
        "largest\neigenv.",
    )
    tables.show(console, tables.Table("", headers, [_cells(row) for row in rows]))
    for line in (
        "±: 95% interval of the mean. Final - SGD: difference to SGD with the same "
        "seed, in points.",
        "Train acc. (given): on the labels trained on, noise included.",
        "Gradients: of a batch, in a run. Time: of the training steps alone, median "
        "over the seeds.",
        "Largest eigenvalue: of the Hessian of the loss, over the first 1000 training "
        "examples with the given labels.",
        f"Learning rates, rhos and decays: {settings['hyperparameters']}. With other "
        "noise or epochs than those of the tuning they may mislead.",
    ):
        console.print(line, highlight=False)
    for row in rows:
        if row.runs < settings["seeds"]:
            console.print(
                f"{row.contender}: only {row.runs} of {settings['seeds']} runs."
            )
        if row.diverged:
            console.print(
                f"{row.contender}: {row.diverged} of {row.runs} runs diverged to a "
                "loss that is not finite; their accuracies are as measured."
            )


def _cells(row: Row) -> list[str]:
    rho = row.contender.rho
    return [
        row.contender.optimizer,
        f"{row.contender.learning_rate:g}",
        "" if rho is None else f"{rho:g}",
        f"{row.contender.weight_decay:g}",
        row.final_accuracy.percent(),
        row.best_accuracy.percent(),
        "" if math.isnan(row.gain.mean) else row.gain.percent(sign="+"),
        row.train_accuracy.percent(),
        f"{row.test_loss.mean:.3f}",
        f"{row.gradients:.0f}",
        "" if math.isnan(row.relative_time) else f"{row.relative_time:.2f}",
        f"{row.sam_fraction:.0%}",
        f"{row.sharpness.mean:.2f}",
    ]


def save(
    out: Path,
    runs: Sequence[Run],
    settings: dict[str, Any],
    provenance: dict[str, Any],
) -> list[Path]:
    """Writes the table as text and CSV, all runs as CSV and JSON, and the figures.

    Returns:
      The paths of the figures.
    """
    rows = summarise(runs)
    with (out / "table.txt").open("w", encoding="utf-8") as file:
        print_report(Console(file=file, width=TABLE_WIDTH), rows, settings)
    conditions = {**settings, **provenance["versions"], **provenance["machine"]}
    _write_csv(out / "table.csv", [{**_flat(row), **conditions} for row in rows])
    _write_csv(
        out / "runs.csv",
        [
            {
                **run.contender._asdict(),
                **run._asdict(),
                "final_accuracy": run.test_accuracies[-1],
                "best_accuracy": max(run.test_accuracies),
                "gradients": run.gradients[-1],
                **conditions,
            }
            for run in runs
        ],
    )
    report.write_json(
        out / "results.json",
        {
            **provenance,
            "settings": settings,
            "table": [_flat(row) for row in rows],
            "runs": [
                {**run._asdict(), "contender": run.contender._asdict()} for run in runs
            ],
        },
    )
    return _save_figures(out, runs, rows)


def _flat(row: Row) -> dict[str, Any]:
    flat = row.contender._asdict()
    for key, value in row._asdict().items():
        if isinstance(value, report.Estimate):
            flat |= {f"{key}_mean": value.mean, f"{key}_interval": value.interval}
        elif key != "contender":
            flat[key] = value
    return flat


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    # Lists and the contender are in the JSON file; here they would be one cell.
    columns = [
        key for key, value in rows[0].items() if not isinstance(value, list | tuple)
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _save_figures(out: Path, runs: Sequence[Run], rows: Sequence[Row]) -> list[Path]:
    curves = []
    for row in rows:
        own = [run for run in runs if run.contender == row.contender]
        epochs = [
            _estimate(a) for a in zip(*(r.test_accuracies for r in own), strict=True)
        ]
        curves.append(
            comparison_figures.Curve(
                label=str(row.contender),
                x=np.mean([run.gradients for run in own], axis=0),
                mean=np.array([epoch.mean for epoch in epochs]),
                interval=np.array([epoch.interval for epoch in epochs]),
            )
        )
    paths = [out / "accuracy_gradients.png"]
    comparison_figures.accuracy_against_gradients(curves).savefig(paths[0])

    scans = []
    for name in dict.fromkeys(row.contender.optimizer for row in rows):
        own_rows = [row for row in rows if row.contender.optimizer == name]
        own_rows.sort(key=lambda row: row.contender.rho or 0.0)
        if len(own_rows) > 1:
            scans.append(
                comparison_figures.Curve(
                    label=name,
                    x=np.array([row.contender.rho for row in own_rows]),
                    mean=np.array([row.final_accuracy.mean for row in own_rows]),
                    interval=np.array(
                        [row.final_accuracy.interval for row in own_rows]
                    ),
                )
            )
    if scans:
        references = {
            row.contender.optimizer: row.final_accuracy.mean
            for row in rows
            if row.contender.rho is None
        }
        paths.append(out / "accuracy_rho.png")
        comparison_figures.accuracy_against_rho(scans, references).savefig(paths[1])
    return paths
