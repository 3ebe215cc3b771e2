"""Which copy a folder has, and what it has promised, is known after every crash, or the copy does not serve."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import ForeignData
from kvstore.placement.cluster_map import ClusterMap, Replica, at_home, first_map
from kvstore.store.copy_file import copy_path, make_copy, open_copy, rename_store
from kvstore.store.opening import open_files, store_path

STORE = "the-store"
PARTITIONS = 64


def the_map(copy_id: str, *replicas: Replica, term: int = 5, store_id: str = "the-store") -> ClusterMap:
    found = first_map("c", PARTITIONS, [at_home("s1", "http://s1", store_id, copy_id=copy_id, term=term)])
    shard = msgspec.structs.replace(found.shards[0], replicas=list(replicas))
    return msgspec.structs.replace(found, shards=[shard])


REPLICA = Replica(node="s2", copy_id="other", state="in-sync", joined=4)


def test_the_files_of_a_copy_are_named_by_shard_and_node() -> None:
    home, away = (store_path(Path("data"), "s1", node) for node in ("s1", "s2"))
    assert [str(path) for path in (home, copy_path(home))] == ["data/shard-s1.db", "data/shard-s1.id"]
    assert [str(path) for path in (away, copy_path(away), away.with_suffix(".lock"))] == [
        "data/shard-s1.copy-s2.db", "data/shard-s1.copy-s2.id", "data/shard-s1.copy-s2.lock",
    ]  # fmt: skip


def test_the_same_promise_may_be_made_by_many_threads_at_once(tmp_path: Path) -> None:
    made = make_copy(tmp_path / "shard-s1.db", STORE, "mine")
    with ThreadPoolExecutor(8) as threads:
        for term in range(1, 60):
            list(threads.map(made.promise, [term] * 8))
    assert made.identity.promised == 59


def test_a_promise_survives_and_never_falls(tmp_path: Path) -> None:
    db = tmp_path / "shard-s1.db"
    made = make_copy(db, STORE, "mine")
    for term in (3, 3, 7):
        made.promise(term)
        found = open_copy(db, "s1", STORE, the_map("mine", REPLICA)).identity
        assert (found.copy_id, found.promised) == ("mine", term)
    with pytest.raises(ForeignData, match="promised term 7, and the map names term 6"):
        made.promise(6)
    assert open_copy(db, "s1", STORE, None).identity.promised == 7
    assert [path.name for path in tmp_path.iterdir()] == ["shard-s1.id"], "nothing is left over"


@pytest.mark.parametrize("what", ["missing", "damaged", "cut"])
def test_a_lost_file_is_made_again_from_a_map_without_replicas_and_refused_with_some(tmp_path: Path, what: str) -> None:
    db = tmp_path / "shard-s1.db"
    make_copy(db, STORE, "mine").promise(5)
    path = copy_path(db)
    content = path.read_bytes()
    if what == "missing":
        path.unlink()
    elif what == "damaged":
        path.write_bytes(content.replace(b'"promised":5', b'"promised":1'))
    else:
        path.write_bytes(content[:-9])
    left = path.read_bytes() if path.exists() else None
    with pytest.raises(ForeignData, match="must not serve"):
        open_copy(db, "s1", STORE, the_map("mine", REPLICA))
    assert (path.read_bytes() if path.exists() else None) == left, "it is left as it is"
    found = open_copy(db, "s1", STORE, the_map("mine")).identity
    assert (found.copy_id, found.promised) == ("mine", 5)
    assert path.read_bytes() == content


@pytest.mark.parametrize("what", ["missing", "damaged"])
@pytest.mark.parametrize(("shard", "node"), [("s1", "s2"), ("s2", "s2")], ids=["a guest", "at home"])
def test_the_lost_file_of_a_copy_that_joins_a_primary_on_another_node_is_not_made_again_from_its_map(
    tmp_path: Path, shard: str, node: str, what: str
) -> None:
    """The map that came with the snapshot names no replica yet; the file may be half of that snapshot."""
    db = store_path(tmp_path, shard, node)
    make_copy(db, STORE, "mine")
    if what == "missing":
        copy_path(db).unlink()
    else:
        copy_path(db).write_bytes(b"{}")
    found = the_map("of-the-primary")
    primary = msgspec.structs.replace(found.shards[0].primary, node="s1")
    away = msgspec.structs.replace(found, shards=[msgspec.structs.replace(found.shards[0], id=shard, primary=primary)])
    with pytest.raises(ForeignData, match="which copy this is is not known: move its files away"):
        open_copy(db, shard, STORE, away)


def test_the_lost_file_of_a_primary_away_from_home_is_made_again_from_a_map_without_replicas(tmp_path: Path) -> None:
    db = store_path(tmp_path, "s1", "s2")
    found = the_map("mine")
    primary = msgspec.structs.replace(found.shards[0].primary, node="s2")
    away = msgspec.structs.replace(found, shards=[msgspec.structs.replace(found.shards[0], primary=primary)])
    assert open_copy(db, "s1", STORE, away).identity.copy_id == "mine"


def test_a_store_of_an_earlier_program_is_the_copy_that_the_converted_map_names(tmp_path: Path) -> None:
    for durable in (None, the_map("the-store", term=0)):
        copy_path(tmp_path / "shard-s1.db").unlink(missing_ok=True)
        assert open_copy(tmp_path / "shard-s1.db", "s1", STORE, durable).identity.copy_id == "the-store"
        assert copy_path(tmp_path / "shard-s1.db").exists()


def test_a_damaged_file_that_no_map_stands_for_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """The cluster may know the copy by its id already: another one would be refused for ever."""
    db = tmp_path / "shard-s1.db"
    make_copy(db, STORE, "mine")
    copy_path(db).write_bytes(b"{}")
    with pytest.raises(ForeignData, match="no map here names this copy: put the file back"):
        open_copy(db, "s1", STORE, None)
    assert copy_path(db).read_bytes() == b"{}"


def test_a_file_of_another_store_is_as_good_as_lost(tmp_path: Path) -> None:
    db = tmp_path / "shard-s1.db"
    make_copy(db, "another", "theirs").promise(9)
    with pytest.raises(ForeignData, match="is of store another, and the files beside it are of store the-store"):
        open_copy(db, "s1", STORE, the_map("mine", REPLICA))
    assert json.loads(copy_path(db).read_bytes())["copy_id"] == "theirs", "it is left as it is"
    found = open_copy(db, "s1", STORE, the_map("mine")).identity
    assert (found.store_id, found.copy_id, found.promised) == (STORE, "mine", 5)
    rename_store(db, "new-name")
    assert open_copy(db, "s1", "new-name", None).identity.copy_id == "mine"


async def opened_copy(path: Path) -> str:
    engine, log, lock_fd, _, copy_file, _ = await open_files(path, "s1", PARTITIONS, Limits(), SYSTEM)
    await engine.close()
    log.close()
    assert lock_fd is not None
    os.close(lock_fd)
    assert copy_file is not None
    assert copy_file.identity.store_id == engine.identity.store_id
    return copy_file.identity.copy_id


async def test_every_new_store_is_a_copy_of_its_own_also_beside_the_id_of_an_earlier_one(tmp_path: Path) -> None:
    first = await opened_copy(tmp_path / "shard-s1.db")
    assert await opened_copy(tmp_path / "shard-s1.db") == first
    for path in tmp_path.iterdir():
        if path.suffix != ".id":
            path.unlink()
    second = await opened_copy(tmp_path / "shard-s1.db")
    assert second != first
    assert await opened_copy(tmp_path / "shard-s1.db") == second
