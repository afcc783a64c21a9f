"""Tells how far a command is: by a bar in a terminal, by lines everywhere else."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Between two lines where there is no terminal
_SECONDS = 15


class Bar:
    """How much is done, and what is going on."""

    def __init__(self, shown: Progress, task: TaskID) -> None:
        self._shown, self._task = shown, task
        self._told = time.monotonic()

    def describe(self, text: str) -> None:
        self._shown.update(self._task, description=text)
        self._tell()

    def advance(self, steps: int = 1) -> None:
        self._shown.advance(self._task, steps)
        self._tell()

    def _tell(self) -> None:
        console = self._shown.console
        now = time.monotonic()
        if console.is_terminal or now - self._told < _SECONDS:
            return
        self._told = now
        task = self._shown.tasks[self._task]
        console.print(f"{task.percentage:.0f}% {task.description}", highlight=False)
        console.file.flush()


@contextmanager
def progress(total: int, console: Console | None = None) -> Iterator[Bar]:
    """Shows how much of `total` is done.

    Args:
      total: how often `advance` will be called.
      console: where; a quiet one tells nothing.

    Yields:
      A :class:`Bar`.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,  # the bar shares the cores with what it shows
    ) as shown:
        yield Bar(shown, shown.add_task("starting", total=total))
