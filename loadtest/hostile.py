"""Clients that misbehave, and what another client notices of them, on a cluster of its own.

    python -m loadtest.hostile                             all shapes, prints a table
    python -m loadtest.hostile unread-batches --seconds 30 --json

Owns: the shapes in turn, the client beside them, the router's memory, the verdict: memory stays under the stated bound,
the other client is served, and its p99 stays within `P99_RATIO_MAX` of what it was undisturbed just before. Each shape
is repeated in rounds, of which the medians count: p99s of milliseconds are easily those of another process.
Promises: bounded in connections and time; nothing that it started stays. "Undisturbed" begins once the router is at
rest after the shape before. Exit code 0: as promised, 1: not, 2: it could not be measured.
Leaves to others: the shapes (`hostile_shapes`), starting and ending processes (`cluster`).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import msgspec
import psutil
from yarl import URL

from kvstore.client import Client
from kvstore.config import Limits
from kvstore.errors import KvError
from loadtest.cluster.local import LocalCluster
from loadtest.hostile_shapes import BIG_BYTES, BIG_KEYS, CONTROL, MID_BYTES, MID_KEYS, SHAPES, Hostile, Shape

P99_RATIO_MAX = 3.0
_FAILED_SHARE_MAX = 0.01
_TASKS = 4
_PAUSE_S = 0.01
_SAMPLE_S = 0.02
_SETTLE_S = 2.0
_REST_LOOK_S = 0.5
_REST_CPU_SHARE_MAX = 0.1
_REST_WAIT_S_MAX = 60.0
_CONNECTION_BYTES = 32 * 1024
_FRAMES_PER_CHANNEL = 4


class Figures(msgspec.Struct):
    """What the other client saw during one shape, and what the router took; times in milliseconds."""

    shape: str
    connections: int
    requests: int
    failures: dict[str, int]
    p50_ms: float
    p99_ms: float
    ratio: float
    router_bytes: int
    reopened: int


class Round(msgspec.Struct):
    """A shape, and what the other client saw before it began: how busy the machine is changes.
    Of several rounds: the median of each time, the sum of each count, the most memory."""

    undisturbed: Figures
    shape: Figures


class Result(msgspec.Struct):
    """`bound_bytes`: what the router's memory may be at most."""

    bound_bytes: int
    rounds: list[Round]

    @property
    def complaints(self) -> list[str]:
        """What was not as promised."""
        found = []
        for figures in (each.shape for each in self.rounds):
            if figures.router_bytes > self.bound_bytes:
                found.append(f"{figures.shape}: the router had {figures.router_bytes / 1e6:,.0f} MB")
            if figures.ratio > P99_RATIO_MAX and figures.shape != CONTROL.name:
                found.append(f"{figures.shape}: the other client's p99 was {figures.ratio:.1f} times the undisturbed")
            if sum(figures.failures.values()) > _FAILED_SHARE_MAX * figures.requests:
                found.append(f"{figures.shape}: {sum(figures.failures.values())} of {figures.requests} requests failed")
        return found


@click.command(help="Repeat what hostile clients do, and measure what another client notices.")
@click.option(
    "--seconds", type=click.IntRange(2, 600), default=10, show_default=True, help="Of each shape, in each round."
)
@click.option("--rounds", type=click.IntRange(1, 99), default=3, show_default=True, help="Of which the medians count.")
@click.option("--shards", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="A document instead of the table.")
@click.argument("names", nargs=-1, metavar="[SHAPE]...")
def main(seconds: int, rounds: int, shards: int, as_json: bool, names: tuple[str, ...]) -> None:
    known = {shape.name: shape for shape in (CONTROL, *SHAPES)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(f"there is no shape {unknown[0]}; known are {', '.join(known)}")
    shapes = [known[name] for name in names] if names else [CONTROL, *SHAPES]
    try:
        result = asyncio.run(_measure(shapes, seconds, rounds, shards))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise _NotMeasured("interrupted; everything that was started has been ended") from None
    except (OSError, RuntimeError, TimeoutError, KvError, psutil.Error) as error:
        raise _NotMeasured(str(error) or "it took too long") from error
    if as_json:
        click.echo(json.dumps({**msgspec.to_builtins(result), "complaints": result.complaints}, indent=2))
    else:
        click.echo(render(result))
    sys.exit(1 if result.complaints else 0)


class _NotMeasured(click.ClickException):
    exit_code = 2


async def _measure(shapes: list[Shape], seconds: float, rounds: int, shards: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="kvstore-hostile-") as name:
        async with LocalCluster(Path(name), shards) as cluster, Client(cluster.url, retries=0) as kv:
            await _fill(kv)
            router = cluster.pids()["router-0"].pid
            port = URL(cluster.url).port or 80
            result = Result(stated_bound(resident_bytes(router), shards), [])
            for shape in shapes:
                if sys.stderr.isatty():
                    click.echo(f"{shape.name}: {shape.words} …", err=True)
                result.rounds.append(median([await _round(shape, port, kv, router, seconds) for _ in range(rounds)]))
            if cluster.pids()["router-0"].pid != router:
                raise RuntimeError("the router ended and was started again: its log says why")
            return result


async def _round(shape: Shape, port: int, kv: Client, router: int, seconds: float) -> Round:
    await _until_at_rest(router)
    undisturbed = await _observe(None, port, kv, router, seconds)
    return Round(undisturbed, await _observe(shape, port, kv, router, seconds))


async def _until_at_rest(router: int) -> None:
    """What the shape before has left behind is done. Raises TimeoutError."""
    async with asyncio.timeout(_REST_WAIT_S_MAX):
        used_s, share = _cpu_s(router), 1.0
        while share > _REST_CPU_SHARE_MAX:
            await asyncio.sleep(_REST_LOOK_S)
            before_s, used_s = used_s, _cpu_s(router)
            share = (used_s - before_s) / _REST_LOOK_S


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def median(rounds: list[Round]) -> Round:
    """One round that stands for all of them."""
    undisturbed = _median([each.undisturbed for each in rounds])
    shape = _median([each.shape for each in rounds])
    shape.ratio = shape.p99_ms / undisturbed.p99_ms
    return Round(undisturbed, shape)


def _median(figures: list[Figures]) -> Figures:
    failures: Counter[str] = Counter()
    for each in figures:
        failures.update(each.failures)
    return msgspec.structs.replace(
        figures[0],
        requests=sum(each.requests for each in figures),
        failures=dict(failures),
        p50_ms=statistics.median(each.p50_ms for each in figures),
        p99_ms=statistics.median(each.p99_ms for each in figures),
        router_bytes=max(each.router_bytes for each in figures),
        reopened=sum(each.reopened for each in figures),
    )


def stated_bound(undisturbed_bytes: int, shards: int) -> int:
    """What the limits of cluster.yaml promise for the memory of a router, beside what it takes anyway."""
    limits = Limits()
    slow_clients = limits.answer_bytes_in_flight_max + limits.body_bytes_in_flight_max
    slow_clients += limits.connections_max * _CONNECTION_BYTES
    return undisturbed_bytes + slow_clients + shards * _FRAMES_PER_CHANNEL * limits.frame_bytes_max


async def _fill(kv: Client) -> None:
    for number in range(BIG_KEYS):
        await kv.put(f"big-{number}", os.urandom(BIG_BYTES))
    for number in range(MID_KEYS):
        await kv.put(f"mid-{number}", os.urandom(MID_BYTES))
    await kv.put("mid", os.urandom(MID_BYTES))
    for number in range(10):
        await kv.put(f"small-{number}", b"value")


async def _observe(shape: Shape | None, port: int, kv: Client, router: int, seconds: float) -> Figures:
    observer = _Observer(kv)
    if shape is None:
        peak = await _watch(observer, router, seconds)
        return observer.figures("undisturbed", 0, peak, 0)
    with Hostile(shape, port) as hostile:
        await asyncio.sleep(_SETTLE_S)  # its interpreter starts, its connections open
        peak = await _watch(observer, router, seconds)
        return observer.figures(shape.name, shape.connections, peak, hostile.reopened)


async def _watch(observer: _Observer, router: int, seconds: float) -> int:
    """Let the observer work for so long; the highest memory of the router in that time."""
    tasks = [asyncio.create_task(observer.work(number)) for number in range(_TASKS)]
    peak, end_s = 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        peak = max(peak, resident_bytes(router))
        await asyncio.sleep(_SAMPLE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return peak


def resident_bytes(pid: int) -> int:
    """Resident memory now. Raises psutil.NoSuchProcess."""
    return psutil.Process(pid).memory_info().rss


class _Observer:
    """A client that minds its own business: small and large reads and writes, one after the other."""

    def __init__(self, kv: Client) -> None:
        self._kv = kv
        self._times_s: list[float] = []
        self._failures: Counter[str] = Counter()
        self._large = os.urandom(MID_BYTES)

    async def work(self, number: int) -> None:
        kv, key = self._kv, f"mine-{number}"
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: kv.put(key, b"value"),
            lambda: kv.get(key),
            lambda: kv.put(f"{key}-large", self._large),
            lambda: kv.get(f"{key}-large"),
        ]
        while True:
            for call in calls:
                began_s = time.perf_counter()
                try:
                    await call()
                except KvError as error:
                    self._failures[f"{error.status} {error.code}"] += 1
                self._times_s.append(time.perf_counter() - began_s)
                await asyncio.sleep(_PAUSE_S)

    def figures(self, shape: str, connections: int, router_bytes: int, reopened: int) -> Figures:
        times = sorted(self._times_s)
        if not times:
            raise RuntimeError(f"{shape}: the other client had no answer at all")
        p50, p99 = (times[min(len(times) - 1, int(part * len(times)))] * 1000 for part in (0.5, 0.99))
        return Figures(shape, connections, len(times), dict(self._failures), p50, p99, 1.0, router_bytes, reopened)


def render(result: Result) -> str:
    """A table of Markdown and the complaints."""
    lines = [
        "| shape | connections | cut off | router MB | requests beside | failed | p50 ms | p99 ms | undisturbed | × |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    shapes = [each.shape for each in result.rounds]
    for row, before in zip(shapes, (each.undisturbed for each in result.rounds), strict=True):
        failed, megabytes = sum(row.failures.values()), row.router_bytes / 1e6
        cells = [f"{row.connections:,}", f"{row.reopened:,}", f"{megabytes:,.0f}", f"{row.requests:,}", f"{failed:,}"]
        cells += [f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}", f"{before.p99_ms:.1f}", f"{row.ratio:.1f}"]
        lines.append(f"| {row.shape} | {' | '.join(cells)} |")
    lines.append(f"\nthe router's memory may be {result.bound_bytes / 1e6:,.0f} MB")
    lines += [f"  {row.shape}: {count:,} × {words}" for row in shapes for words, count in row.failures.items()]
    lines += [f"not as promised: {complaint}" for complaint in result.complaints]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
