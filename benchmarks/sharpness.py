"""How sharp each method's end point is, by several measures: does their order agree?

The methods of `tune.py`'s digits at their chosen settings. Measured over the first
1000 training examples with the labels trained on:

- rise: L(w + r g/|g|) - L(w) at the radius r = 0.1 along the gradient g;
- relative rise: the same at 1% of the weights' norm;
- eigenvalue: the largest of the Hessian;
- random: the mean rise at 10% of each filter's norm along filter-normalised directions.

    python benchmarks/sharpness.py

A run is written down when it ends; the same command goes on.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from scipy import stats

from benchmarks import arguments
from benchmarks.reports import report, studies
from benchmarks.tasks import optimizers, problems, runs
from benchmarks.tasks.records import Record
from msam_optax import sharpness

METHODS = ("sgd", "nag", "adam", "msam", "sam", "ae_sam", "looksam")
MEASURES = ("rise", "relative_rise", "eigenvalue", "random")
_FIRST_SEED = 100
_LANCZOS_STEPS = 15


def measures(
    loss: Callable[[Any, Any], jax.Array], params: Any, batch: Any
) -> dict[str, float]:
    """The measures at the weights, and the loss that they start from."""
    gradient = sharpness.mean_gradient(loss, params, [batch])
    unit = optax.tree.scale(1 / optax.tree.norm(gradient), gradient)
    norm = float(optax.tree.norm(params))
    start = sharpness.mean_loss(loss, params, [batch])

    def rise(radius: float, direction: Any) -> float:
        moved = optax.tree.add_scale(params, radius, direction)
        return sharpness.mean_loss(loss, moved, [batch]) - start

    key = jax.random.key(0)
    top = sharpness.hessian_eigenvalues(
        loss, params, [batch], 1, key, num_matvecs=_LANCZOS_STEPS
    )
    directions = [
        sharpness.filter_normalized_direction(k, params)
        for k in jax.random.split(key, 4)
    ]
    return {
        "loss_there": start,
        "gradient_norm": float(optax.tree.norm(gradient)),
        "weights_norm": norm,
        "rise": rise(0.1, unit),
        "relative_rise": rise(0.01 * norm, unit),
        "eigenvalue": float(top.values[0]),
        "random": float(np.mean([rise(0.1, d) for d in directions])),
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = ("loss_there", "gradient_norm", "weights_norm", *MEASURES)
    lines = [
        f"| method | {' | '.join(c.replace('_', ' ') for c in columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    names = list(dict.fromkeys(row["method"] for row in rows))
    means: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for name in names:
        own = [row for row in rows if row["method"] == name]
        cells = []
        for column in columns:
            mean, half = report.estimate([row[column] for row in own], level=0.95)
            cells.append(f"{mean:.3g} ± {half:.1g}")
            if column in means:
                means[column].append(mean)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Agreement of the methods' order by two measures (Kendall's tau: 1 for the "
        "same order, -1 for the reverse):",
        "",
        f"| | {' | '.join(m.replace('_', ' ') for m in MEASURES)} |",
        "|---" * (1 + len(MEASURES)) + "|",
    ]
    for one in MEASURES:
        taus = [stats.kendalltau(means[one], means[m]).statistic for m in MEASURES]
        cells = [f"{tau:+.2f}" for tau in taus]
        lines.append(f"| {one.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures, and writes rows and table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=arguments.positive_integer, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="one epoch on small digits: a minute"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    arguments.add_out(parser, Path("runs/studies/sharpness"))
    args = parser.parse_args(argv)
    quick: dict[str, Any] = {"epochs": 1, "dataset": "digits"} if args.quick else {}
    problem = problems.digits(**quick)
    tuned, _ = optimizers.load_studied("mnist5k", "mlp")
    provenance = report.provenance("sharpness.py", argv)
    record = Record(args.out / "test.jsonl", ("method", "seed"))

    def loss(params: Any, batch: Any) -> jax.Array:
        return problem.evaluate(params, batch)[1]

    for name in args.methods:
        run = runs.compiled(problem, optimizers.METHODS[name].build)
        setting = tuned.get(name) or optimizers.untuned(name)
        traced = runs.traced(setting)
        for seed in range(_FIRST_SEED, _FIRST_SEED + args.seeds):
            if record.find({"method": name, "seed": seed}):
                continue
            inputs = problem.inputs(seed, False)
            outcome, params = run(traced, inputs)
            batch = tuple(jax.numpy.asarray(part[:1000]) for part in inputs.train)
            record.append(
                {
                    "method": name,
                    "seed": seed,
                    **setting._asdict(),
                    "accuracy": float(outcome.accuracy),
                    **measures(loss, params, batch),
                    "commit": provenance["commit"],
                }
            )
    lines = [
        *_table(record.rows),
        "",
        f"± is the 95% interval over {args.seeds} seeds. The measures are those of "
        "`benchmarks/sharpness.py`.",
    ]
    studies.publish(args.out / "table.md", lines, provenance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
