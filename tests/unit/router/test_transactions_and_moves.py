"""Transactions while partitions change hands: what is refused with 421 is tried again, what is over is told to the
shard that has the keys by then. (In which ways this can go wrong is explored in tests/unit/transactions.)"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore.config import Limits
from kvstore.errors import Unavailable
from kvstore.model import Attempt, Condition, TxnOp
from kvstore.protocol import Abort, ApplyIntents, Outcome, Transact
from kvstore.router.coordinator import Coordinator
from kvstore.router.intent_resolver import IntentResolver
from kvstore.router.participants import Transaction, TxnShare
from kvstore.router.service import RouterService
from tests.unit.router.fake_shards import all_follow, all_on, halves, key_of, make_map, make_service, shards
from tests.unit.waiting import until

KEY, OTHER = key_of("s1"), key_of("s2")
ATTEMPT = Attempt(1, 1, "r")
WRITE = Transaction([], [TxnOp("put", KEY, b"1")], [])


def asked(shard_id: str, kind: type) -> list[Any]:
    return [request for request in shards[shard_id].asked if isinstance(request, kind)]


async def test_a_transaction_waits_for_a_partition_that_is_fenced(service: RouterService) -> None:
    shards["s1"].fence(KEY)
    doing = asyncio.create_task(Coordinator(service, Limits()).run(WRITE, None))
    await asyncio.sleep(0.1)
    assert len(asked("s1", Transact)) == 1
    all_follow(service, all_on(2, "s2"))
    assert (await doing).version == 9
    assert len(asked("s2", Transact)) == 1


async def test_the_time_in_which_a_transaction_waits_for_a_move_is_not_taken_off_its_own(fake_channels: None) -> None:
    limits = Limits(txn_timeout_s=0.9, reroute_timeout_s=60.0)
    service = make_service()
    all_follow(service, halves())
    shards["s1"].fence(KEY)
    doing = asyncio.create_task(Coordinator(service, limits).run(WRITE, None))
    await asyncio.sleep(1.0)
    all_follow(service, all_on(2, "s2"))
    assert (await doing).version == 9


async def test_a_transaction_on_a_key_without_an_owner_for_good_is_unavailable(fake_channels: None) -> None:
    limits = Limits(txn_timeout_s=0.2, reroute_timeout_s=0.3)
    service = make_service()
    all_follow(service, halves())
    shards["s1"].fence(KEY)
    with pytest.raises(Unavailable):
        await Coordinator(service, limits).run(WRITE, None)


async def test_a_transaction_that_was_split_up_for_a_shard_that_has_left_is_split_up_again(
    service: RouterService,
) -> None:
    channel: Any = service.table.channels["s1"]

    def leaves(*_: Any, **__: Any) -> Any:
        all_follow(service, make_map(2, lambda _: 0, "s2"))
        raise Unavailable("shard s1 is not connected", shard="s1", retry_after_ms=1000)

    channel.request = leaves
    assert (await Coordinator(service, Limits()).run(WRITE, None)).version == 9


def part_of(service: RouterService, *keys: str) -> TxnShare:
    part = TxnShare(service.table.owner_of(keys[0]))
    part.conditions = [Condition(key, exists=True) for key in keys]
    part.keys = dict.fromkeys(keys)
    return part


async def test_a_finish_follows_its_keys_to_all_their_owners(service: RouterService) -> None:
    all_follow(service, all_on(2, "s1"))
    part = part_of(service, KEY, OTHER)
    shards["s1"].fence(OTHER)
    IntentResolver(service).finish([part], "anchor", ATTEMPT, Outcome(0, "committed", "a", 9, True, 5))
    await until(lambda: len(asked("s1", ApplyIntents)) >= 2)
    all_follow(service, halves(3))
    await until(lambda: asked("s2", ApplyIntents))
    await asyncio.sleep(0.3)
    assert [finish.keys for finish in asked("s2", ApplyIntents)] == [[OTHER]]
    assert asked("s1", ApplyIntents)[-1].keys == [KEY]
    assert all(
        (finish.version, finish.succeeded, finish.decided_ms) == (9, True, 5) for finish in asked("s2", ApplyIntents)
    )


async def test_an_abort_is_told_where_it_was_prepared_and_follows_its_keys(service: RouterService) -> None:
    channel = service.table.owner_of(KEY)
    shards["s1"].fence(KEY)
    IntentResolver(service).abort(ATTEMPT, [KEY], channel)
    await until(lambda: asked("s1", Abort))
    all_follow(service, all_on(2, "s2"))
    await until(lambda: asked("s2", Abort))
    await asyncio.sleep(0.3)
    assert len(asked("s2", Abort)) == 1, "once it is told, it is told no more"


async def test_an_abort_whose_shard_is_gone_is_left_to_the_stores(service: RouterService) -> None:
    channel: Any = service.table.owner_of(KEY)
    channel.error = Unavailable("away")
    IntentResolver(service).abort(ATTEMPT, [KEY], channel)
    channel.error, channel.fails_with = None, Unavailable("lost")
    IntentResolver(service).abort(ATTEMPT, [KEY], channel)
    await asyncio.sleep(0.2)
    assert asked("s1", Abort) == asked("s2", Abort) == []
