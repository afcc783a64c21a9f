"""What step_cost.py measured: as tables, as files and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.costs.methods import Bars
from benchmarks.costs.timing import Spread
from benchmarks.reports import report, tables


class StepCost(NamedTuple):
    """The whole training step of an optimizer.

    Attributes:
      model: what is trained.
      name: of the optimizer.
      base: the optimizer it is measured against.
      time_ratio: its time over the base's.
      seconds: its time.
      employed_fraction: the share of steps that took an extra gradient; None where
        that is not a choice.
      gradients: of a batch, in a step.
      flops: of a step.
      temporary_bytes: of its programs, the largest.
      argument_bytes: of its programs, the largest.
      state_bytes: of the optimizer's state.
      params_bytes: of the parameters.
      trace_seconds: for tracing and lowering all its programs.
      compile_seconds: of all its programs in XLA.
    """

    model: str
    name: str
    base: str
    time_ratio: Spread
    seconds: Spread
    employed_fraction: float | None
    gradients: float
    flops: float
    temporary_bytes: int
    argument_bytes: int
    state_bytes: int
    params_bytes: int
    trace_seconds: float
    compile_seconds: float


class UpdateCost(NamedTuple):
    """The update of an optimizer alone.

    Attributes:
      name: of the optimizer.
      base: the optimizer it is measured against.
      time_ratio: its time over the base's.
      seconds: its time.
      temporary_bytes: of its program, over arguments and results.
      accessed_bytes: what its instructions read and write.
      params_bytes: of the parameters.
    """

    name: str
    base: str
    time_ratio: Spread
    seconds: Spread
    temporary_bytes: int
    accessed_bytes: float
    params_bytes: int


class PeerCost(NamedTuple):
    """The whole training step of an optimizer of PyTorch.

    Attributes:
      model: what is trained.
      name: of the optimizer.
      base: the optimizer it is measured against.
      time_ratio: its time over the base's.
      seconds: its time.
      gradients: of a batch, in a step.
    """

    model: str
    name: str
    base: str
    time_ratio: Spread
    seconds: Spread
    gradients: float


class Measured(NamedTuple):
    """All of a run."""

    steps: list[StepCost]
    updates: list[UpdateCost]
    peers: list[PeerCost]
    bars: Bars

    def step_bar(self, cost: StepCost) -> float | None:
        """How high the ratio of a whole step may be."""
        bar = self.bars.step.get(cost.name)
        if bar is None or cost.model not in self.bars.models:
            return None
        # SAM on a fraction f of the steps takes 1 + f gradients.
        return bar * cost.gradients if cost.name == "ae_sam" else bar


_STEP_HEADERS = (
    "optimizer",
    "base",
    "time / base",
    "bar",
    "ms",
    "f",
    "gradients",
    "FLOPs",
    "temp. MB",
    "args. MB",
    "state / P",
    "compile s",
)
_UPDATE_HEADERS = (
    "optimizer",
    "base",
    "time / base",
    "bar",
    "ms",
    "temp. / P",
    "accessed / P",
)
_PEER_HEADERS = ("model", "optimizer", "base", "time / base", "ms", "gradients")
_NOTES = (
    "Time: median and quartiles, over the base in the same round; steps that take an "
    "extra gradient and steps that don't are measured apart and combined with their "
    "shares.",
    "f: share of the steps that took the extra gradient. FLOPs: as XLA counts them, "
    "over the base's. Temporaries and arguments: of the compiled program, the largest "
    "where there are several. State: in units of the parameters' size P. Compile: "
    "tracing and lowering, and XLA, of all programs together.",
    "Update alone: of a step without extra gradient, except SAM's, whose gradient is "
    "one addition. Accessed: bytes that the instructions read and write.",
)


def tables_of(measured: Measured) -> list[tables.Table]:
    """One table a model, one of the update alone, and one of PyTorch's."""
    result = []
    for model in dict.fromkeys(cost.model for cost in measured.steps):
        own = {cost.name: cost for cost in measured.steps if cost.model == model}
        rows = [_step_row(cost, own[cost.base], measured) for cost in own.values()]
        result.append(tables.Table(f"Whole step: {model}", _STEP_HEADERS, rows))
    rows = [_update_row(cost, measured.bars) for cost in measured.updates]
    parameters = measured.updates[0].params_bytes / 4
    title = f"Update alone: {parameters:.0e} parameters"
    result.append(tables.Table(title, _UPDATE_HEADERS, rows))
    if measured.peers:
        rows = [_peer_row(cost) for cost in measured.peers]
        result.append(tables.Table("PyTorch, whole step", _PEER_HEADERS, rows))
    return result


def _step_row(cost: StepCost, base: StepCost, measured: Measured) -> tuple[str, ...]:
    fraction = cost.employed_fraction
    return (
        cost.name,
        cost.base,
        tables.ratio(cost.time_ratio),
        tables.bar(cost.time_ratio, measured.step_bar(cost)),
        f"{1e3 * cost.seconds.median:.2f}",
        "" if fraction is None else f"{fraction:.2f}",
        f"{cost.gradients:.2f}",
        f"{cost.flops / base.flops:.3f}",
        f"{cost.temporary_bytes / 1e6:.2f}",
        f"{cost.argument_bytes / 1e6:.2f}",
        f"{cost.state_bytes / cost.params_bytes:.2f}",
        f"{cost.trace_seconds:.2f} + {cost.compile_seconds:.2f}",
    )


def _peer_row(cost: PeerCost) -> tuple[str, ...]:
    return (
        cost.model,
        cost.name,
        cost.base,
        tables.ratio(cost.time_ratio),
        f"{1e3 * cost.seconds.median:.2f}",
        f"{cost.gradients:.2f}",
    )


def _update_row(cost: UpdateCost, bars: Bars) -> tuple[str, ...]:
    return (
        cost.name,
        cost.base,
        tables.ratio(cost.time_ratio),
        tables.bar(cost.time_ratio, bars.update.get(cost.name)),
        f"{1e3 * cost.seconds.median:.2f}",
        f"{cost.temporary_bytes / cost.params_bytes:.2f}",
        f"{cost.accessed_bytes / cost.params_bytes:.2f}",
    )


def print_report(console: Console, measured: Measured) -> None:
    """Prints the tables and how to read them."""
    for table in tables_of(measured):
        tables.show(console, table)
    for note in _NOTES:
        console.print(note, highlight=False)


def save(
    out: Path,
    measured: Measured,
    settings: dict[str, Any],
    provenance: dict[str, Any],
) -> list[Path]:
    """Writes the tables in Markdown, everything as JSON, and the figure."""
    markdown, json, figure = (
        out / name for name in ("table.md", "results.json", "ratios.png")
    )
    tables.write_markdown(
        markdown, "Cost of a step", tables_of(measured), _NOTES, provenance
    )
    report.write_json(
        json,
        {
            **provenance,
            "settings": settings,
            "steps": [
                {**tables.flat(cost), "bar": measured.step_bar(cost)}
                for cost in measured.steps
            ],
            "updates": [
                {**tables.flat(cost), "bar": measured.bars.update.get(cost.name)}
                for cost in measured.updates
            ],
            "peers": [tables.flat(cost) for cost in measured.peers],
        },
    )
    ratios(measured).savefig(figure)
    return [markdown, json, figure]


class _Line(NamedTuple):
    label: str
    ratio: Spread
    bar: float | None
    peer: bool = False


def ratios(measured: Measured) -> Figure:
    """Time over the base's: a panel for each model, and one for the update alone."""
    panels: dict[str, list[_Line]] = {}
    for cost in measured.steps:
        lines = panels.setdefault(f"{cost.model}, whole step", [])
        if cost.name != cost.base:
            bar = measured.step_bar(cost)
            lines.append(_Line(cost.name, cost.time_ratio, bar))
    for peer in measured.peers:
        if peer.name != peer.base:
            panels[f"{peer.model}, whole step"].append(
                _Line(f"PyTorch {peer.name}", peer.time_ratio, None, peer=True)
            )
    panels["update alone"] = [
        _Line(cost.name, cost.time_ratio, measured.bars.update.get(cost.name))
        for cost in measured.updates
        if cost.name != cost.base
    ]
    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(12, 4.2 * rows), dpi=150, layout="constrained")
    for index, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, lines)
        axes.set_title(title)
    return figure


def _draw(axes: Any, lines: Sequence[_Line]) -> None:
    positions = range(len(lines))
    medians = [line.ratio.median for line in lines]
    spread = [
        [line.ratio.median - line.ratio.low for line in lines],
        [line.ratio.high - line.ratio.median for line in lines],
    ]
    colors = ["#BBBBBB" if line.peer else "#56B4E9" for line in lines]
    axes.barh(positions, medians, xerr=spread, color=colors, capsize=3)
    barred = [i for i in positions if lines[i].bar is not None]
    axes.vlines(
        [lines[i].bar for i in barred],
        [i - 0.45 for i in barred],
        [i + 0.45 for i in barred],
        color="#D55E00",
        lw=2,
        label="bar",
    )
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(positions, [line.label for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("time / base optimizer's")
    axes.spines[["top", "right"]].set_visible(False)
    if barred:
        axes.legend(frameon=False)
