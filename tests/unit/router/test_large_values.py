"""Large values on their way from the shards: each in its room, and one of each shard at a time."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.config import Limits
from kvstore.errors import TooManyRequests
from kvstore.protocol import Answer, Get
from kvstore.router.large_values import LargeValues
from kvstore.router.service import KeyRequest, Routed
from kvstore.transport.answers import AnswerAccount, Room

SIZE = 100_000


class Owner:
    """Every key is asked for, and answered when the test says so."""

    def __init__(self) -> None:
        self.asked: dict[str, asyncio.Future[Routed]] = {}

    async def ask(self, request: KeyRequest) -> Routed:
        assert isinstance(request, Get)
        assert not request.bytes_max, "now all of it is wanted"
        self.asked[request.key] = asyncio.get_running_loop().create_future()
        return await self.asked[request.key]

    def answer(self, key: str) -> None:
        self.asked[key].set_result(Routed(Answer(0, 200, 1, bytes(SIZE)), "s1", 0))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_of_each_shard_one_large_value_is_on_its_way_and_a_shard_that_hangs_delays_those_of_no_other() -> None:
    owner, account = Owner(), AnswerAccount(Limits())
    large = LargeValues(owner)
    async with asyncio.timeout(60), Room(account) as room:
        asking = [
            asyncio.create_task(large.get(key, SIZE, shard, room))
            for key, shard in (("a", "1"), ("b", "1"), ("c", "2"))
        ]
        await settle()
        assert sorted(owner.asked) == ["a", "c"]
        owner.answer("a")
        await settle()
        assert sorted(owner.asked) == ["a", "b", "c"]
        owner.answer("b")
        owner.answer("c")
        await asyncio.gather(*asking)


async def test_a_large_value_without_room_is_not_asked_for() -> None:
    owner, account = Owner(), AnswerAccount(Limits(answer_bytes_in_flight_max=SIZE, answer_wait_s=0.01))
    account.charge(1)
    async with asyncio.timeout(60), Room(account) as room:
        with pytest.raises(TooManyRequests):
            await LargeValues(owner).get("a", SIZE, "1", room)
    assert not owner.asked
