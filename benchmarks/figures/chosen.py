"""Variants of a method, each at its own radius: chosen on validation, then tested.

All that is trained is one program for each variant, compiled once for all radii.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import common
from benchmarks.reports.progress import progress
from benchmarks.tasks import optimizers, problems, runs
from benchmarks.tune import FIRST_TEST_SEED
from msam_optax.plotting import plot_estimates

# Seeds that choose the radius; for each another fifth is held out.
_SEARCHED = 3


class Variant(NamedTuple):
    """What is trained.

    Attributes:
      make_run: as `runs.make_run` has it, for a problem.
      rhos: that are compared.
    """

    make_run: Callable[[runs.Problem], runs.Run]
    rhos: Sequence[float]


def problem_of(study: common.Study, epochs: int | None = None) -> runs.Problem:
    """The study's images, with the MLP in batches of 128, as `tune.py` trains it."""
    args = study.args
    return problems.digits(epochs or args.epochs, args.dataset, args.label_noise)


def traced(setting: optimizers.Setting, rho: float | None = None) -> runs.Traced:
    """Hyper-parameters of a run, with another radius if one is given."""
    values = setting.learning_rate, setting.rho if rho is None else rho
    return runs.Traced(*map(np.float32, (*values, setting.weight_decay)))


def compute(
    study: common.Study, like: str, variants: Mapping[str, Variant]
) -> list[dict[str, Any]]:
    """One row for each run: of the search, and of the test at the chosen radius.

    Args:
      study: what is trained.
      like: the method whose learning rate and weight decay all have.
      variants: by name.
    """
    problem, setting = problem_of(study), study.setting(like)
    searched, tested = study.seeds[:_SEARCHED], study.seeds
    total = sum(len(searched) * len(v.rhos) + len(tested) for v in variants.values())
    rows = []
    with progress(total) as bar:

        def row(name: str, run: runs.Run, rho: float, seed: int, part: str) -> Any:
            bar.describe(f"{name}, ρ={rho:g}, {part}")
            inputs = problem.inputs(seed, part == "validation")
            outcome, _ = run(traced(setting, rho), inputs)
            bar.advance()
            rows.append(
                {
                    "variant": name,
                    **common.columns_of(setting._replace(rho=rho)),
                    "part": part,
                    "seed": seed,
                    "accuracy": float(outcome.accuracy),
                    "train_accuracy": float(outcome.train_accuracy),
                }
            )

        for name, variant in variants.items():
            run = jax.jit(variant.make_run(problem))
            for rho in variant.rhos:
                for seed in searched:
                    row(name, run, rho, seed, "validation")
            rho = best(r for r in rows if r["variant"] == name)
            for seed in tested:
                row(name, run, rho, FIRST_TEST_SEED + seed, "test")
    return rows


def best(rows: Iterable[Mapping[str, Any]]) -> float:
    """The radius of the highest mean accuracy."""
    means = common.summarise(rows, ("rho",), "accuracy")
    (rho,) = max(means, key=lambda key: means[key].mean)
    return rho


def draw(rows: Sequence[Mapping[str, Any]], xlabel: str = "ρ") -> Figure:
    """The search to the left, the tests at the chosen radii to the right."""
    parts = common.grouped(rows, "part")
    figure, ((left, right),) = common.panels(1, 2)
    plot_estimates(
        common.curves(parts["validation"], "variant", "rho", "accuracy", 100.0),
        xlabel=xlabel,
        ylabel="validation accuracy (%)",
        log_x=True,
        bars=True,
        ax=left,
    )
    means = common.summarise(parts["test"], ("variant", "rho"), "accuracy")
    handles, labels = left.get_legend_handles_labels()
    colors = {
        label: bars.lines[0].get_color()
        for label, bars in zip(labels, handles, strict=True)
    }
    for place, (name, rho) in enumerate(means):
        found = means[name, rho]
        mean, interval = 100 * found.mean, 100 * found.interval
        right.errorbar(place, mean, interval, fmt="o", capsize=3, color=colors[name])
    right.set_xticks(range(len(means)), [f"{name}\nρ={rho:g}" for name, rho in means])
    right.set_xlim(-0.5, len(means) - 0.5)
    right.set_ylabel("test accuracy (%)")
    return figure
