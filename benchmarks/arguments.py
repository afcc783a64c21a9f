"""Command line arguments that the benchmarks share."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jax.sharding import Mesh

from benchmarks.tasks import data, models, optimizers, training


class Parser(argparse.ArgumentParser):
    """Answers a bad argument with one sentence and exit code 2."""

    def __init__(self, description: str, **options: Any) -> None:
        # A typo must not start an hour of training.
        super().__init__(description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive_integer(text: str) -> int:
    """Reads an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"a whole number of at least 1 is needed, but {text!r} was given."
        )
    return value


def folder(text: str) -> Path:
    """Reads the path of a folder, which need not be there yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder to write to.")
    return path


def add_out(
    parser: argparse.ArgumentParser, default: Path | None = None, told: str = ""
) -> None:
    """Adds ``--out``.

    Args:
      parser: to add it to.
      default: None where it hangs on other arguments.
      told: what it is then, in words.
    """
    parser.add_argument(
        "--out",
        type=folder,
        metavar="DIR",
        default=default,
        help=f"folder to write to (default: {default or told})",
    )


def finite(text: str) -> float:
    """Reads a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(
            f"a finite number is needed, but {text!r} was given."
        )
    return value


def positive(text: str) -> float:
    """Reads a finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(
            f"a number above 0 is needed, but {text!r} was given."
        )
    return value


def non_negative(text: str) -> float:
    """Reads a finite number of at least 0."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(
            f"a number of at least 0 is needed, but {text!r} was given."
        )
    return value


def fraction(text: str) -> float:
    """Reads a number in [0, 1]."""
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"a number in [0, 1] is needed, but {text!r} was given."
        )
    return value


class Several(argparse.Action):
    """Values given apart by spaces, by commas, or by the flag once more."""

    def __init__(self, *args: Any, read: Callable[[str], Any], **options: Any) -> None:
        super().__init__(*args, **{**options, "nargs": "+"})
        self._read = read

    def __call__(self, parser, namespace, values, option_string=None):
        texts = [text for value in values for text in value.split(",") if text]
        try:
            read = [self._read(text) for text in texts]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentError(self, str(error)) from None
        if not read:
            raise argparse.ArgumentError(self, "expected at least one value.")
        before = getattr(namespace, self.dest)
        # The default is a tuple: what is given takes its place.
        before = [] if isinstance(before, tuple) else before
        setattr(namespace, self.dest, [*before, *read])


def add_task_arguments(
    parser: Parser, seeds: int, weight_decay: float | None = optimizers.WEIGHT_DECAY
) -> None:
    """Adds the arguments of `load_task`, and those that are the same for all runs.

    Args:
      parser: what they are added to.
      seeds: default of --seeds.
      weight_decay: default of --weight-decay; None for that of each optimizer's own.
    """

    def add(flag: str, help_text: str, **options: Any) -> None:
        parser.add_argument(flag, help=f"{help_text} (default: %(default)s)", **options)

    add("--dataset", "what is learned", choices=data.NAMES, default="mnist5k")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="folder that holds the dataset's files"
    )
    add("--model", "what learns it", choices=models.NAMES, default="mlp")
    add(
        "--label-noise",
        "share of the training labels that are random",
        type=fraction,
        default=0.4,
        metavar="FRACTION",
    )
    add(
        "--seeds",
        "runs of each optimizer",
        type=positive_integer,
        default=seeds,
        metavar="N",
    )
    add(
        "--epochs",
        "passes over the training part",
        type=positive_integer,
        default=30,
        metavar="N",
    )
    add(
        "--batch-size",
        "examples in a step",
        type=positive_integer,
        default=128,
        metavar="N",
    )
    own = "each one's own" if weight_decay is None else f"{weight_decay:g}"
    parser.add_argument(
        "--weight-decay",
        help=f"of every optimizer (default: {own})",
        type=non_negative,
        default=weight_decay,
        metavar="LAMBDA",
    )


def load_task(
    parser: Parser,
    args: argparse.Namespace,
    validation: bool = False,
    mesh: Mesh | None = None,
) -> training.Task:
    """Loads data and model; a bad argument ends the program with one sentence.

    Args:
      parser: reports what is bad.
      args: as `add_task_arguments` has them.
      validation: put a held out part of the training part in the place of the test
        part.
      mesh: devices that share out every batch.
    """
    try:
        dataset = data.load(args.dataset, args.data_dir)
    except data.DataError as error:
        parser.error(str(error))
    if validation:
        dataset = data.hold_out(dataset)
    examples = len(dataset.train_labels)
    if args.batch_size > examples:
        parser.error(
            f"argument --batch-size: {args.batch_size} was given, but there are only "
            f"{examples} training examples."
        )
    if mesh is not None and args.batch_size % mesh.size:
        parser.error(
            f"argument --batch-size: {args.batch_size} was given, but {mesh.size} "
            "devices cannot share that out evenly."
        )
    return training.Task(
        dataset,
        models.build(args.model, dataset.num_classes),
        label_noise=args.label_noise,
        epochs=args.epochs,
        batch_size=args.batch_size,
        mesh=mesh,
    )
