"""Where syncs run: on the event loop's thread, or in another one. When rows are applied to the file."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from kvstore.environment import Environment
from kvstore.protocol import Get, Put
from kvstore.storage.engine import Application
from kvstore.store.store import Store
from tests.unit.store.harness import Sink, ask, opened

T = TypeVar("T")


class SlowThreads(Environment):
    """The disk takes no time; the way to a thread and the one back take a second each."""

    def __init__(self) -> None:
        super().__init__()
        self._clock_s = 0.0

    def monotonic_s(self) -> float:
        return self._clock_s

    async def in_thread(self, function: Callable[[], T]) -> T:
        self._clock_s += 1
        result = await super().in_thread(function)
        self._clock_s += 1
        return result


async def test_a_quick_disk_is_synced_on_the_loop_again_however_slow_the_threads_are(tmp_path: Path) -> None:
    async with opened(tmp_path, SlowThreads(), sync_inline_ms_max=2.0) as store:
        store.pipeline.writer.pace.observe(10.0)  # the disk stalled once
        assert not store.pipeline.writer.pace.is_inline
        for number in range(200):
            await ask(store, Put(number + 1, f"key-{number}", b""))
            if store.pipeline.writer.pace.is_inline:
                return
    raise AssertionError("200 syncs that took no time were still not taken for quick")


class Windows(Environment):
    """Each wait of the applier ends at once, after so many rows as the next entry of `coming` says were written."""

    def __init__(self) -> None:
        super().__init__()
        self.coming: list[int] = []
        self.store: Store | None = None
        self._number = 0

    async def wait_for(self, event: Awaitable[Any], seconds: float) -> bool:
        if not self.coming or seconds != 0.05:
            return await super().wait_for(event, seconds)
        asyncio.ensure_future(event).cancel()
        for _ in range(self.coming.pop(0)):
            await self.write_row()
        return False

    async def write_row(self) -> None:
        assert self.store is not None
        self._number += 1
        await ask(self.store, Put(self._number, f"key-{self._number}", b""))


async def test_rows_gather_while_many_come_and_are_applied_at_once_when_few_do(tmp_path: Path) -> None:
    environment, applied = Windows(), asyncio.Queue[int]()
    async with opened(tmp_path, environment, apply_delay_s=0.05) as store:
        environment.store, apply = store, store.tables.engine.apply
        await store.applier.flush()

        async def counted(application: Application) -> None:
            applied.put_nowait(len(application.rows))
            await apply(application)

        store.tables.engine.apply = counted  # type: ignore[method-assign]
        for coming in ([30, 30, 30, 1], [2]):
            environment.coming = [*coming]
            await environment.write_row()
            rows = 0
            async with asyncio.timeout(60):
                while rows < sum(coming):
                    rows = await applied.get()
            assert rows in (sum(coming), sum(coming) + 1), "the first row may have been applied before"


async def test_a_sweep_that_finds_nothing_leaves_rows_to_gather(tmp_path: Path) -> None:
    swept = asyncio.Event()
    async with opened(tmp_path, apply_delay_s=3600.0, expiry_sweep_s=0.01) as store:
        due, sweeps = store.tables.engine.due, 0

        async def counted(*args: Any) -> Any:
            nonlocal sweeps
            sweeps += 1
            if sweeps >= 3:
                swept.set()
            return await due(*args)

        await store.applier.flush()
        await ask(store, Put(1, "key", b""))
        store.tables.engine.due = counted  # type: ignore[method-assign]
        async with asyncio.timeout(60):
            await swept.wait()
        assert store.tables.memtable.unapplied_count == 1


class Clock(Environment):
    """Monotonic time that stands still until it is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s


async def test_clients_that_only_read_are_at_work_as_those_that_write_are(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock) as store:

        async def get() -> None:
            store.get(Get(1, "key"), sink := Sink())
            await sink.answer()

        for call in (lambda: ask(store, Put(1, "key", b"")), get):
            clock.now_s += 10.0
            store.applier.is_busy  # noqa: B018 (a window of the meter begins)
            clock.now_s += 1.0
            assert not store.applier.is_busy
            for _ in range(10):
                await call()
            clock.now_s += 0.2
            assert store.applier.is_busy
