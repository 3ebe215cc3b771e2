"""A shard whose primary dies: what waits for the next one, what is asked again there, what ends as unknown.

The channels are in-process fakes, the rules are real.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.errors import KvError, OutcomeUnknown, TooManyRequests, Unavailable
from kvstore.model import IdempotencyKey, TxnOp
from kvstore.placement.cluster_map import ClusterMap, Primary, Replica
from kvstore.protocol import Answer, DecideCommit, Get, Outcome, Put, Vote
from kvstore.router.batch import BatchBody, parse_batch, run_batch
from kvstore.router.coordinator import Coordinator
from kvstore.router.json_ops import GetOp, PutOp
from kvstore.router.large_values import LargeValues
from kvstore.router.participants import Transaction
from kvstore.router.service import RouterService
from kvstore.transport.answers import AnswerAccount, Room
from tests.unit.router.fake_shards import (
    PARTITIONS,
    FakeChannel,
    all_follow,
    halves,
    key_of,
    make_service,
    shards,
)

pytestmark = pytest.mark.usefixtures("fake_channels")

KEY = key_of("s1")
ONCE = IdempotencyKey("k", "same")
WRITE = Transaction([], [TxnOp("put", KEY, b"1")], [])


def replicated(epoch: int = 1, primary: str = "s1") -> ClusterMap:
    """As `halves`; shard s1 has copies on both nodes, and that primary."""
    found = halves(epoch)
    other = "s2" if primary == "s1" else "s1"
    first = msgspec.structs.replace(
        found.shards[0],
        primary=Primary(node=primary, copy_id=f"c-{primary}"),
        replicas=[Replica(node=other, copy_id=f"c-{other}", state="in-sync", joined=1)],
    )
    return msgspec.structs.replace(found, replicas=2, shards=[first, found.shards[1]])


@pytest.fixture
async def service() -> RouterService:
    made = make_service()
    all_follow(made, replicated())
    return made


def channel_of(service: RouterService) -> FakeChannel:
    channel: Any = service.table.channels["s1"]
    return channel


async def is_taken_over(service: RouterService, epoch: int = 2) -> None:
    """After a moment, node s2 is the primary."""
    await asyncio.sleep(0.02)
    all_follow(service, replicated(epoch, "s2"))


async def failing_over(service: RouterService, call: Any) -> Any:
    asked = asyncio.create_task(call)
    await is_taken_over(service)
    return await asked


def not_connected(channel: FakeChannel) -> None:
    channel.error = Unavailable("shard s1 is not connected", shard="s1")


def lost(error: KvError) -> Callable[[FakeChannel], None]:
    def lose(channel: FakeChannel) -> None:
        channel.fails_with = error

    return lose


def not_the_primary(channel: FakeChannel) -> None:
    problem = Unavailable("this node does not serve that store").problem()
    answers: list[Any] = [Answer(0, 503, problem=problem)]
    channel.shard.answer = lambda request, *_: msgspec.structs.replace(answers[0], id=request.id)  # type: ignore[method-assign]


CLOSED = lost(Unavailable("shard s1 closed the connection before it answered", shard="s1"))
UNKNOWN = lost(OutcomeUnknown("shard s1 closed the connection before it answered"))


@pytest.mark.parametrize("dies", [not_connected, CLOSED])
async def test_a_read_waits_for_the_next_primary(service: RouterService, dies: Callable[[FakeChannel], None]) -> None:
    shards["s1"].data[KEY] = b"v"
    dies(channel_of(service))
    routed = await failing_over(service, service.ask(Get(0, KEY)))
    assert (routed.answer.status, routed.answer.value) == (200, b"v")


@pytest.mark.parametrize("dies", [not_connected, CLOSED])
async def test_a_write_that_was_not_executed_waits_for_the_next_primary(
    service: RouterService, dies: Callable[[FakeChannel], None]
) -> None:
    dies(channel_of(service))
    routed = await failing_over(service, service.ask(Put(0, KEY, b"v")))
    assert routed.answer.status == 201
    assert shards["s1"].data[KEY] == b"v"


async def test_a_write_that_was_sent_ends_with_an_unknown_outcome(service: RouterService) -> None:
    UNKNOWN(channel_of(service))
    with pytest.raises(OutcomeUnknown):
        await service.ask(Put(0, KEY, b"v"))


async def test_a_write_with_an_idempotency_key_is_sent_again_to_the_next_primary(service: RouterService) -> None:
    UNKNOWN(channel_of(service))
    routed = await failing_over(service, service.ask(Put(0, KEY, b"v", once=ONCE)))
    assert routed.answer.status == 201


async def test_its_outcome_stays_unknown_if_no_primary_comes(service: RouterService) -> None:
    made = make_service(reroute_timeout_s=0.2)
    all_follow(made, replicated())
    UNKNOWN(channel_of(made))
    asked = asyncio.create_task(made.ask(Put(0, KEY, b"v", once=ONCE)))
    await asyncio.wait_for(channel_of(made).failed.wait(), 60)
    not_connected(channel_of(made))
    with pytest.raises(OutcomeUnknown):
        await asked


def not_at_all(channel: FakeChannel) -> None:
    channel.error = TooManyRequests("too much is under way to shard s1")


@pytest.mark.parametrize("then", [not_connected, not_the_primary, not_at_all])
async def test_what_the_next_primary_does_not_look_at_leaves_unknown_what_was_sent_before(
    service: RouterService, then: Callable[[FakeChannel], None]
) -> None:
    """No refusal may say that nothing was done: the first time it may have been."""
    made = make_service(reroute_timeout_s=0.3)
    all_follow(made, replicated())
    limits = Limits(txn_timeout_s=0.3, reroute_timeout_s=0.3)
    for call in (made.ask(Put(0, KEY, b"v", once=ONCE)), Coordinator(made, limits).run(WRITE, ONCE)):
        channel = channel_of(made)
        channel.error = None
        UNKNOWN(channel)
        channel.failed.clear()
        asked = asyncio.create_task(call)
        await asyncio.wait_for(channel.failed.wait(), 60)
        channel.fails_with = None
        then(channel)
        with pytest.raises(OutcomeUnknown):
            await asked


async def test_a_shard_that_refuses_when_it_has_no_copies_any_more_leaves_unknown_what_was_sent_before(
    service: RouterService,
) -> None:
    UNKNOWN(channel_of(service))
    asked = asyncio.create_task(service.ask(Put(0, KEY, b"v", once=ONCE)))
    await asyncio.wait_for(channel_of(service).failed.wait(), 60)
    channel_of(service).fails_with = None
    not_the_primary(channel_of(service))
    all_follow(service, halves(2))
    with pytest.raises(OutcomeUnknown):
        await asked


async def test_a_node_that_does_not_serve_the_shard_yet_is_asked_again(service: RouterService) -> None:
    shard, answer = shards["s1"], shards["s1"].answer
    not_the_primary(channel_of(service))
    asked = asyncio.create_task(service.ask(Put(0, KEY, b"v")))
    await asyncio.sleep(0.12)
    shard.answer = answer  # type: ignore[method-assign]
    assert (await asked).answer.status == 201


async def test_without_a_primary_for_long_it_is_unavailable() -> None:
    made = make_service(reroute_timeout_s=0.2)
    all_follow(made, replicated())
    not_connected(channel_of(made))
    with pytest.raises(Unavailable) as refused:
        await made.ask(Put(0, KEY, b"v"))
    assert refused.value.members["retry_after_ms"] > 0


async def test_every_call_names_the_shard_without_a_primary_in_the_same_words() -> None:
    made = make_service(reroute_timeout_s=0.1)
    all_follow(made, replicated())
    shards["s1"].fenced = set(range(PARTITIONS))
    transaction = Coordinator(made, Limits(txn_timeout_s=0.1, reroute_timeout_s=0.1)).run(WRITE, None)
    for call in (made.ask(Put(0, KEY, b"v")), transaction, made.all_shards.count("")):
        with pytest.raises(Unavailable, match=r"^shard s1 does not answer for its keys now\.?$"):
            await call


async def test_what_waits_at_a_deposed_primary_ends_soon(service: RouterService) -> None:
    old = channel_of(service)
    all_follow(service, replicated(2, "s2"))
    assert channel_of(service) is not old
    while not old.closed:
        await asyncio.sleep(0.01)


async def test_a_shard_without_copies_is_not_waited_for(service: RouterService) -> None:
    other: Any = service.table.channels["s2"]
    other.error = Unavailable("shard s2 is not connected", shard="s2")
    with pytest.raises(Unavailable, match="not connected"):
        await service.ask(Get(0, key_of("s2")))


async def test_listings_and_counts_wait_for_the_next_primary(service: RouterService) -> None:
    shards["s1"].data[KEY] = b"v"
    not_connected(channel_of(service))
    counted = await failing_over(service, service.all_shards.count(""))
    assert (counted.keys, counted.missing) == (1, 0)
    not_connected(channel_of(service))
    asked = asyncio.create_task(service.all_shards.page("", "", 10, True))
    await asyncio.sleep(0.02)
    channel_of(service).error = None
    assert [item[0] for item in (await asked).items] == [KEY]


async def test_a_partial_listing_does_not_wait(service: RouterService) -> None:
    not_connected(channel_of(service))
    assert (await service.all_shards.count("", partial=True)).missing != 0


async def test_writes_of_a_batch_to_one_key_stay_in_order(service: RouterService) -> None:
    not_connected(channel_of(service))
    body = BatchBody([PutOp(key=KEY, value="1"), PutOp(key=KEY, value="2"), GetOp(key=KEY)])
    limits = service._limits
    steps = parse_batch(body, limits)

    async def run() -> list[Any]:
        async with Room(AnswerAccount(limits)) as room:
            results = run_batch(service, steps, limits, room, LargeValues(service))
            return [msgspec.json.decode(result) async for result in results]

    results = await failing_over(service, run())
    assert [result["status"] for result in results] == [201, 201, 200]
    assert results[2]["value"] == "2"


async def test_a_router_stays_awake_while_a_new_owner_is_not_connected(service: RouterService) -> None:
    """Without copies, too: the owner changes in the moment in which the old one is lost."""
    channel = channel_of(service)
    CLOSED(channel)
    asked = asyncio.create_task(service.ask(Get(0, KEY)))
    await asyncio.sleep(0)
    all_follow(service, msgspec.structs.replace(halves(2), owners=[1] * PARTITIONS))
    other: Any = service.table.channels["s2"]
    other.error = Unavailable("shard s2 is not connected", shard="s2")
    with pytest.raises(Unavailable, match="not connected"):
        async with asyncio.timeout(1):
            await asked


DEPOSED = Answer(0, 504, problem=OutcomeUnknown("the shard has got another primary").problem())
BOTH = Transaction([], [TxnOp("put", key_of("s2"), b"1"), TxnOp("put", KEY, b"1")], [])


async def test_a_transaction_that_was_not_executed_waits_for_the_next_primary(service: RouterService) -> None:
    not_connected(channel_of(service))
    assert (await failing_over(service, Coordinator(service, Limits()).run(WRITE, None))).version == 9


async def test_a_transaction_that_was_sent_is_unknown_without_an_idempotency_key(service: RouterService) -> None:
    UNKNOWN(channel_of(service))
    with pytest.raises(OutcomeUnknown) as unknown:
        await Coordinator(service, Limits()).run(WRITE, None)
    assert "txn_id" in unknown.value.members


async def test_a_transaction_that_a_deposed_primary_may_have_done_is_not_done_again(service: RouterService) -> None:
    asked: list[Any] = []

    def answer(request: Any, *_: Any) -> Answer:
        asked.append(request)
        return DEPOSED

    shards["s1"].answer = answer  # type: ignore[method-assign, assignment]
    with pytest.raises(OutcomeUnknown):
        await Coordinator(service, Limits()).run(WRITE, None)
    assert len(asked) == 1


async def test_a_transaction_with_an_idempotency_key_is_sent_again_to_the_next_primary(service: RouterService) -> None:
    UNKNOWN(channel_of(service))
    assert (await failing_over(service, Coordinator(service, Limits()).run(WRITE, ONCE))).version == 9


@pytest.mark.parametrize("first", [OutcomeUnknown("closed the connection"), DEPOSED])
async def test_a_commit_that_was_lost_is_not_said_to_be_undone_because_the_next_primary_is_not_there_yet(
    service: RouterService, first: Any
) -> None:
    """The decision may be in the log that the next primary opens with."""
    anchor: Any = service.table.channels["s2"]
    replies: list[Any] = [
        first,
        Answer(0, 503, problem=Unavailable("not served").problem()),
        Outcome(0, "committed", "1-r", 9, succeeded=True),
    ]
    request = anchor.request

    def reply(asked: Any, **options: Any) -> Any:
        if not isinstance(asked, DecideCommit):
            return request(asked, **options)
        future: Any = asyncio.get_running_loop().create_future()
        found = replies.pop(0)
        (future.set_exception if isinstance(found, KvError) else future.set_result)(found)
        return future

    anchor.request = reply
    vote = Vote(0, 3, True, [])
    channel_of(service).shard.answer = lambda *_: vote  # type: ignore[method-assign]
    assert (await Coordinator(service, Limits()).run(BOTH, None)).version == 9
    assert replies == []
