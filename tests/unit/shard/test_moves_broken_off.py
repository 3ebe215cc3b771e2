"""Moves that are broken off, begin again, come back or cross: restarts, late messages, any order of changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import Conflict
from kvstore.protocol import Acquire, Delete, Freeze, Pull, Put, Renew
from kvstore.store.partitions import View
from tests.unit.shard.two_shards import PARTITIONS, Cluster, at, cluster_of_two, rows, trimmed

# --- restarts, late messages, ways back -------------------------------------------------------------------------------


async def test_a_freeze_survives_a_restart_and_ends_with_a_map_without_its_move(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    await cluster.restart("s1")
    assert await cluster.value("s1", "a") == 421
    assert await cluster.value("s1", "b") is None, "what is not fenced it answers for, with no controller there"
    cluster.void(move_id)
    await cluster.spread("s1")
    assert await cluster.value("s1", "a") == b"1"


async def test_a_destination_that_starts_again_between_the_last_pull_and_the_commit_has_all(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    lease = (await cluster.ask("s1", Acquire(2, "a", 60_000, 0, "me"))).version
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    await cluster.restart("s2")
    await asyncio.sleep(0.1)  # it would trim what it takes for left behind
    cluster.commit(move_id)
    await cluster.spread()
    assert await cluster.value("s2", "a") == b"1"
    assert (await cluster.ask("s2", Renew(3, "a", lease))).status == 200


async def test_an_order_that_comes_once_more_to_a_destination_that_has_started_again_removes_nothing(cluster: Cluster):
    """The move is committed meanwhile, and the source has dropped the rows: nothing could bring them again."""
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    await cluster.restart("s2")
    cluster.commit(move_id)
    await cluster.spread("s1")
    assert (await cluster.carry(move_id)).step == "done"
    with pytest.raises(Conflict, match="complete"):
        await cluster.stores["s2"].migration.clear(move_id)
    await cluster.spread()
    assert await cluster.value("s2", "a") == b"1"
    assert not cluster.stores["s2"].partitions.view.freezes, "what was noted ends with the move"


async def test_a_move_that_becomes_complete_while_a_newer_map_is_adopted_stays_complete(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    partitions = cluster.stores["s2"].partitions
    prepare = partitions._prepare

    async def complete_before(*args: Any) -> Any:
        assert (await cluster.carry(move_id)).step == "done"
        return await prepare(*args)

    monkeypatch.setattr(partitions, "_prepare", complete_before)
    cluster.plan("b")
    await cluster.spread("s2")
    assert partitions.is_complete(move_id)
    await cluster.restart("s2")
    assert cluster.stores["s2"].partitions.is_complete(move_id)


async def test_a_freeze_that_comes_when_its_move_is_given_up_is_refused(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    cluster.void(move_id)
    await cluster.spread()
    answer = await cluster.ask("s1", Freeze(2, move_id))
    assert (answer.status, answer.problem["code"]) == (409, "conflict")
    assert await cluster.value("s1", "a") == b"1"


async def test_a_move_that_is_given_up_leaves_no_trace(cluster: Cluster, tmp_path: Path):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    await cluster.stores["s2"].applier.flush()
    assert rows(tmp_path, "s2") != {}
    cluster.void(move_id)
    await cluster.spread()
    await trimmed(tmp_path, "s2", "a")
    assert rows(tmp_path, "s2") == {}
    assert await cluster.value("s1", "a") == b"1"
    with pytest.raises(Conflict, match="does not stand"):
        await cluster.carry(move_id)
    assert cluster.stores["s2"].inspection.snapshot().keys == 0


async def test_rows_that_come_while_a_move_is_given_up_are_dropped_though_the_file_has_them_later(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    store = cluster.stores["s2"]
    page = await cluster.stores["s1"].migration.pull(Pull(0, [at("a")], 0, 0, 100))
    prepare, occupied = store.partitions._prepare, store.tables.engine.occupied

    async def take_after(*args: Any) -> Any:
        """The last moment at which the move stands: what comes now is not in the file when that is looked at."""
        prepared = await prepare(*args)
        await store.migration.take(move_id, page.rows)
        return prepared

    async def occupied_before() -> Set[int]:
        return await occupied() - {at("a")}

    monkeypatch.setattr(store.partitions, "_prepare", take_after)
    monkeypatch.setattr(store.tables.engine, "occupied", occupied_before)
    cluster.void(move_id)
    await cluster.spread()
    await store.applier.flush()
    await trimmed(tmp_path, "s2", "a")


async def test_there_and_back_again_before_the_drop(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    may_drop = asyncio.Event()
    partitions = cluster.stores["s1"].partitions
    drop = partitions._drop

    async def drop_late(orphaned: Set[int]) -> None:
        await may_drop.wait()
        await drop(orphaned)

    monkeypatch.setattr(partitions, "_drop", drop_late)
    for key in ("deleted there", "changed there", "kept"):
        await cluster.ask("s1", Put(1, key, b"old"))
        assert await cluster.value("s1", key) == b"old"  # in the cache of s1
    keys = ("deleted there", "changed there", "kept", "new there")
    await cluster.move(*keys)
    await cluster.ask("s2", Delete(2, "deleted there"))
    await cluster.ask("s2", Put(3, "changed there", b"new"))
    await cluster.ask("s2", Put(4, "new there", b"new"))
    await cluster.move(*keys, to="s1")
    may_drop.set()
    await asyncio.sleep(0.1)
    assert [await cluster.value("s1", key) for key in keys] == [None, b"new", b"old", b"new"]
    assert cluster.stores["s1"].inspection.snapshot().keys == 3
    await cluster.move(*keys)
    assert [await cluster.value("s2", key) for key in keys] == [None, b"new", b"old", b"new"]


async def test_a_drop_takes_nothing_that_is_owned_or_on_its_way_here(cluster: Cluster, tmp_path: Path):
    for key in ("owned", "coming", "left"):
        await cluster.ask("s1", Put(1, key, b"1"))
    await cluster.move("coming", "left")
    move_id = cluster.plan("coming", to="s1")
    await cluster.spread()
    await cluster.carry(move_id, "s1")
    store = cluster.stores["s1"]
    await store.partitions._drop(set(range(PARTITIONS)))
    await store.applier.flush()
    while await store.applier.clean_some():
        pass
    assert {key for _, key in rows(tmp_path, "s1")} == {"owned", "coming"}
    cluster.commit(move_id)
    await cluster.spread()
    assert await cluster.value("s1", "coming") == b"1"


async def test_two_moves_at_the_same_time(cluster: Cluster):
    keys = [f"key-{number}" for number in range(40)]
    for key in keys:
        await cluster.ask("s1", Put(1, key, key.encode()))
    half = PARTITIONS // 2
    moves = [cluster.plan(spare=range(half)), cluster.plan(spare=range(half, PARTITIONS))]
    await cluster.spread()
    assert [progress.step for progress in await asyncio.gather(*map(cluster.carry, moves))] == ["done", "done"]
    cluster.void(moves[0])
    cluster.commit(moves[1])
    await cluster.spread()
    for key in keys:
        mine, other = ("s1", "s2") if at(key) < half else ("s2", "s1")
        assert (await cluster.value(mine, key), await cluster.value(other, key)) == (key.encode(), 421)


async def test_a_map_that_is_older_changes_nothing(cluster: Cluster):
    old = cluster.map
    await cluster.move("a")
    view = cluster.stores["s1"].partitions.view
    assert not await cluster.stores["s1"].partitions.adopt(old)
    assert cluster.stores["s1"].partitions.view == view
    assert view != View()


# --- any order of changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_between_the_steps_the_shards_say_what_a_dictionary_would(tmp_path: Path, seed: int):
    """Random writes between any two messages of random moves, restarts, moves that are given up, and back again."""
    choose = random.Random(seed)
    keys = [f"key-{number}" for number in range(30)]
    model: dict[str, bytes] = {}
    versions: dict[str, int] = {}
    async with cluster_of_two(tmp_path, move_page_rows_max=5) as cluster:

        async def write(_: Any = None) -> None:
            for _ in range(choose.randrange(4)):
                key, value = choose.choice(keys), str(choose.random()).encode()
                request = choose.choice([Put(1, key, value), Delete(1, key), Put(1, key, value, 3_600_000)])
                answer = await cluster.ask(cluster.owner(key), request)
                if answer.status == 421:
                    continue  # fenced: no shard answers for it
                if isinstance(request, Put):
                    model[key] = value
                else:
                    assert (answer.status == 204) == (key in model)
                    model.pop(key, None)
                if answer.status != 404:
                    assert answer.version > versions.get(key, 0)
                    versions[key] = answer.version

        cluster.before_message = cluster.after_message = write
        for _ in range(6):
            await write()
            to = choose.choice(["s1", "s2"])
            owned = [p for p, owner in enumerate(cluster.map.owners) if owner != (0 if to == "s1" else 1)]
            if not owned:
                continue
            move_id = cluster.plan(to=to, spare=choose.sample(owned, choose.randint(1, len(owned))))
            await cluster.spread()
            progress = await cluster.carry(move_id, to)
            assert progress.step == "done", progress.detail
            if choose.random() < 0.3:
                await cluster.restart(choose.choice(["s1", "s2"]))
            if choose.random() < 0.7:
                cluster.commit(move_id)
            else:
                cluster.void(move_id)
            await cluster.spread(*choose.sample(["s1", "s2"], 2))
            found = {}
            for key in keys:
                answers = {shard_id: await cluster.value(shard_id, key) for shard_id in ("s1", "s2")}
                assert list(answers.values()).count(421) == 1, "one shard answers"
                found[key] = answers[cluster.owner(key)]
            assert {key: value for key, value in found.items() if value is not None} == model
            assert sum(store.inspection.snapshot().keys for store in cluster.stores.values()) == len(model)
