"""The machine's environment: waiting with a bound."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.environment import SYSTEM


@pytest.mark.parametrize("turns", range(6))
async def test_a_wait_that_is_cancelled_as_its_event_comes_is_cancelled(turns: int) -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(SYSTEM.wait_for(event.wait(), 60.0))
    await asyncio.sleep(0.01)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    had_ended = waiting.done()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled() or had_ended


async def test_a_wait_tells_whether_its_event_came() -> None:
    event = asyncio.Event()
    assert not await SYSTEM.wait_for(event.wait(), 0.001)
    event.set()
    assert await SYSTEM.wait_for(event.wait(), 60.0)
