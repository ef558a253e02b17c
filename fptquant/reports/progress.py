"""Progress with the time that is left: bars on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_LINE_SECONDS = 30.0
"""Without a terminal, a step that lasts says so this often."""


class Progress:
    """Called as ``progress(done, total, description)``; every description is a bar of its own.

    Where the console is no terminal (a log, a notebook without widgets), it prints one line when a step ends and one
    every half minute while it lasts. Use as a context manager.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description:<34}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
            )
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __call__(self, done: int, total: int, description: str) -> None:
        """Says that ``done`` of ``total`` parts of a step are done; ``done == total`` ends the step."""
        if self._bars is not None:
            self._update_bar(self._bars, done, total, description)
        else:
            self._print_line(done, total, description)

    def _update_bar(self, bars: Bars, done: int, total: int, description: str) -> None:
        if description not in self._tasks:
            self._tasks[description] = bars.add_task(description, total=total)
        bars.update(self._tasks[description], completed=done, total=total)
        if done >= total:
            # A later step of the same name (another method's evaluation) gets a bar of its own.
            bars.stop_task(self._tasks.pop(description))

    def _print_line(self, done: int, total: int, description: str) -> None:
        now = time.monotonic()
        started = self._started.setdefault(description, now)
        if done >= total:
            self.console.print(f"{description}: {total} of {total}, {now - started:.1f} s", highlight=False, soft_wrap=True)
            del self._started[description]
            self._printed.pop(description, None)
        elif now - self._printed.setdefault(description, now) >= _LINE_SECONDS:
            left = (now - started) / max(done, 1) * (total - done)
            self.console.print(f"{description}: {done} of {total}, about {left:.0f} s left", highlight=False, soft_wrap=True)
            self._printed[description] = now
