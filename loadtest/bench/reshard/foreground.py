"""A load that goes on while the cluster grows: so many calls per second, whatever becomes of them.

Owns: when each call is due, over how many connections, and what each took.
Promises: an open loop. A call's time counts from when it was due, not from when a connection was free for it: what a
pause holds back is in the figures.
Leaves to others: the calls (systems.py), percentiles (figures.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Protocol

from loadtest.bench.reshard.figures import Sample


class Caller(Protocol):
    """One connection to a system."""

    async def get(self, key: str) -> bool: ...

    async def put(self, key: str, value: bytes) -> bool: ...

    async def close(self) -> None: ...


class Foreground:
    """`samples` grow from `start` to `stop`. `writes`: the share (0 to 1) of calls that write."""

    def __init__(self, callers: Sequence[Caller], keys: Sequence[str], per_s: float, writes: float, seed: int) -> None:
        self.samples: list[Sample] = []
        self.errors: list[str] = []
        self._callers = callers
        self._keys = keys
        self._per_s = per_s
        self._writes = writes
        self._chance = random.Random(seed)
        self._number = 0
        self._began_s = 0.0
        self._is_over = False  # a client's library may swallow a cancellation
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._began_s = time.monotonic()
        self._tasks = [asyncio.create_task(self._call(caller)) for caller in self._callers]

    async def stop(self) -> None:
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                self.errors.append(repr(result))
        for caller in self._callers:
            await caller.close()

    async def _call(self, caller: Caller) -> None:
        while not self._is_over:
            due_s = self._began_s + self._number / self._per_s
            self._number += 1
            await asyncio.sleep(due_s - time.monotonic())
            ok = await self._one(caller)
            self.samples.append(Sample(due_s, time.monotonic() - due_s, ok))

    async def _one(self, caller: Caller) -> bool:
        key = self._chance.choice(self._keys)
        try:
            if self._chance.random() < self._writes:
                return await caller.put(key, self._chance.randbytes(50).hex().encode())
            return await caller.get(key)
        except Exception as error:
            self.errors.append(repr(error))
            return False
