"""Tunes the optimizers that compare.py compares, on a part of the training data.

Every method gets the same effort: six values of one hyper-parameter, each with the same
seeds. That is the learning rate for a base optimizer, and rho at its base's tuned
learning rate for a sharpness-aware one. The value with the best mean validation
accuracy at the end of training is kept. The test part is never looked at.

    python benchmarks/tune.py
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from benchmarks import arguments
from benchmarks.reports import report
from benchmarks.tasks import optimizers, training


class Trial(NamedTuple):
    """One value of a method's hyper-parameter.

    Attributes:
      optimizer: name of the method.
      learning_rate: at the first step.
      rho: radius; None for a base optimizer.
      accuracies: on the validation part at the end of training, one a seed.
    """

    optimizer: str
    learning_rate: float
    rho: float | None
    accuracies: list[float]


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the best mean accuracy; the smallest value of several such."""
    return max(trials, key=lambda trial: np.mean(trial.accuracies))


def tune(
    task: training.Task,
    seeds: int,
    weight_decay: float,
    on_trial: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Trial]]:
    """Tries all values of all methods.

    Args:
      task: its test part is the validation part.
      seeds: how many runs each value gets.
      weight_decay: of every optimizer.
      on_trial: called with the method's name after each trial.

    Returns:
      The trials of each method, in the order of its grid.
    """
    trials: dict[str, list[Trial]] = {}
    # Base optimizers first: the others take over their learning rates.
    for name in sorted(optimizers.METHODS, key=_has_base):
        method = optimizers.METHODS[name]
        trials[name] = []
        for value in method.grid:
            if method.base is None:
                learning_rate, rho = value, None
            else:
                learning_rate, rho = best(trials[method.base]).learning_rate, value
            setting = optimizers.Setting(
                learning_rate, rho or 0.0, weight_decay, task.total_steps
            )
            trainer = training.Trainer(task, method.build(setting))
            accuracies = [_final_accuracy(task, trainer, seed) for seed in range(seeds)]
            trials[name].append(Trial(name, learning_rate, rho, accuracies))
            on_trial(name)
    return trials


def _has_base(name: str) -> bool:
    return optimizers.METHODS[name].base is not None


def _final_accuracy(task: training.Task, trainer: training.Trainer, seed: int) -> float:
    *_, last = trainer.epochs(seed)
    weights = task.weights(last.state)
    return training.evaluate(
        task.model, weights, task.test_images, task.test_labels
    ).accuracy


def _chosen(trial: Trial) -> dict[str, float]:
    chosen = {"learning_rate": trial.learning_rate}
    return chosen if trial.rho is None else {**chosen, "rho": trial.rho}


def _at_edge(trials: Sequence[Trial]) -> bool:
    return best(trials) in (trials[0], trials[-1])


def _markdown(results: dict[str, Any], trials: dict[str, list[Trial]]) -> str:
    settings = results["settings"]
    lines = [
        f"# Tuned for {settings['dataset']} with {settings['model']}",
        "",
        "Validation accuracy in percent at the end of training, mean ± 68% interval "
        "over the seeds; the test part was not looked at.",
        "",
        f"- command: `{results['command']}`",
        *(f"- {key.replace('_', ' ')}: {value}" for key, value in settings.items()),
        "",
        "| optimizer | learning rate | rho | accuracy | chosen |",
        "|---|---|---|---|---|",
    ]
    for name, rows in trials.items():
        for row in rows:
            rho = "" if row.rho is None else f"{row.rho:g}"
            mark = "yes" if row == best(rows) else ""
            if mark and _at_edge(rows):
                mark += ", at the edge of the grid"
            accuracy = report.estimate(row.accuracies).percent()
            lines.append(
                f"| {name} | {row.learning_rate:g} | {rho} | {accuracy} | {mark} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes, and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    arguments.add_task_arguments(parser, seeds=5)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file to write, with a table beside it (default: where compare.py "
        "looks for it)",
    )
    args = parser.parse_args(argv)
    out = args.out or optimizers.tuned_path(args.dataset, args.model)
    task = arguments.load_task(parser, args, validation=True)

    console = Console()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        total = sum(len(method.grid) for method in optimizers.METHODS.values())
        bar = progress.add_task("tuning", total=total)
        trials = tune(
            task,
            args.seeds,
            args.weight_decay,
            lambda name: progress.update(bar, advance=1, description=f"tuned {name}"),
        )

    options = vars(args).items()
    results = {
        **report.provenance("tune.py", argv),
        "settings": {
            **{key: value for key, value in options if key not in ("out", "data_dir")},
            "momentum": optimizers.MOMENTUM,
            "selection": "mean validation accuracy after the last epoch",
            "train_examples": len(task.clean_labels),
            "validation_examples": len(task.test_labels),
        },
        "chosen": {name: _chosen(best(rows)) for name, rows in trials.items()},
        "at_edge": [name for name, rows in trials.items() if _at_edge(rows)],
        "trials": [trial._asdict() for rows in trials.values() for trial in rows],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(out, results)
    table = out.with_suffix(".md")
    table.write_text(_markdown(results, trials), encoding="utf-8")
    for name, values in results["chosen"].items():
        note = " (at the edge of its grid)" if name in results["at_edge"] else ""
        console.print(f"{name}: {values}{note}")
    console.print(f"Written: {out} and {table}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
