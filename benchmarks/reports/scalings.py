"""What scaling.py measured: as tables, as files and as a figure."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.costs.methods import METHODS
from benchmarks.costs.sharding import KINDS
from benchmarks.reports import tables

# Of the networks compiled whole
DEEPEST = "ViT-L/16, 24 layers"

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]

NOTES = (
    "Seconds of tracing, compiling and starting are the processor's, of all threads "
    "together; in brackets: over the base (SGD, or AdamW) in the same cell. Where "
    "other work shares the machine they move by a fifth, and instructions by nothing.",
    "Instructions: of the optimized program. First step: its run after compiling; init "
    "and eval_params (its second call) outside of jit.",
    "Temporaries: over the step's arguments and results, in units of the parameters' "
    "size P; a gradient is one.",
    "Collectives: bytes that those of the compiled step give on each device, in units "
    "of P; in brackets how many there are, and how many of scalars alone. XLA for CPU "
    "has an all-reduce where others have FSDP's reduce-scatter.",
    "Time: median and quartiles, over the base in the same round.",
)
_SECONDS = ("trace_seconds", "compile_seconds")
_STARTS = ("first_step_seconds", "init_seconds", "eval_params_seconds")


def tables_of(rows: Rows) -> list[tables.Table]:
    """One table for each part that was measured."""
    made = [
        _compiling("Number of tensors", rows["tensors"], "tensors", _STARTS),
        _growth(rows["tensors"]),
        _compiling("Networks compiled whole", rows["shapes"], "shape", ()),
        _memory(rows["memory"]),
        _collectives("Eight devices and less", rows["devices"]),
        _collectives("Many devices (FSDP)", rows["many_devices"]),
        _times("Update alone", "parameters", rows["updates"]),
        _times("Whole step", "batch", rows["steps"]),
    ]
    return [table for table in made if table.rows]


def ratio(rows: Sequence[Row], row: Row, column: str, axis: Sequence[str]) -> float:
    """A column over the base's, in the row that has the same in the axis."""
    base = METHODS[row["method"]].base
    for other in rows:
        if other["method"] == base and all(other[a] == row[a] for a in axis):
            return row[column] / other[column]
    return float("nan")


def _compiling(
    title: str, rows: Sequence[Row], axis: str, starts: Sequence[str]
) -> tables.Table:
    headers = ["method", axis, "trace s", "compile s", "instructions"]
    headers += [name.removesuffix("_seconds").replace("_", " ") for name in starts]
    made = []
    for row in sorted(rows, key=lambda row: row[axis]):
        cells = [row["method"], f"{row[axis]}"]
        for column in (*_SECONDS, "instructions"):
            value = row[column]
            text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
            cells.append(f"{text} ({ratio(rows, row, column, [axis]):.2f})")
        cells += [f"{1e3 * row[name]:.1f} ms" for name in starts]
        made.append(cells)
    return tables.Table(title, headers, made)


def _growth(rows: Sequence[Row]) -> tables.Table:
    """From a hundred tensors, or the fewest, to the most of each method."""
    found = {(row["method"], row["tensors"]): row for row in rows}
    few = 100 if any(count == 100 for _, count in found) else 4
    made = []
    for name in dict.fromkeys(row["method"] for row in rows):
        base = METHODS[name].base
        counts = [n for method, n in found if method == name and (base, n) in found]
        many = max(counts, default=0)
        if (name, few) not in found or (base, few) not in found or many <= few:
            continue
        cells = [name, f"{many}"]
        for column in ("compile_seconds", "instructions"):
            own, others = (
                found[n, many][column] / found[n, few][column] for n in (name, base)
            )
            cells += [f"{own:.1f}", f"{own / others:.2f}"]
        made.append(cells)
    headers = ("method", "to", "compile", "/ base's", "instructions", "/ base's")
    return tables.Table(f"Growth from {few} tensors", headers, made)


def _memory(rows: Sequence[Row]) -> tables.Table:
    headers = (
        "method",
        "parameters",
        "tensors",
        "temporaries / P",
        "more than base",
    )
    made = []
    for row in rows:
        own = row["temporary / P"]
        more = own - own / ratio(rows, row, "temporary / P", ("parameters", "tensors"))
        size = f"{row['parameters']:,}", f"{row['tensors']}"
        made.append((row["method"], *size, f"{own:.3f}", f"{more:+.3f}"))
    return tables.Table("Temporary memory of a step", headers, made)


def _collectives(title: str, rows: Sequence[Row]) -> tables.Table:
    headers = (
        *("method", "layout", "devices", "parameters"),
        *(f"{kind} / P" for kind in KINDS),
        *("args. MB / device", "temp. MB / device"),
    )
    made = []
    for row in rows:
        kinds = (
            f"{row[f'{kind} bytes / P']:.2f} ({row[f'{kind} operations']}, "
            f"{row[f'{kind} scalars']})"
            for kind in KINDS
        )
        made.append(
            (
                row["method"],
                row.get("layout", "FSDP"),
                f"{row['devices']}",
                f"{row['params_bytes'] // 4:,}",
                *kinds,
                f"{row['argument_bytes'] / 1e6:.3f}",
                f"{row['temporary_bytes'] / 1e6:.3f}",
            )
        )
    return tables.Table(title, headers, made)


def _times(title: str, size: str, rows: Sequence[Row]) -> tables.Table:
    made = []
    for row in rows:
        for name in METHODS:
            if name in row:
                low, median, high = row[name]["ratio"]
                time = f"{median:.3f} [{low:.3f}, {high:.3f}]"
                milliseconds = f"{row[name]['milliseconds']:.3f}"
                made.append((name, f"{row['size']:,}", time, milliseconds))
    return tables.Table(title, ("optimizer", size, "time / base", "ms"), made)


def save(out: Path, rows: Rows, provenance: dict[str, Any]) -> list[Path]:
    """Writes the tables in Markdown, and the figures of what was measured."""
    commits = {
        part: sorted({row["commit"] for row in found})
        for part, found in rows.items()
        if found
    }
    notes = [f"Measured at {', '.join(c)}: {part}." for part, c in commits.items()]
    paths = [out / "table.md"]
    tables.write_markdown(
        paths[0], "Cost as it scales", tables_of(rows), [*NOTES, *notes], provenance
    )
    if len({row["tensors"] for row in rows["tensors"]}) > 1:
        paths.append(out / "tensors.png")
        _figure(rows["tensors"]).savefig(paths[-1])
    return paths


def _figure(rows: Sequence[Row]) -> Figure:
    """Compile time and instructions against the number of tensors."""
    figure = Figure(figsize=(12, 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column in zip(panels, ("compile_seconds", "instructions"), strict=True):
        dashes, colors = cycle(("-", "--", ":")), cycle(colormaps["tab20"](range(20)))
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == name]
            own.sort(key=lambda row: row["tensors"])
            base = METHODS[name].base == name or name.startswith("optax")
            axes.plot(
                [row["tensors"] for row in own],
                [row[column] for row in own],
                color="black" if base else next(colors),
                lw=2.5 if base else 1.2,
                ls=next(dashes) if base else "-",
                label=name,
            )
        axes.set(xscale="log", yscale="log", xlabel="tensors")
        axes.set_ylabel(column.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        frameon=False,
        fontsize=8,
    )
    return figure
