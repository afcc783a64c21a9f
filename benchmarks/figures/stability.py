"""MSAM's edge of stability: accuracy and divergence over rho, and what widens it.

Over rho, learning rate and momentum, and for schedules and shapes of the perturbation
on two data sets; all accuracies are of held out parts of the training parts. The paper
of MSAM (arXiv 2401.12033) leaves the question open:

    python benchmarks/figures/stability.py --quick

A run counts as diverged if its loss is not finite, or if its accuracy is below half of
that of the same seed without a perturbation: at too large a rho the loss seldom
overflows, since a perturbation of bounded length leaves the gradients bounded. Training
stands still at the accuracy of a guess.
"""

import sys
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.figures.stability_ranges import TOLERANCE, Rows, range_tables
from benchmarks.figures.stability_variants import (
    CLIP_SHARE,
    VARIANTS,
    WARM_UP_SHARE,
    Point,
    compiled,
    final_state,
)
from benchmarks.reports import report, tables
from benchmarks.reports.progress import progress
from benchmarks.tasks import data, training
from msam_optax import plotting

# What is varied, one at a time, around the usual learning rate and momentum.
LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
MOMENTA = (0.5, 0.8, 0.9, 0.95)
# The learning rate is MSAM's tuned one for the digits.
USUAL = Point(learning_rate=0.03, momentum=0.9, rho=0.0)
MAP_RHOS = (0.5, 1.25, 2.0, 3.2)
VARIANT_RHOS = (0.3, 0.5, 0.8, 1.25, 2.0, 3.2, 5.0)
# The figure shows accuracies down to this many points below that without perturbation.
_SHOWN_BELOW = 20.0


def second_dataset(first: str) -> str:
    """What stands beside the study's own data set."""
    return "mnist5k" if first == "fashion_mnist" else "fashion_mnist"


def second_task(name: str, first: training.Task) -> training.Task:
    """As many training examples of another data set, a fifth of them held out."""
    dataset = data.load(name)
    chosen = slice(round(1.25 * len(first.clean_labels)))  # before the split
    dataset = dataset._replace(
        train_images=dataset.train_images[chosen],
        train_labels=dataset.train_labels[chosen],
    )
    return training.Task(
        data.hold_out(dataset),
        first.model,
        label_noise=first.label_noise,
        epochs=first.epochs,
        batch_size=first.batch_size,
    )


def _plan(first: str, second: str) -> list[tuple[str, str, Point]]:
    """Data set, variant and point of all runs; those without a perturbation first."""
    plan = []
    for rho in (0.0, *MAP_RHOS):
        point = USUAL._replace(rho=rho)
        points = [point._replace(learning_rate=rate) for rate in LEARNING_RATES]
        points += [point._replace(momentum=momentum) for momentum in MOMENTA]
        plan += [(first, "constant", point) for point in points]
    for dataset in (first, second):
        plan.append((dataset, "constant", USUAL))
        plan += [
            (dataset, variant, USUAL._replace(rho=rho))
            for variant in VARIANTS
            for rho in VARIANT_RHOS
        ]
    return list(dict.fromkeys(plan))


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a data set, variant, point and seed."""
    first = study.settings["dataset"]
    second = second_dataset(first)
    tasks = {first: study.task, second: second_task(second, study.task)}
    plan = _plan(first, second)
    decay = study.setting("msam").weight_decay
    trainings = {name: compiled(study.task.model, name, decay) for name in VARIANTS}
    plain: dict[tuple[str, Point, int], float] = {}
    rows = []
    with progress(len(plan) * len(study.seeds)) as bar:
        for dataset, variant, point in plan:
            task = tasks[dataset]
            bar.describe(f"{dataset}, {variant}, rho {point.rho:g}")
            for seed in study.seeds:
                weights = task.weights(
                    final_state(trainings[variant], task, point, seed)
                )
                found = training.evaluate(
                    task.model, weights, task.test_images, task.test_labels
                )
                without = plain.setdefault(
                    (dataset, point._replace(rho=0.0), seed), found.accuracy
                )
                stands_still = found.accuracy < without / 2
                rows.append(
                    {
                        "dataset": dataset,
                        "variant": variant,
                        **point._asdict(),
                        "seed": seed,
                        "validation_accuracy": found.accuracy,
                        "validation_loss": found.loss,
                        "diverged": int(stands_still or not np.isfinite(found.loss)),
                    }
                )
                bar.advance()
    return rows


def _at(rows: Rows, **values: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[k] == v for k, v in values.items())]


def _variant_rows(rows: Rows) -> Rows:
    usual = _at(rows, learning_rate=USUAL.learning_rate, momentum=USUAL.momentum)
    return [row for row in usual if row["rho"] in VARIANT_RHOS]


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Maps of the first data set, then the variants on both."""
    figure, axes = common.panels(2, 3)
    first, second = dict.fromkeys(row["dataset"] for row in rows)
    maps = [
        row
        for row in _at(rows, dataset=first, variant="constant")
        if row["rho"] in (0.0, *MAP_RHOS)
    ]
    for along, column in (("learning_rate", 0), ("momentum", 1)):
        fixed = "momentum" if along == "learning_rate" else "learning_rate"
        shown = _at(maps, **{fixed: getattr(USUAL, fixed)})
        for value, ax in zip(
            ("validation_accuracy", "diverged"), axes[:, column], strict=True
        ):
            _heat_map(ax, shown, along, value)
        axes[0, column].set_title(
            f"{first}, {fixed.replace('_', ' ')} {getattr(USUAL, fixed):g}"
        )
    for dataset, ax in zip((first, second), axes[:, 2], strict=True):
        shown = _at(_variant_rows(rows), dataset=dataset)
        without = _at(rows, dataset=dataset, **USUAL._asdict())
        (plain,) = common.curves(
            without, "dataset", "rho", "validation_accuracy", 100.0
        ).values()
        plotting.plot_estimates(
            common.curves(shown, "variant", "rho", "validation_accuracy", 100.0),
            references={"sgd": plain},
            xlabel="ρ (unit of the weights)",
            ylabel="final validation accuracy (%)",
            log_x=True,
            ax=ax,
        )
        ax.set_xticks(VARIANT_RHOS, [f"{rho:g}" for rho in VARIANT_RHOS])
        ax.minorticks_off()
        ax.set_ylim(bottom=np.min(plain.mean) - _SHOWN_BELOW)
        ax.legend(frameon=False, loc="lower left", fontsize="small")
        ax.set_title(f"{dataset}, variants of MSAM")
    return figure


def _heat_map(ax: Axes, rows: Rows, along: str, value: str) -> None:
    """Mean of a share over the seeds, in percent."""
    means = common.summarise(rows, ("rho", along), value)
    rhos, places = (sorted({key[i] for key in means}) for i in (0, 1))
    percent = np.array([[100 * means[r, p].mean for p in places] for r in rhos])
    accuracy = value == "validation_accuracy"
    colors = matplotlib.colormaps["viridis" if accuracy else "Oranges"]
    image = ax.imshow(
        percent, cmap=colors, vmin=0, vmax=100, origin="lower", aspect="auto"
    )
    for (i, j), number in np.ndenumerate(percent):
        red, green, blue, _ = colors(number / 100)
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        color = "white" if dark else "black"
        mean = means[rhos[i], places[j]]
        text = mean.percent() if accuracy else f"{number:.0f}"
        ax.text(j, i, text, ha="center", va="center", color=color, size="small")
    ax.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    ax.set_yticks(range(len(rhos)), [f"{rho:g}" for rho in rhos])
    ax.set(xlabel=along.replace("_", " "), ylabel="ρ (unit of the weights)")
    label = "final validation accuracy (%)" if accuracy else "diverged runs (%)"
    ax.figure.colorbar(image, ax=ax, label=label)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, draws and saves; returns the exit code."""
    study = common.open_study(
        *(__file__, __doc__, argv),
        part="validation",
        quick={"epochs": 20, "seeds": 3},
        full={"dataset": "mnist5k", "batch_size": 128, "epochs": 30},
    )
    try:
        rows = compute(study)
    except data.DataError as error:
        sys.exit(str(error))
    common.save(study, rows, draw(rows))
    tables.write_markdown(
        study.args.out / f"{study.name}.md",
        "How wide MSAM's good range of rho is",
        range_tables(_variant_rows(rows)),
        [
            "Mean ± 68% interval over the seeds, of accuracies on validation data. "
            "Good are the rhos of a seed whose accuracy is at most "
            f"{100 * TOLERANCE:g} point below the best of that seed and variant, of "
            f"{', '.join(map(str, VARIANT_RHOS))}: what ends at an end of these may be "
            "wider.",
            f"Zero in warm-up: in the first {WARM_UP_SHARE:.0%} of the steps. Clipped: "
            f"at most {CLIP_SHARE:.0%} of the weights' norm. Ramp: from 0 at the start "
            "to rho at the end. Layer-wise: rho is that of all weights at the start.",
            *(f"{key}: {value}" for key, value in study.settings.items()),
        ],
        report.provenance(f"figures/{study.name}.py", study.args.argv),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
