"""Carrying out the faults of a schedule: killing, pausing, cutting links, adding and removing shards.

Owns: on whom a fault falls, doing it and ending it, the record of what was done.
Promises: only processes of the given cluster are touched; `heal` ends everything that still lasts. The choices come
from the draw of the step and from the names of the processes that there are.
Leaves to others: when (schedule), the signals (loadtest.cluster.armed), the bytes (proxy), members of the cluster
(reshard).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Literal

from kvstore.failpoints import POINTS
from loadtest.chaos.cluster import ChaosCluster
from loadtest.chaos.copies import CopyFaults
from loadtest.chaos.reshard import Move, Reshard
from loadtest.chaos.schedule import SWEEP, Step
from loadtest.chaos.summary import Fault
from loadtest.chaos.sweep import Sweep
from loadtest.cluster import processes
from loadtest.cluster.proxy import CLIENTS, Proxy

AT_A_POINT = "at a point"
SLOW_AT_A_POINT = "slow at a point"
POWER_CUT = "slow, then its power is cut"
_POINTS: Mapping[str, Sequence[Sequence[str]]] = {  # those of transactions are passed more often than those of moves
    "router": [POINTS["router"]],
    "shard": [POINTS["transactions"], POINTS["transactions"], POINTS["source"], POINTS["destination"]],
    "controller": [POINTS["controller"]],
}
_CONTROLLER = "controller-0"
_TURNS_MAX = 4
_RESET_EVERY_S = 0.3
_POLL_S = 0.05
_COMES_BACK_S = 4.0  # so long after a fault a process may not be what it was


class Nemeses:
    """Faults of one run. `faults`: what was done, times counted from `began_s` (monotonic); `now`: what lasts."""

    def __init__(
        self, cluster: ChaosCluster, proxy: Proxy | None, reshard: Reshard, copies: CopyFaults, began_s: float
    ) -> None:
        self.faults: list[Fault] = []
        self.now: dict[int, str] = {}
        self._cluster = cluster
        self._proxy = proxy
        self._reshard = reshard
        self._began_s = began_s
        self.copies = copies
        copies.busy = self._busy
        self.sweep = Sweep(cluster, reshard)
        self._doers: dict[str, Callable[[Step, random.Random, Fault], Awaitable[None]]] = {
            "kill": self._kill,
            "pause": self._pause,
            "partition": self._partition,
            "disk": self._disk,
            "maps": self._old_maps,
            SWEEP: self._sweep_all,
            "reshard": self._change,
            "die": self._kill,
            "stop": self._pause,
            "cut": self._partition,
            "lose-disk": copies.lose_disk,
            "rot": copies.rot,
            "promote": copies.promote,
        }

    async def run(self, steps: Sequence[Step], phase_s: float) -> None:
        """All of them, each at its time, counted from `phase_s` (monotonic); returns when the last one is over."""
        async with asyncio.TaskGroup() as group:
            for step in steps:
                await asyncio.sleep(max(0.0, phase_s + step.at_s - time.monotonic()))
                group.create_task(self.do(step))

    async def do(self, step: Step) -> None:
        """One of them; returns when it is over."""
        began_s = time.monotonic()
        fault = Fault(began_s - self._began_s, step.for_s, step.nemesis, step.kind, [])
        self.faults.append(fault)
        key = id(fault)
        self.now[key] = f"{step.nemesis} {step.kind}"
        try:
            await self._doers[step.nemesis](step, random.Random(step.draw), fault)
        finally:
            del self.now[key]
            if step.for_s or step.nemesis == "reshard":
                fault.for_s = time.monotonic() - began_s

    def _busy(self) -> set[str]:
        """The processes that faults touch now, or have just touched."""
        recent_s = time.monotonic() - self._began_s - _COMES_BACK_S
        found = [each for each in self.faults if id(each) in self.now or each.at_s + each.for_s > recent_s]
        return {name for each in found for target in each.targets for name in target.split(" → ")}

    def heal(self) -> None:
        """End all that still lasts."""
        self._cluster.holds.end_all()
        for name in self._cluster.members():
            self._cluster.wake(name)
            self._cluster.speed_up(name)
        if self._proxy is not None:
            self._proxy.heal_all()

    # --- processes ---------------------------------------------------------------------------------------------------

    async def _kill(self, step: Step, rng: random.Random, fault: Fault) -> None:
        if step.kind == AT_A_POINT:
            await self._at_a_point("kill", step.for_s, rng, fault)
            return
        names = victims(step.kind, self.copies.free(), rng)
        fault.targets = names
        if not step.for_s:
            killed = self._cluster.kill_all(names)
            if len(killed) < len(names):
                fault.note = f"{len(names) - len(killed)} of them did not run"
            return
        for name in names:
            self._cluster.hold(name)
        try:
            await asyncio.sleep(step.for_s)
        finally:
            for name in names:
                self._cluster.let_come_back(name)

    async def _pause(self, step: Step, rng: random.Random, fault: Fault) -> None:
        if step.kind == AT_A_POINT:
            await self._at_a_point("stop", step.for_s, rng, fault)
            return
        if step.kind == SLOW_AT_A_POINT:
            await self._slow_at_a_point(step.for_s, rng, fault)
            return
        end_s = time.monotonic() + step.for_s
        fault.targets = victims(step.kind, self.copies.free(), rng)
        paused: list[str] = []
        try:
            while len(paused) < len(fault.targets) and time.monotonic() < end_s:
                for name in [name for name in fault.targets if name not in paused]:
                    with contextlib.suppress(KeyError):  # one that is just being started is waited for
                        self._cluster.pause(name)
                        paused.append(name)
                await asyncio.sleep(_POLL_S)
            await asyncio.sleep(max(0.0, end_s - time.monotonic()))
        finally:
            for name in paused:
                self._cluster.wake(name)
        if missing := [name for name in fault.targets if name not in paused]:
            fault.note = f"{', '.join(missing)} did not run"

    async def _at_a_point(
        self, action: Literal["kill", "stop"], for_s: float, rng: random.Random, fault: Fault
    ) -> None:
        """A process dies or stands still at a named point of its code.
        If it comes there in this time."""
        end_s = time.monotonic() + for_s
        name, point = some_point(self.copies.free(), rng)
        fault.targets = [name]
        fault.note = f"did not come to {point}"
        armed = self._cluster.arm(name, f"{point}={action}@{rng.randint(1, _TURNS_MAX)}")
        try:
            while time.monotonic() < end_s:
                if armed is None:  # it is just being started, and takes its point then
                    armed = self._cluster.pids().get(name)
                elif not processes.is_running(armed) or self._cluster.stands_still(armed):
                    fault.note = f"at {point}"
                    break
                await asyncio.sleep(_POLL_S)
            if action == "stop":
                await asyncio.sleep(max(0.0, end_s - time.monotonic()))
        finally:
            self._cluster.arm(name, "")
            self._cluster.wake(name)

    async def _slow_at_a_point(self, for_s: float, rng: random.Random, fault: Fault) -> None:
        """A process sleeps whenever it comes to a named point; at the end it is killed, to be quick again."""
        name, point = some_point(self.copies.free(), rng)
        pause_ms = rng.choice((200, 800, 1600))
        fault.targets, fault.note = [name], f"{pause_ms} ms at {point}"
        self._cluster.arm(name, f"{point}=pause:{pause_ms}")
        try:
            await asyncio.sleep(for_s)
        finally:
            self._cluster.arm(name, "")
            self._cluster.kill(name)

    async def _sweep_all(self, step: Step, rng: random.Random, fault: Fault) -> None:
        await self.sweep.run(step.for_s, rng)
        fault.note = f"{len(self.sweep.met)} of {len(self.sweep.all)} points were met so far"

    async def _disk(self, step: Step, rng: random.Random, fault: Fault) -> None:
        """Syncs and reads of shards take long; at the end of some that, what was not synced is lost."""
        shards = _shards(self.copies.free())
        fault.targets = shards if step.kind == "all slow" else [rng.choice(shards)]
        for name in fault.targets:
            self._cluster.slow_down(name)
        try:
            await asyncio.sleep(step.for_s)
            if step.kind == POWER_CUT:
                self._cluster.kill_all(fault.targets)
        finally:
            for name in fault.targets:
                self._cluster.speed_up(name)

    async def _change(self, step: Step, rng: random.Random, fault: Fault) -> None:
        fault.targets, fault.note = await self._reshard.do(step.kind, rng)

    async def _old_maps(self, step: Step, rng: random.Random, fault: Fault) -> None:
        """While partitions move their source and a router do not hear that they are another's, and all others do."""
        assert self._proxy is not None
        fault.targets, fault.note = await self._reshard.do("weigh", rng)
        if (move := await self._reshard.a_move()) is not None:
            await self._keep_from_maps(self._proxy, move, step.for_s, rng, fault)

    async def _keep_from_maps(self, proxy: Proxy, move: Move, for_s: float, rng: random.Random, fault: Fault) -> None:
        routers = [name for name in self._cluster.members() if name.startswith("router-")]
        deaf = [name for name in (f"shard-{move.source}", rng.choice(sorted(routers))) if name in self.copies.free()]
        ways = [way for name in deaf for way in ((name, _CONTROLLER), (_CONTROLLER, name))]
        fault.note += f"; {' and '.join(deaf)} hear of no newer map"
        for source, destination in ways:
            proxy.cut(source, destination)
        try:
            await asyncio.sleep(for_s)
        finally:
            for source, destination in ways:
                proxy.heal(source, destination)

    # --- links -------------------------------------------------------------------------------------------------------

    async def _partition(self, step: Step, rng: random.Random, fault: Fault) -> None:
        assert self._proxy is not None
        if step.kind == "duplicate":
            await self._duplicate(self._proxy, step.for_s, rng, fault)
            return
        ways = self._ways(step.kind, rng)
        fault.targets = [f"{source} → {destination}" for source, destination in ways]
        if step.kind == "reset":
            await self._reset(self._proxy, step.for_s, ways, fault)
            return
        fault.note = self._break(self._proxy, step.kind, ways, rng)
        try:
            await asyncio.sleep(step.for_s)
        finally:
            for source, destination in ways:
                self._proxy.heal(source, destination)

    def _ways(self, kind: str, rng: random.Random) -> list[tuple[str, str]]:
        """Directions of links: source and destination."""
        members = sorted(self.copies.free())
        if kind.startswith("nodes"):
            nodes = _shards(members)
            pairs = rng.sample([(one, other) for one in nodes for other in nodes if one < other], k=rng.choice((1, 2)))
        elif kind in ("isolate", "node alone"):
            lonely = rng.choice(members if kind == "isolate" else _shards(members))
            pairs = [(lonely, other) for other in members if other != lonely]
        else:
            pairs = some_pairs(members, rng)
        if kind in ("cut one way", "stall", "nodes one way"):
            return [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
        return [way for pair in pairs for way in (pair, pair[::-1])]

    @staticmethod
    def _break(proxy: Proxy, kind: str, ways: Sequence[tuple[str, str]], rng: random.Random) -> str:
        """The note on it."""
        if kind == "delay":
            delay_ms = rng.choice((20, 100, 400))
            for source, destination in ways:
                proxy.delay(source, destination, delay_ms, delay_ms / 2)
            return f"{delay_ms} to {delay_ms * 3 // 2} ms"
        if kind == "drop":
            probability = rng.choice((0.01, 0.05, 0.2))
            for source, destination in ways:
                proxy.drop(source, destination, probability)
            return f"with probability {probability:g}"
        for source, destination in ways:
            (proxy.stall if kind == "stall" else proxy.cut)(source, destination)
        return ""

    @staticmethod
    async def _duplicate(proxy: Proxy, for_s: float, rng: random.Random, fault: Fault) -> None:
        probability = rng.choice((0.2, 0.5, 1.0))
        fault.targets, fault.note = [f"{CLIENTS} → routers"], f"with probability {probability:g}"
        proxy.duplicate(probability)
        try:
            await asyncio.sleep(for_s)
        finally:
            proxy.duplicate(0.0)

    @staticmethod
    async def _reset(proxy: Proxy, for_s: float, ways: Sequence[tuple[str, str]], fault: Fault) -> None:
        deadline_s, count = time.monotonic() + for_s, 0
        while time.monotonic() < deadline_s:
            count += sum(proxy.reset(source, destination) for source, destination in ways)
            await asyncio.sleep(_RESET_EVERY_S)
        fault.note = f"{count} connections"


def victims(kind: str, members: set[str], rng: random.Random) -> list[str]:
    """On which processes a kill or a pause falls."""
    running = sorted(members)
    of_role = [name for name in running if name.startswith(f"{kind}-")]
    if kind == "all":
        return running
    if kind == "several":
        return rng.sample(running, k=rng.randint(2, max(2, len(running) - 1)))
    if kind == "for some time":
        return rng.sample(running, k=rng.choice((1, 1, 2)))
    if kind in ("one node", "two nodes"):
        return rng.sample(_shards(members), k=1 if kind == "one node" else 2)
    if kind == "node and controller":
        return [rng.choice(_shards(members)), _CONTROLLER]
    return [rng.choice(of_role)]


def some_point(members: set[str], rng: random.Random) -> tuple[str, str]:
    """A process, and a point of the code that such a process comes by."""
    name = rng.choice(victims("router", members, rng) + victims("controller", members, rng) + _shards(members))
    return name, rng.choice(rng.choice(_POINTS[name.partition("-")[0]]))


def _shards(members: Iterable[str]) -> list[str]:
    return sorted(name for name in members if name.startswith("shard-"))


def some_pairs(members: Sequence[str], rng: random.Random) -> list[tuple[str, str]]:
    """Links of one kind, one to three of them: of clients, of routers to shards, among shards, of the controller."""
    routers = [name for name in members if name.startswith("router-")]
    shards = _shards(members)
    controllers = [name for name in members if name.startswith("controller-")]
    all_pairs = rng.choice(
        [
            [(CLIENTS, router) for router in routers],
            [(router, shard) for router in routers for shard in shards],
            [(router, shard) for router in routers for shard in shards],
            [(one, other) for one in shards for other in shards if one < other],
            [(follower, controller) for follower in routers + shards for controller in controllers],
        ]
    )
    return rng.sample(all_pairs, k=min(len(all_pairs), rng.randint(1, 3)))
