"""The channel over real WebSockets: what leaves in which frame, and what is refused past its bounds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore.errors import TooManyRequests
from kvstore.protocol import Answer, Get, Put, Scan, encode_frame
from kvstore.transport.channel import Channel
from tests.unit.transport.far_end import MIB
from tests.unit.waiting import until

# --- frames -----------------------------------------------------------------------------------------------------------


async def test_what_is_asked_in_one_turn_of_the_loop_leaves_in_one_frame(far: Any, channel: Channel) -> None:
    futures = [channel.request(Get(0, f"key-{number}")) for number in range(100)]
    await until(lambda: len(far.requests) == 100)
    assert len(far.frames) == 1
    assert [request.key for request in far.frames[0]] == [f"key-{number}" for number in range(100)]
    assert not any(future.done() for future in futures)


async def test_what_is_asked_later_leaves_in_another_frame_without_waiting_for_answers(
    far: Any, channel: Channel
) -> None:
    channel.request(Get(0, "a"))
    await until(lambda: len(far.frames) == 1)
    channel.request(Get(0, "b"))
    await until(lambda: len(far.frames) == 2)


async def test_ids_are_unique_and_answers_find_their_askers_in_any_order(far: Any, channel: Channel) -> None:
    futures = [channel.request(Get(0, f"key-{number}")) for number in range(10)]
    await until(lambda: len(far.requests) == 10)
    ids = [request.id for request in far.requests]
    assert len(set(ids)) == 10
    for position in (7, 2, 9):
        await far.send(Answer(ids[position], 200, position, b"%d" % position))
    rest = [position for position in range(10) if position not in (7, 2, 9)]
    await far.send(*(Answer(ids[position], 200, position, b"%d" % position) for position in reversed(rest)))
    assert [(await future).version for future in futures] == list(range(10))


async def test_an_answer_comes_while_others_are_still_waited_for(far: Any, channel: Channel) -> None:
    slow, quick = channel.request(Put(0, "slow", b"")), channel.request(Get(0, "quick"))
    await until(lambda: len(far.requests) == 2)
    await far.send(Answer(far.requests[1].id, 404))
    assert (await quick).status == 404
    assert not slow.done()
    assert channel.ops_under_way == 1


async def test_a_frame_is_bounded_in_bytes(far: Any, connect: Any) -> None:
    channel = await connect(frame_bytes_max=10_000)
    for number in range(20):
        channel.request(Put(0, f"key-{number}", b"v" * 3000))
    await until(lambda: len(far.requests) == 20)
    assert [request.key for request in far.requests] == [f"key-{number}" for number in range(20)]
    assert max(sum(len(request.value) for request in frame) for frame in far.frames) <= 10_000 + 3000
    assert len(far.frames) >= 5


async def test_a_value_larger_than_a_frame_still_leaves(far: Any, connect: Any) -> None:
    channel = await connect(frame_bytes_max=1000)
    channel.request(Put(0, "a", b"v" * MIB))
    await until(lambda: far.requests)
    assert len(far.requests[0].value) == MIB


async def test_an_answer_that_is_not_waited_for_is_dropped(far: Any, channel: Channel) -> None:
    await far.send(Answer(4711, 200))
    future = channel.request(Get(0, "a"))
    await until(lambda: far.requests)
    await far.send(Answer(far.requests[0].id, 404))
    await far.send(Answer(far.requests[0].id, 200))
    assert (await future).status == 404
    assert channel.connected


async def test_all_that_a_value_can_hold_arrives_as_it_was_sent(far: Any, channel: Channel) -> None:
    value = bytes(range(256)) * 100
    future = channel.request(Put(0, "🔑/nul\0", value, 77))
    await until(lambda: far.requests)
    (put,) = far.requests
    assert (put.key, put.value, put.ttl_ms) == ("🔑/nul\0", value, 77)
    await far.send(Answer(put.id, 200, 2**53 - 1, value, 5, {"code": "x", "n": [1, None]}))
    answer = await future
    assert (answer.version, answer.value, answer.ttl_left_ms) == (2**53 - 1, value, 5)
    assert answer.problem == {"code": "x", "n": [1, None]}


async def test_messages_that_count_little_and_are_large_leave_in_frames_that_the_far_end_reads(
    far: Any, connect: Any
) -> None:
    channel = await connect(frame_bytes_max=10_000)
    futures = [channel.request(Get(0, f"{number:03}" + "k" * 1000)) for number in range(100)]
    await until(lambda: len(far.requests) == len(futures))
    assert [request.key[:3] for request in far.requests] == [f"{number:03}" for number in range(100)]
    assert max(len(encode_frame(frame)) for frame in far.frames) <= 20_000


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_past_its_bound_of_operations_it_refuses_at_once_and_goes_on_when_answers_came(
    far: Any, connect: Any
) -> None:
    channel = await connect(channel_ops_max=3)
    futures = [channel.request(Get(0, "a")) for _ in range(3)]
    with pytest.raises(TooManyRequests) as refused:
        channel.request(Get(0, "b"))
    assert refused.value.members["retry_after_ms"] > 0
    await until(lambda: len(far.requests) == 3)
    await far.send(Answer(far.requests[0].id, 404))
    await futures[0]
    channel.request(Get(0, "b"))


async def test_past_its_bound_of_bytes_it_refuses_at_once_and_gives_the_bytes_back(far: Any, connect: Any) -> None:
    channel = await connect(channel_bytes_max=10_000)
    future = channel.request(Put(0, "a", b"v" * 6000))
    with pytest.raises(TooManyRequests):
        channel.request(Put(0, "b", b"v" * 6000))
    channel.request(Put(0, "small", b"v"))
    await until(lambda: len(far.requests) == 2)
    await far.send(*(Answer(request.id, 201) for request in far.requests))
    await future
    assert (channel.bytes_under_way, channel.ops_under_way) == (0, 0)
    channel.request(Put(0, "b", b"v" * 6000))


async def test_a_get_counts_for_what_gets_brought_lately(far: Any, connect: Any) -> None:
    channel = await connect(channel_bytes_max=20_000)
    for number in range(30):
        future = channel.request(Get(0, "a"))
        await until(lambda count=number + 1: len(far.requests) == count)
        await far.send(Answer(far.requests[-1].id, 200, 1, bytes(6000)))
        await future
    futures = [channel.request(Get(0, "a")) for _ in range(3)]
    with pytest.raises(TooManyRequests):
        channel.request(Get(0, "a"))
    await until(lambda: len(far.requests) == 33)
    await far.send(*(Answer(request.id, 200, 1, b"") for request in far.requests[-3:]))
    await asyncio.gather(*futures)
    assert channel.bytes_under_way == 0


async def test_a_get_that_brings_small_values_only_does_not_count_for_large_ones_that_others_brought(
    far: Any, connect: Any
) -> None:
    channel = await connect(channel_bytes_max=20_000)
    for number in range(30):
        future = channel.request(Get(0, "large"))
        await until(lambda count=number + 1: len(far.requests) == count)
        await far.send(Answer(far.requests[-1].id, 200, 1, bytes(6000)))
        await future
    small = [channel.request(Get(0, "small", 1000)) for _ in range(10)]
    channel.request(Get(0, "large"))
    await until(lambda: len(far.requests) == 41)
    await far.send(*(Answer(request.id, 200, 1, bytes(800)) for request in far.requests[30:40]))
    await asyncio.gather(*small)
    before = channel.bytes_under_way
    channel.request(Get(0, "small", 1000))
    assert 400 < channel.bytes_under_way - before < 1000


async def test_a_page_of_values_counts_for_the_largest_page(connect: Any) -> None:
    channel = await connect(channel_bytes_max=10_000, page_bytes_max=6000)
    channel.request(Scan(0, "", "", 100, True))
    with pytest.raises(TooManyRequests):
        channel.request(Scan(0, "", "", 100, True))
    channel.request(Scan(0, "", "", 100, False))


# --- strikes ----------------------------------------------------------------------------------------------------------


async def test_a_strike_is_named_before_what_is_asked_by_it_and_again_on_each_connection(
    far: Any, connect: Any
) -> None:
    channel = await connect()
    channel.request(Get(0, "before"))
    channel.name_strike(7)
    channel.name_strike(7)
    channel.request(Get(0, "after"))
    await until(lambda: len(far.requests) == 3)
    assert [getattr(each, "key", 0) or each.strike for each in far.requests] == ["before", 7, "after"]
    far.hang_up()
    await until(lambda: len(far.sockets) == 2 and channel.connected)
    channel.request(Get(0, "again"))
    await until(lambda: len(far.requests) == 5)
    assert [getattr(each, "key", 0) or each.strike for each in far.requests[3:]] == [7, "again"]
