"""MSAM's best radius against learning rate and momentum, and what ports of it cost.

On the validation split of `tune.py`'s digits, with MSAM's weight decay of there. The
ports that differ from the authors' code have the sign reversed, or take one norm for
each tensor.

    python benchmarks/radius.py

A run is written down when it ends; the same command goes on.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import msam_optax
from benchmarks import arguments
from benchmarks.reports import report, studies
from benchmarks.tasks import optimizers, problems, runs
from benchmarks.tasks.records import Record
from msam_optax import ascents

RHOS = (0.1, 0.2, 0.5, 1.0, 2.0)
RATES = (0.003, 0.01, 0.03, 0.1)
MOMENTUMS = (0.8, 0.9, 0.95)


class Point(NamedTuple):
    """What is trained.

    Attributes:
      variant: key of `VARIANTS`.
      learning_rate: at the first step.
      momentum: mu.
      rho: radius.
    """

    variant: str
    learning_rate: float
    momentum: float
    rho: float


def _tensorwise(rho: Any, direction: Any, params: Any) -> Any:
    del params
    norms = jax.tree.map(lambda v: jnp.sqrt(jnp.sum(v**2)), direction)
    return jax.tree.map(
        lambda v, n: rho * v / jnp.where(n == 0, jnp.inf, n), direction, norms
    )


VARIANTS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "msam": lambda base, rho: msam_optax.momentum_perturbation(base, rho),
    "sign reversed": lambda base, rho: msam_optax.momentum_perturbation(base, -rho),
    "norm of each tensor": lambda base, rho: msam_optax.momentum_perturbation(
        base, ascent=ascents.make(rho, _tensorwise)
    ),
}


def points(learning_rate: float) -> list[Point]:
    """What is trained, around MSAM's learning rate."""
    found = [Point("msam", rate, 0.9, rho) for rate in RATES for rho in RHOS]
    # At the same size of a step, learning_rate / (1 - momentum).
    found += [
        Point("msam", round(learning_rate * (1 - mu) / 0.1, 6), mu, rho)
        for mu in MOMENTUMS
        for rho in RHOS
    ]
    found += [
        Point(variant, learning_rate, 0.9, rho)
        for variant in ("sign reversed", "norm of each tensor")
        for rho in (0.05, *RHOS[:4])
    ]
    return list(dict.fromkeys(found))


def _trainer(
    problem: runs.Problem, variant: str, weight_decay: float
) -> Callable[..., tuple[runs.Outcome, Any]]:
    @jax.jit
    def run(point, inputs):
        rate, momentum, rho = point

        def build(setting: optimizers.Setting) -> optax.GradientTransformation:
            base = optax.sgd(setting.schedule, momentum)
            decay = optax.add_decayed_weights(setting.weight_decay)
            return optax.chain(decay, VARIANTS[variant](base, setting.rho))

        traced = runs.Traced(rate, rho, weight_decay)
        outcome, params = runs.make_run(problem, build)(traced, inputs)
        return outcome, optax.tree.norm(params)

    return run


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    groups: dict[tuple[str, float, float], dict[float, list[float]]] = {}
    for row in rows:
        key = row["variant"], row["learning_rate"], row["momentum"]
        accuracies = groups.setdefault(key, {}).setdefault(row["rho"], [])
        accuracies.append(100 * (row["accuracy"] or 0.0))
    rhos = sorted({row["rho"] for row in rows})
    head = " | ".join(f"{rho:g}" for rho in rhos)
    lines = [
        f"| variant | learning rate | momentum | {head} |",
        "|---" * (3 + len(rhos)) + "|",
    ]
    for (variant, rate, momentum), own in groups.items():
        means = {rho: float(np.mean(values)) for rho, values in own.items()}
        best = max(means, key=lambda rho: means[rho])
        cells = [
            ""
            if rho not in means
            else f"{'**' * (rho == best)}{means[rho]:.1f}{'**' * (rho == best)}"
            for rho in rhos
        ]
        lines.append(f"| {variant} | {rate:g} | {momentum:g} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and writes rows and table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=arguments.positive_integer, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="one epoch on small digits: a minute"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/studies/radius"))
    args = parser.parse_args(argv)
    quick: dict[str, Any] = {"epochs": 1, "dataset": "digits"} if args.quick else {}
    problem = problems.digits(**quick)
    tuned, _ = optimizers.load_studied("mnist5k", "mlp")
    base = tuned.get("msam") or optimizers.untuned("msam")
    provenance = report.provenance("radius.py", argv)
    record = Record(args.out / "validation.jsonl", (*Point._fields, "seed"))
    trainers: dict[str, Callable[..., Any]] = {}
    for point in points(base.learning_rate):
        if point.variant not in trainers:
            trainers[point.variant] = _trainer(
                problem, point.variant, base.weight_decay
            )
        for seed in range(args.seeds):
            columns = {**point._asdict(), "seed": seed}
            if record.find(columns):
                continue
            outcome, norm = trainers[point.variant](
                tuple(np.float32(value) for value in point[1:]),
                problem.inputs(seed, True),
            )
            found = {key: float(value) for key, value in outcome._asdict().items()}
            commit = provenance["commit"]
            record.append(
                {**columns, **found, "weights_norm": float(norm), "commit": commit}
            )
    lines = [
        *_table(record.rows),
        "",
        f"Validation accuracy in percent by rho, mean of {args.seeds} seeds, the best "
        f"in bold; weight decay {base.weight_decay:g}.",
    ]
    studies.publish(args.out / "table.md", lines, provenance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
