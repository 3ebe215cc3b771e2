"""How far a long command is, on standard error.
A bar on a terminal, else a plain line every few seconds.

Owns: the rate, the time left, the form of both.
Promises: costs a fraction of a millisecond per update; standard output is never touched.
Leaves to others: what a step is. A bar is drawn over `total` steps (bytes or records); records are counted beside it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.cli.frame import complain

_LINE_EVERY_S = 5.0


class Progress:
    """Counts, and prints a line now and then. `total` None: how much there is, is not known."""

    def __init__(self, label: str, total: int | None) -> None:
        self.label = label
        self.total = total
        self.steps = 0
        self.records = 0
        self._steps_before = 0
        self._began_s = time.monotonic()
        self._printed_s = self._began_s

    def resume_at(self, steps: int) -> None:
        """So many steps were done by an earlier run: they count for the bar, not for the rate."""
        self.steps = self._steps_before = steps

    def add(self, steps: int, records: int) -> None:
        """So many steps and records more are done."""
        self.steps += steps
        self.records += records
        self.refresh()

    @property
    def rate(self) -> float:
        """Records per second of this run."""
        return self.records / max(time.monotonic() - self._began_s, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Seconds left at this run's pace, or None if that cannot be told."""
        done = self.steps - self._steps_before
        if self.total is None or done <= 0:
            return None
        return max(self.total - self.steps, 0) * (time.monotonic() - self._began_s) / done

    def refresh(self) -> None:
        """Print a line if it is time."""
        now_s = time.monotonic()
        if now_s - self._printed_s >= _LINE_EVERY_S:
            self._printed_s = now_s
            self.say(self.line())

    def line(self) -> str:
        """`import: 12,345 records, 43 %, 2,345 records/s, 12 s left`."""
        share = f", {self.steps / self.total:.0%}" if self.total else ""
        left = f", {self.left_s:.0f} s left" if self.left_s is not None else ""
        return f"{self.label}: {self.records:,} records{share}, {self.rate:,.0f} records/s{left}"

    def say(self, line: str) -> None:
        """A line on standard error that does not tear the bar."""
        complain(line)


@contextmanager
def progress(label: str, total: int | None, *, bar: bool | None = None) -> Iterator[Progress]:
    """A bar if standard error is a terminal (or as `bar` says), else lines."""
    if not (sys.stderr.isatty() if bar is None else bar):
        yield Progress(label, total)
        return
    # Imported here: rich takes longer to import than a `get` takes to run.
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[records]:,} records"),
        TextColumn("{task.fields[rate]:,.0f}/s"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), redirect_stdout=False) as live:
        task = live.add_task(label, total=total, records=0, rate=0.0)

        class Bar(Progress):
            def refresh(self) -> None:
                live.update(task, completed=self.steps, records=self.records, rate=self.rate)

            def resume_at(self, steps: int) -> None:
                super().resume_at(steps)
                self.refresh()

            def say(self, line: str) -> None:
                live.console.print(line, markup=False, highlight=False, soft_wrap=True)

        try:
            yield Bar(label, total)
        except BaseException:  # Ctrl-C, too: a bar that stands still would look as if it still ran
            live.live.transient = True
            raise
