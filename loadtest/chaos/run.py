"""A chaos run: a cluster, its clients, phases of faults, the judgement of each.

Owns: the order of phases, their histories and judgements, the summary.
Promises: all processes end with the run, however it ends, and every fault is taken back. The first phase in which
anything is wrong, or that does not come to its end, ends the run; also then all that was done is judged. What was
settled in a phase is looked at once more at the end.
Leaves to others: what a phase is (phase), faults (schedule, nemeses, reshard), clients (clients), processes (cluster),
judging (judge), pages (page), what is shown while it runs (progress).

A phase has new keys, and its history can be judged on its own: while the next one is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import aiohttp

from loadtest.chaos.clients import Clients, Stored
from loadtest.chaos.cluster import ChaosCluster
from loadtest.chaos.copies import CopyFaults
from loadtest.chaos.doubts import Doubts
from loadtest.chaos.judge import JudgeError, judge
from loadtest.chaos.meter import Meter
from loadtest.chaos.nemeses import Nemeses
from loadtest.chaos.phase import Stage
from loadtest.chaos.reshard import Reshard
from loadtest.chaos.schedule import HASTY_PHASE_S, PHASE_S_MAX, SWEEP, Nemesis, phases, plan
from loadtest.chaos.summary import Phase, RunSummary
from loadtest.chaos.sweep import Sweep
from loadtest.cluster.proxy import Proxy
from loadtest.drivers.aio import Wire, session
from loadtest.histories.history import AnyOperation, write

CLIENT_TIMEOUT_S = 5.0  # longer than a router takes at most
_LATE_JUDGEMENT_S = 20.0  # for a run that was interrupted
_EARLY_END_S = 60.0  # in which a phase that was interrupted has to be over
_WORKLOADS = {
    "Lists": "append",
    "Transfer": "bank",
    "Balances": "bank",
    "Markers": "bank",
    "Register": "register",
    "Count": "counter",
    "Element": "set",
    "Members": "set",
    "Lease": "critical-section",
    "Guarded": "critical-section",
}


class Settings(NamedTuple):
    """`seconds` of load. `out`: a folder of the run's own. `bug`: one that is planted in all processes, or none."""

    seconds: float
    seed: int
    nemeses: Sequence[Nemesis]
    routers: int
    shards: int
    out: Path
    bug: str = ""
    replicas: int = 1

    @property
    def command(self) -> str:
        """To run it again."""
        more = (f" --replicas {self.replicas}" if self.replicas > 1 else "") + (
            f" --bug {self.bug}" if self.bug else ""
        )
        return (
            f"python -m loadtest.chaos --minutes {self.seconds / 60:g} --seed {self.seed}"
            f" --nemesis {','.join(self.nemeses)} --routers {self.routers} --shards {self.shards}{more}"
        )


class Run:
    """One run. `summary` is up to date at any time; so is what a line of progress needs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.lengths_s = phases(settings.seconds, HASTY_PHASE_S if settings.bug else PHASE_S_MAX)
        self.doing = "starting the cluster"
        self.meter = Meter()
        self.faults_now: dict[int, str] = {}
        self.was_interrupted = False
        self.summary = RunSummary(
            command=settings.command,
            seed=settings.seed,
            began_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=0.0,
            ok=False,
            nemeses=list(settings.nemeses),
            shards=settings.shards,
            routers=settings.routers,
            replicas=settings.replicas,
            machine=machine_facts(),
            bug=settings.bug,
        )
        self._began_s = time.monotonic()
        self._load_ends_s = self._began_s + sum(self.lengths_s)
        self._judging: list[asyncio.Task[None]] = []
        self._settled: dict[int, Stored] = {}
        self._hurry = asyncio.Event()
        self._sweep: Sweep | None = None

    @property
    def left_s(self) -> float:
        """Of load, about."""
        return max(0.0, self._load_ends_s - time.monotonic())

    @property
    def is_wrong(self) -> bool:
        """Something was found already, or did not come to its end."""
        return any(phase.complaints or phase.unfinished or phase.violations for phase in self.summary.phases)

    async def run(self) -> RunSummary:
        """All of it.
        Cancelling it once ends it early: load and faults end at once, and the phase so far is judged.

        Raises RuntimeError if the cluster does not start.
        """
        try:
            await self._play()
        except asyncio.CancelledError:
            self.was_interrupted = True
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
        self.doing = "judging"
        await self._wait_for_judgements(_LATE_JUDGEMENT_S if self.was_interrupted or self.is_wrong else None)
        self._sum_up()
        return self.summary

    async def _play(self) -> None:
        async with self._staged() as (stage, workers):
            for number, seconds in enumerate(self.lengths_s, start=1):
                self._load_ends_s = time.monotonic() + sum(self.lengths_s[number - 1 :])
                await self._watch(self._play_one(stage, number, seconds), workers)
                if self.is_wrong:
                    return
            self.doing = "looking again at what was settled"
            for number, sentences in (await stage.look_again(self._settled)).items():
                self.summary.phases[number - 1].complaints += sentences

    async def _play_one(self, stage: Stage, number: int, seconds: float) -> None:
        phase = Phase(number, time.monotonic() - self._began_s, seconds, {}, [], [])
        self.summary.phases.append(phase)
        closing = await stage.play(phase, plan(self.settings.seed, number, seconds, self.settings.nemeses))
        if closing is not None:
            self._settled[number] = closing.stored
            self._count(phase, closing.operations)
            path = self.settings.out / f"phase-{number}.ndjson"
            write(path, closing.operations)
            self._judging.append(asyncio.create_task(self._judge(phase, path)))

    async def _watch(self, playing: Coroutine[None, None, None], workers: Sequence[asyncio.Task[None]]) -> None:
        """To the end of the phase.
        Or until the judgement on an earlier one makes it pointless, or a client fails."""
        task = asyncio.create_task(playing)
        self._hurry.clear()
        try:
            while not (task.done() or self.is_wrong):
                judging = [each for each in self._judging if not each.done()]
                await asyncio.wait([task, *judging, *workers], return_when=asyncio.FIRST_COMPLETED)
                self._complain_of(workers)
        except asyncio.CancelledError:
            # What has been done is there to be read and judged, whatever the rest would have been.
            self._hurry.set()
            await asyncio.wait([task], timeout=_EARLY_END_S)
            raise
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled():
            task.result()

    def _complain_of(self, workers: Sequence[asyncio.Task[None]]) -> None:
        """A client that was answered something it cannot make sense of has ended with an error."""
        for worker in workers:
            if worker.done() and (error := worker.exception()) is not None:
                told = "".join(traceback.format_exception(error))
                self.summary.phases[-1].complaints.append(f"a client cannot go on:\n{told}")

    @asynccontextmanager
    async def _staged(self) -> AsyncIterator[tuple[Stage, list[asyncio.Task[None]]]]:
        """The cluster and the clients, who rest."""
        settings = self.settings
        proxy = Proxy(settings.seed) if {"partition", "maps", "cut"} & set(settings.nemeses) else None
        folder, bug, replicas = settings.out / "cluster", settings.bug, settings.replicas
        cluster = ChaosCluster(folder, settings.shards, settings.routers, proxy, bug, replicas)
        async with contextlib.AsyncExitStack() as stack:
            if proxy is not None:
                await proxy.start()
                stack.push_async_callback(proxy.stop)
            await stack.enter_async_context(cluster)
            http = await stack.enter_async_context(session(CLIENT_TIMEOUT_S))
            stage = self._stage(cluster, proxy, http)
            jobs = [*(client.run() for client in stage.clients.all), self.meter.run()]
            workers = [asyncio.create_task(job) for job in jobs]
            try:
                yield stage, workers
            finally:
                stage.nemeses.heal()
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                self.doing = "stopping all processes"

    def _stage(self, cluster: ChaosCluster, proxy: Proxy | None, http: aiohttp.ClientSession) -> Stage:
        self._began_s = self.meter.began_s = time.monotonic()
        seed = self.settings.seed
        was_duplicated = proxy.was_duplicated if proxy is not None else _never
        clients = Clients(http, cluster.client_urls, cluster.urls, seed, self.meter, was_duplicated)
        reshard = Reshard(Wire(http, cluster.urls, seed), self.settings.shards)
        copies = CopyFaults(cluster, proxy, Wire(http, cluster.urls, seed))
        nemeses = Nemeses(cluster, proxy, reshard, copies, self._began_s)
        self._sweep = nemeses.sweep
        self.faults_now, self.summary.faults, self.summary.points = nemeses.now, nemeses.faults, self.meter.points
        return Stage(cluster, clients, nemeses, reshard, Doubts(http, cluster.urls), self._tell, self._hurry)

    def _tell(self, doing: str) -> None:
        self.doing = doing

    # --- judging -----------------------------------------------------------------------------------------------------

    async def _judge(self, phase: Phase, path: Path) -> None:
        try:
            phase.checks = (await judge(path)).checks
        except JudgeError as error:
            phase.complaints.append(str(error))

    async def _wait_for_judgements(self, timeout_s: float | None) -> None:
        left = [task for task in self._judging if not task.done()]
        if left:
            await asyncio.wait(left, timeout=timeout_s)
        for task in left:
            task.cancel()
        await asyncio.gather(*self._judging, return_exceptions=True)

    def _count(self, phase: Phase, operations: Sequence[AnyOperation]) -> None:
        phase.operations = dict(Counter(_WORKLOADS[type(operation).__name__] for operation in operations))
        outcomes = Counter(operation.outcome for operation in operations)
        totals = self.summary.totals
        totals.done += outcomes["done"]
        totals.refused += outcomes["refused"]
        totals.unknown += outcomes["unknown"]

    def _sum_up(self) -> None:
        summary = self.summary
        summary.seconds = time.monotonic() - self._began_s
        if self._sweep is not None and SWEEP in self.settings.nemeses:
            summary.met, summary.unmet = sorted(self._sweep.met), self._sweep.left
        # one that was given up has nothing to show
        summary.phases = [phase for phase in summary.phases if phase.checks or phase.complaints or phase.unfinished]
        summary.ok = bool(summary.phases) and all(phase.ok for phase in summary.phases)


def machine_facts() -> list[str]:
    """What the figures of a run depend on, a sentence each."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        f"{os.cpu_count()} processors, {memory_bytes / 2**30:.1f} GiB of memory",
        f"{platform.system()} {platform.release()} on {platform.machine()}",
        f"Python {platform.python_version()}",
    ]


def _never(once: str) -> bool:
    return False
