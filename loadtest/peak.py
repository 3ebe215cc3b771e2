"""A peak of load: 50 users, 1,000 users, 50 users again, on a cluster of its own.

    python -m loadtest.peak                      prints a table
    python -m loadtest.peak --users 2000 --seconds 120 --json

Owns: the three phases, what is measured in each, the verdict: no failure but 429 and 503, and latency that falls back.
Promises: everything that it started has ended when it returns. Exit code 0, or 1 when that verdict does not hold.
Leaves to others: the load (loadtest/locustfile.py, peak_shape.py), the cluster (loadtest.cluster).

Rates and percentiles are those of Locust's report, at the end of each phase, over its last ten seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import msgspec

from loadtest.bench import command
from loadtest.cluster import processes
from loadtest.cluster.local import REPOSITORY, LocalCluster

_EXPECTED_CODES = ("429 ", "503 ")
_WINDOW_S = 12  # of Locust's rates and percentiles: a phase is longer
_FALLBACK_MAX = 2.0  # times the p99 of the first phase, in the last one
_END_TIMEOUT_S = 120.0


class Phase(msgspec.Struct):
    """What held at its end.
    Memory is the most that was seen in it (sum of PSS), `others` the share of the machine's CPU time that went to
    programs besides cluster and Locust."""

    name: str
    users: int
    seconds: int
    requests_per_s: float = 0.0
    failures_per_s: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    cluster_bytes_max: int = 0
    locust_bytes_max: int = 0
    others: float = 0.0


class Peak(msgspec.Struct):
    """`failures`: how many, by what they say."""

    phases: list[Phase]
    requests: int
    failures: dict[str, int]

    @property
    def complaints(self) -> list[str]:
        """What was promised and did not hold."""
        before, _, after = self.phases
        found = [
            f"{count:,} × {words}" for words, count in self.failures.items() if not words.startswith(_EXPECTED_CODES)
        ]
        if after.p99_ms > _FALLBACK_MAX * before.p99_ms:
            found.append(
                f"p99 was {before.p99_ms:.0f} ms before the peak and is {after.p99_ms:.0f} ms after it, while others "
                f"took {before.others:.0%} and {after.others:.0%} of the CPU"
            )
        return found


@click.command(help="Locust with few users, many, and few again. Exit code 0: no errors but 429 and 503, latency fell.")
@click.option("--users", type=click.IntRange(1), default=1000, show_default=True, help="At the peak.")
@click.option("--few", type=click.IntRange(1), default=50, show_default=True, help="Before and after it.")
@click.option("--seconds", type=click.IntRange(_WINDOW_S), default=60, show_default=True, help="Of the peak.")
@click.option(
    "--around", type=click.IntRange(_WINDOW_S), default=25, show_default=True, help="Seconds before and after."
)
@click.option("--shards", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--processes", "workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Of Locust.")
@click.option("--json", "as_json", is_flag=True, help="A document instead of the table.")
@click.argument("classes", nargs=-1)
def main(
    users: int, few: int, seconds: int, around: int, shards: int, workers: int, as_json: bool, classes: tuple[str, ...]
) -> None:
    climb_s = users // 100 + 1
    phases = [Phase("before", few, around), Phase("peak", users, seconds + climb_s), Phase("after", few, around)]
    peak = command.run(_measure(phases, shards, workers, classes))
    if as_json:
        document = {**msgspec.to_builtins(peak), "complaints": peak.complaints}
        click.echo(json.dumps(document, indent=2))
    else:
        click.echo(render(peak))
    sys.exit(1 if peak.complaints else 0)


async def _measure(phases: list[Phase], shards: int, workers: int, classes: tuple[str, ...]) -> Peak:
    with tempfile.TemporaryDirectory(prefix="kvstore-peak-") as name:
        folder = Path(name)
        async with LocalCluster(folder, shards) as cluster:
            shape = ",".join(str(number) for number in (phases[0].users, phases[1].users, *(p.seconds for p in phases)))
            command = [
                *(sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py,loadtest/bench/peak_shape.py"),
                *("--host", cluster.url, "--headless", "--only-summary", "--peak", shape),
                *("--html", str(folder / "report.html"), *classes),
            ]
            command += ["--processes", str(workers)] if workers > 1 else []
            locust = await processes.start(command, folder / "locust.log", cwd=REPOSITORY)
            try:
                await _watch(locust, cluster, phases)
            finally:
                await processes.end(locust)
        page = folder / "report.html"
        if not page.exists():
            raise RuntimeError(f"Locust ended without a report\n{processes.tail(folder / 'locust.log')}")
        report, _ = json.JSONDecoder().raw_decode(page.read_text(encoding="utf-8").partition("templateArgs = ")[2])
        return summarize(report, phases)


async def _watch(locust: asyncio.subprocess.Process, cluster: LocalCluster, phases: list[Phase]) -> None:
    """Until Locust ends: note memory and CPU, and show how far it is."""
    loop = asyncio.get_running_loop()
    began_s, total_s = loop.time(), sum(phase.seconds for phase in phases)
    meter = _Meter([member.pid for member in cluster.family()[:1]], [locust.pid])
    while locust.returncode is None:
        passed_s = loop.time() - began_s
        if passed_s > total_s + _END_TIMEOUT_S:
            raise TimeoutError(f"Locust has not ended {_END_TIMEOUT_S:g} s after its last phase")
        phase = _phase_at(phases, passed_s)
        meter.note(phase)
        if sys.stderr.isatty():
            click.echo(
                f"\r{phase.name}: {phase.users} users, {max(total_s - passed_s, 0):.0f} s left ", nl=False, err=True
            )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(locust.wait(), 1.0)
    if sys.stderr.isatty():
        click.echo(err=True)


class _Meter:
    """Memory and CPU of the two trees of processes under these roots, and of all others."""

    def __init__(self, cluster: list[int], locust: list[int]) -> None:
        self._cluster = cluster
        self._locust = locust
        self._last = self._now()
        self._sums: dict[str, tuple[float, float]] = {}

    def _now(self) -> tuple[float, float]:
        """CPU seconds that others have used, and those that all cores have had."""
        own = sum(processes.cpu_by_name([*self._cluster, *self._locust]).values())
        return processes.machine_cpu().busy - own, (os.cpu_count() or 1) * time.monotonic()

    def note(self, phase: Phase) -> None:
        phase.cluster_bytes_max = max(phase.cluster_bytes_max, processes.pss_bytes(self._cluster))
        phase.locust_bytes_max = max(phase.locust_bytes_max, processes.pss_bytes(self._locust))
        now = self._now()
        others, whole = self._sums.get(phase.name, (0.0, 0.0))
        others, whole = others + now[0] - self._last[0], whole + now[1] - self._last[1]
        self._sums[phase.name], self._last = (others, whole), now
        phase.others = others / whole if whole else 0.0


def _phase_at(phases: list[Phase], passed_s: float) -> Phase:
    for phase in phases:
        if passed_s < phase.seconds:
            return phase
        passed_s -= phase.seconds
    return phases[-1]


def summarize(report: dict[str, Any], phases: list[Phase]) -> Peak:
    """`report`: what Locust draws, with a point for each second."""
    points = report["history"]
    end_s = 0
    for phase in phases:
        end_s += phase.seconds
        point = points[min(end_s, len(points)) - 1]
        phase.requests_per_s, phase.failures_per_s = point["current_rps"][1], point["current_fail_per_sec"][1]
        phase.p50_ms = point["response_time_percentile_0.5"][1]
        phase.p99_ms = point["response_time_percentile_0.99"][1]
    failures: Counter[str] = Counter()
    for entry in report["failures_statistics"]:
        failures[entry["error"]] += entry["occurrences"]
    total = next(entry for entry in report["requests_statistics"] if entry["name"] == "Aggregated")
    return Peak(phases, total["num_requests"], dict(failures))


def render(peak: Peak) -> str:
    lines = [
        "| | users | requests/s | failures/s | p50 ms | p99 ms | cluster MB | Locust MB | CPU of others % |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for phase in peak.phases:
        numbers = [phase.users, phase.requests_per_s, phase.failures_per_s, phase.p50_ms, phase.p99_ms]
        numbers += [phase.cluster_bytes_max / 1e6, phase.locust_bytes_max / 1e6, phase.others * 100]
        lines.append(f"| {phase.name} | {' | '.join(f'{number:,.0f}' for number in numbers)} |")
    lines.append(f"\n{peak.requests:,} requests; {sum(peak.failures.values()):,} failures")
    lines += [f"  {count:,} × {words}" for words, count in sorted(peak.failures.items())]
    lines += [f"not as promised: {complaint}" for complaint in peak.complaints]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
