"""Accuracy for equal budgets of gradients: SGD, MSAM and SAM (MSAM paper, figure A.11).

SAM takes two gradients a step. So it is trained for half of the epochs of SGD and MSAM,
and for all of them while these two get twice as many: two budgets, the same for all.
Each run has its learning rate fall to 0 at its own end.

Each method's setting was tuned for the smaller budget of SGD and MSAM, which is SAM's
larger one, and not again for the others.

Reference: Becker, Altrock and Risse, "Momentum-SAM", arXiv 2401.12033.

    python benchmarks/figures/equal_budget.py --quick
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.reports.progress import progress

# Gradients a step.
COSTS = {"sgd": 1, "msam": 1, "sam": 2}


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each budget, method and seed."""
    budgets = study.task.epochs, 2 * study.task.epochs
    rows = []
    with progress(len(budgets) * len(COSTS) * len(study.seeds)) as bar:
        for budget, (method, cost) in itertools.product(budgets, COSTS.items()):
            epochs = max(1, budget // cost)
            shorter = study.with_epochs(epochs)
            trainer = shorter.trainer(method)
            for seed in study.seeds:
                bar.describe(f"{method}, {epochs} epochs, seed {seed + 1}")
                *_, last = trainer.epochs(seed)
                rows.append(
                    {
                        "method": method,
                        **common.columns_of(study.setting(method)),
                        "epochs": epochs,
                        "gradients": last.gradients,
                        "seed": seed,
                        **study.accuracies(last),
                    }
                )
                bar.advance()
    return rows


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test beside training accuracy over the budget."""
    return common.accuracies(rows, "gradients", "gradients of a batch")


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
