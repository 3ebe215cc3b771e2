"""Messages that are well formed and wild: a shard answers each, goes on, and can be opened again.

Between the messages and the service lies what lies there in a running shard (the decoder of the channel), and behind it
a real store with all its background work, recovery included.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from kvstore.config import Limits
from kvstore.model import Attempt, Condition, IdempotencyKey, Preconditions, Read, TxnOp
from kvstore.placement.cluster_map import Strike, at_home, map_of
from kvstore.protocol import (
    Abort,
    Acquire,
    Answer,
    ApplyIntents,
    CancelWait,
    Count,
    DecideCommit,
    Delete,
    Explain,
    Follow,
    Forget,
    ForStore,
    Freeze,
    Get,
    GetLock,
    GetTxn,
    Names,
    Outcome,
    Prepare,
    Pull,
    Put,
    ReadLock,
    ReadUnlock,
    Receive,
    Release,
    Renew,
    Request,
    ResolveTxn,
    Scan,
    ScanLeases,
    Stats,
    Transact,
    encode_frame,
)
from kvstore.shard.peers import Peers
from kvstore.shard.receiver import Receiver
from kvstore.shard.recovery import Recovery
from kvstore.shard.service import ShardService
from kvstore.storage.rows import DECISION, Row
from kvstore.store.ops import WriteOp
from kvstore.store.store import Store
from kvstore.transactions.decisions import Decision
from kvstore.transport.frames import decode_apart

PARTITIONS = 64
LIMITS = Limits(
    disk_reserve_bytes=1,
    log_segment_bytes=4 << 20,
    expiry_sweep_s=0.02,
    txn_timeout_s=0.05,
    request_timeout_s=0.5,
    lock_wait_s_max=1,
    key_bytes_max=64,
    value_bytes_max=4096,
)
WAIT_S = 20.0
EXAMPLES = int(os.environ.get("KVSTORE_WILD_EXAMPLES", "8"))


class Asker:
    """Who waits for the answer to one message."""

    closed = False

    def __init__(self) -> None:
        self.reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def send(self, reply: Any, /) -> None:
        self.reply.set_result(reply)  # raises when there is a second one


class Shard:
    def __init__(self, service: ShardService) -> None:
        self.service = service

    def begin(self, message: Any, *, unchecked: bool = False) -> asyncio.Future[Any]:
        """Over the wire: encoded, decoded, handled. `unchecked`: as if no bound had been thought of."""
        asker = Asker()
        if unchecked:
            self.service._begin(message, asker)
            return asker.reply
        requests, refusals = decode_apart(encode_frame([message]))
        for request in requests:
            self.service.handle(request, asker)
        for refusal in refusals:
            asker.send(refusal)
        return asker.reply

    async def ask(self, message: Any) -> Any:
        return await asyncio.wait_for(self.begin(message), WAIT_S)


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Shard]:
    """A shard with all its work. Fails if its process would have ended."""
    fatal: list[BaseException] = []
    path = folder / "s1.db"
    store = await Store.open(path, LIMITS, "s1", PARTITIONS, fatal.append)  # type: ignore[arg-type]
    async with aiohttp.ClientSession() as session:
        peers = Peers(store, LIMITS, session)
        receiver = Receiver("s1", store, peers, LIMITS)
        recovery = Recovery("s1", store, peers, LIMITS)
        service = ShardService("s1", store, receiver, LIMITS)
        if store.cluster_map is None:
            members = [at_home("s1", "http://s1", store.identity.store_id, copy_id=store.copy_id)]
            owners = [0] * PARTITIONS
            await service.follow(map_of(members, cluster_id="c", epoch=1, partitions=PARTITIONS, owners=owners))
        work = asyncio.create_task(recovery.run())
        try:
            yield Shard(service)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            await recovery.close()
            await receiver.close()
            await peers.close()
            await store.close()
    assert fatal == []


# --- anything ---------------------------------------------------------------------------------------------------------

EDGES = [0, 1, -1, -2, 63, 64, 65_535, 65_536, 10**9, 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
integers = st.sampled_from(EDGES) | st.integers(-(2**63), 2**64 - 1)
small = st.integers(0, 50)
numbers = small | integers
texts = st.sampled_from(["", "a", "b", "c", "nul\0", "🔑", "x" * 64, "x" * 65, "y" * 5000]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=5
)
blobs = st.sampled_from([b"", b"1", b"x" * 4096, b"x" * 4097, b"\xff" * 9000]) | st.binary(max_size=9)
attempts = st.builds(Attempt, numbers, numbers, texts, numbers) | st.sampled_from(
    [Attempt(5, 5, "r"), Attempt(6, 7, "q")]
)
onces = st.none() | st.builds(IdempotencyKey, texts, texts)
guards = st.none() | st.builds(
    Preconditions,
    st.none() | numbers,
    st.booleans(),
    st.booleans(),
    st.none() | st.lists(numbers),
    st.none() | st.lists(numbers),
)
conditions = st.lists(
    st.builds(Condition, texts, st.none() | numbers, st.none() | st.booleans(), st.none() | numbers), max_size=2
)
steps = st.lists(st.builds(TxnOp, st.sampled_from(["put", "delete", "get"]), texts, blobs, numbers), max_size=2)
keys = st.lists(texts, max_size=3)
reads = st.lists(st.none() | st.builds(Read, numbers, st.none() | blobs), max_size=2)
problems = st.none() | st.dictionaries(texts | st.sampled_from(["code", "detail", "self"]), texts | numbers, max_size=3)
waits = st.sampled_from([0, 1, 20, -1, 1001, 2**53, 2**63])  # one that is in bounds ends within the test
odd_locks = st.lists(texts | numbers | st.lists(numbers, max_size=1), max_size=3)
maps = blobs | st.dictionaries(texts, numbers, max_size=2).map(msgspec.json.encode) | st.builds(
    lambda epoch, owner, partition, shards: msgspec.json.encode(
        {
            "cluster_id": "c", "epoch": epoch, "partitions": PARTITIONS, "owners": [owner] * PARTITIONS,
            "moves": [{"id": "m", "source": "s1", "to": "s2", "partitions": [partition]}], **shards,
        }
    ),
    numbers, numbers, numbers,
    st.sampled_from([{"members": []}, {"format": 4, "nodes": [], "shards": []}, {"format": 5}]),
)  # fmt: skip

ids = st.integers(1, 100)
kinds = [
    st.builds(Get, ids, texts),
    st.builds(Put, ids, texts, blobs, numbers, guards, onces),
    st.builds(Delete, ids, texts, guards, onces),
    st.builds(Acquire, ids, texts, numbers, waits, texts, onces),
    st.builds(Renew, ids, texts, numbers, onces),
    st.builds(Release, ids, texts, numbers, onces, numbers, st.none() | texts),
    st.builds(CancelWait, ids, texts, numbers),
    st.builds(GetLock, ids, texts),
    st.builds(ScanLeases, ids, texts, texts, numbers, blobs, texts),
    st.builds(Transact, ids, texts, attempts, conditions, steps, steps, onces),
    st.builds(Prepare, ids, texts, attempts, conditions, steps, steps, st.none() | texts, texts),
    st.builds(
        DecideCommit, ids, texts, attempts, conditions, steps, steps, numbers, st.booleans(), problems, problems, keys,
        onces, reads, reads,
    ),
    st.builds(ApplyIntents, ids, attempts, keys, numbers, st.booleans(), numbers),
    st.builds(Abort, ids, attempts, keys),
    st.builds(ResolveTxn, ids, texts, attempts),
    st.builds(GetTxn, ids, numbers, texts),
    st.builds(ReadLock, ids, attempts, keys),
    st.builds(ReadUnlock, ids, keys, odd_locks),
    st.builds(Forget, ids, st.lists(attempts, max_size=2)),
    st.builds(Follow, ids, maps),
    st.builds(Receive, ids, texts, texts),
    st.builds(Pull, ids, st.lists(numbers, max_size=3), numbers, numbers, numbers),
    st.builds(Freeze, ids, texts),
    st.builds(Scan, ids, texts, texts, numbers, st.booleans(), blobs, texts),
    st.builds(Count, ids, texts, blobs),
    st.builds(Explain, ids, texts),
    st.builds(Stats, ids, numbers),
]  # fmt: skip
messages = st.one_of(kinds)


def test_every_kind_of_request_is_among_the_wild_ones() -> None:
    drawn = {type(find(kind, lambda _: True, settings=settings(database=None))) for kind in kinds}
    kept_by_the_channel = {Names, ForStore}  # which have no answer
    assert drawn == set(Request.__args__) - kept_by_the_channel


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.lists(messages, min_size=1, max_size=40))
def test_a_shard_answers_whatever_it_is_sent_and_goes_on_also_when_opened_again(wild: list[Any]) -> None:
    answers_each(wild, unchecked=False)


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(st.lists(messages.filter(lambda message: isinstance(message, WriteOp)), min_size=1, max_size=40))
def test_an_operation_that_no_check_has_stopped_fails_alone_and_undone(wild: list[Any]) -> None:
    answers_each(wild, unchecked=True)


def answers_each(wild: list[Any], *, unchecked: bool) -> None:
    async def run(folder: Path) -> None:
        async with opened(folder) as shard:
            asked = [shard.begin(message, unchecked=unchecked) for message in wild]
            for message, reply in zip(wild, asked, strict=True):
                assert (await asyncio.wait_for(reply, WAIT_S)).id == message.id
            await goes_on(shard)
        async with opened(folder) as shard:
            await goes_on(shard)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


async def goes_on(shard: Shard) -> None:
    """It writes, reads and counts; after the background work has had its turns, too."""
    for _ in range(2):
        assert (await shard.ask(Put(1, "goes on", b"1"))).status in (201, 204)
        assert (await shard.ask(Get(2, "goes on"))).value == b"1"
        assert isinstance((await shard.ask(Stats(3))).facts, dict)
        await asyncio.sleep(0.06)


# --- the right value of each that once ended the process --------------------------------------------------------------

OLD = Attempt(5, 5, "r")


def struck(partitions: Sequence[int] = (1,), clock: int = 0) -> bytes:
    """A map in which a shard was given up."""
    strike = Strike(shard="s2", store_id="2", epoch=2, partitions=list(partitions), opened=2, clock=clock)
    members = [at_home("s1", "http://s1", "1")]
    owners = [0] * PARTITIONS
    return msgspec.json.encode(
        map_of(members, cluster_id="c", epoch=2, partitions=PARTITIONS, owners=owners, strikes=[strike])
    )


BAD = [
    (Put(7, "k", b"v", 2**63 - 1), 400, "bad-request"),
    (Put(7, "k", b"v", 315_360_000_001), 400, "bad-ttl"),
    (Put(7, "k" * 65, b"v"), 400, "key-too-long"),
    (Put(7, "", b"v"), 400, "key-empty"),
    (Put(7, "k", b"v" * 4097), 413, "value-too-large"),
    (Acquire(7, "k", 86_400_001, 0, ""), 400, "bad-ttl"),
    (Acquire(7, "k", 0, 0, ""), 400, "bad-request"),
    (DecideCommit(7, "k", OLD, [], [], [], 2**53, True, None, None, []), 400, "bad-request"),
    (ApplyIntents(7, OLD, ["k"], 2**63, True, 0), 400, "bad-request"),
    (ApplyIntents(7, OLD, ["k"], 1, True, 2**60), 400, "bad-request"),
    (ReadLock(7, OLD, []), 400, "bad-request"),
    (ReadUnlock(7, ["k"], [1]), 400, "bad-request"),
    (GetTxn(7, 10**9, "5-r"), 400, "bad-request"),
    (GetTxn(7, PARTITIONS, "5-r"), 400, "bad-request"),
    (Pull(7, [64], 0, 0, 10), 400, "bad-request"),
    (Pull(7, [1], 0, 0, -1), 400, "bad-request"),
    (Scan(7, "", "", 0), 400, "bad-request"),
    (Prepare(7, "k", OLD, [], [], []), 400, "bad-request"),
    (Prepare(7, "k", Attempt(1, 2**63, "r"), [], [TxnOp("put", "k")], []), 400, "bad-request"),
    (Transact(7, "k", OLD, [], [TxnOp("put", "k", b"", 2**62)], []), 400, "bad-ttl"),
    (Follow(7, b"{}"), 400, "bad-request"),
    (Follow(7, struck(partitions=[PARTITIONS])), 400, "bad-request"),
    (Follow(7, struck(clock=2**60)), 400, "bad-request"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "status", "code"), BAD, ids=lambda value: type(value).__name__)
async def test_what_is_out_of_bounds_is_refused_by_itself(tmp_path: Path, message: Any, status: int, code: str) -> None:
    async with opened(tmp_path) as shard:
        before, bad, after = shard.begin(Put(1, "before", b"1")), shard.begin(message), shard.begin(Get(2, "before"))
        answer = await bad
        assert (answer.id, answer.status, answer.problem["code"]) == (7, status, code)
        assert (await before).status == 201
        assert (await after).status in (200, 404)
        await goes_on(shard)


async def test_an_attempt_that_no_router_can_have_stamped_is_gone_and_leaves_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as shard:
        outcome = await shard.ask(ResolveTxn(1, "k", Attempt(1, 2**63, "r")))
        assert isinstance(outcome, Outcome)
        assert (outcome.state, outcome.floor) == ("gone", 0)
        await goes_on(shard)
        assert (await shard.ask(Stats(2))).facts["decisions"] == 0


async def test_a_version_above_which_no_steps_are_left_fails_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as shard:
        assert (await shard.begin(ApplyIntents(1, OLD, [], 2**63 - 1, False, 0), unchecked=True)).status == 500
        await goes_on(shard)


async def test_a_decision_beyond_all_bounds_that_lies_in_the_file_goes_and_does_not_end_the_process(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as shard:
        store = shard.service.store
        decision = Decision("aborted", Attempt(1, 2**63, "r"), "k")
        row = Row(DECISION, decision.attempt.name, 1, 1, 1, 0, decision.encode())
        await store.pipeline.step(lambda batch: batch.changes.take([row]))
    async with opened(tmp_path) as shard:
        assert (await shard.ask(Stats(1))).facts["decisions"] == 1
        async with asyncio.timeout(WAIT_S):
            while (await shard.ask(Stats(2))).facts["decisions"]:
                await asyncio.sleep(0.02)
        assert (await shard.ask(Stats(3))).facts["attempts_floor"] == 0
        await goes_on(shard)


async def test_an_intent_that_was_stored_under_wider_limits_is_applied(tmp_path: Path) -> None:
    async with opened(tmp_path) as shard:
        with contextlib.ExitStack() as wider:
            wider.callback(setattr, shard.service._admission, "_limits", LIMITS)
            shard.service._admission._limits = Limits(key_bytes_max=10**6, ttl_s_max=2**60)
            prepare = Prepare(1, "k", OLD, [], [TxnOp("put", "long" * 100, b"v", 2**62)], [])
            assert (await shard.ask(prepare)).vote > 0
        assert (await shard.ask(ApplyIntents(2, OLD, ["long" * 100], 9, True, 2**53 - 1))).status == 200
        answer = await shard.ask(Get(3, "long" * 100))
        assert isinstance(answer, Answer)
        assert (answer.version, answer.value) == (9, b"v")
