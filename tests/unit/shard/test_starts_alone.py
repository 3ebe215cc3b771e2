"""Which stores a node serves before it has heard the controller, by what lies in its folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import StoreBehind
from kvstore.placement.cluster_map import ClusterMap, CopyState, Node, Primary, Replica, at_home, first_map
from kvstore.replication.promise import Identity, read_identity, write_identity
from kvstore.shard.copy_wires import connect
from kvstore.shard.folder import FileFolder
from kvstore.shard.hosted import Surroundings
from kvstore.shard.resident import Resident
from kvstore.storage.disk import OsDisk
from kvstore.storage.record import CommitRecord
from kvstore.store.copy_place import CopyFiles
from kvstore.store.opening import Opened, ToldBefore, open_files, open_unapplied, store_path
from kvstore.store.store import Store
from kvstore.transport.sessions import ClusterSession

PARTITIONS = 64
LIMITS = Limits(log_segment_bytes=1 << 20)
TERM = 3
NODES = ["s1", "n2"]  # the shard's home, and a node that serves it for the home


def fatal(error: BaseException) -> NoReturn:
    raise AssertionError from error


class Told:
    """What the controller says that a store has told. `asked`: the stores of which that was asked."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.asked: list[str] = []

    async def __call__(self, store_id: str) -> ToldBefore:
        self.asked.append(store_id)
        return ToldBefore(self.number)


class Folder:
    """Of that node, with the files of shard s1's store."""

    def __init__(self, path: Path, node_id: str) -> None:
        self.path = path
        self.node_id = node_id
        self.db = store_path(path, "s1", node_id)

    async def follow(self, cluster_map: ClusterMap) -> None:
        """The store has followed that map, and its file has applied it."""
        store = await Store.open(self.db, LIMITS, "s1", PARTITIONS, fatal)
        await store.promise(TERM)
        await store.partitions.adopt(cluster_map)
        await store.close()

    def map(self, epoch: int, copy_id: str, state: CopyState | None = None) -> ClusterMap:
        """That copy here is the primary of shard s1; with another one in that state."""
        home = at_home("s1", "http://127.0.0.1:1", self.store_id)
        joined = [Replica(node="s9", copy_id="other", state=state, joined=epoch)] if state is not None else []
        primary = Primary(node=self.node_id, copy_id=copy_id)
        shard = msgspec.structs.replace(home.shard, primary=primary, term=TERM, replicas=joined)
        found = first_map("c", PARTITIONS, [home._replace(shard=shard)])
        nodes = [*found.nodes, *(Node(id=node, url=f"http://{node}") for node in ("n2", "s9"))]
        return msgspec.structs.replace(found, epoch=epoch, nodes=nodes)

    async def log(self, cluster_map: ClusterMap) -> int:
        """Put a record with that map in the log, which the file does not apply; its number."""
        found = (await open_unapplied(self.db, "s1", PARTITIONS, LIMITS, SYSTEM)).opened
        record = CommitRecord(found.engine.applied.clock, cluster_map=msgspec.json.encode(cluster_map))
        number = found.log.append(record.encode(), TERM)
        found.log.sync()
        await found.close()
        return number

    async def apply(self) -> int:
        """Have the file apply the whole log; the number of its last record."""
        opened = await open_files(self.db, "s1", PARTITIONS, LIMITS, SYSTEM)
        await opened.close()
        return opened.log.last.number

    @property
    def store_id(self) -> str:
        return self.identity.store_id

    @property
    def identity(self) -> Identity:
        found = read_identity(OsDisk(), self.path, self.db.stem)
        assert found is not None
        return found

    def promise(self, term: int) -> None:
        write_identity(OsDisk(), self.path, self.db.stem, self.identity._replace(promised=term))

    async def open(self, told: Told) -> Opened | CopyFiles:
        """Closed again."""
        opened = await FileFolder(self.path, self.node_id, LIMITS).open("s1", PARTITIONS, told)
        await opened.close()
        return opened


@pytest.fixture
async def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    """The store was served alone in `TERM`, as its file says."""
    found = Folder(tmp_path, request.param)
    await found.apply()
    await found.follow(found.map(4, found.identity.copy_id))
    return found


on_both_nodes: Any = pytest.mark.parametrize("folder", NODES, indirect=True)


@on_both_nodes
async def test_a_store_whose_map_names_no_copy_is_served_and_has_asked_how_far_it_had_come(folder: Folder) -> None:
    told = Told()
    assert isinstance(await folder.open(told), Opened)
    assert told.asked == [folder.store_id]


@on_both_nodes
async def test_a_store_that_has_promised_a_higher_term_is_a_copy(folder: Folder) -> None:
    """A copy that joined was promoted with what it had, and has cut off the map that named it."""
    folder.promise(TERM + 1)
    for number in (0, 99):
        opened = await folder.open(Told(number))
        assert isinstance(opened, CopyFiles), "the primary knows more"
        assert opened.copy.identity.promised == TERM + 1


@on_both_nodes
async def test_a_store_whose_map_names_another_copy_here_is_a_copy(folder: Folder) -> None:
    await folder.follow(folder.map(5, "another folder's"))
    assert isinstance(await folder.open(Told()), CopyFiles)


@on_both_nodes
@pytest.mark.parametrize("state", ["joining", "in-sync"])
@pytest.mark.parametrize("told", [0, 99])
async def test_a_store_whose_log_names_a_copy_is_one_though_its_file_names_none(
    folder: Folder, state: CopyState, told: int
) -> None:
    """Also if the other copy has told of more by now: it was promoted, and has it."""
    await folder.log(folder.map(5, folder.identity.copy_id, state))
    opened = await folder.open(Told(told))
    assert isinstance(opened, CopyFiles)
    assert opened.logged is not None
    assert opened.logged.epoch == 5


@on_both_nodes
async def test_an_old_folder_of_a_store_without_copies_is_refused(folder: Folder) -> None:
    last = await folder.apply()
    with pytest.raises(StoreBehind, match=f"ends with record {last}, and .* record {last + 1} was durable"):
        await folder.open(Told(last + 1))
    assert isinstance(await folder.open(Told(last)), Opened), "nothing is left open, and nothing was changed"


@on_both_nodes
async def test_a_store_whose_log_names_no_copy_any_more_asks_too_though_its_file_names_one(folder: Folder) -> None:
    await folder.log(folder.map(5, folder.identity.copy_id, "joining"))
    await folder.apply()
    assert isinstance(await folder.open(Told()), CopyFiles)
    number = await folder.log(folder.map(6, folder.identity.copy_id))
    with pytest.raises(StoreBehind):
        await folder.open(Told(number + 1))
    assert isinstance(await folder.open(told := Told(number)), Opened)
    assert told.asked == [folder.store_id]


async def test_on_its_home_a_store_that_no_map_names_serves_unless_it_has_promised_a_term(tmp_path: Path) -> None:
    """It has promised by a map that its log does not have: another one may be the primary."""
    new = Folder(tmp_path, "s1")
    assert isinstance(await new.open(Told()), Opened)
    assert isinstance(await new.open(Told()), Opened)
    new.promise(1)
    assert isinstance(await new.open(Told()), CopyFiles)


@pytest.fixture
async def controller() -> AsyncIterator[str]:
    """The address of one that has been told nothing."""

    async def told(_: web.Request) -> web.Response:
        return web.json_response({"number": 0, "clock_floor": 0})

    app = web.Application()
    app.router.add_post("/v1/told", told)
    async with TestServer(app) as server:
        yield str(server.make_url("/"))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_new_store_that_died_between_its_first_promise_and_its_first_map_serves_in_the_next_term(
    tmp_path: Path, controller: str
) -> None:
    folder = Folder(tmp_path, "s1")
    await folder.apply()
    folder.promise(TERM)
    async with aiohttp.ClientSession() as session:
        dial, files = partial(connect, session, ClusterSession()), FileFolder(tmp_path, "s1", LIMITS)
        around = Surroundings("s1", files, LIMITS, session, ClusterSession(), controller, fatal, SYSTEM, dial)
        resident = Resident("s1", around)
        await resident.begin(PARTITIONS)
        running = asyncio.create_task(resident.run())
        named = folder.map(TERM, folder.identity.copy_id)
        resident.hear(named)
        await until(lambda: (report := resident.report()) is not None and report.needs_term)
        shard = msgspec.structs.replace(named.shards[0], term=TERM + 1)
        resident.hear(msgspec.structs.replace(named, epoch=TERM + 1, shards=[shard]))
        await until(lambda: resident.local.hosted is not None and resident.local.hosted.is_open)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await resident.close()
    assert isinstance(await folder.open(Told()), Opened), "from now on it needs no controller"
