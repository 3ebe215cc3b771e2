"""What is not answered in time on a channel, for whom, and when the connection is given up."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from kvstore.errors import OutcomeUnknown, Unavailable
from kvstore.protocol import Answer, Get, Info, Put, Stats
from tests.unit.transport.far_end import MIB, outcome
from tests.unit.waiting import until


async def test_what_is_not_answered_in_time_is_unavailable_for_a_read_and_unknown_for_a_write(
    far: Any, connect: Any
) -> None:
    channel = await connect(request_timeout_s=0.2)
    read, write = channel.request(Get(0, "a")), channel.request(Put(0, "b", b""))
    await until(lambda: far.requests)
    far.answers_all = True
    for _ in range(3):
        await asyncio.sleep(0.05)
        await channel.request(Stats(0))
    assert isinstance(await outcome(read), Unavailable)
    assert isinstance(await outcome(write), OutcomeUnknown)
    assert channel.ops_under_way == 0


async def test_a_shard_that_says_nothing_at_all_loses_its_connection(far: Any, connect: Any) -> None:
    channel = await connect(request_timeout_s=0.2)
    assert isinstance(await outcome(channel.request(Put(0, "a", b""))), OutcomeUnknown)
    await until(lambda: len(far.sockets) == 2 and channel.connected)


async def test_a_shard_that_answers_others_in_time_keeps_its_connection(far: Any, connect: Any) -> None:
    channel = await connect(request_timeout_s=0.2)
    slow = channel.request(Get(0, "slow"))
    await until(lambda: far.requests)
    far.answers_all = True
    while not slow.done():
        await channel.request(Stats(0))
        await asyncio.sleep(0.02)
    assert isinstance(await outcome(slow), Unavailable)
    assert len(far.sockets) == 1
    assert channel.connected


async def test_what_came_while_this_process_stood_still_is_read_before_anything_is_timed_out(
    far: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = await connect(request_timeout_s=60)
    read, write = channel.request(Get(0, "a")), channel.request(Put(0, "b", b""))
    await until(lambda: len(far.requests) == 2)
    answers = (Answer(request.id, 200, value=bytes(MIB)) for request in far.requests)  # more than is read at once
    sending = asyncio.create_task(far.send(*answers))
    await asyncio.sleep(0)  # it lies in the socket
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "time", lambda: time.monotonic() + 100.0)
    assert (await outcome(read)).status == 200
    assert (await outcome(write)).status == 200
    assert len(far.sockets) == 1
    await sending


async def test_a_write_that_timed_out_before_it_left_does_not_leave_afterwards(far: Any, connect: Any) -> None:
    far.reads = False
    channel = await connect(frame_bytes_max=MIB, request_timeout_s=0.3)
    futures = [channel.request(Put(0, f"key-{number:02}", b"v" * MIB)) for number in range(40)]
    while not all(future.done() for future in futures):
        await far.send(Info(4711, 1, {}))  # it is alive and answers; it is slow to take in what is sent
        await asyncio.sleep(0.02)
    outcomes = [await outcome(future) for future in futures]
    unsent = {f"key-{number:02}" for number, error in enumerate(outcomes) if isinstance(error, Unavailable)}
    assert unsent
    assert len(far.sockets) == 1
    far.transports[0].resume_reading()
    last = channel.request(Get(0, "last"))
    await until(lambda: any(request.key == "last" for request in far.requests) or last.done())
    assert not unsent & {request.key for request in far.requests}, "its asker was told that nothing was done"
