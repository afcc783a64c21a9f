"""MSAM's best radius against rate, momentum, batch and width, and what ports cost.

On the validation split of two of `tune.py`'s studies, with MSAM's weight decay of
there. Variants that may need less of a search: rho relative to the weights' norm, a
multiple of the last update, and one norm for each tensor, as some ports have it; others
have the sign reversed.

    python benchmarks/radius.py
    python benchmarks/radius.py --tasks digits --seeds 3

A run is written down when it ends; the same command goes on.
"""

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msam_optax
from benchmarks import arguments
from benchmarks.reports import report, studies, tables
from benchmarks.tasks import optimizers, problems, runs
from benchmarks.tasks.fashion import fashion
from benchmarks.tasks.records import Record
from msam_optax import ascents

MOMENTUMS = (0.8, 0.95)


class Task(NamedTuple):
    """What is trained on, by the name of a study.

    Attributes:
      problem: makes it, given ``batch_size`` and ``width``.
      quick: what else it is made with in a quick run.
      rates: learning rates.
      batches: batch sizes; the first is that of the study.
      widths: likewise, of the network.
    """

    problem: Callable[..., runs.Problem]
    quick: Mapping[str, Any]
    rates: Sequence[float]
    batches: Sequence[int]
    widths: Sequence[int]


def _fashion(batch_size: int, seen: int = 128_000, **options: Any) -> runs.Problem:
    """With as many images seen, whatever the batch."""
    return fashion(0.2, steps=seen // batch_size, batch_size=batch_size, **options)


TASKS = {
    "digits": Task(
        problems.digits,
        {"epochs": 1, "dataset": "digits"},
        (0.003, 0.01, 0.03, 0.1),
        (128, 32, 512),
        (256, 64, 512),
    ),
    "fashion-20": Task(
        _fashion,
        {"images": 256, "seen": 256, "validating": 100, "dataset": "digits"},
        (0.01, 0.03, 0.1, 0.3),
        (64, 16, 256),
        (16, 8, 32),
    ),
}


class Variant(NamedTuple):
    """A way to perturb along the momentum.

    Attributes:
      wrap: ``wrap(base, rho) -> optimizer``.
      rhos: what is tried, in the variant's own unit.
    """

    wrap: Callable[[optax.GradientTransformation, Any], optax.GradientTransformation]
    rhos: Sequence[float]


def _tensorwise(rho: Any, direction: Any, params: Any) -> Any:
    del params
    norms = jax.tree.map(lambda v: jnp.sqrt(jnp.sum(v**2)), direction)
    return jax.tree.map(
        lambda v, n: rho * v / jnp.where(n == 0, jnp.inf, n), direction, norms
    )


def _relative(rho: Any, direction: Any, params: Any) -> Any:
    size = optax.tree.norm(params) / optax.tree.norm(direction)
    return optax.tree.scale(jnp.nan_to_num(rho * size, posinf=0.0), direction)


def _ascending(perturb: Any) -> Callable[..., optax.GradientTransformation]:
    return lambda base, rho: msam_optax.momentum_perturbation(
        base, ascent=ascents.make(rho, perturb)
    )


VARIANTS = {
    "msam": Variant(msam_optax.momentum_perturbation, (0.1, 0.2, 0.5, 1.0, 2.0)),
    "relative to the weights": Variant(
        _ascending(_relative), (0.01, 0.02, 0.05, 0.1, 0.2)
    ),
    "multiple of the last update": Variant(
        lambda base, rho: msam_optax.momentum_perturbation(
            base, along="update", ascent=ascents.unnormalized(rho)
        ),
        (1.0, 3.0, 10.0, 30.0, 100.0),
    ),
    "norm of each tensor": Variant(_ascending(_tensorwise), (0.05, 0.1, 0.2, 0.5, 1.0)),
    "sign reversed": Variant(
        lambda base, rho: msam_optax.momentum_perturbation(base, -rho),
        (0.05, 0.1, 0.2, 0.5, 1.0),
    ),
}


class Point(NamedTuple):
    """What is trained.

    Attributes:
      task: key of `TASKS`.
      variant: key of `VARIANTS`.
      axis: what differs from the study's own setting.
      learning_rate: at the first step.
      momentum: mu.
      batch_size: examples a step.
      width: of the network.
      rho: in the variant's unit.
    """

    task: str
    variant: str
    axis: str
    learning_rate: float
    momentum: float
    batch_size: int
    width: int
    rho: float


def points(name: str, learning_rate: float) -> list[Point]:
    """What is trained on a task, around MSAM's learning rate there."""
    task = TASKS[name]
    sizes = task.batches[0], task.widths[0]
    usual = Point(name, "msam", "", learning_rate, 0.9, *sizes, rho=0.0)

    def over_rates(variant: str) -> list[Point]:
        alike = usual._replace(variant=variant, axis="learning rate")
        return [alike._replace(learning_rate=rate) for rate in task.rates]

    settings = over_rates("msam")
    for mu in MOMENTUMS:
        # At the same size of a step, learning_rate / (1 - momentum)
        rate = round(learning_rate * (1 - mu) / 0.1, 6)
        settings.append(
            usual._replace(axis="momentum", learning_rate=rate, momentum=mu)
        )
    for batch in task.batches[1:]:
        settings.append(usual._replace(axis="batch", batch_size=batch))
    for width in task.widths[1:]:
        settings.append(usual._replace(axis="width", width=width))
    settings += over_rates("relative to the weights")
    settings += over_rates("multiple of the last update")
    settings.append(usual._replace(variant="norm of each tensor"))
    settings.append(usual._replace(variant="sign reversed"))
    return [
        setting._replace(rho=rho)
        for setting in settings
        for rho in VARIANTS[setting.variant].rhos
    ]


def _build(
    variant: str, momentum: float, setting: optimizers.Setting
) -> optax.GradientTransformation:
    base = optax.sgd(setting.schedule, momentum)
    decay = optax.add_decayed_weights(setting.weight_decay)
    return optax.chain(decay, VARIANTS[variant].wrap(base, setting.rho))


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row a setting: the best rho, what it reaches, and the accuracy at each."""
    groups: dict[tuple[Any, ...], dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        key = tuple(row[name] for name in Point._fields[:-1])
        groups.setdefault(key, {}).setdefault(row["rho"], []).append(row)
    headers = [
        *("task", "variant", "learning rate", "momentum", "batch", "width", "best rho"),
        *("accuracy", "over its weights' norm", "accuracy at each rho tried"),
    ]
    cells = []
    for (task, variant, _, *numbers), own in groups.items():
        means = {
            rho: 100 * float(np.mean([row["accuracy"] or 0.0 for row in seeds]))
            for rho, seeds in sorted(own.items())
        }
        best = max(means, key=lambda rho: means[rho])
        norms = [row["weights_norm"] or math.nan for row in own[best]]  # diverged: None
        relative = f"{best / np.mean(norms):.3f}" if variant == "msam" else ""
        edge = " (edge)" if best in (min(means), max(means)) else ""
        each = ", ".join(f"{rho:g}: {mean:.1f}" for rho, mean in means.items())
        setting = [task, variant, *(f"{number:g}" for number in numbers)]
        found = [f"{best:g}{edge}", f"{means[best]:.1f}", relative, each]
        cells.append([*setting, *found])
    return tables.markdown(headers, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and writes rows and table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--seeds", type=arguments.positive_integer, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="a few steps on small digits: minutes"
    )
    arguments.add_out(parser, Path("runs/studies/radius"))
    args = parser.parse_args(argv)
    provenance = report.provenance("radius.py", argv)
    record = Record(args.out / "validation.jsonl", (*Point._fields, "seed"))
    for name in args.tasks:
        _measure(name, range(args.seeds), args.quick, record, provenance["commit"])
    seeds = len({row["seed"] for row in record.rows})
    lines = [
        *_table(record.rows),
        "",
        f"Validation accuracy in percent, mean of up to {seeds} seeds, at MSAM's "
        "weight decay of the study. Rho is in each variant's own unit. (edge): of what "
        "was tried.",
    ]
    studies.publish(args.out / "table.md", lines, provenance)
    return 0


def _measure(
    name: str, seeds: Sequence[int], quick: bool, record: Record, commit: str
) -> None:
    """Trains a task's points that are not in the record yet."""
    task = TASKS[name]
    tuned = optimizers.chosen_by(name).get("msam") or optimizers.untuned("msam")

    @cache
    def problem(batch_size: int, width: int) -> runs.Problem:
        options = task.quick if quick else {}
        return task.problem(batch_size=batch_size, width=width, **options)

    @cache
    def inputs(seed: int, *sizes: int) -> runs.Inputs:
        return problem(*sizes).inputs(seed, True)

    @cache
    def run(variant: str, momentum: float, *sizes: int) -> runs.Run:
        return runs.compiled(problem(*sizes), partial(_build, variant, momentum))

    for seed, point in itertools.product(seeds, points(name, tuned.learning_rate)):
        columns = {**point._asdict(), "seed": seed}
        if record.find(columns):
            continue
        sizes = point.batch_size, point.width
        setting = point.learning_rate, point.rho, tuned.weight_decay
        outcome, params = run(point.variant, point.momentum, *sizes)(
            runs.traced(setting), inputs(seed, *sizes)
        )
        found = {key: float(value) for key, value in outcome._asdict().items()}
        norm = float(optax.tree.norm(params))
        print(*columns.values(), f"{found['accuracy']:.3f}", flush=True)
        record.append({**columns, **found, "weights_norm": norm, "commit": commit})


if __name__ == "__main__":
    sys.exit(main())
