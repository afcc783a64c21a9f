"""Test accuracy against label noise, at the end of training and stopped early.

After the label noise experiments of arXiv 2010.01412 (SAM) and arXiv 2304.14647
(AE-SAM), with MSAM and LookSAM beside:

    python benchmarks/figures/label_noise.py --quick

Each method stands at its own setting, tuned at one share of wrong labels (40% for the
digits) and not again at the others. A fifth of the training part, with clean labels, is
held out: of each run the epoch is chosen that is best there, and its test accuracy
shown, which is what stopping early is worth. With `--label-noise` it is that noise
alone.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split

from benchmarks.figures import common
from benchmarks.reports import report, tables
from benchmarks.reports.progress import progress
from benchmarks.tasks import training
from msam_optax import plotting

METHODS = ("sgd", "msam", "looksam", "ae_sam", "sam")
NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)
_TITLES = {
    "final_accuracy": "After the last epoch",
    "early_accuracy": "After the epoch that is best on validation",
}


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method, label noise and seed."""
    study, validation = with_validation(study)
    task, seeds, noises = study.task, study.seeds, study.settings["label_noise"]
    parts = {
        "test": (task.test_images, task.test_labels),
        "validation": validation,
    }
    rows = []
    with progress(len(METHODS) * len(noises) * len(seeds) * task.epochs) as bar:
        for method in METHODS:
            setting = study.setting(method)
            trainer = study.trainer(method)
            for noise in noises:
                # The labels are drawn when a run starts: one compilation serves all.
                task.label_noise = noise
                for seed in seeds:
                    bar.describe(f"{method}, {noise:.0%} noise, seed {seed + 1}")
                    found: dict[str, list[float]] = {name: [] for name in parts}
                    for epoch in trainer.epochs(seed):
                        weights = task.weights(epoch.state)
                        for name, part in parts.items():
                            at = training.evaluate(task.model, weights, *part)
                            found[name].append(at.accuracy)
                        bar.advance()
                    chosen = int(np.argmax(found["validation"]))
                    rows.append(
                        {
                            "method": method,
                            "label_noise": noise,
                            "seed": seed,
                            **common.columns_of(setting),
                            "gradients": epoch.gradients,
                            "final_accuracy": found["test"][-1],
                            "early_accuracy": found["test"][chosen],
                            "early_epoch": chosen + 1,
                        }
                    )
    return rows


def with_validation(study: common.Study) -> tuple[common.Study, tuple[Any, Any]]:
    """The study without a fifth of its training part, and that fifth."""
    task = copy.copy(study.task)
    labels = np.asarray(task.clean_labels)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    validation = task.train_images[held_out], task.clean_labels[held_out]
    task.train_images = task.train_images[train]
    task.clean_labels = task.clean_labels[train]
    task.steps_per_epoch = len(train) // task.batch_size
    task.total_steps = task.epochs * task.steps_per_epoch
    return study._replace(task=task), validation


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Accuracies over the noise, a line a method, with 68% intervals."""
    figure, (axes,) = common.panels(1, 2)
    for ax, (value, title) in zip(axes, _TITLES.items(), strict=True):
        plotting.plot_estimates(
            common.curves(rows, "method", "label_noise", value, 100.0),
            xlabel="share of random training labels",
            ylabel="test accuracy (%)",
            bars=True,
            ax=ax,
        )
        ax.set_title(title.lower())
        common.zoom(ax, 100 * min(row[value] for row in rows if row["method"] == "sgd"))
    return figure


def accuracy_tables(rows: Sequence[dict[str, Any]]) -> list[tables.Table]:
    """Accuracies in percent, a row a method and a column a noise."""
    noises = list(dict.fromkeys(row["label_noise"] for row in rows))
    shown = []
    for value, title in _TITLES.items():
        means = common.summarise(rows, ("method", "label_noise"), value)
        shown.append(
            tables.Table(
                title,
                ["method", *(f"{noise:.0%} noise" for noise in noises)],
                [
                    [method, *(means[method, noise].percent() for noise in noises)]
                    for method in dict.fromkeys(row["method"] for row in rows)
                ],
            )
        )
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, draws and saves; returns the exit code."""
    every: dict[str, Any] = {"label_noise": NOISES}
    study = common.open_study(__file__, __doc__, argv, quick=every, full=every)
    if study.args.label_noise != NOISES:
        study.settings["label_noise"] = (study.args.label_noise,)
    rows = compute(study)
    common.save(study, rows, draw(rows))
    settings = {row["method"]: row for row in rows}
    tables.write_markdown(
        study.args.out / f"{study.name}.md",
        "Test accuracy against label noise",
        accuracy_tables(rows),
        [
            "Percent of the test part, mean ± 68% interval over the seeds. The best "
            "epoch is that on a held out fifth of the training part.",
            *(f"{key}: {value}" for key, value in study.settings.items()),
            *(
                f"{method}: learning rate {row['learning_rate']:g}, rho "
                f"{row['rho']:g}, weight decay {row['weight_decay']:g}, at all noises"
                for method, row in settings.items()
            ),
        ],
        report.provenance(f"figures/{study.name}.py", study.args.argv),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
