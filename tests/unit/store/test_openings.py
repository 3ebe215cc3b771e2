"""A store and the partitions of a shard that was lost: what it refuses, what it says is gone, what it opens empty."""

from __future__ import annotations

from typing import Any

import msgspec

from kvstore.errors import Conflict, WrongOwner, from_problem
from kvstore.model import Attempt, TxnOp
from kvstore.placement.cluster_map import Move, Strike
from kvstore.placement.ring import partition_of
from kvstore.protocol import Abort, DecideCommit, Frozen, Outcome, Prepare, ResolveTxn, Vote
from kvstore.store.store import Store
from tests.unit.store.conftest import PARTITIONS, Harness, make_map

HERE, THERE = "here", "there"  # keys: the partition of the one was lost, that of the other was not
LOST = partition_of(HERE.encode(), PARTITIONS)
STRUCK, OPENED = 5, 7
CLOCK = 1 << 33
EARLY, BETWEEN, LATE = (Attempt(n, n, "router01", epoch) for n, epoch in ((100, 4), (200, 6), (300, 7)))


def strike(opened: int = OPENED) -> Strike:
    return Strike(shard="s9", store_id="s9", epoch=STRUCK, partitions=[LOST], opened=opened, clock=CLOCK)


async def adopt(store: Store, epoch: int, *strikes: Strike, owner: int = 0, moves: Any = ()) -> None:
    """The lost partition is that of s1, the store under test, or (1) of s2; all others are the store's."""
    cluster_map = make_map(epoch, lambda partition: owner if partition == LOST else 0, moves)
    await store.partitions.adopt(msgspec.structs.replace(cluster_map, strikes=list(strikes)))


def prepare(key: str, attempt: Attempt) -> Prepare:
    return Prepare(1, "elsewhere", attempt, [], [TxnOp("put", key, b"x")], [])


def commit(key: str, attempt: Attempt, *others: str) -> DecideCommit:
    return DecideCommit(1, key, attempt, [], [TxnOp("put", key, b"x")], [], 7, True, None, None, list(others))


async def decisions(harness: Harness) -> list[Any]:
    return await harness.sql("SELECT key FROM rows WHERE kind = 'decision' AND body IS NOT NULL")


async def test_in_a_reopened_partition_only_attempts_of_the_opening_and_later_prepare(harness: Harness) -> None:
    await adopt(harness.store, OPENED, strike())
    for attempt in (EARLY, BETWEEN):
        refused = await harness.write(prepare(HERE, attempt))
        assert isinstance(from_problem(refused.problem), WrongOwner)
        assert (await harness.store.inspection.explain(HERE))["intent"] is None
    assert isinstance(await harness.write(prepare(THERE, EARLY)), Vote)
    assert isinstance(await harness.write(prepare(HERE, LATE)), Vote)


async def test_what_was_decided_at_a_lost_anchor_is_gone_and_never_said_to_be_aborted(harness: Harness) -> None:
    await adopt(harness.store, OPENED, strike())
    for attempt in (EARLY, BETWEEN):
        for op in (commit(HERE, attempt, THERE), ResolveTxn(1, HERE, attempt), commit(HERE, attempt, THERE)):
            outcome = await harness.write(op)
            assert isinstance(outcome, Outcome)
            assert outcome.state == "gone"
    assert await decisions(harness) == []
    assert (await harness.get(HERE)).status == 404
    assert (await harness.write(commit(HERE, LATE, THERE))).state == "committed"
    assert (await harness.write(ResolveTxn(1, THERE, EARLY))).state == "aborted"


async def test_a_vote_that_was_lost_commits_nothing_however_often_the_commit_comes(harness: Harness) -> None:
    await adopt(harness.store, STRUCK, strike(opened=0), owner=1)
    refused = await harness.write(commit(THERE, EARLY, HERE))
    assert isinstance(from_problem(refused.problem), Conflict)
    assert (await harness.write(commit(THERE, EARLY, HERE))).state == "aborted"
    assert (await harness.get(THERE)).status == 404
    await adopt(harness.store, OPENED, strike(), owner=1)
    assert (await harness.write(commit(THERE, LATE, HERE))).state == "committed"


async def test_a_commit_that_waits_when_its_participant_is_struck_commits_nothing(harness: Harness) -> None:
    await adopt(harness.store, STRUCK - 1, owner=1)
    blocking = Attempt(900, 900, "router02", 4)
    assert isinstance(await harness.write(prepare(THERE, blocking)), Vote)
    waiting = harness.write(commit(THERE, EARLY, HERE))
    await adopt(harness.store, STRUCK, strike(opened=0), owner=1)
    await harness.write(Abort(1, blocking, [THERE]))
    assert isinstance(from_problem((await waiting).problem), Conflict)
    assert (await harness.get(THERE)).status == 404


async def test_what_is_opened_is_empty_whatever_lay_there_and_its_versions_are_above_the_clock(
    harness: Harness,
) -> None:
    await harness.put(HERE)
    await harness.put(THERE)
    await harness.sql("CREATE TABLE kept AS SELECT * FROM rows WHERE key = ?", HERE)
    await adopt(harness.store, STRUCK, strike(opened=0), owner=1)
    await harness.sql("INSERT OR REPLACE INTO rows SELECT * FROM kept")  # left behind, and not tidied away yet
    await adopt(harness.store, OPENED, strike())
    assert (await harness.get(HERE)).status == 404
    assert (await harness.get(THERE)).status == 200
    assert await harness.sql("SELECT * FROM rows WHERE key = ?", HERE) == []
    assert harness.store.clock.keys == 1
    assert (await harness.put(HERE)).version > CLOCK
    await harness.reopen()
    assert (await harness.get(HERE)).status == 200
    assert harness.store.strike == STRUCK


async def test_what_came_by_a_move_after_the_opening_stays(harness: Harness) -> None:
    await adopt(harness.store, OPENED, strike(), owner=1)
    move = Move(id="m", source="s2", to="s1", partitions=[LOST])
    await adopt(harness.store, OPENED + 1, strike(), owner=1, moves=[move])
    await harness.store.migration.clear("m")
    await harness.store.migration.complete("m", Frozen(0, 1, 0, 0, (0, 0)), [])
    await adopt(harness.store, OPENED + 2, strike())
    await harness.put(HERE)
    await adopt(harness.store, OPENED + 3, strike())
    harness.forget_cache()
    assert (await harness.get(HERE)).status == 200
