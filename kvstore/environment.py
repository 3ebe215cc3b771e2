"""What a process takes from the machine that is neither disk nor network: time, random numbers, tasks.

Owns: the one place that reads clocks and draws random numbers; for a store also the one that starts tasks and timers.
Those of a process are the running event loop's, which a simulation passes, too.
Promises: `SYSTEM` is the machine itself. A simulator passes another environment with the same methods; code that takes
an environment asks nothing else for these things.
Leaves to others: files (`storage.disk`), SQLite (`storage.engine`), sockets (`transport`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Environment:
    """The machine. Times ending in `_s` are seconds, in `_ms` milliseconds.

    `boot` names this run of the machine, from whose boot on its monotonic clock counts, for all of its processes.
    """

    def __init__(self) -> None:
        self.boot = _boot()

    def monotonic_s(self) -> float:
        """A clock that never jumps."""
        return time.monotonic()

    def boottime_s(self) -> float:
        """A clock that never jumps, and goes on while the machine sleeps (where the system has one)."""
        return time.clock_gettime(_BOOTTIME)

    def now_ms(self) -> int:
        """Unix time in milliseconds."""
        return time.time_ns() // 1_000_000

    def now_us(self) -> int:
        """Unix time in microseconds."""
        return time.time_ns() // 1000

    def random_hex(self, count: int) -> str:
        """`count` random bytes as hexadecimal digits."""
        return secrets.token_hex(count)

    def uniform(self, low: float, high: float) -> float:
        """A random number between both."""
        return random.uniform(low, high)

    def free_bytes(self, folder: Path) -> int:
        """Free space on the file system of that folder. Raises OSError."""
        disk = os.statvfs(folder)
        return disk.f_bavail * disk.f_frsize

    async def sleep(self, seconds: float) -> None:
        """Let others run for that long."""
        await asyncio.sleep(seconds)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run it beside the caller, which keeps the task."""
        return asyncio.get_running_loop().create_task(work)

    def call_later(self, delay_s: float, function: Callable[..., None], *args: Any) -> asyncio.TimerHandle:
        """Call the function after that time."""
        return asyncio.get_running_loop().call_later(delay_s, function, *args)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run a blocking function beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(None, function)

    async def wait_for(self, event: Awaitable[Any], seconds: float) -> bool:
        """Wait for the event, that long at most; whether it came. A caller that is cancelled ends in any case:
        `asyncio.wait_for` of Python 3.11 forgets that if the event comes in the same turn."""
        try:
            async with asyncio.timeout(seconds):
                await event
        except TimeoutError:
            return False
        return True


class StopAsked(asyncio.Event):
    """Set when a process is to stop in order. `at_once`: without handing on first what it serves."""

    def __init__(self) -> None:
        super().__init__()
        self.at_once = asyncio.Event()

    def ask(self) -> None:
        """To stop; asked a second time, at once."""
        if self.is_set():
            self.at_once.set()
        self.set()

    def ask_at_once(self) -> None:
        """To stop: nothing else goes on, or who asks does not want to wait."""
        self.at_once.set()
        self.set()


async def until_one_ends(*works: Coroutine[Any, Any, Any]) -> None:
    """Do all of it side by side, until one ends; then the others are cancelled.

    Raises what that one raised.
    """
    tasks = [asyncio.get_running_loop().create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in done:
            task.result()


async def until_quiet(
    environment: Environment, asked_s: Callable[[], float], quiet_s: float, quiet_s_max: float
) -> None:
    """Until nothing was asked for `quiet_s`, `quiet_s_max` from now at the latest.

    `asked_s`: when something was asked last, on the monotonic clock.
    """
    began_s = now_s = environment.monotonic_s()
    while now_s < (until_s := min(max(began_s, asked_s()) + quiet_s, began_s + quiet_s_max)):
        await environment.sleep(until_s - now_s)
        now_s = environment.monotonic_s()


async def to_its_end(environment: Environment, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, in a task of its own.
    A caller that is cancelled waits for its end before it goes on: a thread cannot be ended, and what the caller
    holds is in use until then."""
    task = environment.spawn(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()  # what went wrong concerns no caller any more
        raise


def utc_text(unix_ms: int) -> str:
    """Unix time as RFC 3339 has it: "2026-11-28T21:14:03.250Z"."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:13]
    except OSError:
        return secrets.token_hex(6)  # of this process, then


SYSTEM = Environment()
