"""Test accuracy against label noise, at the end of training and at its best.

After the label noise experiments of arXiv 2010.01412 (SAM) and arXiv 2304.14647
(AE-SAM), with MSAM and LookSAM beside:

    python benchmarks/figures/label_noise.py --quick

As in the papers the learning rate is the usual one, at which SGD fits wrong labels; rho
is not tuned. A tuned learning rate may be so small that no method fits them before the
end; the best accuracy shows what stopping early is worth. With `--label-noise` it is
that noise alone.
"""

import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.reports import report, tables
from benchmarks.reports.progress import progress
from benchmarks.tasks import training
from msam_optax import plotting

METHODS = ("sgd", "nag", "msam", "looksam", "ae_sam", "sam")
NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method, label noise and seed."""
    task, seeds, noises = study.task, study.seeds, study.settings["label_noise"]
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
                    accuracies = []
                    for epoch in trainer.epochs(seed):
                        test = training.evaluate(
                            task.model,
                            task.weights(epoch.state),
                            task.test_images,
                            task.test_labels,
                        )
                        accuracies.append(test.accuracy)
                        bar.advance()
                    best = max(accuracies)
                    rows.append(
                        {
                            "method": method,
                            "label_noise": noise,
                            "seed": seed,
                            "learning_rate": setting.learning_rate,
                            "rho": setting.rho,
                            "gradients": epoch.gradients,
                            "final_accuracy": accuracies[-1],
                            "best_accuracy": best,
                            "best_epoch": accuracies.index(best) + 1,
                        }
                    )
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Final and best accuracy over the noise, a line a method, with 68% intervals."""
    figure, (axes,) = common.panels(1, 2)
    for ax, value in zip(axes, ("final_accuracy", "best_accuracy"), strict=True):
        plotting.plot_estimates(
            common.curves(rows, "method", "label_noise", value, 100.0),
            xlabel="share of random training labels",
            ylabel=f"{value.replace('_', ' test ')} (%)",
            bars=True,
            ax=ax,
        )
    return figure


def accuracy_tables(rows: Sequence[dict[str, Any]]) -> list[tables.Table]:
    """Final and best accuracy in percent, a row a method and a column a noise."""
    noises = list(dict.fromkeys(row["label_noise"] for row in rows))
    shown = []
    for value, title in (
        ("final_accuracy", "After the last epoch"),
        ("best_accuracy", "After the best epoch on the test part"),
    ):
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
    study = study._replace(tuned={})
    if study.args.label_noise != NOISES:
        study.settings["label_noise"] = (study.args.label_noise,)
    rows = compute(study)
    common.save(study, rows, draw(rows))
    rhos = {row["method"]: row["rho"] for row in rows if row["rho"]}
    tables.write_markdown(
        study.args.out / f"{study.name}.md",
        "Test accuracy against label noise",
        accuracy_tables(rows),
        [
            "Percent, mean ± 68% interval over the seeds. The best epoch is chosen on "
            "the test part itself: an upper bound, for all methods alike.",
            *(f"{key}: {value}" for key, value in study.settings.items()),
            f"Learning rate {rows[0]['learning_rate']:g}; rho "
            f"{', '.join(f'{rho:g} for {method}' for method, rho in rhos.items())}: "
            "not tuned, the same at all noises.",
        ],
        report.provenance(f"figures/{study.name}.py", study.args.argv),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
