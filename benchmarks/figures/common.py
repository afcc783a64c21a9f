"""What the scripts of figures share: arguments, runs, and what they leave behind."""

import argparse
import copy
import csv
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import arguments
from benchmarks.reports import report
from benchmarks.reports.progress import progress
from benchmarks.tasks import optimizers, training
from benchmarks.tasks.search import Hyperparameters
from msam_optax.plotting import Estimates, plot_estimates

# What minutes on two cores show, as the study of the digits tuned it, and what an
# accelerator is for.
_QUICK = {
    "dataset": "mnist5k",
    "model": "mlp",
    "label_noise": 0.4,
    "epochs": 30,
    "seeds": 5,
    "batch_size": 128,
}
_FULL = {
    "dataset": "fashion_mnist",
    "model": "wrn",
    "label_noise": 0.4,
    "epochs": 100,
    "seeds": 3,
    "batch_size": 256,
}

# Methods that no study tuned, and those whose setting they take over.
_LIKE = {"ss_sam": "sam", "esam": "sam", "ae_looksam": "ae_sam"}

Build = Callable[[optimizers.Setting], optax.GradientTransformation]


class Study(NamedTuple):
    """What a figure is made of.

    Attributes:
      name: of the script, and of the files that it writes.
      args: the command line.
      settings: what was trained, and how.
      task: model and data.
      studied: hyper-parameters by method, see `optimizers.load_studied`.
      part: what the task evaluates on: `test`, or `validation` for a held out fifth of
        the training part, on which radii may be compared.
    """

    name: str
    args: argparse.Namespace
    settings: dict[str, Any]
    task: training.Task
    studied: dict[str, Hyperparameters]
    part: str = "test"

    @property
    def seeds(self) -> range:
        return range(self.settings["seeds"])

    def setting(self, method: str) -> optimizers.Setting:
        """A method's own hyper-parameters, as studied, or else its defaults."""
        name = _LIKE.get(method, method)
        found = self.studied.get(name) or optimizers.untuned(method)
        decay = self.args.weight_decay
        return optimizers.Setting(
            learning_rate=found.learning_rate,
            rho=found.rho or 0.0,
            weight_decay=found.weight_decay if decay is None else decay,
            total_steps=self.task.total_steps,
        )

    def trainer(self, method: str) -> training.Trainer:
        """Trains by a method of `optimizers.METHODS` at its own hyper-parameters."""
        entry = optimizers.METHODS[method]
        optimizer = entry.build(self.setting(method))
        return training.Trainer(self.task, optimizer, entry.extra_gradient)

    def adjustable_trainer(
        self, method: str, build: Build | None = None
    ) -> training.Trainer:
        """As `trainer`, and compiled once for `epochs(seed, rho=)`.

        Args:
          method: its hyper-parameters are what an epoch is not told otherwise.
          build: makes the optimizer; that of the method if None.
        """
        entry, setting = optimizers.METHODS[method], self.setting(method)

        @optax.inject_hyperparams
        def made(rho):
            return (build or entry.build)(setting._replace(rho=rho))

        return training.Trainer(self.task, made(setting.rho), entry.extra_gradient)

    def with_epochs(self, epochs: int) -> "Study":
        """The same study with runs, and schedules, of another length."""
        task = copy.copy(self.task)
        task.epochs = epochs
        task.total_steps = epochs * task.steps_per_epoch
        return self._replace(task=task)

    def accuracies(self, epoch: training.Epoch) -> dict[str, float]:
        """On the study's part, and on the labels trained on, noise included."""
        task = self.task
        weights = task.weights(epoch.state)
        held_out = training.evaluate(
            task.model, weights, task.test_images, task.test_labels
        )
        train = training.evaluate(task.model, weights, task.train_images, epoch.labels)
        return {
            f"{self.part}_accuracy": held_out.accuracy,
            "train_accuracy": train.accuracy,
        }


def open_study(
    script: str,
    doc: str | None,
    argv: Sequence[str] | None = None,
    *,
    part: str = "test",
    quick: Mapping[str, Any] = MappingProxyType({}),
    full: Mapping[str, Any] = MappingProxyType({}),
) -> Study:
    """Reads the command line of a figure's script, and loads what it asks for.

    Args:
      script: the script's `__file__`.
      doc: the script's `__doc__`.
      argv: the command line's arguments; those of the process if None.
      part: what the task evaluates on, see `Study`.
      quick: what differs from the usual quick setting, for instance `label_noise`.
      full: what differs from the usual full setting.
    """
    argv = sys.argv[1:] if argv is None else argv
    chosen = {**_QUICK, **quick} if "--quick" in argv else {**_FULL, **full}
    parser = arguments.Parser((doc or "").partition("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="the setting for two cores: minutes"
    )
    arguments.add_task_arguments(parser, seeds=chosen["seeds"], weight_decay=None)
    parser.set_defaults(**chosen)
    arguments.add_out(parser, Path("runs/figures"))
    args = parser.parse_args(argv, argparse.Namespace(argv=list(argv)))
    return Study(
        name=Path(script).stem,
        args=args,
        settings={key: getattr(args, key) for key in chosen},
        task=arguments.load_task(parser, args, validation=part == "validation"),
        studied=optimizers.load_studied(args.dataset, args.model)[0],
        part=part,
    )


def grouped(
    rows: Iterable[Mapping[str, Any]], column: str
) -> dict[Any, list[Mapping[str, Any]]]:
    """The rows of each value of a column, in the order in which the values come."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def summarise(
    rows: Iterable[Mapping[str, Any]], by: Sequence[str], value: str
) -> dict[tuple[Any, ...], report.Estimate]:
    """Mean and 68% interval of a column over the seeds, grouped by other columns."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row[value])
    return {key: report.estimate(values) for key, values in groups.items()}


def curves(
    rows: Iterable[Mapping[str, Any]], label: str, x: str, y: str, scale: float = 1.0
) -> dict[str, Estimates]:
    """Column y against column x, a curve for each value of the column `label`."""
    found = summarise(rows, (label, x), y)
    result = {}
    for name in dict.fromkeys(name for name, _ in found):
        at = sorted(position for other, position in found if other == name)
        estimates = np.array([found[name, position] for position in at])
        result[str(name)] = Estimates(at, *(scale * estimates.T))
    return result


def panels(
    rows: int, columns: int, *, alike: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure and its Axes[rows, columns], with alike y-axes in a row or their own."""
    figure = Figure(figsize=(5 * columns, 3.6 * rows), dpi=150, layout="constrained")
    return figure, figure.subplots(
        rows, columns, squeeze=False, sharey="row" if alike else "none"
    )


def accuracies(
    rows: Sequence[Mapping[str, Any]], along: str, xlabel: str, *, log_x: bool = False
) -> Figure:
    """Each method's test beside its training accuracy, against the column `along`."""
    figure, (axes,) = panels(1, 2)
    for ax, part, labels in zip(
        axes, ("test", "train"), ("test", "given training labels"), strict=True
    ):
        plot_estimates(
            curves(rows, "method", along, f"{part}_accuracy", scale=100),
            xlabel=xlabel,
            ylabel=f"accuracy, {labels} (%)",
            log_x=log_x,
            bars=True,
            ax=ax,
        )
    return figure


def zoom(ax: Axes, level: float, below: float = 5.0) -> None:
    """Lets the y-axis begin a little below a level; what diverged is not shown."""
    low, _ = ax.get_ylim()
    ax.set_ylim(bottom=max(low, level - below))


def trained(
    study: Study, trainers: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Trains by each method with each seed, with a progress bar.

    Args:
      study: what is trained.
      trainers: by method, with `epochs` as a `training.Trainer` has it.

    Yields:
      For each epoch the columns that say which it is, and what its trainer yielded.
    """
    runs = list(itertools.product(study.seeds, trainers))
    with progress(len(runs) * study.task.epochs) as bar:
        for seed, method in runs:
            bar.describe(f"{method}, seed {seed}")
            columns = {**columns_of(study.setting(method)), "seed": seed}
            epochs = trainers[method].epochs(seed)
            for number, epoch in enumerate(epochs, start=1):
                yield {"method": method, **columns, "epoch": number}, epoch
                bar.advance()


def columns_of(setting: optimizers.Setting) -> dict[str, float]:
    """The columns that tell what a row was trained with."""
    return {
        "learning_rate": setting.learning_rate,
        "rho": setting.rho,
        "weight_decay": setting.weight_decay,
    }


def momentum_of(opt_state: optax.OptState) -> Any:
    """The momentum of the SGD inside an optimizer's state."""
    # By the state's name: its field's may be that of a parameter too.
    return optax.tree.get(opt_state, "TraceState").trace


def save(study: Study, rows: Sequence[Mapping[str, Any]], figure: Figure) -> None:
    """Writes the rows as CSV, the figure as PNG, and how to repeat both as JSON."""
    out = study.args.out
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{study.name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure.savefig(out / f"{study.name}.png")
    report.write_json(
        out / f"{study.name}.json",
        {
            "settings": {**study.settings, "evaluated_on": study.part},
            **report.provenance(f"figures/{study.name}.py", study.args.argv),
        },
    )
    Console().print(f"Figure: {out / study.name}.png", soft_wrap=True)


def run(
    script: str,
    doc: str | None,
    argv: Sequence[str] | None,
    compute: Callable[[Study], list[dict[str, Any]]],
    draw: Callable[[list[dict[str, Any]]], Figure],
    **settings: Any,
) -> int:
    """A script from its command line to its files; returns its exit code.

    Args:
      script: the script's `__file__`.
      doc: the script's `__doc__`.
      argv: the command line's arguments; those of the process if None.
      compute: makes the rows of the CSV.
      draw: makes the figure from them.
      **settings: `part`, `quick` and `full`, see `open_study`.
    """
    study = open_study(script, doc, argv, **settings)
    rows = compute(study)
    save(study, rows, draw(rows))
    return 0
