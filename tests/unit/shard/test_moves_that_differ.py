"""A move whose rows at both ends differ, or are damaged, or may lack a deletion, is not done."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import Conflict
from kvstore.protocol import Delete, Pull, Put
from kvstore.storage.rows import checksum
from tests.unit.shard.two_shards import Cluster, at, nothing


async def test_a_copy_that_may_have_missed_a_deletion_is_void(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))

    async def delete_and_forget(request: Any) -> None:
        if not isinstance(request, Pull):
            return
        cluster.after_message = nothing
        await cluster.ask("s1", Delete(2, "a"))
        store = cluster.stores["s1"]
        await store.applier.flush()
        assert await store.maintenance.trim_some(store.clock.sequence, 10)
        await store.applier.flush()
        assert await store.applier.clean_some() == 1

    cluster.after_message = delete_and_forget
    move_id = cluster.plan("a")
    await cluster.spread()
    progress = await cluster.carry(move_id)
    assert (progress.step, "begins again" in progress.detail) == ("failed", True)


async def test_a_copy_that_differs_is_not_taken(cluster: Cluster, tmp_path: Path):
    for key in ("a", "b"):
        await cluster.ask("s1", Put(1, key, b"1"))

    async def lose_a_row(request: Any) -> None:
        if isinstance(request, Pull) and request.after_row < 0:
            await cluster.stores["s2"].applier.flush()
            with closing(sqlite3.connect(tmp_path / "s2.db")) as connection, connection:
                connection.execute("DELETE FROM rows WHERE key = 'a'")

    cluster.before_message = lose_a_row
    move_id = cluster.plan("a", "b")
    await cluster.spread()
    progress = await cluster.carry(move_id)
    assert (progress.step, "differs" in progress.detail) == ("failed", True)


async def test_a_damaged_row_is_not_carried_on(cluster: Cluster, tmp_path: Path):
    await cluster.ask("s1", Put(1, "a", b"1"))
    await cluster.stores["s1"].applier.flush()
    with closing(sqlite3.connect(tmp_path / "s1.db")) as connection, connection:
        connection.execute("UPDATE rows SET body = x'00' WHERE key = 'a'")
    move_id = cluster.plan("a")
    await cluster.spread()
    progress = await cluster.carry(move_id)
    assert (progress.step, "'a'" in progress.detail) == ("failed", True)


async def test_a_source_whose_row_is_not_taken_finds_that_it_is_damaged_when_the_move_begins_again(
    cluster: Cluster, tmp_path: Path
):
    """Its own verification would find it within a day; until then the move would begin again and again."""
    await cluster.ask("s1", Put(1, "a", b"1"))
    await cluster.stores["s1"].applier.flush()
    with closing(sqlite3.connect(tmp_path / "s1.db")) as connection, connection:
        connection.execute("UPDATE rows SET body = x'00' WHERE key = 'a'")
    for _ in range(2):
        assert not cluster.stores["s1"].tables.verification.damage
        move_id = cluster.plan("a")
        await cluster.spread()
        assert (await cluster.carry(move_id)).step == "failed"
        cluster.void(move_id)
        await cluster.spread()
    assert "'a'" in cluster.stores["s1"].tables.verification.damage


async def test_what_comes_after_the_comparison_is_compared_again(cluster: Cluster):
    await cluster.ask("s1", Put(1, "a", b"1"))
    move_id = cluster.plan("a")
    await cluster.spread()
    assert (await cluster.carry(move_id)).step == "done"
    fenced = await cluster.stores["s1"].partitions.freeze(move_id)
    store = cluster.stores["s2"]
    await store.migration.complete(move_id, fenced, [])
    other = next(key for key in map(str, range(10_000)) if at(key) == at("a"))
    row = ("value", other, at("a"), 1, 0, b"x", None, checksum("value", other, 1, 0, b"x"))
    await store.migration.take(move_id, [row])
    with pytest.raises(Conflict, match="differs"):
        await store.migration.complete(move_id, fenced, [])
