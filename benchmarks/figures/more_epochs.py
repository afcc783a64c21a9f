"""Test accuracy against the length of training: SGD, MSAM and SAM.

A review of sharpness-aware methods and the SAM paper (table 1) report that SAM goes on
to improve with more epochs where SGD overfits. Each method stands at its own learning
rate, ρ and weight decay, tuned on validation data for one number of epochs (30 for the
digits) and not again for the others; the learning rate falls to 0 at the end of each
run.

Reference: Foret et al., "Sharpness-Aware Minimization", arXiv 2010.01412.

    python benchmarks/figures/more_epochs.py --quick
"""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import chosen, common
from benchmarks.reports.progress import progress
from benchmarks.tasks import optimizers, runs

METHODS = ("sgd", "msam", "sam")
# Of the number that was tuned for
SHARES = (1 / 3, 1.0, 3.0)


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row a method, number of epochs and seed."""
    rows = []
    with progress(len(METHODS) * len(SHARES) * len(study.seeds)) as bar:
        for method, share in itertools.product(METHODS, SHARES):
            epochs = max(round(share * study.args.epochs), 1)
            problem = chosen.problem_of(study, epochs)
            run = runs.compiled(problem, optimizers.METHODS[method].build)
            setting = study.setting(method)
            for seed in study.seeds:
                bar.describe(f"{method}, {epochs} epochs, seed {seed + 1}")
                outcome, _ = run(chosen.traced(setting), problem.inputs(seed, False))
                rows.append(
                    {
                        "method": method,
                        **common.columns_of(setting),
                        "epochs": epochs,
                        "seed": seed,
                        "test_accuracy": float(outcome.accuracy),
                        "train_accuracy": float(outcome.train_accuracy),
                    }
                )
                bar.advance()
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Test beside training accuracy."""
    return common.accuracies(rows, "epochs", "epochs", log_x=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
