"""Sessions and orders that come to a copy: on a failing or full disk, while it closes or is promoted."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from kvstore.placement.cluster_map import at_home, first_map
from kvstore.replication.beats import Drop
from kvstore.replication.copy_applier import CopyApplier
from kvstore.replication.messages import Foreign, Hello, Told
from kvstore.replication.promise import Identity, read_identity
from kvstore.replication.session import Session
from kvstore.storage.disk import OsDisk, OsFile
from tests.unit.shard.resident_copy import (
    PARTITIONS,
    STORE_ID,
    Came,
    folder_of,
    is_served,
    named,
    promoted,
    resident_copy,
    until,
)


async def test_a_copy_whose_disk_fails_in_a_session_ends_the_process(tmp_path: Path) -> None:
    """The connection alone must not end: what is on the disk is not known, and no later session would mend that."""
    failed: list[BaseException] = []

    def note(error: BaseException) -> NoReturn:
        failed.append(error)
        raise SystemExit

    def fails(file: OsFile) -> None:
        raise OSError(5, "I/O error")

    async with resident_copy(tmp_path, note) as resident:
        hello = Hello(Session(STORE_ID, 3, "start", resident.local.copy_id, 1))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(OsFile, "sync", fails)
            with pytest.raises(SystemExit):
                await resident.sessions.serve_here(Came(hello))
        await resident.close()
    assert [str(error) for error in failed] == ["[Errno 5] I/O error"]


async def test_a_session_that_comes_while_a_copy_is_closed_does_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with resident_copy(tmp_path) as resident:
        came = Came(Hello(Session(STORE_ID, 3, "start", resident.local.copy_id, 1)))
        end_sessions = resident.sessions.end

        async def beset() -> None:
            await end_sessions()
            await resident.sessions.serve_here(came)

        monkeypatch.setattr(resident.sessions, "end", beset)
        await resident.close()
    assert [type(answer) for answer in came.sent] == [Foreign]


async def test_a_copy_on_a_full_disk_ends_a_session_that_it_cannot_promise_for_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: OsFile, data: bytes, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with resident_copy(tmp_path) as resident:
        hello = Hello(Session(STORE_ID, 3, "start", resident.local.copy_id, 1))
        refused = Came(hello)
        with monkeypatch.context() as patched:
            patched.setattr(OsFile, "pwrite", full)
            await resident.sessions.serve_here(refused)
        assert refused.sent == []
        taken = Came(hello)
        serving = asyncio.create_task(resident.sessions.serve_here(taken))
        async with asyncio.timeout(60):
            while not taken.sent:
                await asyncio.sleep(0.01)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        assert [type(answer) for answer in taken.sent] == [Told]
        await resident.close()


async def test_a_copy_that_is_to_be_the_primary_opens_when_there_is_room_for_its_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, refused = OsFile.pwrite, 0

    def full(file: OsFile, data: bytes, offset: int) -> None:
        nonlocal refused
        if not refused and b"promised" in data:
            refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        pwrite(file, data, offset)

    async with resident_copy(tmp_path) as resident:
        monkeypatch.setattr(OsFile, "pwrite", full)
        running = asyncio.create_task(resident.run())
        resident.hear(promoted(resident.local.copy_id))
        await until(running, lambda: is_served(resident))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await resident.close()
    assert refused == 1


@pytest.mark.parametrize("comes_back", [False, True])
async def test_a_guest_whose_shard_has_left_is_a_copy_again_also_if_another_store_has_its_name(
    tmp_path: Path, comes_back: bool
) -> None:
    """The node has stores of its own, and must not end; the controller tells it to drop the copy."""
    async with resident_copy(tmp_path) as resident:
        running = asyncio.create_task(resident.run())
        found = promoted(resident.local.copy_id)
        resident.hear(found)
        await until(running, lambda: is_served(resident))
        others = first_map("c", PARTITIONS, [at_home("s1" if comes_back else "s9", "http://127.0.0.1:1", "other")])
        resident.hear(msgspec.structs.replace(others, epoch=4))
        await until(running, lambda: resident.local.copy is not None)
        resident.drop(Drop(shard="s1", copy_id=resident.local.copy_id))
        async with asyncio.timeout(60):
            await running
    assert folder_of(tmp_path, "n2").copies() == []


async def test_a_session_that_comes_while_a_copy_becomes_a_store_reaches_neither(tmp_path: Path) -> None:
    """It could cut the log, or promise, behind the back of the store that is about to have the files."""
    answers: list[Any] = []
    hand_over = CopyApplier.hand_over

    async with resident_copy(tmp_path) as resident:
        copy_id = resident.local.copy_id

        async def beset(applier: CopyApplier) -> Identity:
            came = Came(Hello(Session(STORE_ID, 99, "other", copy_id, 1)))
            await resident.sessions.serve_here(came)
            answers.extend(came.sent)
            return await hand_over(applier)

        found = promoted(copy_id)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(CopyApplier, "hand_over", beset)
            running = asyncio.create_task(resident.run())
            resident.hear(found)
            await until(running, lambda: is_served(resident))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await resident.close()
    assert answers == [Foreign()]
    kept = read_identity(OsDisk(), tmp_path, "shard-s1.copy-n2")
    assert kept is not None
    assert kept.promised == 3


async def test_an_order_to_drop_a_copy_is_refused_while_the_map_names_it(tmp_path: Path) -> None:
    """The answer to a beat may come late, from before the map named the copy; a map that does not is waited for."""
    async with resident_copy(tmp_path) as resident:
        running = asyncio.create_task(resident.run())
        order = Drop(shard="s1", copy_id=resident.local.copy_id)
        resident.hear(named(resident.local.copy_id))
        resident.drop(order)
        await asyncio.sleep(0.1)
        assert folder_of(tmp_path, "n2").copies() == ["s1"]
        assert not running.done()
        resident.hear(named("another copy"))
        resident.drop(order)
        await asyncio.wait_for(running, 30)
    assert folder_of(tmp_path, "n2").copies() == []
    assert (tmp_path / "shard-s1.copy-n2.db.removed").exists()
