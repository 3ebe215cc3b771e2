"""What waits for the answers of one node: what it counts for, and what becomes of it without an answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore.errors import OutcomeUnknown, Unavailable
from kvstore.protocol import Answer, Get
from kvstore.transport.under_way import Pending, UnderWay


class Store:
    store_id, answered = "x", False

    def __init__(self, shard_id: str = "s1") -> None:
        self.shard_id = shard_id


def begin(
    under_way: UnderWay, op_id: int, store: Store, *, is_write: bool = False, deadline_s: float = 9.0
) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    under_way.ops[op_id] = Pending(future, is_write, 100, deadline_s, store)
    under_way.bytes += 100
    return future


async def test_an_answer_reaches_its_asker_and_gives_its_bytes_back() -> None:
    under_way, store = UnderWay(), Store()
    first, second = begin(under_way, 1, store), begin(under_way, 2, store)
    under_way.take([Answer(2, 200, value=b"v" * 800), Answer(7, 200)])
    assert second.result().id == 2
    assert not first.done()
    assert (under_way.bytes, under_way.mean_value_bytes, store.answered) == (100, 100, True)


async def test_without_an_answer_only_a_write_that_left_is_of_unknown_outcome() -> None:
    under_way, store = UnderWay(), Store()
    read, write, held_back = (
        begin(under_way, 1, store),
        begin(under_way, 2, store, is_write=True),
        begin(under_way, 3, store, is_write=True),
    )
    under_way.note_sent([Get(1, "a"), Get(2, "b")])
    under_way.fail_all("closed the connection")
    assert [type(each.exception()) for each in (read, write, held_back)] == [Unavailable, OutcomeUnknown, Unavailable]
    assert (under_way.ops, under_way.bytes) == ({}, 0)


async def test_what_is_late_and_what_a_store_waits_for_are_found_by_their_ids() -> None:
    under_way, one, other = UnderWay(), Store(), Store("s2")
    for op_id, store, deadline_s in ((1, one, 5.0), (2, other, 6.0), (3, one, 7.0)):
        begin(under_way, op_id, store, deadline_s=deadline_s)
    assert under_way.late(6.0) == [1, 2]
    assert under_way.of(one) == [1, 3]
    assert (under_way.count(one), under_way.count(other)) == (2, 1)


async def test_an_asker_that_waits_no_more_is_not_told() -> None:
    under_way = UnderWay()
    gone = begin(under_way, 1, Store())
    gone.cancel()
    under_way.fail([1], "did not answer in time")
    with pytest.raises(asyncio.CancelledError):
        gone.result()
    assert under_way.bytes == 0
