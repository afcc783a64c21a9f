"""What a study found: the chosen settings, and a table with intervals."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.reports import report
from benchmarks.tasks.search import Found, Plan

Row = Mapping[str, Any]


def score(row: Row, kind: str) -> float:
    """The accuracy or minus the loss of a run; NaN where it diverged."""
    value = math.nan if row[kind] is None else float(row[kind])
    return value if kind == "accuracy" else -value


def save(
    out: Path,
    kind: str,
    plan: Plan,
    found: Mapping[str, Found],
    bases: Mapping[str, str | None],
    tests: Sequence[Row],
    provenance: Mapping[str, Any],
) -> None:
    """Writes or extends `chosen.json`, and writes `table.md` from all that is there.

    Args:
      out: the study's folder.
      kind: "accuracy" or "loss".
      plan: of the search.
      found: by method; those of earlier calls stay.
      bases: the method that each one's gain is over, itself for a base; None for the
        first.
      tests: rows of the chosen settings.
      provenance: of this call.
    """
    path = out / "chosen.json"
    methods: dict[str, Any] = {}
    if path.is_file():
        methods = json.loads(path.read_text(encoding="utf-8"))["methods"]
    for name, result in found.items():
        methods[name] = {
            **result._asdict(),
            "chosen": result.chosen._asdict(),
            "base": bases.get(name),
        }
    report.write_json(path, {**provenance, "plan": plan._asdict(), "methods": methods})
    lines = _table(kind, methods, tests)
    lines += ["", *_notes(kind, plan, provenance)]
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def chosen_rows(name: str, chosen: Row, tests: Sequence[Row]) -> dict[int, Row]:
    """A method's tests at its chosen setting, by seed."""
    wanted = {"method": name, **chosen}
    return {
        row["seed"]: row
        for row in tests
        if all(row[key] == value for key, value in wanted.items())
    }


class Compared(NamedTuple):
    """A method's tests beside those of what it is compared with.

    Attributes:
      rows: by seed.
      base: what the gains are over; None for a method that is compared with nothing.
      gains: paired by seed, in points or nats; more is better.
    """

    rows: dict[int, Row]
    base: str | None
    gains: list[float]

    @property
    def gradients(self) -> float:
        """In a step, mean."""
        return 1 + sum(r["sam_fraction"] for r in self.rows.values()) / len(self.rows)


def compared(
    kind: str, methods: Mapping[str, Any], tests: Sequence[Row]
) -> dict[str, Compared]:
    """Each method that was tested, over its base: its own, or else the first."""
    scale = 100 if kind == "accuracy" else 1
    rows = {
        name: own
        for name, method in methods.items()
        if (own := chosen_rows(name, method["chosen"], tests))
    }
    first = next(iter(rows), "")
    found = {}
    for name, own in rows.items():
        base = methods[name].get("base") or first
        over = rows.get(base, {}) if base != name else {}
        gains = [
            scale * (score(row, kind) - score(over[seed], kind))
            for seed, row in own.items()
            if seed in over
        ]
        found[name] = Compared(own, base if over else None, gains)
    return found


def _table(kind: str, methods: Mapping[str, Any], tests: Sequence[Row]) -> list[str]:
    scale, digits = (100, 2) if kind == "accuracy" else (1, 4)
    lines = [
        "| method | learning rate | rho | weight decay | settings, runs | validation "
        f"| test {kind} | gain | over | gradients a step | train accuracy | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in compared(kind, methods, tests).items():
        method = methods[name]
        chosen = method["chosen"]
        values = [scale * abs(score(row, kind)) for row in own.rows.values()]
        edge = " (edge)" if method["at_edge"] else ""
        trained = report.estimate(
            [100 * row["train_accuracy"] for row in own.rows.values()]
        )
        cells = [
            name,
            f"{chosen['learning_rate']:g}",
            "" if chosen["rho"] is None else f"{chosen['rho']:g}",
            f"{chosen['weight_decay']:g}{edge}",
            f"{method['settings']}, {method['runs']}",
            f"{scale * abs(method['score']):.{digits}f}",
            _interval(values, digits),
            _interval(own.gains, digits, "+") if own.base else "",
            own.base or "",
            f"{own.gradients:.2f}",
            f"{trained.mean:.1f}",
            str(len(own.rows)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    mean, half = report.estimate(values, level=0.95)
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def _notes(kind: str, plan: Plan, provenance: Mapping[str, Any]) -> list[str]:
    unit = "percent" if kind == "accuracy" else "nats a character"
    rungs = ", ".join(f"{seeds} seeds for {kept}" for kept, seeds in plan.rungs)
    return [
        f"Test {kind} in {unit}; ± is the 95% interval of the mean, from Student's t. "
        "Gain: paired by seed, so that more is better.",
        "",
        f"Search, the same for every method: {plan.first} settings drawn and "
        f"{sum(plan.near)} neighbours with one seed, then {rungs}: {plan.runs} runs, "
        "and a few for each step by which a range moved, at most "
        f"{plan.moves}. Seeds and examples of the test are in no run of the search. "
        "(edge): the best still lies at the edge of what was tried.",
        "",
        "All runs, each with the commit of its code: `validation.jsonl`, `test.jsonl`.",
        "",
        *report.origin(provenance),
    ]


def publish(path: Path, lines: Sequence[str], provenance: Mapping[str, Any]) -> None:
    """Writes Markdown with where it comes from below it, and shows it."""
    text = "\n".join([*lines, "", *report.origin(provenance)])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")
    Console().print(text, highlight=False, soft_wrap=True)
