"""The opening of a term on real files: whom it asks, what it waits for, which log is the truth.

Each test is a sentence of the rules of an opening: broken, acknowledged records are lost or two nodes serve one shard.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import DataCorrupt
from kvstore.replication import messages
from kvstore.replication.configuration import Configuration, Primary, Replica
from kvstore.replication.copy import StoreCopy
from kvstore.replication.promise import read_identity
from kvstore.replication.serving import serve_copy
from kvstore.replication.session import Session
from kvstore.replication.wire import Wire, WireLost
from kvstore.shard.copy_wires import connect
from kvstore.shard.folder import FileFolder
from kvstore.shard.hosted import Surroundings
from kvstore.shard.term_opening import TermOpening
from kvstore.storage.disk import OsDisk
from kvstore.storage.engine import Application
from kvstore.storage.record import CommitRecord
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.store.copy_place import CopyFiles
from kvstore.store.opening import untold
from kvstore.transport.sessions import ClusterSession
from tests.unit.store.real_files import hide_from_unique_index
from tests.unit.waiting import until

LIMITS = Limits(log_segment_bytes=1 << 20, replica_timeout_s=0.2, lease_s=0.5, failover_after_s=1.0, told_timeout_s=0.1)
STORE_ID = "0123456789abcdef0123456789abcdef"
TERM = 9


class MemoryWire:
    """One end of a connection in memory."""

    def __init__(self, decode: Callable[[bytes], Any]) -> None:
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.other: MemoryWire
        self._decode = decode

    async def send(self, message: Any) -> None:
        self.other.inbox.put_nowait(messages.encode(message))

    async def receive(self) -> Any:
        frame = await self.inbox.get()
        if frame is None:
            raise WireLost("closed")
        return self._decode(frame)

    async def close(self) -> None:
        self.other.inbox.put_nowait(None)


def write(copy: StoreCopy, first: int, last: int, value: bytes = b"value", term: int = 1) -> None:
    """Append records of these numbers, and sync them."""
    for number in range(first, last + 1):
        row = Row(VALUE, f"k{number}", 1, number, number, 0, value)
        copy.log.append(CommitRecord(Clock(number, number), [row]).encode(), term)
    copy.log.sync()


class Nodes:
    """Node n1 is to open the term; n2 and n3 have copies in sync, too. `cut_off`: they cannot be reached.

    `told`: what the controller answers; None while it is away. `asked_told`: how often it was asked.
    """

    def __init__(self, folder: Path, session: aiohttp.ClientSession) -> None:
        self.folder = folder
        self.told: dict[str, int] | None = {"number": 0, "clock_floor": 0}
        self.asked_told = 0
        self.files: dict[str, CopyFiles] = {}
        self.cut_off: set[str] = set()
        self.deaf: set[str] = set()  # what they are sent is not read
        self.unheard: list[MemoryWire] = []
        self.asked: list[str] = []
        self.lost_fetches = 0
        self.news = asyncio.Event()
        self.serving: list[asyncio.Task[None]] = []
        cluster = ClusterSession()
        self._around = Surroundings(
            "n1", FileFolder(folder, "n1", LIMITS), LIMITS, session, cluster, "http://x", fatal, SYSTEM,
            partial(connect, session, cluster), self.news.set, self.connect,
        )  # fmt: skip

    async def make(self, node: str, records: int, promised: int = 0) -> StoreCopy:
        files = await FileFolder(self.folder, node, LIMITS).make_copy("s1", STORE_ID, 64)
        self.files[node] = files
        write(files.copy, 1, records)
        if promised:
            await files.copy.opening.promise(promised)
        return files.copy

    async def damage_own_file(self) -> None:
        """n1 is there with all its records applied, and the unique index of its file does not lead to one of them."""
        copy = self.files["n1"].copy
        rows = [Row(VALUE, f"k{number}", 1, number, number, 0, b"value") for number in range(1, 4)]
        await copy.engine.apply(Application(rows, copy.log.last, Clock(3, 3)))
        await self.files["n1"].close()
        hide_from_unique_index(self.files["n1"].path, "k2")
        again = await FileFolder(self.folder, "n1", LIMITS).open("s1", 64, untold)
        assert isinstance(again, CopyFiles)
        self.files["n1"] = again

    def config(self, *others: str, epoch: int = TERM, term: int = TERM) -> Configuration:
        copies = tuple(Replica(node, self.files[node].copy.identity.copy_id, "in-sync", 2) for node in others)
        primary = Primary("n1", self.files["n1"].copy.identity.copy_id)
        return Configuration("s1", STORE_ID, epoch, term, primary, copies)

    def opening(self, config: Configuration) -> TermOpening:
        return TermOpening(self.files["n1"].copy, config, "start", self._around)

    def ask_controller_at(self, url: str) -> None:
        self._around = self._around._replace(controller_url=url)

    async def tell(self, request: web.Request) -> web.Response:
        assert (await request.json())["store_id"] == STORE_ID
        self.asked_told += 1
        if self.told is None:
            raise web.HTTPServiceUnavailable
        return web.json_response(self.told)

    async def connect(self, node: str, session: Session) -> Wire:
        self.asked.append(node)
        kept = read_identity(OsDisk(), self.folder, "shard-s1.copy-n1")
        assert kept is not None
        assert kept.promised == session.term, "the own promise is durable before any copy is asked"
        if node in self.cut_off:
            raise WireLost("cut off")
        ours: MemoryWire = _Ours(self)
        theirs = MemoryWire(messages.decode_from_primary)
        ours.other, theirs.other = theirs, ours
        if node in self.deaf:
            self.unheard.append(theirs)
            return ours
        copy = self.files[node].copy
        self.serving.append(asyncio.create_task(serve_copy(theirs, lambda _: copy, SYSTEM)))
        return ours

    async def close(self) -> None:
        for task in self.serving:
            task.cancel()
        await asyncio.gather(*self.serving, return_exceptions=True)
        for files in self.files.values():
            await files.close()


class _Ours(MemoryWire):
    def __init__(self, nodes: Nodes) -> None:
        super().__init__(messages.decode_from_copy)
        self._nodes = nodes

    async def send(self, message: Any) -> None:
        if isinstance(message, messages.Fetch) and self._nodes.lost_fetches:
            self._nodes.lost_fetches -= 1
            raise WireLost("the connection is lost")
        await super().send(message)


def fatal(error: BaseException) -> NoReturn:
    raise AssertionError from error


@asynccontextmanager
async def three(folder: Path, *records: int) -> AsyncIterator[Nodes]:
    async with AsyncExitStack() as at_the_end:
        nodes = Nodes(folder, await at_the_end.enter_async_context(aiohttp.ClientSession()))
        at_the_end.push_async_callback(nodes.close)
        app = web.Application()
        app.router.add_post("/v1/told", nodes.tell)
        server = await at_the_end.enter_async_context(TestServer(app))
        nodes.ask_controller_at(str(server.make_url("/")))
        for node, count in zip(("n1", "n2", "n3"), records, strict=True):
            await nodes.make(node, count)
        yield nodes


async def test_the_longest_log_of_all_copies_in_sync_is_the_truth_and_nothing_of_it_is_cut_off(tmp_path: Path) -> None:
    async with three(tmp_path, 2, 5, 4) as nodes:
        assert await nodes.opening(nodes.config("n2", "n3")).run()
        logs = [nodes.files[node].copy.log for node in ("n1", "n2", "n3")]
        assert [log.last.number for log in logs] == [5, 5, 4]
        assert logs[0].synced == logs[1].last
        assert {node: files.copy.identity.promised for node, files in nodes.files.items()} == {
            "n1": TERM, "n2": TERM, "n3": TERM,
        }  # fmt: skip


async def test_a_copy_in_sync_that_does_not_answer_is_waited_for_until_a_map_has_it_out(tmp_path: Path) -> None:
    """The old primary, too: it has all that was acknowledged, perhaps alone."""
    async with three(tmp_path, 3, 5, 3) as nodes:
        nodes.cut_off = {"n2"}
        opening = nodes.opening(nodes.config("n2", "n3"))
        running = asyncio.create_task(opening.run())
        await until(opening.requests)
        asked = opening.requests()
        copy_id = nodes.files["n2"].copy.identity.copy_id
        assert [(each.kind, each.term, each.copy_id, each.joined) for each in asked] == [("out", TERM, copy_id, 2)]
        assert nodes.news.is_set()
        await asyncio.sleep(3 * LIMITS.replica_timeout_s)
        assert not running.done()
        opening.hear(nodes.config("n3", epoch=TERM + 1))
        assert await asyncio.wait_for(running, 60)
        assert nodes.files["n1"].copy.log.last.number == 3


async def test_a_copy_that_does_not_answer_is_not_taken_out_for_one_whose_own_file_is_damaged(tmp_path: Path) -> None:
    """It may be the only good one."""
    async with three(tmp_path, 3, 3, 3) as nodes:
        await nodes.damage_own_file()
        nodes.cut_off = {"n2"}
        opening = nodes.opening(nodes.config("n2", "n3"))
        running = asyncio.create_task(opening.run())
        asked = []
        async with asyncio.timeout(60):
            while not running.done():
                asked += opening.requests()
                await asyncio.sleep(0.01)
        with pytest.raises(DataCorrupt, match="damaged"):
            await running
        assert asked == []


async def test_a_copy_that_answers_late_is_asked_to_be_out_no_more(tmp_path: Path) -> None:
    async with three(tmp_path, 3, 5, 3) as nodes:
        nodes.cut_off = {"n2"}
        opening = nodes.opening(nodes.config("n2", "n3"))
        running = asyncio.create_task(opening.run())
        await until(opening.requests)
        nodes.cut_off = set()
        assert await asyncio.wait_for(running, 60)
        assert opening.requests() == []
        assert nodes.files["n1"].copy.log.last.number == 5


@pytest.mark.parametrize("promised", [TERM, TERM + 1])
async def test_a_term_that_is_not_above_the_own_promise_is_not_opened(tmp_path: Path, promised: int) -> None:
    async with three(tmp_path, 3, 3, 3) as nodes:
        await nodes.files["n1"].copy.opening.promise(promised)
        assert not await nodes.opening(nodes.config("n2", "n3")).run()
        assert nodes.asked == []


async def test_an_opening_ends_when_the_map_gives_another_term(tmp_path: Path) -> None:
    async with three(tmp_path, 3, 3, 3) as nodes:
        nodes.cut_off = {"n2"}
        opening = nodes.opening(nodes.config("n2", "n3"))
        running = asyncio.create_task(opening.run())
        await until(lambda: "n2" in nodes.asked)
        opening.hear(nodes.config("n2", "n3", epoch=TERM + 1, term=TERM + 1))
        assert not await asyncio.wait_for(running, 60)


async def test_a_connection_to_a_copy_that_has_not_answered_ends_with_the_opening(tmp_path: Path) -> None:
    async with three(tmp_path, 3, 3, 3) as nodes:
        nodes.deaf = {"n2"}
        opening = nodes.opening(nodes.config("n2", "n3"))
        running = asyncio.create_task(opening.run())
        await until(lambda: nodes.unheard and nodes.unheard[-1].inbox.qsize())
        opening.hear(nodes.config("n2", "n3", epoch=TERM + 1, term=TERM + 1))
        assert not await asyncio.wait_for(running, 60)
        for wire in nodes.unheard:
            frames = [wire.inbox.get_nowait() for _ in range(wire.inbox.qsize())]
            assert frames[-1] is None, "it was closed"


async def test_an_opening_ends_when_its_own_copy_promises_a_higher_term(tmp_path: Path) -> None:
    """Another node opens it by a newer map, and this one's copy was asked."""
    async with three(tmp_path, 3, 3, 3) as nodes:
        nodes.cut_off = {"n2"}
        opening = nodes.opening(nodes.config("n2", "n3"))
        running = asyncio.create_task(opening.run())
        await until(lambda: "n2" in nodes.asked)
        copy = nodes.files["n1"].copy
        assert await copy.greeting.hello(Session(STORE_ID, TERM + 1, "other", copy.identity.copy_id, 2)) is not None
        assert not await asyncio.wait_for(running, 60)


async def test_a_copy_that_has_promised_a_higher_term_is_not_counted(tmp_path: Path) -> None:
    async with three(tmp_path, 3, 3, 3) as nodes:
        await nodes.files["n3"].copy.opening.promise(TERM + 5)
        opening = nodes.opening(nodes.config("n2", "n3"))
        running = asyncio.create_task(opening.run())
        await until(opening.requests)
        assert not running.done()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert nodes.files["n3"].copy.identity.promised == TERM + 5


async def test_a_copy_that_is_lost_while_its_records_are_fetched_has_to_tell_again(tmp_path: Path) -> None:
    async with three(tmp_path, 1, 4, 1) as nodes:
        nodes.lost_fetches = 1
        assert await asyncio.wait_for(nodes.opening(nodes.config("n2", "n3")).run(), 60)
        assert nodes.asked.count("n2") == 2
        assert nodes.files["n1"].copy.log.last.number == 4


@pytest.mark.parametrize("own", [3, 5, 8])
async def test_an_old_folder_whose_last_records_no_copy_in_sync_has_counts_as_damaged(tmp_path: Path, own: int) -> None:
    """They were never committed, and were cut off before that folder was put back."""
    async with three(tmp_path, 2, 2, 2) as nodes:
        write(nodes.files["n1"].copy, 3, own, b"never committed")
        write(nodes.files["n2"].copy, 3, 5, term=2)
        with pytest.raises(DataCorrupt, match=rf"ends with record {own}\. .* an older copy"):
            await asyncio.wait_for(nodes.opening(nodes.config("n2")).run(), 60)
        assert nodes.files["n1"].copy.log.last.number == own


async def test_an_old_folder_that_lacks_more_than_the_longest_log_still_has_counts_as_damaged(tmp_path: Path) -> None:
    """So that the copy which has everything takes over, and this one is rebuilt from it."""
    async with three(tmp_path, 2, 2, 9) as nodes:
        log = nodes.files["n2"].copy.log
        for number in range(3, 10):
            write(nodes.files["n2"].copy, number, number, bytes(LIMITS.log_segment_bytes // 3))
            while log.wants_segment:
                log.prepare_segment()
        log.release(8)
        assert log.first > 4
        with pytest.raises(DataCorrupt, match=r"ends with record 2\. .* all up to record 9, .* an older copy"):
            await asyncio.wait_for(nodes.opening(nodes.config("n2")).run(), 60)
        assert nodes.files["n1"].copy.log.last.number == 2
        assert await asyncio.wait_for(nodes.opening(nodes.config("n3", epoch=TERM + 1, term=TERM + 1)).run(), 60)


@pytest.mark.parametrize("others", [(), ("n2",), ("n2", "n3")])
async def test_a_log_that_ends_below_what_was_told_and_that_no_copy_completes_waits_for_a_person(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, others: tuple[str, ...]
) -> None:
    """Also where copies in sync answer: theirs are older ones, too."""
    async with three(tmp_path, 5, 5, 4) as nodes:
        nodes.told = {"number": 9, "clock_floor": 0}
        opening = nodes.opening(nodes.config(*others))
        running = asyncio.create_task(opening.run())
        await until(lambda: nodes.asked_told >= 3)
        assert not running.done()
        assert caplog.text.count("`kvstore shard accept-old s1`") == 1
        nodes.told = {"number": 0, "clock_floor": 700}
        assert await asyncio.wait_for(running, 60)
        assert opening.clock_floor == 700


async def test_an_opening_that_waits_for_newer_files_takes_them_from_a_copy_on_whose_node_they_were_put_back(
    tmp_path: Path,
) -> None:
    async with three(tmp_path, 5, 5, 5) as nodes:
        nodes.told = {"number": 9, "clock_floor": 0}
        running = asyncio.create_task(nodes.opening(nodes.config("n2", "n3")).run())
        await until(lambda: nodes.asked_told >= 2)
        write(nodes.files["n2"].copy, 6, 9)
        assert await asyncio.wait_for(running, 60)
        assert nodes.files["n1"].copy.log.last.number == 9


@pytest.mark.parametrize("others", [(), ("n2", "n3")])
async def test_while_the_controller_is_away_no_log_is_opened_and_as_soon_as_it_answers_one_that_is_whole(
    tmp_path: Path, others: tuple[str, ...]
) -> None:
    async with three(tmp_path, 5, 5, 5) as nodes:
        nodes.told = None
        running = asyncio.create_task(nodes.opening(nodes.config(*others)).run())
        await until(lambda: nodes.asked_told >= 3)
        await asyncio.sleep(3 * LIMITS.told_timeout_s)
        assert not running.done()
        nodes.told = {"number": 5, "clock_floor": 0}
        assert await asyncio.wait_for(running, 60)


async def test_an_opening_that_waits_for_the_controller_ends_when_the_map_gives_another_term(tmp_path: Path) -> None:
    async with three(tmp_path, 3, 3, 3) as nodes:
        nodes.told = None
        opening = nodes.opening(nodes.config("n2", "n3"))
        running = asyncio.create_task(opening.run())
        await until(lambda: nodes.asked_told)
        opening.hear(nodes.config("n2", "n3", epoch=TERM + 1, term=TERM + 1))
        assert not await asyncio.wait_for(running, 60)
