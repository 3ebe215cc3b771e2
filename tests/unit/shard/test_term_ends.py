"""A primary whose term ends goes on as a copy, with its open files and at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.messages import Foreign, Hello, Told
from kvstore.replication.promise import read_identity
from kvstore.replication.session import Session
from kvstore.shard import copy_sessions
from kvstore.shard.folder import FileFolder
from kvstore.shard.resident import Resident
from kvstore.storage.disk import OsDisk
from kvstore.storage.engine import Application, TryLater
from kvstore.storage.sqlite import SqliteEngine
from kvstore.store.copy_place import CopyFiles
from kvstore.store.opening import Opened, untold
from tests.unit.shard.resident_copy import (
    PARTITIONS,
    STORE_ID,
    Came,
    folder_of,
    is_served,
    promoted,
    promoted_before_a_copy,
    replaced,
    resident_copy,
    served_by,
    until,
)


async def test_a_primary_whose_term_ends_goes_on_as_a_copy_with_its_open_files_and_has_promised_the_next_term(
    tmp_path: Path,
) -> None:
    """Else the node that takes over would wait until they are opened again, and then for the promise."""
    async with resident_copy(tmp_path) as resident, served_by(resident) as running:
        store, copy_id = resident.local.store, resident.local.copy_id
        assert store is not None
        resident.hear(replaced(copy_id))
        await until(running, lambda: resident.local.copy is not None)
        copy = resident.local.copy
        assert copy is not None
        assert copy.log is store.tables.log
        assert copy.engine is store.tables.engine
        assert copy.own_engine.is_examined
        assert (copy.identity.promised, copy.identity.copy_id) == (9, copy_id)
        assert read_identity(OsDisk(), tmp_path, "shard-s1.copy-n2") == copy.identity
        assert copy.lease.may_be_promoted(), "it has granted nothing since it was promoted"


async def test_a_primary_that_is_given_a_new_term_opens_again_in_that_very_one(tmp_path: Path) -> None:
    """It gave its lease back, say, and the planned change could not be made."""
    async with resident_copy(tmp_path) as resident, served_by(resident) as running:
        before = resident.local.hosted
        found = promoted_before_a_copy(resident.local.copy_id)
        shard = msgspec.structs.replace(found.shards[0], term=9)
        resident.hear(msgspec.structs.replace(found, epoch=9, shards=[shard]))
        await until(running, lambda: is_served(resident) and resident.local.hosted is not before)
        assert resident.local.store is not None
        assert resident.local.store.tables.term == 9


async def test_a_primary_without_copies_that_a_person_has_gone_on_without_is_a_copy_and_ends_no_node(
    tmp_path: Path,
) -> None:
    """It was stopped when the map came that named a copy, and the next one makes that the primary."""
    async with resident_copy(tmp_path) as resident:
        running = asyncio.create_task(resident.run())
        copy_id = resident.local.copy_id
        resident.hear(promoted(copy_id))
        await until(running, lambda: is_served(resident))
        resident.hear(replaced(copy_id))
        await until(running, lambda: resident.local.copy is not None)
        assert resident.local.copy_id == copy_id
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await resident.close()


async def test_a_session_of_the_next_primary_is_kept_until_the_map_that_names_it_has_come(tmp_path: Path) -> None:
    """Refused, it would come again later, and clients wait meanwhile."""
    async with resident_copy(tmp_path) as resident, served_by(resident) as running:
        copy_id = resident.local.copy_id
        came = Came(Hello(Session(STORE_ID, 9, "other", copy_id, 9)))
        serving = asyncio.create_task(resident.sessions.serve(came))
        await asyncio.sleep(0.05)
        assert came.sent == []
        resident.hear(replaced(copy_id))
        await until(running, lambda: bool(came.sent))
        assert [type(answer) for answer in came.sent] == [Told]
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_a_session_is_not_kept_for_ever_by_a_primary_that_stays_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_sessions, "_KEPT_S", 0.01)
    async with resident_copy(tmp_path) as resident, served_by(resident):
        came = Came(Hello(Session(STORE_ID, 2, "other", resident.local.copy_id, 1)))
        await resident.sessions.serve(came)
        assert [type(answer) for answer in came.sent] == [Foreign]


async def test_the_store_of_files_that_change_hands_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that comes meanwhile would find no store here, and come again later."""
    as_copy = FileFolder.as_copy
    found: list[str] = []

    async def look(folder: FileFolder, shard_id: str, opened: Opened, logged: ClusterMap | None) -> CopyFiles:
        assert resident.local.identity is None
        found.append(resident.local.store_id)
        return await as_copy(folder, shard_id, opened, logged)

    monkeypatch.setattr(FileFolder, "as_copy", look)
    async with resident_copy(tmp_path) as resident, served_by(resident) as running:
        resident.hear(replaced(resident.local.copy_id))
        await until(running, lambda: resident.local.copy is not None)
    assert found == [STORE_ID]


async def test_a_copy_that_starts_knows_the_newest_map_of_its_log_though_its_file_does_not_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is offered where the controller has lost its own."""

    async def not_now(engine: SqliteEngine, application: Application) -> None:
        raise TryLater("the disk is full")

    monkeypatch.setattr(SqliteEngine, "apply", not_now)
    async with resident_copy(tmp_path) as resident, served_by(resident) as running:
        resident.hear(replaced(resident.local.copy_id))
        await until(running, lambda: resident.local.copy is not None)
        assert resident.local.logged_map is not None
    around = resident._around
    again = Resident("s1", around)
    await again.begin(PARTITIONS)
    assert again.local.copy is not None
    assert again.local.copy.engine.applied.cluster_map is None
    assert again.local.logged_map is not None
    assert again.local.logged_map.epoch == 3
    await again.close()


async def test_a_process_that_ends_just_when_a_term_does_closes_no_file_under_the_work_of_the_store(
    tmp_path: Path,
) -> None:
    async with resident_copy(tmp_path) as resident, served_by(resident) as running:
        store = resident.local.store
        assert store is not None
        async with store.applier.turn:  # something is written into the file
            resident.hear(replaced(resident.local.copy_id))
            await until(running, lambda: store._tasks["sweep"].done())
            running.cancel()
            await asyncio.wait([running], timeout=0.1)
            await asyncio.to_thread(store.tables.log.note_durable)
        await asyncio.wait([running])
        assert resident.local.copy is not None, "to be closed in order"
        await resident.close()
        files = await folder_of(tmp_path, "n2").open("s1", PARTITIONS, untold)
        assert isinstance(files, CopyFiles)
        await files.close()
