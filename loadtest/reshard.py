"""`python -m loadtest.reshard`: a cluster of three shards becomes one of four, beside Redis Cluster's own rebalance.

Owns: the options and the order of things: start, store, load, grow, check, end; report.
Promises: every process started is ended and every temporary file removed, also after Ctrl-C, SIGTERM or an error.
Rounds are interleaved: all systems grow under one load before the next begins.
Leaves to others: everything else (`loadtest.bench`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from loadtest.bench import command, report
from loadtest.bench.command import Several
from loadtest.bench.data import Data, make_data
from loadtest.bench.reshard.figures import IDLE, Run, document, latency, render, summarize
from loadtest.bench.reshard.foreground import Foreground
from loadtest.bench.reshard.systems import Growing, KvstoreGrowing, RedisGrowing

LOADS = {IDLE: 0.0, "get": 0.0, "put": 1.0, "mixed": 0.5}  # the share of writes
_SEED = 5
_WARM_UP_S = 1.0
_SETTLE_S = 2.0
_OVERLOADED_MS = 100.0


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, checked."""

    keys: int
    rounds: int
    systems: list[str]
    loads: list[str]
    rate: int
    connections: int
    seconds: float
    fsync: str
    json_file: Path | None
    folder: Path


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--keys", type=click.IntRange(1), default=150_000, show_default=True, help="Keys of 100-byte values.")
@command.rounds
@click.option("--systems", type=Several(click.Choice(["kvstore", "redis"])), default="kvstore,redis", show_default=True)
@click.option(
    "--load",
    "loads",
    type=Several(click.Choice(list(LOADS))),
    default=f"{IDLE},mixed",
    show_default=True,
    help=f"What goes on in the foreground: some of {', '.join(LOADS)}.",
)
@click.option("--rate", type=click.IntRange(1), default=1000, show_default=True, help="Foreground calls per second.")
@click.option("--connections", type=click.IntRange(1), default=16, show_default=True, help="Of the foreground load.")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="Foreground load before the growth.")
@click.option(
    "--fsync",
    type=click.Choice(["everysec", "always"]),
    default="everysec",
    show_default=True,
    help="Redis's appendfsync; everysec spares it the disk, but a crash loses a second.",
)
@command.json_file
@command.folder
def main(**options: Any) -> None:
    click.echo(command.run(_measure(Options(**options))))


async def _measure(options: Options) -> str:
    """Everything from start to end; the report."""
    options.folder.mkdir(parents=True, exist_ok=True)
    data = make_data(options.keys, _SEED)
    makers = _installed(options)
    runs: list[Run] = []
    for number in range(1, options.rounds + 1):
        for load in options.loads:
            for make in command.in_turn(makers, number):
                runs.append(await _run(make(), number, load, data, options))
                command.tell(_line(runs[-1], options.rounds))
    versions = [make().version() for make in makers]
    header = report.machine(versions, " ".join(["python -m loadtest.reshard", *sys.argv[1:]]))
    header.append(
        f"{options.keys:,} keys of 100 bytes, 3 shards become 4, {options.rounds} rounds, medians; under load "
        f"{options.rate:,} calls per second over {options.connections} connections from the same machine"
    )
    cells = summarize(runs)
    command.write_json(options.json_file, document(header, cells, runs))
    return render(cells, header)


def _installed(options: Options) -> list[Callable[[], Growing]]:
    """Makers of the systems asked for that can be started here; the rest is told, with the mend."""
    makers: list[Callable[[], Growing]] = []
    if "kvstore" in options.systems:
        makers.append(KvstoreGrowing)
    if "redis" in options.systems:
        if (mend := RedisGrowing.missing()) is not None:
            command.tell(f"redis is left out: it is not installed. Install it with: {mend}")
        else:
            makers.append(lambda: RedisGrowing(options.fsync))
    return makers


async def _run(system: Growing, number: int, load: str, data: Data, options: Options) -> Run:
    """One growth in a cluster of its own, from its start to its end."""
    with tempfile.TemporaryDirectory(prefix="reshard-", dir=options.folder) as folder:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(system.stop)
            await system.start(Path(folder) / system.name)
            await system.store(data)
            await asyncio.sleep(_SETTLE_S)
            if load == IDLE:
                run = Run(round=number, system=system.name, load=load, growth=await system.grow())
            else:
                run = await _run_loaded(system, number, load, data, options)
            await system.check(data)
    return run


async def _run_loaded(system: Growing, number: int, load: str, data: Data, options: Options) -> Run:
    callers = await system.callers(options.connections)
    foreground = Foreground(callers, data.keys, options.rate, LOADS[load], seed=number)
    foreground.start()
    try:
        await asyncio.sleep(_WARM_UP_S)
        began_s = time.monotonic()
        await asyncio.sleep(options.seconds)
        ended_s = time.monotonic()
        growth = await system.grow()
        await asyncio.sleep(0.1)  # what was due before its end is answered by then
    finally:
        await foreground.stop()
    for error in list(dict.fromkeys(foreground.errors))[:3]:
        command.tell(f"a call failed: {error}")
    before = latency(foreground.samples, began_s, ended_s)
    if before is not None and before.p50_ms > _OVERLOADED_MS:
        command.tell(
            f"{system.name} cannot keep that pace here, so its latencies say nothing: lower --rate {options.rate}"
        )
    return Run(
        round=number,
        system=system.name,
        load=load,
        growth=growth,
        before=before,
        during=latency(foreground.samples, growth.began_s, growth.ended_s),
    )


def _line(run: Run, rounds: int) -> str:
    growth = run.growth
    line = (
        f"[{run.round}/{rounds}] {run.load:<6} {run.system:<8} {growth.keys_moved:>7,} keys in {growth.seconds:6.2f} s:"
        f" {growth.keys_per_s:>8,.0f} keys/s, moved {growth.moved_ratio:.3f} × the least"
    )
    if growth.write_pause_ms_max is not None:
        line += f", pause {growth.write_pause_ms_p99:.0f} / {growth.write_pause_ms_max:.0f} ms (p99 / longest)"
    if run.before is not None and run.during is not None:
        line += f", p99 {run.before.p99_ms:.1f} → {run.during.p99_ms:.1f} ms, {run.during.failed} calls failed"
    return line


if __name__ == "__main__":
    main()
