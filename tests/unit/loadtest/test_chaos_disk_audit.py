"""loadtest.chaos.disk_audit: it finds every row that is wrong in the file of a store, and none in a right one."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from kvstore.placement.cluster_map import ClusterMap, Replica, at_home, map_of
from kvstore.store.store import Store
from loadtest.chaos.disk_audit import look
from loadtest.damage.child import LIMITS, PARTITIONS, cluster_map, end, write

KEYS = [f"key-{number}" for number in range(30)]


@pytest.fixture
async def folder(tmp_path: Path) -> Path:
    """With the file of a store of one shard that owns everything: 30 keys, one of them deleted."""
    store = await Store.open(tmp_path / "shard-s1.db", LIMITS, "s1", PARTITIONS, end)
    await store.partitions.adopt(cluster_map())
    for key in KEYS:
        assert (await write(store, key, key.encode())).status == 201
    assert (await write(store, KEYS[0], None)).status == 204
    await store.applier.flush()
    await store.close()
    return tmp_path


def change(folder: Path, statement: str, file: str = "shard-s1.db") -> None:
    with closing(sqlite3.connect(folder / file)) as connection, connection:
        connection.execute(statement)


async def test_a_right_file_has_what_is_listed_and_a_listing_that_differs_is_told(folder: Path) -> None:
    found = look(folder, cluster_map())
    assert (found.behind, found.wrong) == ([], [])
    assert {key: value for key, (value, _) in found.values.items()} == {key: key.encode() for key in KEYS[1:]}
    assert found.differences(found.values) == []
    lost = {key: value for key, value in found.values.items() if key != KEYS[3]}
    (sentence,) = found.differences(lost)
    assert sentence.startswith(f"{KEYS[3]}: listed as None, in its file")
    assert len(found.differences(found.values | {"more": (b"", 1)})) == 1


async def test_a_file_without_the_newest_map_is_behind(folder: Path) -> None:
    newer = map_of(
        [at_home("s1", "http://127.0.0.1:1", "s1")],
        cluster_id="damage", epoch=8, partitions=PARTITIONS, owners=[0] * PARTITIONS, moves=[],
    )  # fmt: skip
    (sentence,) = look(folder, newer).behind
    assert "has the map of epoch 7, the controller that of epoch 8" in sentence


async def test_rows_of_partitions_that_are_not_owned_are_told(folder: Path) -> None:
    nothing = cluster_map()
    stranger: ClusterMap = map_of(
        [at_home("s1", "http://127.0.0.1:1", "s1"), at_home("s2", "http://127.0.0.1:2", "s2")],
        cluster_id="damage", epoch=nothing.epoch, partitions=PARTITIONS, owners=[1] * PARTITIONS, moves=[],
    )  # fmt: skip
    (folder / "shard-s2.db").write_bytes((folder / "shard-s1.db").read_bytes())
    found = look(folder, stranger)
    assert any("rows of partitions that it does not own" in sentence for sentence in found.behind)


async def test_a_copy_that_has_not_the_same_rows_or_a_damaged_one_is_told(folder: Path) -> None:
    alone = cluster_map()
    (shard,) = alone.shards
    copied = msgspec.structs.replace(
        alone,
        shards=[
            msgspec.structs.replace(shard, replicas=[Replica(node="n2", copy_id="other", state="in-sync", joined=1)])
        ],
    )
    copy = folder / "shard-s1.copy-n2.db"
    copy.write_bytes((folder / "shard-s1.db").read_bytes())
    assert look(folder, copied).behind == []
    for statement, said in (
        ("UPDATE clock SET log_number = log_number - 1", "('', 'clock')"),
        ("DELETE FROM rows WHERE key = 'key-7'", "('value', 'key-7'): None"),
        ("UPDATE rows SET body = 'x' WHERE key = 'key-6'", "checksum"),
    ):
        copy.write_bytes((folder / "shard-s1.db").read_bytes())
        change(folder, statement, "shard-s1.copy-n2.db")
        (sentence,) = look(folder, copied).behind
        assert said in sentence
    copy.unlink()  # the map is followed by another one, in which the copy has another place
    (sentence,) = look(folder, copied).behind
    assert sentence.startswith("shard-s1.copy-n2.db or shard-s1.db cannot be read")


@pytest.mark.parametrize(
    ("statement", "is_told"),
    [
        ("UPDATE rows SET body = 'x' WHERE key = 'key-5'", lambda said: "checksum" in said),
        ("UPDATE rows SET partition = (partition + 1) % 64 WHERE key = 'key-5'", lambda said: "belong" in said),
        ("DELETE FROM rows WHERE key = 'key-5'", lambda said: "counts 29 keys" in said),
        ("UPDATE clock SET keys = 31", lambda said: "counts 31 keys" in said),
    ],
)
async def test_what_never_may_be_is_told(folder: Path, statement: str, is_told: Callable[[str], bool]) -> None:
    change(folder, statement)
    assert any(map(is_told, look(folder, cluster_map()).wrong)), look(folder, cluster_map())
