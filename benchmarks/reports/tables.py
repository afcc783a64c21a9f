"""Tables of the cost benchmarks, for the terminal and in Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.costs.timing import Spread
from benchmarks.reports import report

# Wide enough for all of them, whatever the terminal or file.
WIDTH = 150


class Table(NamedTuple):
    """Texts in rows under headers; the first column is of names."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def ratio(spread: Spread) -> str:
    """A ratio and its quartiles."""
    return f"{spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]"


def bar(spread: Spread, limit: float | None) -> str:
    """A bar, and whether the median keeps below it."""
    if limit is None:
        return ""
    return f"{limit:.3f} {'met' if spread.median <= limit else 'MISSED'}"


def flat(cost: Any) -> dict[str, Any]:
    """A named tuple of numbers and spreads as nested dicts."""
    return {
        key: value._asdict() if isinstance(value, Spread) else value
        for key, value in cost._asdict().items()
    }


def show(console: Console, table: Table) -> None:
    """Prints a table."""
    rich_table = RichTable(
        title=table.title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, header in enumerate(table.headers):
        rich_table.add_column(
            header, justify="right" if index else "left", no_wrap=True
        )
    for row in table.rows:
        rich_table.add_row(*row)
    console.print(rich_table)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown, numbers to the right."""
    align = ["---", *["---:"] * (len(headers) - 1)]
    return [f"| {' | '.join(row)} |" for row in (headers, align, *rows)]


def write_markdown(
    path: Path,
    title: str,
    tables: Sequence[Table],
    notes: Sequence[str],
    provenance: dict[str, Any],
) -> None:
    """Writes tables, how to read them, and what is needed to measure them again."""
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.title}", "", *markdown(table.headers, table.rows), ""]
    lines += [f"- {note}" for note in notes]
    lines += ["", *report.origin(provenance)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
