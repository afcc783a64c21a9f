"""Finished runs, each kept as soon as it ends, so that a study resumes."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class OutOfTime(Exception):
    """The minutes that were given do not suffice; the same command goes on."""


class Record:
    """Rows of a file, found again by some of their columns.

    A row that was cut off while it was written is written anew.
    """

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self._path, self._key = path, key
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            whole, newline, rest = text.rpartition("\n")
            self.rows = [json.loads(line) for line in whole.splitlines()]
            if rest:
                path.write_text(whole + newline, encoding="utf-8")
        self._known = {self._of(row): row for row in self.rows}

    def find(self, columns: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row with these values in the columns of the key."""
        return self._known.get(self._of(columns))

    def append(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a row, in which a number that is not finite becomes null."""
        kept = {
            name: None if isinstance(v, float) and not math.isfinite(v) else v
            for name, v in row.items()
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(kept, allow_nan=False) + "\n")
        self.rows.append(kept)
        self._known[self._of(kept)] = kept
        return kept

    def _of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)
