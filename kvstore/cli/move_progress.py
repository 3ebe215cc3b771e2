"""How far a change of the cluster is, on standard error: a bar on a terminal, else a line every few seconds.

Owns: rate, time left, the form of both.
Promises: standard output is never touched.
Leaves to others: the figures (`change`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from kvstore.cli.frame import complain, human_bytes

_LINE_EVERY_S = 5.0


class Moved(Protocol):
    """What there is to show; partitions that are half moved count half."""

    @property
    def partitions(self) -> float: ...
    @property
    def partitions_total(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def pause_ms(self) -> float: ...


class MoveProgress:
    """Prints a line now and then."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._moving_since_s: float | None = None
        self._printed_s = time.monotonic()

    def show(self, moved: Moved) -> None:
        now_s = time.monotonic()
        if moved.partitions_total and self._moving_since_s is None:
            self._moving_since_s = now_s
        if now_s - self._printed_s >= _LINE_EVERY_S:
            self._printed_s = now_s
            self.say(f"{self.label}: {', '.join(self.parts(moved))}")

    def parts(self, moved: Moved) -> list[str]:
        """`43%`, `12,345 keys at 2,345/s`, `1.2 MB`, `12 s left`, `max pause 31 ms`: short, for a line of 80."""
        if not moved.partitions_total:
            return ["nothing has moved yet"]
        moving_s = time.monotonic() - self._moving_since_s if self._moving_since_s is not None else 0.0
        share = moved.partitions / moved.partitions_total
        rate = f" at {moved.keys / moving_s:,.0f}/s" if moving_s > 0 else ""
        parts = [f"{share:.0%}", f"{moved.keys:,} keys{rate}", human_bytes(moved.bytes)]
        parts += [f"{moving_s / share - moving_s:,.0f} s left"] if 0 < share < 1 else []
        return [*parts, f"max pause {moved.pause_ms:,.0f} ms"]

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
            def show(self, moved: Moved) -> None:
                if moved.partitions_total and self._moving_since_s is None:
                    self._moving_since_s = time.monotonic()
                total = moved.partitions_total or None
                live.update(task, total=total, completed=moved.partitions, facts=", ".join(self.parts(moved)))

            def say(self, line: str) -> None:
                live.console.print(line, markup=False, highlight=False, soft_wrap=True)

        try:
            yield Bar(label)
        except BaseException:  # Ctrl-C, too: a bar that stands still would look as if it still ran
            live.live.transient = True
            raise
