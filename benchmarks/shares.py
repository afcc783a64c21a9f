"""On which share of the steps AE-SAM takes SAM, for a scale of its thresholds.

Both thresholds move together: lambda_1 = shift - 1 at the end and lambda_2 = shift + 1
at the start; a shift of 0 is the paper's. Trains on the whole training part, at the
setting that `tune.py digits` chose for AE-SAM, and evaluates nothing.

    python benchmarks/shares.py
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax

import msam_optax
from benchmarks import arguments
from benchmarks.reports import report, studies
from benchmarks.tasks import optimizers, problems, runs
from benchmarks.tasks.search import Hyperparameters

SHIFTS = (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def _trained(
    setting: Hyperparameters, seeds: int, epochs: int
) -> list[dict[str, float]]:
    problem = problems.digits(epochs=epochs)

    @jax.jit
    def run(traced, inputs, shift):
        def build(setting: optimizers.Setting) -> optax.GradientTransformation:
            return msam_optax.ae_sam(
                optimizers.sgd(setting),
                setting.rho,
                setting.total_steps,
                lambda_1=shift - 1,
                lambda_2=shift + 1,
            )

        return runs.make_run(problem, build)(traced, inputs)[0]

    rows = []
    traced = runs.traced(setting)
    for seed in range(seeds):
        inputs = problem.inputs(seed, False)
        for shift in SHIFTS:
            outcome = run(traced, inputs, np.float32(shift))
            fraction = float(outcome.sam_fraction)
            rows.append({"shift": shift, "seed": seed, "sam_fraction": fraction})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and writes the table and its rows; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=arguments.positive_integer, default=2)
    parser.add_argument("--epochs", type=arguments.positive_integer, default=30)
    arguments.add_out(parser, Path("runs/studies/shares"))
    args = parser.parse_args(argv)
    tuned, _ = optimizers.load_studied("mnist5k", "mlp")
    setting = tuned.get("ae_sam") or optimizers.untuned("ae_sam")
    rows = _trained(setting, args.seeds, args.epochs)
    lines = ["| lambda_1 | lambda_2 | SAM steps % |", "|---|---|---|"]
    for shift in SHIFTS:
        own = [100 * r["sam_fraction"] for r in rows if r["shift"] == shift]
        lines.append(f"| {shift - 1:g} | {shift + 1:g} | {np.mean(own):.1f} |")
    provenance = report.provenance("shares.py", argv)
    lines += ["", f"At {setting}, {args.seeds} seeds, {args.epochs} epochs."]
    studies.publish(args.out / "shares.md", lines, provenance)
    report.write_json(args.out / "shares.json", {**provenance, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
