"""Accuracy for equal budgets of gradients: SGD, MSAM and SAM (MSAM paper, figure A.11).

SAM takes two gradients a step. So it is trained for half of the epochs of SGD and MSAM,
and for all of them while these two get twice as many: two budgets, the same for all.
Each run has its learning rate fall to 0 at its own end.

The hyper-parameters are the tuned ones, tuned for one number of epochs and not again
for these. ρ was tuned at the tuned learning rate. At another one the best ρ may be
larger: there each method is also trained with three times its tuned ρ.

Reference: Becker, Altrock and Risse, "Momentum-SAM", arXiv 2401.12033.

    python benchmarks/figures/equal_budget.py --quick
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.reports.progress import progress
from msam_optax.plotting import plot_estimates

# Gradients a step.
COSTS = {"sgd": 1, "msam": 1, "sam": 2}


def rhos(study: common.Study, method: str, learning_rate: float) -> list[float]:
    """Of a method that are compared at a learning rate."""
    setting = study.setting(method)
    if learning_rate == setting.learning_rate or not setting.rho:
        return [setting.rho]
    return [setting.rho, round(3 * setting.rho, 9)]


def compute(study: common.Study) -> list[dict[str, Any]]:
    """One row for each budget, method, learning rate, ρ and seed."""
    runs = [
        (budget, method, rate, rho)
        for budget in (study.task.epochs, 2 * study.task.epochs)
        for method in COSTS
        for rate in study.learning_rates
        for rho in rhos(study, method, rate)
    ]
    rows = []
    trainers = {}
    with progress(len(runs) * len(study.seeds)) as bar:
        for budget, method, rate, rho in runs:
            epochs = max(1, budget // COSTS[method])
            if (method, epochs) not in trainers:
                shorter = study.with_epochs(epochs)
                trainers[method, epochs] = shorter.adjustable_trainer(method)
            for seed in study.seeds:
                bar.describe(f"{method}, {epochs} epochs, seed {seed + 1}")
                trainer = trainers[method, epochs]
                *_, last = trainer.epochs(seed, learning_rate=rate, rho=rho)
                columns = {"learning_rate": rate, "method": method, "rho": rho}
                spent = {"epochs": epochs, "gradients": last.gradients}
                rows.append(
                    {**columns, **spent, "seed": seed, **study.accuracies(last)}
                )
                bar.advance()
    return rows


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Test above training accuracy over the budget, a column for each learning rate."""
    labelled = [
        {**row, "label": f"{row['method']} ρ={row['rho']:g}" if row["rho"] else "sgd"}
        for row in rows
    ]
    panels = common.grouped(labelled, "learning_rate")
    figure, axes = common.panels(2, len(panels))
    for column, (rate, chosen) in zip(axes.T, panels.items(), strict=True):
        for ax, part, labels in (
            (column[0], "test", "test"),
            (column[1], "train", "given training labels"),
        ):
            plot_estimates(
                common.curves(
                    chosen, "label", "gradients", f"{part}_accuracy", scale=100
                ),
                xlabel="gradients of a batch",
                ylabel=f"accuracy, {labels} (%)",
                bars=True,
                ax=ax,
            )
        column[0].set_title(f"learning rate {rate:g}")
        column[1].get_legend().remove()  # it is that of the panel above
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, draws and saves; returns the exit code."""
    return common.run(__file__, __doc__, argv, compute, draw)


if __name__ == "__main__":
    sys.exit(main())
