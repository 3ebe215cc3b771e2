"""Every named point of the code in turn: a process dies when it comes there, until each has been met.

Owns: which point is next, which processes are armed, provoking what comes by seldom, what has been met.
Promises: a shard or router is armed for one point at a time. Points that were not met in their time come again, last.
Leaves to others: the points (kvstore.failpoints.POINTS), the changes of shards (reshard), when (schedule).

A point that only recovery passes has to be provoked: what asks for the outcome of an attempt has found an intent that
its router left behind, so routers are killed then. While the sweep lasts, shards come, go and change weight.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence

from psutil import Process

from kvstore.failpoints import POINTS
from loadtest.chaos.reshard import Reshard
from loadtest.cluster import processes
from loadtest.cluster.armed import ArmedCluster

_TIME_S = 4.0  # for a point
_LEAST_S = 1.0
_PROVOKE_EVERY_S = 1.0
_CHANGE_EVERY_S = 2.0
_POLL_S = 0.03
_CHANGES = ("add", "weigh", "remove", "weigh")
_LANES = (("router",), ("transactions",), ("source", "destination"), ("controller",))


class Sweep:
    """`all`: the points; `met`: those at which a process has died."""

    def __init__(self, cluster: ArmedCluster, reshard: Reshard) -> None:
        self.all = [point for points in POINTS.values() for point in points]
        self.met: set[str] = set()
        self._cluster = cluster
        self._reshard = reshard
        self._left = [deque(point for role in roles for point in POINTS[role]) for roles in _LANES]
        self._armed: set[str] = set()

    @property
    def left(self) -> list[str]:
        """The points that were not met."""
        return [point for point in self.all if point not in self.met]

    async def run(self, for_s: float, rng: random.Random) -> None:
        """Go on with the points that are left, for that long at most."""
        end_s = time.monotonic() + for_s
        changes = asyncio.create_task(self._change(rng))
        try:
            lanes = [self._lane(number, end_s, random.Random(rng.random())) for number in range(len(_LANES))]
            await asyncio.gather(*lanes)
        finally:
            changes.cancel()
            await asyncio.gather(changes, return_exceptions=True)

    async def _change(self, rng: random.Random) -> None:
        while True:
            for kind in _CHANGES:
                await self._reshard.do(kind, rng)
                await asyncio.sleep(_CHANGE_EVERY_S)

    async def _lane(self, number: int, end_s: float, rng: random.Random) -> None:
        left = self._left[number]
        while left and time.monotonic() < end_s - _LEAST_S:
            point = left.popleft()
            names = self._names(_LANES[number], rng)
            if await self._meet(point, names, min(end_s, time.monotonic() + _TIME_S), rng):
                self.met.add(point)
            else:
                left.append(point)

    def _names(self, roles: Sequence[str], rng: random.Random) -> list[str]:
        """Which processes are armed: for a move half of the shards, whichever will have a part in it."""
        role = "shard" if roles[0] in ("transactions", "source") else roles[0]
        free = [name for name in sorted(self._cluster.members() - self._armed) if name.startswith(f"{role}-")]
        return rng.sample(free, k=max(1, len(free) // 2) if roles[0] == "source" else min(1, len(free)))

    async def _meet(self, point: str, names: Sequence[str], end_s: float, rng: random.Random) -> bool:
        """Whether one of these processes died there."""
        self._armed.update(names)
        armed: dict[str, Process | None] = {name: self._cluster.arm(name, f"{point}=kill") for name in names}
        provoke_s = time.monotonic() + _PROVOKE_EVERY_S / 3
        try:
            while (now_s := time.monotonic()) < end_s:
                for name, process in armed.items():
                    if process is None:  # it is just being started, and takes its point then
                        armed[name] = self._cluster.pids().get(name)
                    elif not processes.is_running(process):
                        return True
                if now_s > provoke_s:
                    provoke_s = now_s + _PROVOKE_EVERY_S
                    self._provoke(point, rng)
                await asyncio.sleep(_POLL_S)
            return False
        finally:
            for name in names:
                self._cluster.arm(name, "")
            self._armed.difference_update(names)

    def _provoke(self, point: str, rng: random.Random) -> None:
        members = sorted(self._cluster.members() - self._armed)
        if point.startswith("ask-"):
            self._kill([name for name in members if name.startswith("router-")], rng)
        elif point == "move-before-void":
            self._kill([name for name in members if name.startswith("shard-")], rng)

    def _kill(self, names: Sequence[str], rng: random.Random) -> None:
        if names:
            self._cluster.kill(rng.choice(names))
