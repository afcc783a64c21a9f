"""Compares optimizers: trains one model on real data with each, over several seeds.

For instance:

    python benchmarks/compare.py
    python benchmarks/compare.py --dataset fashion_mnist --model cnn --epochs 10
    python benchmarks/compare.py --optimizers sgd msam --rho msam=0.2 msam=0.5 msam=1
    python benchmarks/compare.py --optimizers sgd my_module:make --learning-rate 0.1
    srun python benchmarks/compare.py --distributed
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from benchmarks import arguments, distributed
from benchmarks.reports import report
from benchmarks.reports.comparison import (
    TABLE_WIDTH,
    Contender,
    Run,
    print_report,
    save,
    summarise,
)
from benchmarks.reports.progress import progress
from benchmarks.tasks import optimizers, training

_DEFAULT_OPTIMIZERS = ("sgd", "nag", "adam", "msam", "sam", "ae_sam", "looksam")


def compare(
    task: training.Task,
    contenders: Sequence[Contender],
    seeds: int,
    on_epoch: Callable[[str, int], None] = lambda label, advance: None,
) -> Iterator[Run]:
    """Trains every contender with every seed.

    The seeds are the outer loop: what slows the machine down for a while does so for
    all contenders alike.

    Args:
      task: what is learned.
      contenders: what is trained.
      seeds: how many runs each contender gets.
      on_epoch: called with what is going on and the number of epochs just finished.

    Yields:
      Each run when it is finished.
    """
    trainers = {}
    for seed in range(seeds):
        for contender in contenders:
            if contender not in trainers:
                on_epoch(f"compiling {contender}", 0)
                trainers[contender] = _trainer(task, contender)
                trainers[contender].warm_up()
            label = f"{contender}, seed {seed + 1} of {seeds}"
            on_epoch(label, 0)
            yield _measure(
                task,
                contender,
                trainers[contender],
                seed,
                partial(on_epoch, label, 1),
            )


def _trainer(task: training.Task, contender: Contender) -> training.Trainer:
    setting = optimizers.Setting(
        contender.learning_rate,
        contender.rho or 0.0,
        contender.weight_decay,
        task.total_steps,
    )
    method = optimizers.find(contender.optimizer)
    return training.Trainer(task, method.build(setting), method.extra_gradient)


def _measure(
    task: training.Task,
    contender: Contender,
    trainer: training.Trainer,
    seed: int,
    on_epoch: Callable[[], None],
) -> Run:
    losses, accuracies, gradients = [], [], []
    for epoch in trainer.epochs(seed):
        weights = task.weights(epoch.state)
        evaluate = partial(training.evaluate, task.model, weights)
        test = evaluate(task.test_images, task.test_labels)
        losses += [epoch.loss, test.loss]
        accuracies.append(test.accuracy)
        gradients.append(epoch.gradients)
        on_epoch()
    return Run(
        contender=contender,
        seed=seed,
        test_accuracies=accuracies,
        gradients=gradients,
        train_accuracy=evaluate(task.train_images, epoch.labels).accuracy,
        clean_train_accuracy=evaluate(task.train_images, task.clean_labels).accuracy,
        test_loss=test.loss,
        sharpness=training.largest_eigenvalue(
            task.model, weights, task.train_images, epoch.labels
        ),
        sam_fraction=epoch.sam_fraction,
        seconds=epoch.seconds,
        diverged=not np.isfinite(losses).all(),
    )


def _name(text: str) -> str:
    optimizers.find(text)
    return text


def _rho(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(
            f"name=value is needed, for instance msam=1, but {text!r} was given."
        )
    if optimizers.find(name).base is None:
        raise ValueError(f"{name} has no rho.")
    return name, arguments.finite(value)


def _parser() -> arguments.Parser:
    parser = arguments.Parser(__doc__.splitlines()[0])
    arguments.add_task_arguments(parser, seeds=10, weight_decay=None)
    parser.add_argument(
        "--optimizers",
        action=arguments.Several,
        read=_name,
        default=_DEFAULT_OPTIMIZERS,
        metavar="NAME",
        help=f"what is compared, of {', '.join(optimizers.METHODS)}, or one of your "
        "own: module:function, which makes an optimizer of a Setting, see "
        f"benchmarks/tasks/optimizers.py (default: {' '.join(_DEFAULT_OPTIMIZERS)})",
    )
    parser.add_argument(
        "--rho",
        action=arguments.Several,
        read=_rho,
        default=(),
        metavar="NAME=VALUE",
        help="radii in the place of the tuned ones; several for one optimizer, as in "
        "msam=0.5 msam=1, make a row each",
    )
    parser.add_argument(
        "--learning-rate",
        type=arguments.positive,
        metavar="RATE",
        help="of every optimizer, in the place of the tuned ones",
    )
    arguments.add_out(parser, told="runs/<dataset>-<model>")
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes whose devices share out every batch; the first "
        "prints and writes. Reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID, or asks the cluster (Slurm, Open MPI, Cloud TPU)",
    )
    return parser


def _contenders(
    parser: arguments.Parser, args: argparse.Namespace
) -> tuple[list[Contender], str]:
    """What to train, and where the hyper-parameters that were not given come from."""
    tuned, source = optimizers.load_studied(args.dataset, args.model)
    contenders = []
    for name in args.optimizers:
        found = tuned.get(name) or optimizers.untuned(name)
        rhos = [rho for given, rho in args.rho if given == name] or [found.rho]
        rate, decay = args.learning_rate, args.weight_decay
        contenders += [
            Contender(
                name,
                found.learning_rate if rate is None else rate,
                rho,
                found.weight_decay if decay is None else decay,
            )
            for rho in rhos
        ]
    for name, _ in args.rho:
        if name not in args.optimizers:
            parser.error(f"argument --rho: {name} is not among the --optimizers.")
    untuned = [name for name in args.optimizers if name not in tuned]
    if tuned and untuned:
        source += f"; defaults, not tuned, for {', '.join(untuned)}"
    flags: dict[str, Any] = {"learning_rate": None, "weight_decay": None, "rho": ()}
    given = [f"--{key}" for key, unset in flags.items() if getattr(args, key) != unset]
    if given:
        source += f", but for {' and '.join(given).replace('_', '-')}"
    return list(dict.fromkeys(contenders)), source


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints and saves; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    args = parser.parse_args(argv)
    contenders, source = _contenders(parser, args)
    mesh = None
    if args.distributed:
        try:
            mesh = distributed.connect()
        except ValueError as error:
            parser.error(f"argument --distributed: {error}.")
    task = arguments.load_task(parser, args, mesh=mesh)
    out = args.out or Path("runs") / f"{args.dataset}-{args.model}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {out} is no folder to write to ({error}).")

    # All processes measure, but only the first tells.
    first = jax.process_index() == 0
    console = Console(quiet=not first)
    runs: list[Run] = []
    interrupted = False
    with progress(len(contenders) * args.seeds * args.epochs, console) as bar:

        def on_epoch(label: str, advance: int) -> None:
            bar.describe(label)
            bar.advance(advance)

        try:
            for run in compare(task, contenders, args.seeds, on_epoch):
                runs.append(run)
        except KeyboardInterrupt:
            interrupted = True

    if interrupted:
        total = len(contenders) * args.seeds
        console.print(
            f"Interrupted: {len(runs)} of {total} runs are finished and kept."
        )
    if runs and first:
        settings = {
            "dataset": args.dataset,
            "model": args.model,
            "label_noise": args.label_noise,
            "seeds": args.seeds,
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "momentum": optimizers.MOMENTUM,
            "learning_rate_schedule": "cosine to 0",
            "train_examples": len(task.clean_labels),
            "test_examples": len(task.test_labels),
            "hyperparameters": source,
        }
        if task.split is not None:
            devices = task.split.num_devices
            settings |= {"processes": jax.process_count(), "devices": devices}
        figures = save(out, runs, settings, report.provenance("compare.py", argv))
        wide = Console(width=max(console.width, TABLE_WIDTH))
        print_report(wide, summarise(runs), settings)
        for figure in figures:
            console.print(f"Figure: {figure}", soft_wrap=True)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
