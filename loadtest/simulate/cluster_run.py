"""One run of a whole simulated cluster from one seed, and its verdict.

Owns: the order of a run (form, open, faults and clients, heal, close, compare, judge), its end.
Promises: a run is a function of its seed and settings: `Result.digest` covers all of its events. It never hangs: that
is a verdict, too. What is taken out of a run (`Cut`) leaves the rest of its faults and clients as they were.
Leaves to others: the cluster (`cluster`), faults (`cluster_faults`), clients (`cluster_clients`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kvstore import failpoints
from kvstore.shard import copy_wires
from kvstore.store import refusals
from loadtest.histories.verdict import CLOSING, OPENING, judge
from loadtest.simulate.changes import remove_gone
from loadtest.simulate.cluster import Cluster, Errors
from loadtest.simulate.cluster_clients import CLIENTS, Client, History
from loadtest.simulate.cluster_faults import ONLY_WITH_COPIES, USUAL, Fault, Nemesis, draw
from loadtest.simulate.ending import check_copies, is_replicated
from loadtest.simulate.loop import Hang, SimulatedLoop
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.store_run import Result
from loadtest.workloads.judged import Judged, closing, opening

_FORM_S = 60.0  # simulated, in which a cluster without faults must be there
_END_S = 180.0  # simulated, in which all must come to its end without faults
_LOGGED = ("kvstore",)


class Cut(NamedTuple):
    """What is taken out of a run: faults by their place in the schedule, clients by their number."""

    faults: frozenset[int] = frozenset()
    clients: frozenset[int] = frozenset()


WHOLE = Cut()


def simulate_cluster(
    seed: int,
    seconds: float,
    trace: Callable[[str], None] | None = None,
    nemeses: Iterable[str] = USUAL,
    cut: Cut = WHOLE,
    replicas: int = 1,
) -> Result:
    """Run that seed for so many simulated seconds, and judge it. `replicas`: as in cluster.yaml."""
    began_s = time.process_time()
    gc.collect()  # the run before, which is not held any more
    gc.disable()
    loop = SimulatedLoop()
    loop.log.trace = trace
    simulation = _Simulation(Cluster(loop, seed, replicas), seconds, possible(nemeses, replicas), cut)
    cluster, errors = simulation.cluster, Errors(simulation.cluster)
    log = logging.getLogger("kvstore")
    before = log.propagate, log.level
    log.propagate, log.level = False, logging.ERROR
    log.addHandler(errors)
    failpoints.watch(cluster.kill_points.hit)
    failpoints.active, was_active = simulation.at_points, failpoints.active
    try:
        verdict = simulation.run()
    finally:
        failpoints.watch(None)
        failpoints.active = was_active
        log.removeHandler(errors)
        log.propagate, log.level = before
        digest, last = loop.log.digest, list(loop.log.last)
        loop.end()
        forget()
        gc.enable()
    return Result(
        seed, digest, verdict, loop.events, simulation.history.calls, loop.now_s, time.process_time() - began_s,
        dict(cluster.faults), dict(cluster.kill_points.hits), last if verdict else [],
    )  # fmt: skip


def forget() -> None:
    """What modules of `kvstore` remember for as long as a process runs: the next run is another process."""
    copy_wires._closing.clear()
    refusals._faults_told.clear()


def possible(nemeses: Iterable[str], replicas: int) -> list[str]:
    """Those of them that do anything with so many copies."""
    return [each for each in nemeses if replicas > 1 or each not in ONLY_WITH_COPIES]


def scheduled(seed: int, seconds: float, nemeses: Iterable[str], replicas: int = 1) -> int:
    """How many faults the schedule of that seed has."""
    return len(_schedule(seed, seconds, possible(nemeses, replicas))[1])


def _schedule(seed: int, seconds: float, nemeses: Iterable[str]) -> tuple[bool, list[Fault]]:
    """Whether the failpoints between messages are passed, too; and the faults."""
    rng = random.Random(f"{seed} schedule")
    return rng.random() < 0.5, draw(rng, seed, seconds, list(nemeses))


class _Simulation:
    def __init__(self, cluster: Cluster, seconds: float, nemeses: list[str], cut: Cut) -> None:
        self._loop = cluster.loop
        self._seconds = seconds
        self.cluster = cluster
        self.at_points, schedule = _schedule(cluster.seed, seconds, nemeses)
        kept = [fault for number, fault in enumerate(schedule) if number not in cut.faults]
        self._nemesis = Nemesis(self.cluster, kept)
        self.history = History(self.cluster)
        numbers = [number for number in range(1, CLIENTS + 1) if number not in cut.clients]
        self._clients = [Client(f"c{number}", self.cluster, self.history) for number in numbers]

    def run(self) -> str:
        """The verdict; empty if every promise held."""
        self._loop.after_event = self.cluster.check
        try:
            self._loop.run_until_complete(self._run())
        except Violation as error:
            return f"violation: {error}"
        except Hang as error:
            return f"hang: {error}"
        except Exception as error:
            return f"error: {error}\n{''.join(traceback.format_exception(error))}"
        if self._loop.errors:
            return f"error: {self._loop.errors[0]}"
        return self._judge()

    async def _run(self) -> None:
        loop = self._loop
        running = loop.create_task(self.cluster.run())
        await self._all([self._open()], [running], _FORM_S, "the cluster was not formed, or its bank not opened")
        faults = loop.create_task(self._nemesis.run(loop.time()))
        until_s = loop.time() + self._seconds
        loop.call_later(self._seconds, self._nemesis.heal)
        works = [client.run(until_s) for client in self._clients]
        await self._all(works, [running, faults], self._seconds + _END_S, "clients have no answer without any fault")
        await self._all([self._close()], [running], _END_S, "the last reads have no answer without any fault")
        await self._all([self._end()], [running], _END_S, "not all copies are in sync without any fault")
        running.cancel()

    async def _all(self, works: list[Any], beside: list[asyncio.Task[None]], seconds: float, hang: str) -> None:
        """Wait for all works; raise what fails, of them or of what runs beside. Raises Hang."""
        loop = self._loop
        pending: list[asyncio.Future[Any]] = [loop.create_task(work) for work in works]
        until_s = loop.time() + seconds
        while pending:
            waited: list[asyncio.Future[Any]] = [*pending, *beside, self.cluster.failed]
            left_s = until_s - loop.time()
            if left_s <= 0:
                raise Hang(f"{hang}: {len(pending)} wait after {seconds:g} s")
            if loop.errors:
                raise RuntimeError(loop.errors[0])
            await asyncio.wait(waited, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for each in waited:
                if each.done():
                    each.result()
            pending = [each for each in pending if not each.done()]
            beside = [each for each in beside if not each.done()]

    async def _open(self) -> None:
        opener = Client(OPENING, self.cluster, self.history)
        while await opener.do(opening(opener.place, Judged)):  # noqa: ASYNC110 (it asks again)
            await asyncio.sleep(0.1)

    async def _close(self) -> None:
        closer = Client(CLOSING, self.cluster, self.history)
        while await closer.do(closing(closer.place, Judged)):  # noqa: ASYNC110 (it asks again)
            await asyncio.sleep(0.1)

    async def _end(self) -> None:
        while not is_replicated(self.cluster.view):
            await remove_gone(self.cluster)
            await asyncio.sleep(0.1)
        check_copies(self.cluster.view)
        self._loop.note("all copies are in sync, and alike")

    def _judge(self) -> str:
        verdict = judge(self.history.operations)
        said = [f"{check.name}: {each}" for check in verdict.checks for each in check.violations]
        said += [f"{check.name} undecided: {check.note}" for check in verdict.checks if check.note]
        return "violation: " + "\n".join(said) if said else ""
