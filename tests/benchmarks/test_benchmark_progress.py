"""Tests of benchmarks/reports/progress.py."""

import io

import pytest
from rich.console import Console

from benchmarks.reports import progress


def lines(monkeypatch: pytest.MonkeyPatch, seconds: float, quiet: bool = False) -> str:
    """What is told outside a terminal of four steps so many seconds apart."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with progress.progress(4, Console(file=file, quiet=quiet)) as bar:
        for step in range(4):
            now[0] += seconds
            bar.describe(f"step {step}")
            bar.advance()
    return file.getvalue()


def test_tells_at_times_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = lines(monkeypatch, 20.0).splitlines()
    assert told[:4] == ["0% step 0", "25% step 1", "50% step 2", "75% step 3"]
    assert not [line for line in lines(monkeypatch, 1.0).splitlines() if "% st" in line]


def test_a_quiet_console_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines(monkeypatch, 20.0, quiet=True) == ""
