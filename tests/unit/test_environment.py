"""The machine as an environment: what its waits promise."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.environment import SYSTEM


async def test_a_wait_tells_whether_the_event_came() -> None:
    event = asyncio.Event()
    assert not await SYSTEM.wait_for(event.wait(), 0.001)
    event.set()
    assert await SYSTEM.wait_for(event.wait(), 60)


async def test_a_cancellation_that_comes_together_with_the_event_is_not_forgotten() -> None:
    event = asyncio.Event()
    task = asyncio.create_task(SYSTEM.wait_for(event.wait(), 60))
    await asyncio.sleep(0)
    event.set()
    task.cancel()  # the event has come, and the one who waits has not been told yet
    with pytest.raises(asyncio.CancelledError):
        await task
