"""How far a change of the cluster is, on standard error.
A bar on a terminal, else a line every few seconds.

Owns: rate, time left, the form of both.
Promises: standard output is never touched.
Leaves to others: the figures (the controller), asking for them (`change`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvstore.cli.frame import complain, human_bytes

_LINE_EVERY_S = 5.0
_OF_COPIES = ("promote", "replicas")

Document = Mapping[str, Any]  # of a change, as in GET /v1/changes/{id}


class MoveProgress:
    """Prints a line now and then."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._moving_since_s: float | None = None
        self._keys_then = 0
        self._progress_then = 0.0
        self._printed_s = time.monotonic()

    def show(self, change: Document) -> None:
        """Take the change's newest document, and print a line if it is time."""
        now_s = time.monotonic()
        self.note_moving(change)
        if now_s - self._printed_s >= _LINE_EVERY_S:
            self._printed_s = now_s
            self.say(f"{self.label}: {', '.join(self.parts(change))}")

    def note_moving(self, change: Document) -> None:
        """Rates count from when there was something to move, and it was seen first."""
        if change["partitions_total"] and self._moving_since_s is None:
            self._moving_since_s, self._keys_then = time.monotonic(), change["keys_done"]
            self._progress_then = change["progress"] or 0.0

    def parts(self, change: Document) -> list[str]:
        """`43%`, `12,345 keys at 2,345/s`, `1.2 MB`, `12 s left`, `max pause 31 ms`: short, for a line of 80."""
        if change["kind"] in _OF_COPIES:
            return [f"under way for {change['seconds']:,.0f} s"]
        if not change["partitions_total"]:
            return ["nothing has moved yet"]
        moving_s = time.monotonic() - self._moving_since_s if self._moving_since_s is not None else 0.0
        progress, keys = change["progress"] or 0.0, change["keys_done"]
        rate = f" at {max(0, keys - self._keys_then) / moving_s:,.0f}/s" if moving_s > 0 else ""
        parts = [f"{progress:.0%}", f"{keys:,} keys{rate}", human_bytes(change["bytes_done"])]
        gained = progress - self._progress_then
        parts += [f"{moving_s / gained * (1 - progress):,.0f} s left"] if gained > 0 and progress < 1 else []
        return [*parts, f"max pause {change['write_pause_ms_max']:,.0f} ms"]

    def say(self, line: str) -> None:
        """A line on standard error that does not tear the bar."""
        complain(line)


@contextmanager
def move_progress(label: str, *, bar: bool | None = None) -> Iterator[MoveProgress]:
    """A bar if standard error is a terminal (or as `bar` says), else lines."""
    if not (sys.stderr.isatty() if bar is None else bar):
        yield MoveProgress(label)
        return
    # Imported here: rich takes longer to import than most commands take to run.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[facts]}"))
    # The bar takes what the words leave of the line.
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, expand=True) as live:
        task = live.add_task(label, total=None, facts="")

        class Bar(MoveProgress):
            def show(self, change: Document) -> None:
                self.note_moving(change)
                total = change["partitions_total"] or None
                done = (total or 0) * (change["progress"] or 0.0)
                live.update(task, total=total, completed=done, facts=", ".join(self.parts(change)))

            def say(self, line: str) -> None:
                live.console.print(line, markup=False, highlight=False, soft_wrap=True)

        try:
            yield Bar(label)
        except BaseException:  # Ctrl-C, too: a bar that stands still would look as if it still ran
            live.live.transient = True
            raise
