"""What is shown while a chaos run goes on.
One line that is kept up to date, or a line now and then.

Owns: the words of that line.
Leaves to others: what is going on (run).
"""

from __future__ import annotations

import asyncio

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadtest.chaos.run import Run

_LIVE_EVERY_S = 0.25
_PLAIN_EVERY_S = 5.0
_MEAN_OF = 3  # seconds


async def show(run: Run) -> None:
    """On standard error, until cancelled."""
    console = Console(stderr=True)
    if not console.is_terminal:
        while True:
            click.echo(line_of(run), err=True)
            await asyncio.sleep(_PLAIN_EVERY_S)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            live.update(Text(line_of(run), no_wrap=True, overflow="ellipsis"), refresh=True)
            await asyncio.sleep(_LIVE_EVERY_S)


def line_of(run: Run) -> str:
    """Time left, the phase, what is being done, rates, current faults."""
    minutes, seconds = divmod(round(run.left_s), 60)
    phase = len(run.summary.phases)
    points = run.summary.points[-_MEAN_OF:]
    done = sum(sum(point.per_s.values()) for point in points) / max(len(points), 1)
    failed = sum(sum(point.failed_per_s.values()) for point in points) / max(len(points), 1)
    latencies = [point.p99_ms for point in points if point.p99_ms is not None]
    p99 = f", p99 {max(latencies):.0f} ms" if latencies else ""
    faults = ", ".join(run.faults_now.values()) or "none"
    return (
        f"{minutes}:{seconds:02d} left, phase {phase} of {len(run.lengths_s)}, {run.doing};"
        f" {done:.0f} calls/s, {failed:.0f} failed/s{p99}; faults: {faults}"
    )
