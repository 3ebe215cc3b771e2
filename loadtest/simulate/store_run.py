"""One run of the simulation from one seed, and its verdict.

Owns: what is simulated (today: one store, its log and its clients), the end of a run, the verdict.
Promises: a run is a function of its seed and settings: `Result.digest` covers all of its events. It never hangs: that
is a verdict, too.
Leaves to others: machines, faults, clients (their modules); many seeds (`__main__`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec

from kvstore import failpoints
from loadtest.histories.verdict import judge
from loadtest.simulate import store_groups, store_registers, store_sets
from loadtest.simulate.loop import Hang, SimulatedLoop
from loadtest.simulate.store_clients import Client, History
from loadtest.simulate.store_faults import Faults
from loadtest.simulate.store_groups import GROUPS
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.store_leases import Brief, lock
from loadtest.simulate.store_machine import StoreMachine
from loadtest.simulate.store_registers import REGISTERS
from loadtest.simulate.store_sets import Sets

CLIENTS = 6
_END_S = 120.0  # simulated, in which all must come to its end without faults


class Result(msgspec.Struct):
    """`verdict` is empty if every promise held. `last`: the last events before the end."""

    seed: int
    digest: str
    verdict: str
    events: int
    calls: int
    simulated_s: float
    cpu_s: float
    faults: dict[str, int]
    points: dict[str, int]
    last: list[str]

    @property
    def ok(self) -> bool:
        return not self.verdict


def simulate(seed: int, seconds: float, trace: Callable[[str], None] | None = None) -> Result:
    """Run that seed for so many simulated seconds, and judge it."""
    began_s = time.process_time()
    loop = SimulatedLoop()
    loop.log.trace = trace
    simulation = _Simulation(loop, seed)
    failpoints.watch(simulation.machine.kill_points.hit)
    logging.disable(logging.CRITICAL)
    try:
        verdict = simulation.run(seconds)
    finally:
        failpoints.watch(None)
        logging.disable(logging.NOTSET)
        digest, last = loop.log.digest, list(loop.log.last)
        loop.end()
    machine = simulation.machine
    return Result(
        seed, digest, verdict, loop.events, simulation.history.calls, loop.time(), time.process_time() - began_s,
        dict(machine.faults), dict(machine.kill_points.hits), last if verdict else [],
    )  # fmt: skip


class _Simulation:
    def __init__(self, loop: SimulatedLoop, seed: int) -> None:
        self._loop = loop
        self._rng = random.Random(seed)
        self.machine = StoreMachine(loop, self._rng)
        self.history = History(self.machine)
        self._faults = Faults(self.machine)
        self._clients = [
            Client(f"c{number}", self.machine, self.history, random.Random(self._rng.random()))
            for number in range(CLIENTS)
        ]

    def run(self, seconds: float) -> str:
        """The verdict; empty if every promise held."""
        self._loop.after_event = self.machine.check
        try:
            self._loop.run_until_complete(self._run(seconds))
        except Violation as error:
            return f"violation: {error}"
        except Hang as error:
            return f"hang: {error}"
        except Exception as error:
            return f"error: {error!r}\n{''.join(traceback.format_exception(error))}"
        if self._loop.errors:
            return f"error: {self._loop.errors[0]}"
        return self._judge()

    async def _run(self, seconds: float) -> None:
        loop, machine = self._loop, self.machine
        restarts = loop.create_task(self._faults.restart())
        machine.start()
        faults = loop.create_task(self._faults.run())
        works: list[asyncio.Future[Any]] = [loop.create_task(_work(client, seconds)) for client in self._clients]
        await self._all(works, [restarts, faults], seconds + _END_S, seconds)
        await self._all([loop.create_task(self._close())], [restarts], loop.time() + _END_S)
        restarts.cancel()

    async def _all(
        self, works: list[asyncio.Future[Any]], beside: list[asyncio.Task[None]], until_s: float, heal_s: float = 0.0
    ) -> None:
        """Wait for all works; raise what fails, of them, of the machine, or of what runs beside. Raises Hang."""
        loop = self._loop
        pending = list(works)
        healed = not heal_s
        while pending:
            wake_s = until_s if healed else heal_s
            waited: list[asyncio.Future[Any]] = [*pending, *beside, self.machine.failed]
            timeout_s = max(0.001, wake_s - loop.time())
            await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for each in waited:
                if each.done():
                    each.result()
            pending = [each for each in pending if not each.done()]
            beside = [each for each in beside if not each.done()]
            if not healed and loop.time() >= heal_s:
                healed = True
                self._faults.heal()
            if loop.time() >= until_s and pending:
                raise Hang(f"{len(pending)} clients have waited for {_END_S:g} s without any fault")

    async def _close(self) -> None:
        """What everything holds at the end."""
        closing = Client("closing", self.machine, self.history, random.Random(0))
        for number in range(REGISTERS):
            await _until(partial(store_registers.read, closing, f"register/{number}"))
        for number in range(GROUPS):
            await _until(partial(store_groups.is_known, closing, f"group/{number}"))
        await _until(partial(store_sets.list_all, closing, 1000))

    def _judge(self) -> str:
        verdict = judge(self.history.operations)
        said = [f"{check.name}: {each}" for check in verdict.checks for each in check.violations]
        said += [f"{check.name} undecided: {check.note}" for check in verdict.checks if check.note]
        return "violation: " + "\n".join(said) if said else ""


async def _work(client: Client, until_s: float) -> None:
    """Do now one thing and now another."""
    sets, brief = Sets(client), Brief(client)
    acts: list[Callable[[], Awaitable[object]]] = [
        *(
            partial(act, client)
            for act in (
                store_registers.read_any, store_registers.read_any, store_registers.write, store_registers.write,
                store_registers.delete, store_registers.swap, store_registers.write_twice,
                store_groups.swap, store_groups.swap, store_groups.read_any, store_groups.prepare, store_groups.decide,
            )
        ),
        sets.add_or_remove, sets.add_or_remove, partial(store_sets.list_any, client), partial(store_sets.count, client),
        partial(lock, client), brief.write_or_read,
    ]  # fmt: skip
    while client.now_s < until_s:
        await client.rng.choice(acts)()
        await asyncio.sleep(client.rng.expovariate(16.0))


async def _until(ask: Callable[[], Awaitable[object]]) -> None:
    """Ask until there is an answer."""
    while True:
        if await ask():
            return
        await asyncio.sleep(0.1)


class Sum(msgspec.Struct):
    """Of many runs."""

    seeds: int = 0
    events: int = 0
    calls: int = 0
    simulated_s: float = 0.0
    cpu_s: float = 0.0
    faults: dict[str, int] = {}
    points: dict[str, int] = {}
    failed: list[Result] = []

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.events += result.events
        self.calls += result.calls
        self.simulated_s += result.simulated_s
        self.cpu_s += result.cpu_s
        self.faults = dict(Counter(self.faults) + Counter(result.faults))
        self.points = dict(Counter(self.points) + Counter(result.points))
        if not result.ok:
            self.failed.append(result)
