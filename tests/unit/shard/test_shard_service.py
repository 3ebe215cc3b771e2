"""What a shard does with each request, on a real store; and that the last word on ownership is its own."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from kvstore.config import Limits
from kvstore.errors import ForeignData, from_problem
from kvstore.metrics import ShardStats
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap, Primary, Strike, at_home, map_of
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    Acquire,
    Answer,
    Count,
    Delete,
    Explain,
    Get,
    GetLock,
    Page,
    Put,
    Request,
    Scan,
    Stats,
)
from kvstore.shard.peers import Peers
from kvstore.shard.receiver import Receiver
from kvstore.shard.service import ShardService
from kvstore.store.store import Store

PARTITIONS = 64
LIMITS = Limits(log_segment_bytes=4 << 20)
store_ids: dict[str, str] = {}
copy_ids: dict[str, str] = {}
ALL = b"\xff" * (PARTITIONS // 8)


def make_map(epoch: int, owner_of: Callable[[int], int]) -> ClusterMap:
    members = [at_home(s, f"http://{s}", store_ids.get(s, s), copy_id=copy_ids.get(s, "")) for s in ("s1", "s2")]
    owners = [owner_of(partition) for partition in range(PARTITIONS)]
    return map_of(members, cluster_id="c", epoch=epoch, partitions=PARTITIONS, owners=owners)


def all_mine(epoch: int) -> ClusterMap:
    return make_map(epoch, lambda _: 0)


def without(key: str, epoch: int) -> ClusterMap:
    gone = partition_of(key.encode(), PARTITIONS)
    return make_map(epoch, lambda partition: int(partition == gone))


class Shard:
    """The service with its store; `ask` brings the answer to a request."""

    def __init__(self, service: ShardService) -> None:
        self.service = service

    async def ask(self, request: Request) -> Any:
        return await self.begin(request)

    def begin(self, request: Request) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        class Asker:
            closed = False

            def send(self, reply: Any, /) -> None:
                future.set_result(reply)

        self.service.handle(request, Asker())
        return asyncio.ensure_future(asyncio.wait_for(future, 60))


@pytest.fixture
async def shard(tmp_path: Path) -> AsyncIterator[Shard]:
    fatal: list[BaseException] = []
    store = await Store.open(tmp_path / "s1.db", LIMITS, "s1", PARTITIONS, fatal.append)  # type: ignore[arg-type]
    store_ids["s1"], copy_ids["s1"] = store.identity.store_id, store.copy_id
    async with aiohttp.ClientSession() as session:
        peers = Peers(store, LIMITS, session)
        receiver = Receiver("s1", store, peers, LIMITS)
        yield Shard(ShardService("s1", store, receiver, LIMITS))
        await receiver.close()
        await peers.close()
    await store.close()
    assert fatal == []


async def test_without_a_map_nothing_is_owned(shard: Shard) -> None:
    for request in (Get(1, "a"), Put(2, "a", b"1"), Delete(3, "a"), Acquire(4, "a", 1000, 0, ""), GetLock(5, "a")):
        answer = await shard.ask(request)
        assert (answer.id, answer.status, answer.problem["epoch"]) == (request.id, 421, 0)


async def test_each_request_is_answered_under_its_id(shard: Shard) -> None:
    await shard.service.follow(all_mine(3))
    assert await shard.ask(Put(11, "a", b"1")) == Answer(11, 201, 1)
    assert await shard.ask(Get(12, "a")) == Answer(12, 200, 1, b"1")
    assert await shard.ask(Scan(13, "", "", 10, True)) == Page(13, ALL, False, "a", [("a", 1, b"1", 0)])
    assert await shard.ask(Count(14, "")) == Page(14, ALL, False, "", [], 1)
    explained = await shard.ask(Explain(15, "a"))
    assert (explained.id, explained.epoch, explained.facts["version"]) == (15, 3, 1)
    stats = await shard.ask(Stats(16))
    assert (stats.id, stats.facts["keys"]) == (16, 1)
    assert set(stats.facts) == {
        *ShardStats.__struct_fields__,
        "attempts",
        "attempts_floor",
        "clock",
        "disk_spare_bytes",
    }
    assert await shard.ask(Delete(17, "a")) == Answer(17, 204, 2)
    assert (await shard.ask(Get(18, "a"))).status == 404


async def test_a_map_that_is_not_newer_is_not_followed(shard: Shard) -> None:
    assert await shard.service.follow(all_mine(3))
    assert not await shard.service.follow(make_map(3, lambda _: 1))
    assert not await shard.service.follow(make_map(2, lambda _: 1))
    assert (await shard.ask(Put(1, "a", b"1"))).status == 201


async def test_a_partition_that_stays_keeps_its_arrival_and_one_that_comes_back_gets_another(shard: Shard) -> None:
    moved = partition_of(b"moved", PARTITIONS)
    seen = []
    for epoch, cluster_map in enumerate((all_mine(1), without("moved", 2), all_mine(3), all_mine(4)), start=1):
        await shard.service.follow(cluster_map)
        assert shard.service.store.served.epoch == epoch
        seen.append(list(shard.service.store.served.generations))
    for partition in range(PARTITIONS):
        arrivals = [arrivals[partition] for arrivals in seen]
        if partition == moved:
            assert arrivals[1] == 0
            assert 0 < arrivals[0] < arrivals[2] == arrivals[3]
        else:
            assert len(set(arrivals)) == 1
    assert len(set(seen[0])) == PARTITIONS


async def test_a_member_of_no_map_owns_nothing(shard: Shard) -> None:
    await shard.service.follow(make_map(1, lambda _: 1))
    assert (await shard.ask(Get(1, "a"))).status == 421


async def test_a_key_of_another_shard_is_refused_with_the_epoch_that_says_so(shard: Shard) -> None:
    await shard.service.follow(without("b", 7))
    answer = await shard.ask(Put(1, "b", b"1"))
    assert (answer.status, answer.problem["code"], answer.problem["epoch"]) == (421, "wrong-owner", 7)
    assert (await shard.ask(Put(2, "a", b"1"))).status == 201


async def test_a_shard_that_has_left_answers_until_no_router_asks_and_a_member_ends_at_once(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    await shard.service.follow(all_mine(1))
    with monkeypatch.context() as patched:
        patched.setattr(shard.service, "_limits", Limits(farewell_quiet_s=3600.0, farewell_quiet_s_max=3600.0))
        async with asyncio.timeout(60):
            await shard.service.farewell()
    gone = make_map(2, lambda _: 0)
    await shard.service.follow(msgspec.structs.replace(gone, shards=gone.shards[1:]))
    farewell = asyncio.create_task(shard.service.farewell())
    asked_s = loop.time()
    for _ in range(8):
        await asyncio.sleep(0.1)
        has_ended = farewell.done()
        if loop.time() - asked_s >= 0.5:
            break  # a machine so busy that this test was the one that left it alone for so long
        assert not has_ended
        asked_s = loop.time()
        assert (await shard.ask(Put(0, "a", b"1"))).status == 421
    async with asyncio.timeout(60):
        await farewell
    assert loop.time() - asked_s > 0.4


async def test_what_is_left_of_a_partition_that_went_is_neither_listed_nor_counted(shard: Shard) -> None:
    await shard.service.follow(all_mine(1))
    for key in ("a", "b"):
        await shard.ask(Put(1, key, b"1"))
    await shard.service.follow(without("a", 2))
    assert [item[0] for item in (await shard.ask(Scan(2, "", "", 10))).items] == ["b"]
    assert (await shard.ask(Count(3, ""))).count == 1


async def test_a_count_across_a_change_of_ownership_is_of_what_stayed(shard: Shard) -> None:
    await shard.service.follow(all_mine(1))
    for key in ("a", "b"):
        await shard.ask(Put(1, key, b"1"))
    engine: Any = shard.service.store.tables.engine
    original, arrived, may_go_on = engine.scan, asyncio.Event(), asyncio.Event()

    async def scan(*args: Any) -> Any:
        page = await original(*args)
        arrived.set()
        await may_go_on.wait()
        return page

    engine.scan = scan
    counting = shard.begin(Count(9, ""))
    await arrived.wait()
    await shard.service.follow(without("a", 2))
    may_go_on.set()
    owned = partition_set.all_of(PARTITIONS) & ~(1 << partition_of(b"a", PARTITIONS))
    assert await counting == Page(9, partition_set.encode(owned, PARTITIONS), False, "", [], 1)


async def test_a_request_that_fails_for_whatever_reason_is_answered(
    shard: Shard, caplog: pytest.LogCaptureFixture
) -> None:
    await shard.service.follow(all_mine(1))

    async def fail(*_: Any) -> Any:
        raise sqlite3.OperationalError("disk I/O error")

    shard.service.store.tables.engine.scan = fail  # type: ignore[method-assign]
    for request in (Scan(5, "", "", 10), Count(6, "")):
        answer = await shard.ask(request)
        assert (answer.id, answer.status, answer.problem["code"]) == (request.id, 500, "internal")
        assert "disk I/O" not in str(answer.problem)
    assert "disk I/O error" in caplog.text


async def test_a_damaged_value_in_a_listing_is_answered_as_such(shard: Shard) -> None:
    await shard.service.follow(all_mine(1))
    await shard.ask(Put(1, "bad", b"1"))
    await shard.service.store.applier.flush()
    connection = sqlite3.connect(shard.service.store.path)
    with connection:
        connection.execute("UPDATE rows SET body = x'00'")
    connection.close()
    answer = await shard.ask(Scan(2, "", "", 10, True))
    assert (answer.id, answer.status, answer.problem["code"]) == (2, 500, "data-corrupt")


# --- strikes ----------------------------------------------------------------------------------------------------------


class Asker:
    """Asks by a map whose last strike is that one."""

    closed = False

    def __init__(self, strike: int) -> None:
        self.strike = strike
        self.replies: list[Any] = []

    def send(self, reply: Any) -> None:
        self.replies.append(reply)


def struck(epoch: int, *epochs: int, store_id: str = "lost") -> ClusterMap:
    strikes = [Strike(shard="s9", store_id=store_id, epoch=each, partitions=[], opened=each + 1) for each in epochs]
    return msgspec.structs.replace(all_mine(epoch), strikes=strikes)


@pytest.mark.parametrize("strike", [0, 3, 9])
async def test_who_follows_another_strike_is_refused_and_nothing_is_executed(shard: Shard, strike: int) -> None:
    await shard.service.follow(struck(5, 3, 4))
    asker = Asker(strike)
    requests = [Put(1, "a", b"1"), Get(2, "a"), Scan(3, "", "", 10), GetLock(4, "a"), Explain(5, "a")]
    for request in requests:
        shard.service.handle(request, asker)
    assert [(reply.id, reply.status) for reply in asker.replies] == [(request.id, 421) for request in requests]
    assert {from_problem(reply.problem).members["epoch"] for reply in asker.replies} == {5}
    known = Asker(4)
    shard.service.handle(Get(6, "a"), known)
    while not known.replies:
        await asyncio.sleep(0.001)
    assert known.replies[0].status == 404


async def test_a_map_that_names_another_copy_of_the_store_is_not_followed(shard: Shard) -> None:
    before = shard.service.store.cluster_map
    named = all_mine(9)
    primary = Primary(node="s1", copy_id="another")
    other = msgspec.structs.replace(named.shards[0], primary=primary)
    with pytest.raises(ForeignData, match="with the copy another, and this is copy"):
        await shard.service.follow(msgspec.structs.replace(named, shards=[other, named.shards[1]]))
    assert shard.service.store.cluster_map == before


async def test_a_term_is_promised_before_its_map_is_in_force_and_none_below_is_followed(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_term(epoch: int, term: int) -> ClusterMap:
        named = all_mine(epoch)
        return msgspec.structs.replace(
            named, shards=[msgspec.structs.replace(named.shards[0], term=term), named.shards[1]]
        )

    store = shard.service.store
    promised: list[tuple[int, int]] = []
    promise = store.promise

    async def noted(term: int) -> None:
        promised.append((term, store.cluster_map.epoch if store.cluster_map is not None else 0))
        await promise(term)

    monkeypatch.setattr(store, "promise", noted)
    before = store.served.epoch
    await shard.service.follow(at_term(20, 7))
    assert promised == [(7, before)]
    with pytest.raises(ForeignData, match="promised term 7, and the map names term 6"):
        await shard.service.follow(at_term(21, 6))
    assert not await shard.service.follow(at_term(19, 3)), "an older map asks for no promise"
    assert store.served.epoch == 20


async def test_a_shard_that_was_given_up_follows_no_map_that_says_so(shard: Shard) -> None:
    ours = shard.service.store.identity.store_id
    with pytest.raises(ForeignData, match="refused for ever"):
        await shard.service.follow(struck(5, 3, store_id=ours))
