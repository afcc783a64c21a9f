"""What is measured on an accelerator, in pieces that end within minutes."""

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import step_cost
from benchmarks.costs import growth, networks
from benchmarks.reports import tables
from benchmarks.tasks import data, large, models, optimizers, training, workloads
from benchmarks.tasks.records import OutOfTime
from benchmarks.tasks.search import Hyperparameters

Row = dict[str, Any]

KINDS = ("program", "step", "update", "characters", "images")

_BATCH = 256
_STOPS = 10


# Between two lines of what a piece is at
_SECONDS = 15


class Teller:
    """Tells what a piece is at, and stops one that would not end in time.

    Args:
      name: of the piece.
      deadline: on the monotonic clock.
    """

    def __init__(self, name: str, deadline: float) -> None:
        self._name, self._deadline = name, deadline
        self._told = -float("inf")
        self._first: tuple[float, float] | None = None

    def __call__(self, text: str, share: float = 0.0) -> None:
        """Says what is done; raises if the rest of a share would end too late."""
        now = time.monotonic()
        if now - self._told > _SECONDS or share == 1:
            self._told = now
            print(f"{self._name}: {share:.0%}, {text}", flush=True)
        if not share:
            return
        # What comes before the first share is compiling, too.
        then, first = self._first = self._first or (now, share)
        if share > first:
            each = (now - then) / (share - first)
            if now + each * (1 - share) > self._deadline:
                raise OutOfTime


class Size(NamedTuple):
    """How large all of it is.

    Attributes:
      name: of the workloads whose steps are timed.
      models: of these workloads.
      dataset: of the images.
      model: of `models.WideResNet`.
      epochs: over the images.
      characters: as `problems.characters` takes it.
      tensors: of the chains whose programs are looked at.
      update: parameters and rounds of the update alone.
      waits: whether a piece is started only if it is expected to end in time.
    """

    name: str
    models: tuple[str, ...]
    dataset: str
    model: dict[str, Any]
    epochs: int
    characters: dict[str, int]
    tensors: tuple[int, ...]
    update: tuple[int, int]
    waits: bool


FULL = Size(
    name="full",
    models=("wrn", "vit"),
    dataset="fashion_mnist",
    model={"dtype": "bfloat16"},
    epochs=30,
    characters={
        **{"steps": 1000, "length": 128, "batch": 64},
        **{"width": 256, "depth": 6, "heads": 8},
    },
    tensors=(100, 400),
    update=(100_000_000, 100),
    waits=True,
)
QUICK = Size(
    name="quick",
    models=("mlp",),
    dataset="digits",
    model={"depth": 10, "width": 1},
    epochs=1,
    characters={
        **{"steps": 4, "length": 16, "batch": 4},
        **{"width": 8, "depth": 1, "heads": 1},
    },
    tensors=(4,),
    update=(10_000, 2),
    waits=False,
)

# Methods that are timed together; each group has their bases. Two groups, since twelve
# programs of a large network are not compiled within one piece.
_GROUPS = {
    "first gradients": (
        *("sgd", "sgd, control", "nag", "msam", "momentum_perturbation(sgd)"),
        *("adamw", "adamw_msam", "momentum_perturbation(adamw)"),
    ),
    "second gradients": (
        *("sgd", "sam", "ae_sam", "ae_sam, never employed", "looksam, k=5", "esam"),
        *("optax.contrib.sam, opaque", "optax.contrib.sam, transparent"),
    ),
}


class Piece(NamedTuple):
    """What is measured at once.

    Attributes:
      key: columns that name it.
      seconds: that it may take.
      measure: makes the other columns; it is given what tells how far it is.
    """

    key: Row
    seconds: float
    measure: Callable[[Teller], Row]


def pieces(size: Size, seeds: int, data_dir: Path | None) -> Iterator[Piece]:
    """All of them, in their order: what the other ones do not hang on first."""
    for tensors in size.tensors:
        for method in ("sgd", "sam"):
            key = {"kind": "program", "method": method, "tensors": tensors}
            yield Piece(key, 60, partial(_program, method, tensors))
    for model in size.models:
        workload = workloads.SIZES[size.name][model]
        for group, names in _GROUPS.items():
            key = {"kind": "step", "model": model, "group": group}
            yield Piece(key, 300, partial(_steps, workload, names))
    yield Piece({"kind": "update"}, 240, partial(_updates, *size.update))

    text = cache(lambda: large.characters(**size.characters))
    reader = _Cached(text)
    for seed in range(seeds):
        for method, settings in large.CHARACTERS.items():
            build, _ = optimizers.AROUND_ADAMW[method]
            for setting in settings:
                key = {"kind": "characters", "method": method, **setting._asdict()}
                yield Piece(
                    {**key, **size.characters, "seed": seed},
                    120,
                    partial(_run, reader, method, build, setting, seed),
                )

    load = cache(lambda: _images(size, data_dir))
    viewer = _Cached(lambda: load()[1])

    def view(noise: float, *args: Any) -> Row:
        load()[0].label_noise = noise
        return _run(viewer, *args)

    for seed in range(seeds):
        for method, setting in large.IMAGES.items():
            # Both with what is compiled once.
            for noise in (0.0, 0.2):
                key = {"kind": "images", "method": method, **setting._asdict()}
                build = optimizers.METHODS[method].build
                yield Piece(
                    {**key, "label_noise": noise, "epochs": size.epochs, "seed": seed},
                    240,
                    partial(view, noise, method, build, setting, seed),
                )


class _Cached:
    """The last method's compiled programs, of a problem that is loaded if needed."""

    def __init__(self, load: Callable[[], large.Large]) -> None:
        self.load = load
        self._method: str | None = None

    def runner(self, method: str, build: optimizers.Build) -> large.Runner:
        if method != self._method:
            self._method, self._runner = method, large.Runner(self.load(), build)
        return self._runner


def _images(size: Size, data_dir: Path | None) -> tuple[training.Task, large.Large]:
    dataset = data.load(size.dataset, data_dir)
    model = models.build("wrn", dataset.num_classes, **size.model)
    task = training.Task(
        dataset, model, label_noise=0.0, epochs=size.epochs, batch_size=_BATCH
    )
    return task, large.images(task)


def _program(method: str, tensors: int, tell: Teller) -> Row:
    tell("compiling")
    program, compiled = growth.compiled(method, networks.chain(tensors))
    # Of lines like `%name = f32[8]{0} fusion(...), kind=kLoop`.
    opcodes = re.findall(r" = [^\n]*?\s([a-z][a-z0-9-]*)\(", compiled.as_text())
    return {**growth.columns(program), "opcodes": dict(Counter(opcodes).most_common())}


def _steps(workload: workloads.Workload, names: Sequence[str], tell: Teller) -> Row:
    costs = step_cost.measure_steps(workload, tell, names)
    return {"costs": [tables.flat(cost) for cost in costs]}


def _updates(parameters: int, rounds: int, tell: Teller) -> Row:
    costs = step_cost.measure_updates(parameters, rounds, tell)
    return {"costs": [tables.flat(cost) for cost in costs]}


def _run(
    cached: _Cached,
    method: str,
    build: optimizers.Build,
    setting: Hyperparameters,
    seed: int,
    tell: Teller,
) -> Row:
    tell("compiling")
    runner = cached.runner(method, build)
    inputs = cached.load().inputs(seed)
    total = len(inputs.order)
    stops = next(n for n in range(_STOPS, 0, -1) if total % n == 0)
    along: list[Row] = []
    for stop in runner.stops(setting, inputs, stops):
        along.append({"share": stop.share, **stop.scores})
        tell(f"loss {stop.loss:.3f}", stop.share)
    return {
        **stop.scores,
        "train_loss": stop.loss,
        "sam_fraction": stop.sam_fraction,
        "train_seconds": stop.seconds,
        "along": along,
    }
