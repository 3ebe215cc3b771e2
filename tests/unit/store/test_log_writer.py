"""What writes the log: a sync in a thread is told of with all that it has made durable."""

from __future__ import annotations

import asyncio
from typing import Any


async def test_what_is_appended_before_the_thread_begins_its_sync_is_answered_with_it(harness: Any) -> None:
    gate = harness.hold("commit", before=True, once=True)
    first = harness.put("a")
    await gate.arrived.wait()
    second = harness.put("b")
    await harness.decided()
    gate.open()
    async with asyncio.timeout(30):
        answers = await first, await second
    assert [answer.status for answer in answers] == [201, 201]
