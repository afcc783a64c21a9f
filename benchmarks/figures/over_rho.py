"""Final accuracy against ρ: what the figures of it have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from benchmarks.figures import common
from benchmarks.reports.progress import progress
from benchmarks.tasks import training
from msam_optax.plotting import Estimates, plot_estimates

# Without a perturbation.
BASES = ("sgd", "nag")


class Sweep(NamedTuple):
    """A method to train by with several ρ.

    Attributes:
      trainer: adjustable in the learning rate and ρ.
      rhos: what ρ is set to, at a learning rate.
    """

    trainer: training.Trainer
    rhos: Callable[[float], Sequence[float]]


def compute(study: common.Study, sweeps: Mapping[str, Sweep]) -> list[dict[str, Any]]:
    """Trains to the end with each ρ, and by the methods without one.

    Returns:
      One row for each seed, learning rate, method and ρ.
    """
    bases = {
        name: Sweep(study.adjustable_trainer(name), lambda _: [0.0]) for name in BASES
    }
    runs = [
        (seed, rate, method, sweep.trainer, rho)
        for seed in study.seeds
        for rate in study.learning_rates
        for method, sweep in {**bases, **sweeps}.items()
        for rho in sweep.rhos(rate)
    ]
    rows = []
    with progress(len(runs)) as bar:
        for seed, rate, method, trainer, rho in runs:
            bar.describe(f"{method} ρ={rho:g}, seed {seed + 1} of {len(study.seeds)}")
            *_, last = trainer.epochs(seed, learning_rate=rate, rho=rho)
            columns = {"learning_rate": rate, "method": method, "rho": rho}
            rows.append({**columns, "seed": seed, **study.accuracies(last)})
            bar.advance()
    return rows


def draw(rows: Sequence[Mapping[str, Any]], part: str, ax: Axes) -> None:
    """Accuracy on the `test` or the `train` part against ρ, over the bases' levels."""
    column = f"{part}_accuracy"
    levels = common.summarise(rows, ("method",), column)
    methods = [name for (name,) in levels if name not in BASES]
    # With ρ = 0 all are SGD.
    at_zero = [
        {**row, "method": method}
        for row in rows
        if row["method"] == "sgd"
        for method in methods
    ]
    swept = [row for row in rows if row["method"] not in BASES]
    labels = "given training labels" if part == "train" else "test"
    plot_estimates(
        common.curves([*swept, *at_zero], "method", "rho", column, scale=100),
        references={
            name: Estimates(0, 100 * levels[name,].mean, 100 * levels[name,].interval)
            for name in BASES
        },
        xlabel="ρ",
        ylabel=f"accuracy, {labels} (%)",
        bars=True,
        ax=ax,
    )
