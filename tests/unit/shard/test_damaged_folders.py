"""Damaged files in one folder: found at the opening, set aside whole, and rebuilt where a map allows it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import pytest

from kvstore.environment import SYSTEM
from kvstore.errors import DataCorrupt, KvError, is_damage
from kvstore.placement.cluster_map import ClusterMap, Primary
from kvstore.placement.ring import partition_of
from kvstore.replication.copy import StoreCopy
from kvstore.replication.promise import Identity, read_identity, write_identity
from kvstore.shard.damaged import until_damaged
from kvstore.shard.followed_map import FollowedMap
from kvstore.shard.resident import Resident
from kvstore.storage.disk import OsDisk, OsFile
from kvstore.storage.engine import Application
from kvstore.storage.record import CommitRecord
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.store.copy_place import CopyFiles
from kvstore.store.damaged_files import salvage, set_damaged_aside
from kvstore.store.opening import Opened, untold
from tests.unit.shard.damage import DAMAGES, in_header_of_file, in_id, with_the_id_of_another_store, without_id
from tests.unit.shard.resident_copy import (
    LIMITS,
    PARTITIONS,
    STORE_ID,
    folder_of,
    named,
    promoted,
    resident_copy,
    served_by,
    until,
)
from tests.unit.shard.test_node_failover import PATIENCE_S


def a_map(copy_id: str, epoch: int = 3) -> ClusterMap:
    """Shard s1 of node s1, whose copy has that id; a copy in sync lies on node s2."""
    found = named("another")
    shard = msgspec.structs.replace(found.shards[0], primary=Primary(node="s1", copy_id=copy_id), term=1)
    return msgspec.structs.replace(found, epoch=epoch, shards=[shard])


def _row(number: int) -> Row:
    key = f"k{number}"
    return Row(VALUE, key, partition_of(key.encode(), PARTITIONS), 1, 1, 0, b"v")


async def a_store_with_copies(path: Path, store_id: str = STORE_ID) -> str:
    """The home of shard s1, with some records in log and file, and the map that names its copy; its copy's id."""
    files = await folder_of(path, "s1").make_copy("s1", store_id, PARTITIONS)
    copy, rows = files.copy, [_row(number) for number in range(50)]
    copy_id = copy.identity.copy_id
    encoded = msgspec.json.encode(a_map(copy_id))
    copy.log.append(CommitRecord(Clock(1, 1), rows, encoded).encode())
    copy.log.append(CommitRecord(Clock(2, 2), []).encode())
    copy.log.sync()
    await copy.engine.apply(Application(rows, copy.log.last, Clock(2, 2), encoded))
    copy.log.append(CommitRecord(Clock(3, 3), []).encode())
    copy.log.sync()
    copy.log.note_durable()
    await files.close()
    identity = read_identity(OsDisk(), path, "shard-s1")
    assert identity is not None
    write_identity(OsDisk(), path, "shard-s1", identity._replace(promised=2, filling=False))
    return copy_id


@pytest.mark.parametrize("damage", DAMAGES)
async def test_each_kind_of_damage_is_found_at_the_opening_and_all_that_was_there_is_kept(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    copy_id = await a_store_with_copies(tmp_path)
    await a_store_with_copies(tmp_path / "another", "another-store")
    damage(tmp_path / "shard-s1")
    there = {path.name: path.read_bytes().rstrip(b"\0") for path in tmp_path.glob("shard-s1.*")}
    folder = folder_of(tmp_path, "s1")
    with pytest.raises(KvError) as found:
        await folder.open("s1", PARTITIONS, untold)
    assert is_damage(found.value)
    salvaged = await folder.salvage("s1", a_map(copy_id, 2))
    assert salvaged is not None
    knows_id = damage not in (in_id, without_id, with_the_id_of_another_store)
    assert (salvaged.store_id, salvaged.copy_id) == (STORE_ID, copy_id if knows_id else "")
    files = await folder.rebuild("s1", salvaged, PARTITIONS)
    assert files.copy.is_filling
    assert files.copy.identity.copy_id != copy_id
    assert files.copy.identity.promised == (2 if knows_id else 0)
    assert files.copy.log.last.number == 0
    await files.close()
    kept = {path.name: path.read_bytes().rstrip(b"\0") for path in tmp_path.glob("shard-s1.db.damaged*")}
    for name in set(there) - {"shard-s1.lock", "shard-s1.db-wal", "shard-s1.db-shm"}:
        aside = "shard-s1.db.damaged" + name.removeprefix("shard-s1").removeprefix(".db")
        assert aside in kept
        if name not in ("shard-s1.db", "shard-s1.log.note"):  # which an opening may add to before it finds out
            assert kept[aside] == there[name], name


async def test_damage_to_a_row_of_a_copy_counts_only_while_its_primary_is_heard(tmp_path: Path) -> None:
    await a_store_with_copies(tmp_path)
    with closing(sqlite3.connect(tmp_path / "shard-s1.db")) as connection:
        connection.execute("UPDATE rows SET body = 'w' WHERE key = 'k3'")
        connection.commit()
    files = await folder_of(tmp_path, "s1").open("s1", PARTITIONS, untold)
    assert isinstance(files, CopyFiles)
    files.copy.lease.heard_at -= 1000
    verifying = asyncio.create_task(until_damaged(files.copy, followed(), SYSTEM, LIMITS))
    await asyncio.wait([verifying], timeout=1.5)
    assert not verifying.done()
    patient = asyncio.create_task(_heard_again_and_again(files.copy))
    with pytest.raises(DataCorrupt, match="k3"):
        await asyncio.wait_for(verifying, PATIENCE_S)
    patient.cancel()
    await files.close()


async def test_damage_to_a_row_of_a_copy_that_is_to_be_the_primary_does_not_count_also_right_after_its_start(
    tmp_path: Path,
) -> None:
    """It is served, as far as it can be read, once it has its term."""
    copy_id = await a_store_with_copies(tmp_path)
    with closing(sqlite3.connect(tmp_path / "shard-s1.db")) as connection:
        connection.execute("UPDATE rows SET body = 'w' WHERE key = 'k3'")
        connection.commit()
    files = await folder_of(tmp_path, "s1").open("s1", PARTITIONS, untold)
    assert isinstance(files, CopyFiles)
    map_of_it = followed()
    map_of_it.hear(a_map(copy_id))
    patient = asyncio.create_task(_heard_again_and_again(files.copy))
    verifying = asyncio.create_task(until_damaged(files.copy, map_of_it, SYSTEM, LIMITS))
    async with asyncio.timeout(PATIENCE_S):
        while not files.copy.own_engine.is_examined and not verifying.done():
            await asyncio.sleep(0.01)
    await asyncio.wait([verifying], timeout=1.0)
    assert not verifying.done()
    for work in (verifying, patient):
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    await files.close()


def followed() -> FollowedMap:
    """What a node knows of its own shard before it has heard of a map."""
    return FollowedMap("s1", "s1", SYSTEM)


async def test_a_copy_that_has_nothing_to_apply_is_examined_before_it_has_to_open_a_term(tmp_path: Path) -> None:
    await a_store_with_copies(tmp_path)
    files = await folder_of(tmp_path, "s1").open("s1", PARTITIONS, untold)
    assert isinstance(files, CopyFiles)
    assert not files.copy.own_engine.is_examined
    verifying = asyncio.create_task(until_damaged(files.copy, followed(), SYSTEM, LIMITS))
    async with asyncio.timeout(PATIENCE_S):
        while not files.copy.own_engine.is_examined:
            await asyncio.sleep(0.01)
    verifying.cancel()
    await asyncio.gather(verifying, return_exceptions=True)
    await files.close()


async def _heard_again_and_again(copy: StoreCopy) -> None:
    while True:
        copy.lease.hear()
        await asyncio.sleep(0.01)


async def test_files_without_another_copy_by_any_map_are_refused_as_with_one_copy(tmp_path: Path) -> None:
    await a_store_with_copies(tmp_path)
    in_header_of_file(tmp_path / "shard-s1")
    folder = folder_of(tmp_path, "s1")
    alone = msgspec.structs.replace(named(None), epoch=9)
    assert await folder.salvage("s1", alone) is None
    assert await folder.salvage("s1", None) is not None, "a record of its log has a map"


async def test_the_only_copy_of_a_shard_if_not_at_its_home_is_told_to_be_damaged_and_left_as_it_is(
    tmp_path: Path,
) -> None:
    async with resident_copy(tmp_path) as resident:
        copy_id = resident.local.copy_id
        alone = msgspec.structs.replace(promoted(copy_id), epoch=4)
        async with served_by(resident) as running:
            resident.hear(alone)
            await until(running, lambda: resident.local.logged_map == alone)
        in_header_of_file(tmp_path / "shard-s1.copy-n2")
        before = (tmp_path / "shard-s1.copy-n2.db").read_bytes()
        again = Resident("s1", resident._around)
        await again.begin(PARTITIONS)
        again.hear(alone)
        running = asyncio.create_task(again.run())
        await asyncio.wait([running], timeout=1.5)
        assert not running.done()
        report = again.report()
        assert report is not None
        assert (report.role, report.copy_id) == ("damaged", copy_id)
        assert (tmp_path / "shard-s1.copy-n2.db").read_bytes() == before
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await again.close()


async def test_a_map_that_only_the_log_of_another_copy_here_has_says_that_there_are_copies(tmp_path: Path) -> None:
    """What a copy has is applied late, and the log of the damaged store may be released further."""
    await a_store_with_copies(tmp_path)
    in_header_of_file(tmp_path / "shard-s1")
    found = salvage(tmp_path / "shard-s9.db", "s1", "s1", None, [tmp_path / "shard-s1.db"])
    assert found is not None
    assert found.store_id == STORE_ID


async def test_a_map_of_before_the_first_copy_does_not_hide_the_one_that_the_log_of_the_damaged_store_has(
    tmp_path: Path,
) -> None:
    """Files follow their logs late: right after its first copy was made a store knows of it by its log alone."""
    copy_id = await a_store_with_copies(tmp_path)
    in_header_of_file(tmp_path / "shard-s1")
    older = msgspec.json.encode(msgspec.structs.replace(a_map(copy_id, 2), shards=named(None).shards))
    files = await folder_of(tmp_path, "s1").make_copy("s3", "another-store", PARTITIONS)
    await files.copy.engine.apply(Application([], files.copy.log.last, Clock(1, 1), older))
    await files.close()
    salvaged = await folder_of(tmp_path, "s1").salvage("s1", None)
    assert salvaged is not None
    assert (salvaged.copy_id, salvaged.newest_map.epoch) == (copy_id, 3)


@pytest.mark.parametrize("broken_off_at", range(12))
async def test_a_store_that_no_map_names_is_set_aside_whole_after_a_crash_at_any_line(
    tmp_path: Path, broken_off_at: int
) -> None:
    """As one that a node made because its files were lost: nothing here says that another copy could take its place."""
    folder = folder_of(tmp_path, "s1")
    opened = await folder.open("s1", PARTITIONS, untold)
    assert isinstance(opened, Opened)
    await opened.close()
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    with suppress(OSError):
        fresh = Identity(STORE_ID, "fresh", 2, filling=True)
        set_damaged_aside(BrokenOff(broken_off_at), tmp_path, "shard-s1", fresh)
    again = await folder.open("s1", PARTITIONS, untold)
    if isinstance(again, Opened):  # as before
        assert again.engine.identity == opened.engine.identity
    else:
        assert again.copy.identity.copy_id == "fresh"
        kept = {name.replace("shard-s1.db", "shard-s1").replace("shard-s1", "shard-s1.db.damaged") for name in names}
        assert kept <= {path.name for path in tmp_path.iterdir()}
        assert (tmp_path / "shard-s1.db.damaged.id").read_bytes() == names["shard-s1.id"]
        assert not list(tmp_path.glob("*.begun"))
    await again.close()


@pytest.mark.parametrize("broken_off_at", range(12))
async def test_a_crash_while_damaged_files_are_set_aside_never_leaves_what_is_served(
    tmp_path: Path, broken_off_at: int
) -> None:
    copy_id = await a_store_with_copies(tmp_path)
    in_header_of_file(tmp_path / "shard-s1")
    disk = BrokenOff(broken_off_at)
    with suppress(OSError):
        set_damaged_aside(disk, tmp_path, "shard-s1", Identity(STORE_ID, "fresh", 2, filling=True))
    folder = folder_of(tmp_path, "s1")
    found: KvError | None = None
    try:
        opened = await folder.open("s1", PARTITIONS, untold)
    except KvError as error:
        found = error
    if found is not None:
        assert is_damage(found)
        return
    if isinstance(opened, CopyFiles):
        assert opened.copy.identity.copy_id == "fresh"
        assert opened.copy.is_filling
    else:
        assert opened.engine.identity.store_id != STORE_ID, "a new store, which the cluster refuses"
        assert opened.copy_file is not None
        assert opened.copy_file.identity.copy_id != copy_id
    await opened.close()


class BrokenOff(OsDisk):
    """The process dies at the call of that number that changes a name or makes a file."""

    def __init__(self, at: int) -> None:
        self._left = at

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise OSError(5, "the process dies here")

    def rename(self, old: Path, new: Path) -> None:
        self._count()
        super().rename(old, new)

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> OsFile:
        if create:
            self._count()
        return super().open(path, create=create, write=write)
