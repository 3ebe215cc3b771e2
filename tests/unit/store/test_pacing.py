"""Where syncs run: on the event loop's thread, or in another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kvstore.environment import Environment
from kvstore.protocol import Put
from tests.unit.store.harness import ask, opened

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
        store.pipeline.pace.observe(10.0)  # the disk stalled once
        assert not store.pipeline.pace.is_inline
        for number in range(200):
            await ask(store, Put(number + 1, f"key-{number}", b""))
            if store.pipeline.pace.is_inline:
                return
    raise AssertionError("200 syncs that took no time were still not taken for quick")
