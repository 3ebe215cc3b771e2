"""The machine as the rest of the program sees it."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvstore.environment import SYSTEM


def test_the_clock_of_leases_is_the_one_that_goes_on_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = {time.CLOCK_BOOTTIME: 2000.0, time.CLOCK_MONOTONIC: 1000.0}
    monkeypatch.setattr(time, "clock_gettime", readings.__getitem__)
    assert SYSTEM.boottime_s() == 2000.0


@pytest.mark.parametrize("turns", range(5))
async def test_who_is_cancelled_while_its_event_comes_ends(turns: int) -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(SYSTEM.wait_for(event.wait(), 60))
    for _ in range(5):
        await asyncio.sleep(0)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    was_done = waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled() != was_done


async def test_an_event_that_does_not_come_in_time_is_told_from_one_that_does() -> None:
    event = asyncio.Event()
    assert not await SYSTEM.wait_for(event.wait(), 0.001)
    event.set()
    assert await SYSTEM.wait_for(event.wait(), 60)
