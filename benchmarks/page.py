"""The page on top of the studies: one table and two figures from the rows on disk.

    python benchmarks/page.py

Writes the table between the marks in results/studies/README.md, whose sentences are
written by hand, and `gain_against_cost.png` and `policies.png` beside it.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import arguments, tune
from benchmarks.reports import report, studies
from benchmarks.tasks import optimizers
from benchmarks.tasks.records import Record

# Tasks of the studies of policies, by what their names begin with
POLICIES = {"policies": "digits", "fashion-policies": "clothes"}
START, END = "<!-- table: python benchmarks/page.py -->", "<!-- end of the table -->"


class Result(NamedTuple):
    """A contender's tests.

    Attributes:
      method: its name.
      gradients: in a step, mean.
      gain: over its base, paired by seed, in its unit; more is better.
      base: what that is; None for a base.
      seeds: how many.
    """

    method: str
    gradients: float
    gain: report.Estimate
    base: str | None
    seeds: int


def results(folder: Path, kind: str) -> list[Result]:
    """Of the contenders of a study; a base gains 0."""
    methods = json.loads((folder / "chosen.json").read_text(encoding="utf-8"))[
        "methods"
    ]
    rows = Record(folder / "test.jsonl", ("method", "seed", "rho")).rows
    found: list[Result] = []
    for name, own in studies.compared(kind, methods, rows).items():
        gain = report.estimate(own.gains or [0.0, 0.0], level=0.95)
        result = Result(name, own.gradients, gain, own.base, len(own.rows))
        found.append(result)
    return found


def gain_against_cost(found: Sequence[Result]) -> Figure:
    """The first figure: what each method gains over SGD, and what it costs."""
    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for place, result in enumerate(found):
        # Apart from each other where the cost is the same
        x = result.gradients + 0.012 * (place - len(found) / 2)
        axes.errorbar(x, result.gain.mean, result.gain.interval, fmt="o", capsize=3)
        # Away from the line of the base, whose own name stands on the other side
        axes.annotate(
            result.method,
            (x, result.gain.mean),
            xytext=(6 if result.base else -6, 4 if result.gain.mean >= 0 else -12),
            textcoords="offset points",
            horizontalalignment="left" if result.base else "right",
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("gradients a step")
    axes.set_ylabel("test accuracy over SGD, points")
    axes.margins(x=0.12)
    return figure


# Points below the coin beyond which a policy stands at the edge, as a number: to scale
# it would hide the intervals of all others.
_LOWEST = -3.5


def policies(found: Mapping[str, Mapping[str, Sequence[Result]]]) -> Figure:
    """The second figure: each policy's gain over a coin, by task and share."""
    every = [own for shares in found.values() for own in shares.values()]
    names = list(dict.fromkeys(result.method for own in every for result in own))
    width = max(map(len, found.values()))
    figure = Figure(figsize=(3 * width + 1, 3.2 * len(found)), dpi=150)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(
        len(found), width, squeeze=False, sharex="row", sharey=True
    )
    for (task, shares), row in zip(found.items(), panels, strict=True):
        for axes in row[len(shares) :]:
            axes.set_axis_off()
        for axes, (share, own) in zip(row, shares.items(), strict=False):
            for result in own:
                mean, half = result.gain
                if mean < _LOWEST:
                    told = f"$\\leftarrow$ {mean:.1f}"
                    at = _LOWEST, names.index(result.method)
                    axes.annotate(told, at, color="C0", fontsize=8, va="center")
                    continue
                axes.errorbar(
                    mean,
                    names.index(result.method),
                    xerr=half,
                    fmt="o",
                    capsize=3,
                    # In colour what is told apart from the coin
                    color="C0" if abs(mean) > half else "0.5",
                )
            axes.axvline(0, color="0.6", linewidth=0.8)
            axes.set_title(f"{task}, the coin on {share}% of the steps", fontsize=9)
            axes.set_xlabel("test accuracy over the coin, points", fontsize=8)
    panels[0, 0].set_yticks(range(len(names)), names)
    panels[0, 0].invert_yaxis()
    return figure


def table(folder: Path) -> list[str]:
    """All studies in rows of their methods."""
    lines = [
        "| study | method | gradients a step | gain | over | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, study in tune.STUDIES.items():
        if not (folder / name / "chosen.json").is_file():
            continue
        unit, digits = ("points", 2) if study.score == "accuracy" else ("nats", 4)
        for result in results(folder / name, study.score):
            mean, half = result.gain
            gain = f"{mean:+.{digits}f} ± {half:.{digits}f} {unit}"
            cells = [
                f"[{name}]({name}/table.md)",
                f"`{result.method}`",
                f"{result.gradients:.2f}",
                gain if result.base else "",
                f"`{result.base}`" if result.base else "",
                str(result.seeds),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(text: str, lines: Sequence[str]) -> str:
    """The page with the table between its marks."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return "\n".join([before + START, "", *lines, "", END + after])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes table and figures; returns the exit code."""
    parser = arguments.Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=optimizers.RESULTS / "studies")
    folder = parser.parse_args(argv).folder
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(page(text, table(folder)), encoding="utf-8")
    found = results(folder / "digits", "accuracy")
    gain_against_cost(found).savefig(folder / "gain_against_cost.png")
    shares: dict[str, dict[str, Any]] = {}
    for name in tune.STUDIES:
        prefix, _, percent = name.rpartition("-")
        if prefix in POLICIES and (folder / name / "chosen.json").is_file():
            own = results(folder / name, "accuracy")
            shares.setdefault(POLICIES[prefix], {})[percent] = own
    if shares:
        policies(shares).savefig(folder / "policies.png")
    Console().print(f"Written: {readme}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
