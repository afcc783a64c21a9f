"""The tables of what was measured on an accelerator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.costs.methods import ACCELERATOR_BARS, CPU_BARS
from benchmarks.costs.timing import Spread
from benchmarks.reports import report, tables
from benchmarks.reports.step_costs import Measured, StepCost, UpdateCost
from benchmarks.reports.step_costs import save as save_costs

Rows = Sequence[dict[str, Any]]

_NOTES = (
    "± is the 95% interval of the mean over the seeds; a gain is paired by seed, and "
    "more is better.",
    "Gradients a step: 1, and 1 more for each step that takes SAM's.",
    "On characters the loss on the validation part chooses rho, and the test part is "
    "shown at it. On images nothing was tuned.",
    "Every row that was measured, with the commit of its code, is in `pieces.jsonl`.",
)


def save(out: Path, rows: Rows, provenance: dict[str, Any]) -> None:
    """Writes the tables of all rows so far, and those of `step_cost.py`."""
    shown = [
        table
        for table in (_programs(rows), _characters(rows), *_images(rows))
        if table.rows
    ]
    tables.write_markdown(
        out / "table.md", "On an accelerator", shown, _NOTES, provenance
    )
    measured = _costs(rows)
    if measured.steps and measured.updates:
        folder = out / "step_cost"
        folder.mkdir(exist_ok=True)
        save_costs(folder, measured, {}, provenance)


def _of(rows: Rows, kind: str) -> Rows:
    return [row for row in rows if row["kind"] == kind]


def _costs(rows: Rows) -> Measured:
    steps: dict[tuple[str, str], StepCost] = {}
    for row in _of(rows, "step"):
        for cost in row["costs"]:
            found = StepCost(**_spreads(cost))
            # A base is in each group of methods.
            steps.setdefault((found.model, found.name), found)
    updates = [
        UpdateCost(**_spreads(cost))
        for row in _of(rows, "update")
        for cost in row["costs"]
    ]
    bars = CPU_BARS if jax.default_backend() == "cpu" else ACCELERATOR_BARS
    return Measured(list(steps.values()), updates, [], bars)


def _spreads(cost: dict[str, Any]) -> dict[str, Any]:
    return {k: Spread(**v) if isinstance(v, dict) else v for k, v in cost.items()}


def _programs(rows: Rows) -> tables.Table:
    found = _of(rows, "program")
    base = {row["tensors"]: row for row in found if row["method"] == "sgd"}
    lines = []
    for row in found:
        of_base = base.get(row["tensors"], row)
        launched = [
            sum(of["opcodes"].get(name, 0) for name in ("fusion", "custom-call"))
            for of in (row, of_base)
        ]
        lines.append(
            [
                row["method"],
                str(row["tensors"]),
                str(row["instructions"]),
                f"{row['instructions'] / of_base['instructions']:.2f}",
                str(launched[0]),
                f"{launched[0] / max(launched[1], 1):.2f}",
            ]
        )
    headers = ("method", "tensors", "instructions", "/ sgd", "kernels", "/ sgd")
    return tables.Table("The optimized program of a step", headers, lines)


def _characters(rows: Rows) -> tables.Table:
    found = _of(rows, "characters")
    chosen: dict[str, Rows] = {}
    for method in dict.fromkeys(row["method"] for row in found):
        by_rho: dict[Any, list[dict[str, Any]]] = {}
        for row in found:
            if row["method"] == method:
                by_rho.setdefault(row["rho"], []).append(row)
        chosen[method] = min(by_rho.values(), key=_validation)
    return _trained(
        "A character transformer, loss in nats", chosen, "test_loss", -1.0, ".4f"
    )


def _validation(rows: Rows) -> float:
    losses = [row["validation_loss"] for row in rows]
    return float("inf") if None in losses else sum(losses) / len(losses)


def _images(rows: Rows) -> list[tables.Table]:
    found = _of(rows, "images")
    shown = []
    for noise in dict.fromkeys(row["label_noise"] for row in found):
        by_method: dict[str, Rows] = {}
        for row in found:
            if row["label_noise"] == noise:
                by_method[row["method"]] = [*by_method.get(row["method"], []), row]
        title = f"WRN-16-4, {noise:.0%} random labels, test accuracy in percent"
        shown.append(_trained(title, by_method, "test_accuracy", 100.0, ".2f"))
    return shown


def _trained(
    title: str, by_method: dict[str, Rows], score: str, scale: float, form: str
) -> tables.Table:
    """A line a method; a gain is over the first one, with the same seed."""
    lines = []
    bases = next(iter(by_method.values()), [])
    base = {row["seed"]: row for row in bases}
    for method, rows in by_method.items():
        of = [abs(scale) * _number(row[score]) for row in rows]
        gains = [
            scale * (_number(row[score]) - _number(base[row["seed"]][score]))
            for row in rows
            if row["seed"] in base
        ]
        gradients = 1 + sum(row["sam_fraction"] for row in rows) / len(rows)
        setting = [rows[0][k] for k in ("learning_rate", "rho", "weight_decay")]
        lines.append(
            [
                method,
                *("" if value is None else f"{value:g}" for value in setting),
                _interval(of, form),
                "" if rows is bases else _interval(gains, f"+{form}"),
                f"{gradients:.2f}",
                f"{sum(row['train_seconds'] for row in rows) / len(rows):.0f}",
                str(len(rows)),
            ]
        )
    headers = (
        *("method", "learning rate", "rho", "weight decay", "test", "gain"),
        *("gradients a step", "seconds, compiling included", "seeds"),
    )
    return tables.Table(title, headers, lines)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _interval(values: Sequence[float], form: str) -> str:
    found = report.estimate(values, 0.95)
    single = len(values) < 2
    return f"{found.mean:{form}}" + ("" if single else f" ± {found.interval:.2g}")
