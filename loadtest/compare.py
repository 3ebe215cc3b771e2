"""`python -m loadtest.compare`: this cluster beside etcd, Redis behind webdis, and a bare handler, on one machine.

Owns: the options and the order of things: start, measure at rest, store the keys, run, report, end.
Promises: every process started is ended by pid and every temporary file removed, also after Ctrl-C, SIGTERM or an
error; what is not installed is left out, with the command that installs it.
Leaves to others: everything else (`loadtest.bench`).
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from loadtest.bench import command, report, scaling
from loadtest.bench.command import Several
from loadtest.bench.data import SHARDS, make_data
from loadtest.bench.drive import SETTLE_S, WARM_UP_S, Plan, Run
from loadtest.bench.report import SystemFacts
from loadtest.bench.systems import BareSystem, EtcdSystem, KvstoreSystem, RedisSystem, Shape, System
from loadtest.bench.workloads import WORKLOADS
from loadtest.cluster import processes

SYSTEMS = ("kvstore", "etcd", "redis", "bare")
_MB = 1_000_000
_IDLE_WAIT_S = 1.0
_SEED = 2  # of keys' values; the order of requests has the round's number as its seed


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The command line, checked."""

    rounds: int
    seconds: int
    connections: list[int]
    systems: list[str]
    works: list[str]
    shards: list[int]
    routers: list[int]
    replicas: int
    keys: int
    json_file: Path | None
    folder: Path

    @property
    def shapes(self) -> list[Shape]:
        return [Shape(shards, routers) for shards in self.shards for routers in self.routers]


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Rounds; figures are medians.")
@click.option(
    "--seconds", type=click.IntRange(1), default=5, show_default=True, help="Length of one run (txn-zipf: 10 or more)."
)
@click.option("--connections", type=Several(click.IntRange(1, 10_000)), default="1,32,128", show_default=True)
@click.option("--systems", type=Several(click.Choice(SYSTEMS)), default=",".join(SYSTEMS), show_default=True)
@click.option(
    "--work",
    "works",
    type=Several(click.Choice(list(WORKLOADS))),
    default="get,put",
    show_default=True,
    help=f"Some of {', '.join(WORKLOADS)}.",
)
@click.option(
    "--shards",
    type=Several(click.IntRange(1, 64)),
    default=str(SHARDS),
    show_default=True,
    help="Shards of this cluster; several, as in 1,2,4, are clusters of their own.",
)
@click.option(
    "--routers",
    type=Several(click.IntRange(1, 8)),
    default="1",
    show_default=True,
    help="Routers of each of these; several, as in 1,2.",
)
@click.option(
    "--replicas",
    type=click.IntRange(1, 5),
    default=1,
    show_default=True,
    help="Copies of every key; etcd runs on as many nodes as bear the same losses: 2 copies, 3 nodes.",
)
@click.option("--keys", type=click.IntRange(1), default=20_000, show_default=True, help="Keys of 100-byte values.")
@command.json_file
@command.folder
def main(**options: Any) -> None:
    asked = Options(**options)
    if shutil.which("wrk") is None:
        raise click.ClickException("wrk, the load generator, is not installed: apt-get install wrk")
    click.echo(command.run(_compare(asked)))


async def _compare(options: Options) -> str:
    """Everything from start to end; the report."""
    options.folder.mkdir(parents=True, exist_ok=True)
    data = make_data(options.keys, _SEED, options.shapes[0].shards)
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-", dir=options.folder)))
        systems = _installed(options)
        plan = Plan(systems, [WORKLOADS[name] for name in options.works], data, folder)
        facts = []
        for system in systems:
            stack.push_async_callback(system.stop)
            facts.append(await _start(system, folder / system.name))
        for system in systems:
            command.tell(f"storing {len(data.keys):,} keys in {system.name}")
            await plan.prepare(system)
        runs = await _run_all(plan, options)
        facts = [
            msgspec.structs.replace(fact, loaded_pss_mb=processes.pss_bytes(system.roots) / _MB)
            for fact, system in zip(facts, systems, strict=True)
        ]
    return _report(options, runs, facts)


def _installed(options: Options) -> list[System]:
    """The systems asked for that can be started here; the rest is told, with the mend."""
    known: dict[str, Callable[[], list[System]]] = {
        "kvstore": lambda: _clusters(options.shapes, options.replicas),
        "etcd": lambda: [EtcdSystem(nodes=2 * options.replicas - 1)],
        "redis": lambda: [RedisSystem()],
        "bare": lambda: [BareSystem()],
    }
    found = []
    for system in (system for name in options.systems for system in known[name]()):
        if (mend := system.missing()) is not None:
            command.tell(f"{system.name} is left out: it is not installed. Install it with: {mend}")
        else:
            found.append(system)
    return found


def _clusters(shapes: Sequence[Shape], replicas: int = 1) -> list[System]:
    """One that is alone is called `kvstore`; several are called by their shapes."""
    if len(shapes) == 1:
        return [KvstoreSystem(shapes[0], replicas=replicas)]
    return [KvstoreSystem(shape, shape.name, replicas) for shape in shapes]


async def _start(system: System, folder: Path) -> SystemFacts:
    """Start one system, let it come to rest, and take its memory before the next one starts."""
    command.tell(f"starting {system.name}")
    folder.mkdir()
    version = await asyncio.to_thread(system.version)
    began_s = time.monotonic()
    await system.start(folder)
    ready_s = time.monotonic() - began_s
    await asyncio.sleep(_IDLE_WAIT_S)
    idle_mb = processes.pss_bytes(system.roots) / _MB
    command.tell(f"{system.name} is ready after {ready_s:.2f} s and takes {idle_mb:.0f} MB at rest")
    shards, routers = system.shape or (0, 0)
    return SystemFacts(
        system=system.name,
        version=version,
        shards=shards,
        routers=routers,
        ready_s=ready_s,
        idle_pss_mb=idle_mb,
    )


async def _run_all(plan: Plan, options: Options) -> list[Run]:
    steps = plan.steps(options.rounds, options.connections)
    warm_ups = len({(step.system.name, step.workload.name) for step in steps})
    expected_s = sum(step.seconds(options.seconds) + SETTLE_S for step in steps) + warm_ups * (WARM_UP_S + SETTLE_S)
    command.tell(f"{len(steps)} runs of {options.seconds} s: about {expected_s / 60:.1f} minutes")
    work_width = max(8, *(len(step.workload.name) for step in steps))
    system_width = max(8, *(len(step.system.name) for step in steps))
    began = time.monotonic()
    runs: list[Run] = []
    async for run in plan.run(steps, options.seconds):
        runs.append(run)
        left_s = (time.monotonic() - began) / len(runs) * (len(steps) - len(runs))
        errors = f"  ERRORS {run.errors}" if run.failed else ""
        command.tell(
            f"[{len(runs):>3}/{len(steps)}] round {run.round} {run.work:<{work_width}} {run.connections:>4}"
            f" {run.system:<{system_width}}"
            f" {run.per_s:>9,.0f}/s  p99 {run.p99_ms:>7.2f} ms  {run.cpu_us_per_op:>5.0f} µs CPU/op"
            f"  ({int(left_s) // 60}:{int(left_s) % 60:02d} left){errors}"
        )
    return runs


def _report(options: Options, runs: Sequence[Run], facts: Sequence[SystemFacts]) -> str:
    asked = " ".join(["python -m loadtest.compare", *sys.argv[1:]])
    wrk = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout.split()
    header = report.machine([" ".join(wrk[:2]), *dict.fromkeys(fact.version for fact in facts)], asked)
    header.append(
        f"{options.keys:,} keys, values of 100 bytes, {options.rounds} rounds of {options.seconds} s, medians; "
        "wrk on the same machine, with 1 thread for each router, among which the connections are shared "
        "(cas, cas-hot and lock: 1 thread for each connection)"
    )
    header += report.shapes(facts)
    header += _longer(options)
    header.append(report.quietness(runs))
    cells, growths = report.summarize(runs), scaling.growths(runs, facts)
    document = {"header": header, "systems": facts, "cells": cells, "growths": growths, "runs": runs}
    command.write_json(options.json_file, document)
    return report.render(cells, facts, header, scaling.sections(growths), scaling.targets(growths))


def _longer(options: Options) -> list[str]:
    """A line if some runs took longer than asked."""
    works = [WORKLOADS[name] for name in options.works]
    texts = [f"{work.name}: {work.seconds_min} s" for work in works if work.seconds_min > options.seconds]
    return [f"runs that have to be longer: {', '.join(texts)}"] if texts else []


if __name__ == "__main__":
    main()
