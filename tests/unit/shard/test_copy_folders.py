"""What a node's folder is taken for when its process starts: files of copies, whole or left by half, real ones."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore import set_aside
from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import ForeignData, is_damage
from kvstore.placement.cluster_map import ClusterMap, Node, Primary, Replica, Shard, at_home, first_map
from kvstore.replication.beats import Drop, Make
from kvstore.replication.copy_applier import CopyApplier
from kvstore.replication.messages import Foreign, Hello, Told
from kvstore.replication.promise import Identity, read_identity, write_identity
from kvstore.replication.session import Session
from kvstore.shard import copy_sessions
from kvstore.shard.copy_wires import connect
from kvstore.shard.folder import FileFolder
from kvstore.shard.hosted import Surroundings
from kvstore.shard.resident import Resident
from kvstore.storage.disk import OsDisk, OsFile
from kvstore.storage.engine import Application, TryLater
from kvstore.storage.sqlite import SqliteEngine
from kvstore.store.copy_place import CopyFiles
from kvstore.store.opening import Opened, ToldBefore, untold
from kvstore.store.tables import OnFatal
from kvstore.transport.sessions import ClusterSession

PARTITIONS = 64
LIMITS = Limits(log_segment_bytes=1 << 20, told_timeout_s=0.2)
STORE_ID = "0123456789abcdef0123456789abcdef"


def fatal(error: BaseException) -> NoReturn:
    raise AssertionError from error


def folder_of(path: Path, node_id: str) -> FileFolder:
    return FileFolder(path, node_id, LIMITS)


async def opened_home(folder: FileFolder) -> Opened:
    """The store of shard s1 on its home."""
    opened = await folder.open("s1", PARTITIONS, untold)
    assert isinstance(opened, Opened)
    assert opened.lock_fd is not None
    return opened


async def home_with_a_record(folder: FileFolder) -> Opened:
    """The same, with a record in its log."""
    opened = await opened_home(folder)
    opened.log.append(b"of the time before")
    opened.log.sync()
    return opened


async def made_copy(path: Path) -> str:
    """Node n2 has an empty copy of shard s1; the copy's id."""
    files = await folder_of(path, "n2").make_copy("s1", STORE_ID, PARTITIONS)
    await files.close()
    return files.copy.identity.copy_id


async def test_a_copy_keeps_its_id_and_is_never_served_by_itself(tmp_path: Path) -> None:
    made = await made_copy(tmp_path)
    folder = folder_of(tmp_path, "n2")
    assert folder.copies() == ["s1"]
    opened = await folder.open("s1", PARTITIONS, untold)
    assert isinstance(opened, CopyFiles)
    assert opened.copy.identity.copy_id == made
    await opened.close()


async def test_a_node_without_a_folder_makes_its_own_store(tmp_path: Path) -> None:
    opened = await opened_home(folder_of(tmp_path / "new", "s1"))
    await opened.close()


@pytest.mark.parametrize("has_begun_again", [False, True])
async def test_a_home_that_a_snapshot_was_filling_opens_as_an_empty_copy_and_does_not_serve(
    tmp_path: Path, has_begun_again: bool
) -> None:
    """Its file knows no map, as that of a new store, which would serve."""
    folder = folder_of(tmp_path, "s1")
    new = await home_with_a_record(folder)
    if has_begun_again:  # the process died between the log's new beginning and that of the file
        new.log.restart(new.log.last)
    await new.close()
    identity = read_identity(OsDisk(), tmp_path, "shard-s1")
    assert identity is not None
    write_identity(OsDisk(), tmp_path, "shard-s1", identity._replace(promised=7, filling=True))
    opened = await folder.open("s1", PARTITIONS, untold)
    assert isinstance(opened, CopyFiles)
    assert opened.copy.is_filling
    assert opened.copy.log.last.number == 0
    assert opened.copy.identity == identity._replace(promised=7, filling=True)
    await opened.close()


@pytest.mark.parametrize("broken_off", [False, True])
async def test_an_empty_copy_on_its_shards_home_is_a_copy_again_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_off: bool
) -> None:
    """No map is in its files yet; as a store that serves it would be behind what the primary elsewhere has told."""
    folder = folder_of(tmp_path, "s1")

    async def told(_: str) -> ToldBefore:
        return ToldBefore(40)

    if broken_off:  # its log is made, its file half
        with monkeypatch.context() as patched:
            patched.setattr(SqliteEngine, "open", _dies)
            with pytest.raises(OSError, match="dies"):
                await folder.make_copy("s1", STORE_ID, PARTITIONS)
    else:
        await (await folder.make_copy("s1", STORE_ID, PARTITIONS)).close()
    made = read_identity(OsDisk(), tmp_path, "shard-s1")
    opened = await folder.open("s1", PARTITIONS, told)
    assert isinstance(opened, CopyFiles)
    assert opened.copy.identity == made
    assert opened.copy.engine.identity.store_id == STORE_ID
    await opened.close()


async def test_an_empty_copy_whose_id_is_damaged_is_refused_as_damaged_and_not_as_a_store_that_is_behind(
    tmp_path: Path,
) -> None:
    """Who is told that it is behind would look for a newer backup; the copy needs none."""
    folder = folder_of(tmp_path, "s1")
    await (await folder.make_copy("s1", STORE_ID, PARTITIONS)).close()
    path = tmp_path / "shard-s1.id"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    async def told(_: str) -> ToldBefore:
        return ToldBefore(40)

    with pytest.raises(ForeignData, match="are copied from there") as refused:
        await folder.open("s1", PARTITIONS, told)
    assert is_damage(refused.value)


async def _dies(*_: object) -> NoReturn:
    raise OSError(5, "the process dies here")


async def test_what_a_crash_left_of_a_copy_that_was_being_made_is_rebuilt(tmp_path: Path) -> None:
    """Without an id it would stand under the store's own, which the primary's copy may have."""
    made = await made_copy(tmp_path)
    (tmp_path / "shard-s1.copy-n2.id").unlink()
    assert folder_of(tmp_path, "n2").copies() == []
    again = await made_copy(tmp_path)
    assert again not in (made, STORE_ID)
    assert folder_of(tmp_path, "n2").copies() == ["s1"]


async def test_a_copy_whose_id_is_damaged_is_refused(tmp_path: Path) -> None:
    await made_copy(tmp_path)
    (tmp_path / "shard-s1.copy-n2.id").write_bytes(b"{}")
    with pytest.raises(ForeignData, match="move its files away"):
        await folder_of(tmp_path, "n2").open("s1", PARTITIONS, untold)


async def test_a_copy_whose_setting_aside_was_broken_off_at_any_file_is_never_opened(tmp_path: Path) -> None:
    made = await made_copy(tmp_path)
    folder = folder_of(tmp_path, "n2")
    renamed: list[str] = []
    rename = Path.rename

    def broken_off(path: Path, target: Path) -> Path:
        if renamed:
            raise OSError(5, "the process dies here")
        renamed.append(path.name)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "rename", broken_off)
        with pytest.raises(OSError, match="dies"):
            await folder.set_aside("s1")
    assert folder.copies() == []
    await folder.set_aside("s1")
    assert not (tmp_path / "shard-s1.copy-n2.db").exists()
    assert await made_copy(tmp_path) != made


@pytest.mark.parametrize("done", [0, 1, 2])
async def test_a_home_whose_setting_aside_was_broken_off_is_set_aside_at_the_next_start_which_makes_a_store(
    tmp_path: Path, done: int
) -> None:
    folder = folder_of(tmp_path, "s1")
    await (await home_with_a_record(folder)).close()
    synced: list[Path] = []

    def break_off(path: Path) -> None:
        synced.append(path)
        if len(synced) > done:
            raise OSError(5, "the power goes")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(set_aside, "sync_folder", break_off)
        if done < 2:
            with pytest.raises(OSError, match="the power goes"):
                await folder.set_aside("s1")
            assert (tmp_path / "shard-s1.db").exists(), "the file goes last"
        else:
            set_aside.begin(tmp_path / "shard-s1.db")
    new = await opened_home(folder)
    assert new.log.last.number == 0
    assert (tmp_path / "shard-s1.db.removed.log.000001").exists()
    await new.close()


async def test_a_copy_that_is_set_aside_takes_the_place_of_none_that_was_set_aside_before(tmp_path: Path) -> None:
    """Each may be the last that has what was acknowledged."""
    folder, made = folder_of(tmp_path, "n2"), []
    for _ in range(3):
        made.append(await made_copy(tmp_path))
        await folder.set_aside("s1")
    kept = ["shard-s1.copy-n2.db.removed.1", "shard-s1.copy-n2.db.removed.2", "shard-s1.copy-n2.db.removed"]
    found = [read_identity(OsDisk(), tmp_path, name) for name in kept]
    assert [identity.copy_id for identity in found if identity is not None] == made
    assert all((tmp_path / name).exists() and (tmp_path / f"{name}.log.000001").exists() for name in kept)
    assert not (tmp_path / "shard-s1.copy-n2.lock").exists()


def named(copy_id: str | None) -> ClusterMap:
    """Shard s1 of node s1; with that copy on node n2."""
    home = at_home("s1", "http://127.0.0.1:1", STORE_ID)
    replicas = [Replica(node="n2", copy_id=copy_id, state="in-sync", joined=1)] if copy_id is not None else []
    shard = Shard(id="s1", store_id=STORE_ID, primary=home.shard.primary, term=1, replicas=replicas)
    return first_map("c", PARTITIONS, [home._replace(shard=shard)])


def promoted(copy_id: str) -> ClusterMap:
    """That copy is the primary of shard s1, in term 3."""
    found = named(None)
    node = Node(id="n2", url="http://127.0.0.1:2")
    shard = msgspec.structs.replace(found.shards[0], primary=Primary(node="n2", copy_id=copy_id), term=3)
    return msgspec.structs.replace(found, epoch=3, nodes=[*found.nodes, node], shards=[shard])


def is_served(resident: Resident) -> bool:
    return resident.local.hosted is not None and resident.local.hosted.is_open


async def until(running: asyncio.Task[None], condition: Callable[[], bool]) -> None:
    """Raises what ends the work before."""
    async with asyncio.timeout(60):
        while not condition():
            if running.done():
                running.result()
            await asyncio.sleep(0.01)


async def nothing_told(_: web.Request) -> web.Response:
    """What a controller answers that no store has told of any record."""
    return web.json_response({"number": 0, "version": 0, "clock_floor": 0})


@asynccontextmanager
async def resident_copy(path: Path, on_fatal: OnFatal = fatal) -> AsyncIterator[Resident]:
    """On node n2, an empty copy of shard s1."""
    controller = web.Application()
    controller.router.add_post("/v1/told", nothing_told)
    async with TestServer(controller) as server, aiohttp.ClientSession() as session:
        dial, url = partial(connect, session, ClusterSession()), str(server.make_url("/"))
        folder = folder_of(path, "n2")
        around = Surroundings("n2", folder, LIMITS, session, ClusterSession(), url, on_fatal, SYSTEM, dial)
        resident = Resident("s1", around)
        await resident.make(Make(shard="s1", store_id=STORE_ID, partitions=PARTITIONS))
        yield resident


class Came:
    """A connection by which these messages have come, and then no more."""

    def __init__(self, *messages: Any) -> None:
        self._messages = list(messages)
        self.sent: list[Any] = []

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def receive(self) -> Any:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    async def close(self) -> None:
        self._messages.clear()


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


def promoted_before_a_copy(copy_id: str) -> ClusterMap:
    """As `promoted`; a copy of it on node s1 joins."""
    found = promoted(copy_id)
    joining = [Replica(node="s1", copy_id=STORE_ID, state="joining", joined=3)]
    return msgspec.structs.replace(found, shards=[msgspec.structs.replace(found.shards[0], replicas=joining)])


def replaced(copy_id: str) -> ClusterMap:
    """The primary of shard s1 is on node s1 again, in term 9; that copy is one in sync."""
    home = at_home("s1", "http://127.0.0.1:1", STORE_ID)
    replicas = [Replica(node="n2", copy_id=copy_id, state="in-sync", joined=9)]
    shard = Shard(id="s1", store_id=STORE_ID, primary=home.shard.primary, term=9, replicas=replicas)
    return msgspec.structs.replace(promoted(copy_id), epoch=9, shards=[shard])


@asynccontextmanager
async def served_by(resident: Resident) -> AsyncIterator[asyncio.Task[None]]:
    """The copy is promoted, and served."""
    running = asyncio.create_task(resident.run())
    try:
        resident.hear(promoted_before_a_copy(resident.local.copy_id))
        await until(running, lambda: is_served(resident))
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await resident.close()


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
