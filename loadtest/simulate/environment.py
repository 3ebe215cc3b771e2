"""What a simulated process takes from its machine: clocks that drift and jump, random numbers from the seed, threads.

Owns: `SimulatedEnvironment`.
Promises: draws everything from one `random.Random`. A thread is a function that runs some time after it was asked for,
and whose result arrives some time after it ran, in between anything may happen.
Leaves to others: time itself (`loop`), files (`disk`, `engine`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kvstore.environment import Environment
from loadtest.simulate.disk import SimulatedDisk
from loadtest.simulate.loop import SimulatedLoop

T = TypeVar("T")

BEGIN_MS = 1_800_000_000_000
THREAD_S = (0.00002, 0.0003)
SYNC_S = 0.0001  # of a disk without faults
SLOW_SHARE, SLOW_S = 0.02, 0.3  # now and then a disk takes long


class SimulatedEnvironment(Environment):
    """`rate`: seconds of its monotonic clock per second."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random, disk: SimulatedDisk) -> None:
        self._loop = loop
        self._rng = rng
        self._disk = disk
        self.reboot()
        self.rate = rng.uniform(0.99, 1.01)
        self._jump_ms = 0
        self._latest_ms = 0
        self.sync_s = SYNC_S
        self._in_thread = False
        self._waited_s = 0.0

    def reboot(self) -> None:
        """The machine's clock begins again."""
        self.boot = self.random_hex(6)
        self._begin_s = self._rng.uniform(0, 1e6)

    def monotonic_s(self) -> float:
        waited_s = self._waited_s if self._in_thread else 0.0  # the loop's time goes on when the thread has ended
        return self._begin_s + (self._loop.now_s + waited_s) * self.rate

    def boottime_s(self) -> float:
        return self.monotonic_s()

    def now_ms(self) -> int:
        return BEGIN_MS + self._jump_ms + int(self._loop.now_s * self.rate * 1000)

    def now_us(self) -> int:
        return (BEGIN_MS + self._jump_ms) * 1000 + int(self._loop.now_s * self.rate * 1e6)

    @property
    def latest_ms(self) -> int:
        """The latest that the wall clock has shown."""
        self._latest_ms = max(self._latest_ms, self.now_ms())
        return self._latest_ms

    def jump(self, by_ms: int) -> None:
        """The wall clock is set to another time, which is off by that."""
        self._latest_ms = self.latest_ms
        self._jump_ms = by_ms

    def uniform(self, low: float, high: float) -> float:
        return self._rng.uniform(low, high)

    def random_hex(self, count: int) -> str:
        return self._rng.randbytes(count).hex()

    def free_bytes(self, folder: Path) -> int:
        if self._disk.capacity is None:
            return 1 << 40
        return max(0, self._disk.capacity - self._disk.used_bytes)

    async def sleep(self, seconds: float) -> None:
        await self._loop.sleep(seconds)

    def call_later(self, delay_s: float, function: Callable[..., None], *args: Any) -> Any:
        return self._loop.call_later(delay_s, function, *args)

    async def in_thread(self, function: Callable[[], T]) -> T:
        await self.pause()
        self._in_thread, self._waited_s = True, 0.0
        try:
            result = function()
        finally:
            self._in_thread = False
        await self.pause(self._waited_s)
        return result

    async def pause(self, least_s: float = 0.0) -> None:
        """For as long as another thread takes."""
        more_s = self._rng.uniform(0, SLOW_S) if self._rng.random() < SLOW_SHARE else 0.0
        await self._loop.sleep(least_s + self._rng.uniform(*THREAD_S) + more_s)

    def note_sync(self) -> None:
        """The disk syncs: the loop's thread waits for it; another one is waited for where it was begun."""
        if self._in_thread:
            self._waited_s += self.sync_s
        else:
            self._loop.block(self.sync_s)
