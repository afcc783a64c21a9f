"""Final accuracy against ρ: what the figures of it have in common."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from benchmarks.figures import common
from benchmarks.reports.progress import progress
from benchmarks.tasks import optimizers, training
from msam_optax.plotting import Estimates, plot_estimates

# Without a perturbation.
BASES = ("sgd", "nag")


class Sweep(NamedTuple):
    """A method to train by with several ρ.

    Attributes:
      setting: whose learning rate and weight decay it is trained with.
      trainer: adjustable in ρ.
      rhos: what ρ is set to.
    """

    setting: optimizers.Setting
    trainer: training.Trainer
    rhos: Sequence[float]


def sweep(
    study: common.Study,
    method: str,
    rhos: Sequence[float],
    build: common.Build | None = None,
) -> Sweep:
    """A method, or what is built in its place, at its learning rate and decay."""
    return Sweep(study.setting(method), study.adjustable_trainer(method, build), rhos)


def compute(study: common.Study, sweeps: Mapping[str, Sweep]) -> list[dict[str, Any]]:
    """Trains to the end with each ρ, and by the methods without one.

    Returns:
      One row for each seed, method and ρ.
    """
    bases = {name: sweep(study, name, [0.0]) for name in BASES}
    runs = [
        (seed, method, swept, rho)
        for seed in study.seeds
        for method, swept in {**bases, **sweeps}.items()
        for rho in swept.rhos
    ]
    rows = []
    with progress(len(runs)) as bar:
        for seed, method, swept, rho in runs:
            bar.describe(f"{method} ρ={rho:g}, seed {seed + 1} of {len(study.seeds)}")
            *_, last = swept.trainer.epochs(seed, rho=rho)
            columns = common.columns_of(swept.setting._replace(rho=rho))
            rows.append(
                {"method": method, **columns, "seed": seed, **study.accuracies(last)}
            )
            bar.advance()
    return rows


def draw(rows: Sequence[Mapping[str, Any]], part: str, ax: Axes) -> None:
    """Accuracy on `validation` or `train` against ρ, over the bases' levels."""
    column = f"{part}_accuracy"
    levels = common.summarise(rows, ("method",), column)
    swept = [row for row in rows if row["method"] not in BASES]
    labels = "given training labels" if part == "train" else part
    plot_estimates(
        common.curves(swept, "method", "rho", column, scale=100),
        references={
            name: Estimates(0, 100 * levels[name,].mean, 100 * levels[name,].interval)
            for name in BASES
        },
        xlabel="ρ",
        ylabel=f"accuracy, {labels} (%)",
        bars=True,
        ax=ax,
    )
