"""A store that has copies: a real store on a real file, whose records go to copies on simulated disks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import ForeignData, OutcomeUnknown, Unavailable
from kvstore.model import Attempt
from kvstore.placement.cluster_map import ClusterMap, Move, Replica, at_home, map_of
from kvstore.placement.ring import partition_of
from kvstore.protocol import (
    ApplyIntents,
    Count,
    Delete,
    Explain,
    Freeze,
    Get,
    Pull,
    Put,
    ReadLock,
    Reads,
    ReadUnlock,
    Request,
    Scan,
    ScanLeases,
)
from kvstore.replication import messages
from kvstore.replication.copy import StoreCopy
from kvstore.replication.files import Place, make_copy
from kvstore.replication.places import Times
from kvstore.replication.serving import serve_copy
from kvstore.replication.session import Session
from kvstore.replication.wire import Wire, WireLost
from kvstore.shard.disk_watch import DiskWatch
from kvstore.shard.service import ShardService
from kvstore.storage.disk import OsFile
from kvstore.storage.engine import Application, Engine, Identity
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.segments import Position
from kvstore.storage.sync_pace import SyncPace
from kvstore.store import gathering
from kvstore.store.opening import open_files
from kvstore.store.replicas import Replicating
from kvstore.store.store import Store
from loadtest.simulate.disk import SimulatedDisk
from tests.unit.replication.one_copy import FOLDER, rows_of
from tests.unit.replication.primary_with_copies import Inline, QueueWire
from tests.unit.store.conftest import Gate
from tests.unit.store.harness import PARTITIONS, Sink, TurnedTime, asked, next_id
from tests.unit.waiting import until

TIMES = Times(lease_s=30.0, disk_stall_s=30.0, replica_timeout_s=30.0, failover_after_s=60.0)


class Turned(TurnedTime):
    """The machine; the clock of leases can be stepped."""

    lease_step_s = 0.0

    def boottime_s(self) -> float:
        return super().boottime_s() + self.lease_step_s


def fatal(error: BaseException) -> NoReturn:
    raise error


class Primary:
    """A store of shard s1 on node s1, and copies on nodes n2, n3."""

    def __init__(self, folder: Path, times: Times = TIMES) -> None:
        self.times = times
        self.path = folder / "shard-s1.db"
        self.environment = Turned()
        self.limits = Limits(disk_reserve_bytes=1, log_segment_bytes=4 << 20, verify_share=1.0)
        self.copies: dict[str, StoreCopy] = {}
        self.wires: list[QueueWire] = []
        self.sessions: list[Session] = []
        self.news = 0
        self.epoch = 1
        self.is_closed = False
        self.store: Store
        self._tasks: list[asyncio.Task[Any]] = []

    # --- what the store is given

    async def connect(self, node: str, session: Session) -> Wire:
        if node not in self.copies:
            raise WireLost("the node is down")
        ours, theirs = QueueWire(messages.decode_from_copy), QueueWire(messages.decode_from_primary)
        ours.other, theirs.other = theirs, ours
        self.wires.append(ours)
        self.sessions.append(session)
        serving = serve_copy(theirs, lambda session: self.copies[node], Inline())
        self._tasks.append(asyncio.create_task(serving))
        return ours

    def _note_news(self) -> None:
        self.news += 1

    @property
    def replicating(self) -> Replicating:
        return Replicating("s1", "start", self.connect, self.times, self._note_news)

    async def open(self) -> Store:
        return await Store.open(
            self.path, self.limits, "s1", PARTITIONS, fatal, self.environment, replicating=self.replicating
        )

    # --- copies and maps

    async def make_copy(self, node: str) -> StoreCopy:
        identity = Identity(self.store.identity.store_id, None, "s1", PARTITIONS)

        async def empty() -> Engine:
            return MemoryEngine(identity)

        place = Place(SimulatedDisk(), FOLDER, f"shard-s1.copy-{node}", empty, empty, 1 << 20)
        copy = await make_copy(place, identity.store_id, Inline(), TIMES)
        self.copies[node] = copy
        self._tasks.append(asyncio.create_task(copy.applier.run()))
        return copy

    def replica(self, node: str, state: Any, joined: int) -> Replica:
        return Replica(node=node, copy_id=self.copies[node].following.copy_id, state=state, joined=joined)

    def map(self, *replicas: Replica, term: int = 1) -> ClusterMap:
        """The next map, with these copies."""
        self.epoch += 1
        home = at_home("s1", "http://s1", self.store.identity.store_id, copy_id=self.store.copy_id, term=term)
        shard = msgspec.structs.replace(home.shard, replicas=list(replicas))
        cluster_map = map_of([home], cluster_id="c", epoch=self.epoch, partitions=PARTITIONS, owners=[0] * PARTITIONS)
        nodes = [*cluster_map.nodes, *(msgspec.structs.replace(home.node, id=each.node) for each in replicas)]
        return msgspec.structs.replace(cluster_map, shards=[shard], nodes=nodes)

    async def in_sync(self, *nodes: str) -> list[Replica]:
        """These copies join, and a map says so."""
        joining = [self.replica(node, "joining", self.epoch + 1) for node in nodes]
        await self.store.partitions.adopt(self.map(*joining))
        sender = self.store.tables.sender
        assert sender is not None
        await until(lambda: {each.copy_id for each in sender.requests()} == {each.copy_id for each in joining})
        replicas = [msgspec.structs.replace(each, state="in-sync") for each in joining]
        await self.store.partitions.adopt(self.map(*replicas))
        await until(self.store.tables.may_answer)
        return replicas

    def hold_up(self) -> asyncio.Event:
        """What the copies answer is held up from now on, until the event is set."""
        gate = asyncio.Event()
        for wire in self.wires:
            wire.gate = gate
        return gate

    # --- operations

    def put(self, key: str, value: bytes = b"value") -> Sink:
        return asked(self.store, Put(next_id(), key, value))

    def get(self, key: str) -> Sink:
        sink = Sink()
        self.store.get(Get(next_id(), key), sink)
        return sink

    async def close(self) -> None:
        if not self.is_closed:
            await asyncio.wait_for(self.store.close(), 60)
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        wrong = [each for each in results if isinstance(each, Exception)]
        assert not wrong, wrong


@asynccontextmanager
async def primary(folder: Path, times: Times = TIMES) -> AsyncIterator[Primary]:
    """One that serves all partitions, without a copy."""
    found = Primary(folder, times)
    found.store = await found.open()
    try:
        await found.store.partitions.adopt(found.map())
        yield found
    finally:
        await found.close()


async def test_a_store_without_copies_has_no_sender_and_syncs_where_it_did_before(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        assert (await one.put("a").answer()).status == 201
        assert one.store.tables.sender is None
        assert one.store.pipeline.writer.is_inline


async def test_a_write_is_answered_and_seen_once_every_copy_in_sync_has_it_on_disk(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        assert (await one.put("before").answer()).status == 201
        copy, _ = await one.make_copy("n2"), await one.make_copy("n3")
        await one.in_sync("n2", "n3")
        gate = one.hold_up()
        number = one.store.tables.log.last.number + 1
        written = one.put("a", b"1")
        await until(lambda: copy.log.synced.number == one.store.tables.log.durable == number)
        assert written.replies == []
        assert (await one.get("a").answer()).status == 404, "nothing is seen that could be lost"
        assert one.store.durable < one.store.tables.log.durable, "and no higher number is told"
        gate.set()
        assert (await written.answer()).status == 201
        assert (await one.get("a").answer()).value == b"1"
        assert one.store.durable == one.store.tables.log.durable
        await until(lambda: {"before", "a"} <= rows_of(copy.engine).keys())


async def test_records_leave_for_the_copies_before_the_own_sync(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        copy = await one.make_copy("n2")
        await one.in_sync("n2")
        writer: Any = one.store.pipeline.writer
        writer.pace = SyncPace(0)  # in a thread
        writer._sync_in_thread = gate = Gate(writer._sync_in_thread, before=True)
        number = one.store.tables.log.last.number + 1
        written = one.put("a")
        await until(lambda: copy.log.synced.number == number)
        assert one.store.tables.log.durable < number
        assert written.replies == []
        gate.open()
        assert (await written.answer()).status == 201


async def test_where_the_disk_is_quick_a_record_leaves_and_is_then_synced_on_the_loop(
    tmp_path: Path,
) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        writer: Any = one.store.pipeline.writer
        writer.pace = SyncPace(1e6)  # whatever the machine does: quick
        wire: Any = one.wires[-1]
        done: list[str] = []
        sync_now, send = writer.sync_now, wire.send

        def noted_sync() -> None:
            done.append("synced")
            sync_now()

        async def noted_send(message: Any) -> None:
            if isinstance(message, messages.Records):
                done.append("left")
            await send(message)

        writer.sync_now, wire.send = noted_sync, noted_send
        assert (await one.put("a").answer()).status == 201
        assert done == ["left", "synced"]


STALL_S = 1.0


class Stalls:
    """The disk of a primary: its next sync takes `STALL_S`; `hangs` within that time. `began_s`, `ended_s`: of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hangs = False
        self.began_s = self.ended_s = 0.0
        sync = OsFile.sync

        def stalled(file: OsFile) -> None:
            if not self.began_s:
                self.hangs, self.began_s = True, SYSTEM.boottime_s()
                time.sleep(STALL_S)
                self.hangs, self.ended_s = False, SYSTEM.boottime_s()
            sync(file)

        monkeypatch.setattr(OsFile, "sync", stalled)


@pytest.mark.parametrize("inline_ms_max", [0.0, 1e6], ids=["in a thread", "on the loop"])
async def test_while_the_own_disk_stands_still_no_copy_is_asked_out_and_then_it_has_its_own_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline_ms_max: float
) -> None:
    """The copy is on the same disk. It is asked out once it owes an answer for too long on a disk that is well."""
    async with primary(tmp_path, TIMES._replace(replica_timeout_s=0.4)) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        sender = one.store.tables.sender
        assert sender is not None
        one.store.pipeline.writer.pace = SyncPace(inline_ms_max)
        one.hold_up()
        disk, news, asked_while = Stalls(monkeypatch), one.news, []
        one.put("a")
        while not disk.ended_s:
            asked_while += sender.requests()
            await asyncio.sleep(0.01)
        assert asked_while == []
        assert sender.requests() == ()
        assert one.news == news
        await until(lambda: [each.kind for each in sender.requests()] == ["out"])
        (link,) = sender.links.by_key.values()
        since_s = link.in_flight.patience.since
        assert since_s is not None
        owed_before_s = max(0.0, disk.began_s - since_s) + 0.05
        assert SYSTEM.boottime_s() - disk.ended_s >= 0.4 - owed_before_s


async def test_a_disk_that_never_answers_blames_no_copy_and_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a primary whose disk hangs would go on alone, or hold its shard for ever."""
    async with primary(tmp_path, TIMES._replace(replica_timeout_s=0.2)) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        sender, log, ended = one.store.tables.sender, one.store.tables.log, threading.Event()
        assert sender is not None
        one.store.pipeline.writer.pace = SyncPace(0)
        one.hold_up()
        disk = Stalls(monkeypatch)
        watch = DiskWatch(STALL_S / 2, lambda: [log] if sender.shipping.links else [], lambda _: ended.set())
        watch.start()
        one.put("a")
        await until(lambda: disk.hangs)
        asked_out = []
        while not ended.is_set() and disk.hangs:
            asked_out += sender.requests()
            await asyncio.sleep(0.01)
        watch.close()
        assert ended.is_set()
        assert asked_out == []


async def on_its_way(one: Any) -> tuple[asyncio.Event, Any, int]:
    """A write whose record is on the own disk, and comes to no copy before the event is set; the record's number."""
    gate = one.hold_up()
    first = one.put("a")
    number = one.store.tables.log.last.number + 1
    await until(lambda: one.store.tables.log.durable == number)
    return gate, first, number


async def test_what_comes_while_a_record_is_on_its_way_to_copies_is_one_batch(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        gate, first, number = await on_its_way(one)
        others = []
        for key in ("b", "c", "d"):
            others.append(one.put(key))
            await asyncio.sleep(0.01)
        assert one.store.tables.log.last.number == number
        gate.set()
        assert [(await each.answer()).status for each in (first, *others)] == [201] * 4
        assert one.store.tables.log.last.number == number + 1


async def test_clients_that_work_at_once_are_waited_for_a_moment_and_share_the_next_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("_WINDOW_S_MAX", "_FIRST_COMMIT_S"):
        monkeypatch.setattr(gathering, bound, 60.0)  # ends before, when as many have come as there were
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        gate, first, number = await on_its_way(one)
        second = one.put("b")
        gate.set()
        assert (await first.answer()).status == 201
        await asyncio.sleep(0.05)
        assert one.store.tables.log.last.number == number, "the first client's next operation is waited for"
        third = one.put("c")
        assert [(await each.answer()).status for each in (second, third)] == [201, 201]
        assert one.store.tables.log.last.number == number + 1
        fourth, fifth = one.put("d"), one.put("e")
        assert [(await each.answer()).status for each in (fourth, fifth)] == [201, 201]
        assert one.store.tables.log.last.number == number + 2


async def test_nothing_is_sent_to_a_copy_before_the_map_that_names_it_is_durable(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        writer: Any = one.store.pipeline.writer
        writer.pace = SyncPace(0)  # in a thread
        writer._sync_in_thread = gate = Gate(writer._sync_in_thread, before=True)
        adopted = asyncio.create_task(one.store.partitions.adopt(one.map(one.replica("n2", "joining", 3))))
        await asyncio.wait_for(gate.arrived.wait(), 60)
        assert one.store.tables.sender is not None
        await asyncio.sleep(0.1)
        assert one.sessions == []
        gate.open()
        assert await adopted
        await until(lambda: one.sessions)


def with_a_move(cluster_map: ClusterMap, move_id: str, partition: int) -> ClusterMap:
    """A move of that partition to shard s2 stands, too."""
    to = at_home("s2", "http://s2", "s2")
    nodes, shards = [*cluster_map.nodes, to.node], [*cluster_map.shards, to.shard]
    move = Move(id=move_id, source="s1", to="s2", partitions=[partition])
    return msgspec.structs.replace(cluster_map, nodes=nodes, shards=shards, moves=[move])


def free_of(*keys: str) -> int:
    """A partition in which none of these keys is."""
    return min(set(range(PARTITIONS)) - {partition_of(key.encode(), PARTITIONS) for key in keys})


async def test_what_no_record_carries_is_answered_only_with_the_lease(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        await one.put("a", b"1").answer()
        service = ShardService("s1", one.store, None, one.limits)  # type: ignore[arg-type]
        assert (await one.get("a").answer()).value == b"1"
        await one.store.partitions.adopt(with_a_move(one.map(*replicas), "m", free_of("a", "absent")))
        await one.store.partitions.freeze("m")
        service.handle(ReadLock(next_id(), Attempt(100, 100, "router01"), ["a"]), sink := Sink())
        await until(lambda: sink.replies)
        (read,) = sink.replies
        assert isinstance(read, Reads)
        gate = one.hold_up()
        one.environment.lease_step_s += TIMES.lease_s
        assert not one.store.tables.may_answer()
        looks: list[Request] = [
            Get(1, "a"),
            Delete(2, "absent"),
            Scan(3, "", "", 10, True),
            Get(4, "absent"),
            Count(5, ""),
            ScanLeases(6, "", "", 10),
            Explain(7, "a"),
            Freeze(8, "m"),
            ApplyIntents(9, Attempt(101, 101, "router01"), ["absent"], 1, True, 1),
            ReadUnlock(10, ["a"], read.lock),
        ]
        for look in looks:
            service.handle(look, sink := Sink())
            answer = await sink.answer(5)
            assert (answer.id, answer.status) == (look.id, 503), look
            assert answer.problem is not None
            assert answer.problem["code"] == Unavailable.code
        gate.set()
        await until(one.store.tables.may_answer)
        for look, status in zip(looks[:2], (200, 404), strict=True):
            service.handle(look, sink := Sink())
            assert (await sink.answer()).status == status


async def test_the_lease_is_looked_at_behind_the_read_of_the_file(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        await one.put("a", b"1").answer()
        await one.store.applier.flush()
        one.store.tables.cache.clear()
        engine: Any = one.store.tables.engine
        engine.read = gate = Gate(engine.read)
        read = one.get("a")
        await asyncio.wait_for(gate.arrived.wait(), 60)
        one.hold_up()
        one.environment.lease_step_s += TIMES.lease_s
        gate.open()
        assert (await read.answer()).status == 503


async def test_a_copy_that_is_out_is_waited_for_no_more_though_an_earlier_map_still_waits_for_it(
    tmp_path: Path,
) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        one.hold_up()
        earlier = asyncio.create_task(one.store.partitions.adopt(one.map(*replicas)))
        await until(lambda: one.store.tables.log.durable >= one.store.tables.sender.shipping.committed + 1)  # type: ignore[union-attr]
        written = one.put("a")
        later = one.map()
        adopted = asyncio.create_task(one.store.partitions.adopt(later))
        await asyncio.sleep(0.05)
        assert written.replies == []
        assert not earlier.done()
        assert one.store.replicas.hear(later)
        assert (await written.answer()).status == 201
        assert await asyncio.wait_for(earlier, 30)
        assert await asyncio.wait_for(adopted, 30)
        assert (await one.put("b").answer()).status == 201
        assert (await one.get("b").answer()).status == 200, "without copies no lease is needed"


async def test_an_older_map_that_is_adopted_late_names_no_copy_again_that_is_out(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        one.hold_up()
        older, newer = one.map(*replicas), one.map()
        one.store.replicas.hear(newer)
        assert await asyncio.wait_for(one.store.partitions.adopt(older), 30)
        assert one.store.tables.sender is not None
        assert one.store.tables.sender.shipping.links == ()
        assert (await one.put("a").answer()).status == 201


async def test_a_store_whose_own_map_names_a_copy_is_not_opened_without_a_new_term(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.store.partitions.adopt(one.map(one.replica("n2", "joining", 3)))
        await one.store.close()
        with pytest.raises(ForeignData, match="has copies"):
            await one.open()
        await one.make_copy("n2")
        one.store = await _opened_in_term(one, "n2")


async def _opened_in_term(one: Primary, *nodes: str) -> Store:
    opened = await open_files(one.path, "s1", PARTITIONS, one.limits, one.environment)
    one.store = Store(opened, one.limits, one.environment, fatal, one.replicating)
    one.store.begin()
    term = one.epoch + 1
    replicas = [one.replica(node, "in-sync", 3) for node in nodes]
    await asyncio.wait_for(one.store.partitions.restore(one.map(*replicas, term=term)), 60)
    return one.store


async def test_a_term_is_open_once_every_copy_in_sync_has_the_record_that_opens_it(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.put("a", b"1").answer()
        copy = await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        await one.store.close()
        opened = await open_files(one.path, "s1", PARTITIONS, one.limits, one.environment)
        one.store = Store(opened, one.limits, one.environment, fatal, one.replicating)
        one.store.begin()
        copies, one.copies = one.copies, {}  # the node is away
        opens = one.map(*replicas, term=9)
        one.epoch = 9
        opening = asyncio.create_task(one.store.partitions.restore(opens))
        await until(lambda: one.store.tables.sender is not None and one.store.tables.log.durable > copy.log.last.number)
        assert not opening.done()
        assert (await one.get("a").answer()).status in (421, 503)
        assert (await one.put("b").answer()).status in (421, 503)
        one.copies = copies
        await asyncio.wait_for(opening, 60)
        assert one.store.tables.log.last.term == 9 == copy.log.last.term == copy.following.promised
        await until(one.store.tables.may_answer)
        assert (await one.get("a").answer()).value == b"1"
        assert (await one.put("b").answer()).status == 201


async def test_an_older_copy_that_was_promoted_gives_versions_above_all_that_was_told(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.put("a", b"1").answer()
        before = one.store.clock.version
        await one.store.close()
        opened = await open_files(one.path, "s1", PARTITIONS, one.limits, one.environment)
        one.store = Store(opened, one.limits, one.environment, fatal, one.replicating)
        one.store.begin()
        opens = one.map(term=9)
        shard = msgspec.structs.replace(opens.shards[0], clock_floor=before + (1 << 32))
        one.epoch = 9
        await one.store.partitions.restore(msgspec.structs.replace(opens, shards=[shard, *opens.shards[1:]]))
        await one.put("b").answer()
        assert one.store.clock.version > before + (1 << 32)


async def test_a_store_whose_term_has_ended_answers_nothing_more_and_closes(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        await one.put("a", b"1").answer()
        one.hold_up()
        written = one.put("lost?")
        await until(lambda: one.store.tables.log.durable > one.store.durable)
        assert not one.store.replicas.hear(one.map(*replicas, term=7))
        assert one.news > 0
        assert (await one.put("b").answer()).status == 503
        assert (await one.get("a").answer()).status == 503
        await one.store.close()
        one.is_closed = True
        answer = await written.answer()
        assert answer.problem is not None
        assert answer.problem["code"] == OutcomeUnknown.code


async def test_a_store_that_leaves_its_files_open_waits_for_what_is_under_way_in_them(tmp_path: Path) -> None:
    """A thread cannot be ended, and what applies to the file from then on must see all that it did."""
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        engine: Any = one.store.tables.engine
        apply, began, may_end = engine.apply, asyncio.Event(), asyncio.Event()
        threads: list[asyncio.Task[None]] = []
        positions: list[Position] = []

        async def in_thread(application: Application) -> None:
            began.set()
            await may_end.wait()
            await apply(application)
            positions.append(application.position)

        async def slow(application: Application) -> None:
            threads.append(asyncio.create_task(in_thread(application)))
            await asyncio.shield(threads[-1])

        engine.apply = slow
        await one.put("a", b"1").answer()
        await began.wait()
        assert not one.store.replicas.hear(one.map(*replicas, term=7))
        closing = asyncio.create_task(one.store.close(keeps_files=True))
        await asyncio.sleep(0.05)
        assert not closing.done()
        may_end.set()
        await asyncio.wait_for(closing, 60)
        assert all(thread.done() for thread in threads)
        engine.apply = apply
        files = one.store.opened
        assert files.engine.applied.position == positions[-1]
        assert await files.engine.occupied() is not None, "the file is open"
        assert files.log.append(b"x") == files.log.last.number, "and so is the log"
        await files.close()
        one.is_closed = True


async def test_a_work_whose_step_is_given_up_with_the_term_ends_no_process(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        replicas = await one.in_sync("n2")
        one.hold_up()
        store, failed = one.store, list[BaseException]()
        store._on_fatal = lambda error: failed.append(error)  # type: ignore[assignment,return-value]
        version = store.clock.version
        work = store._guard(store.pipeline.step(lambda batch: batch.changes.see(version + 1)))
        store._tasks["work"] = asyncio.create_task(work)
        await until(lambda: store.tables.log.durable > store.durable)
        assert not store.replicas.hear(one.map(*replicas, term=7))
        async with store.applier.turn:
            closing = asyncio.create_task(store.close())
            await asyncio.sleep(0.05)  # the end waits for the file
        await asyncio.wait_for(closing, 60)
        one.is_closed = True
        assert failed == []


async def test_a_lease_is_given_back_once_the_copy_has_all_and_then_nothing_is_answered(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        copy = await one.make_copy("n2")
        await one.in_sync("n2")
        await one.put("a", b"1").answer()
        gate = one.hold_up()
        held = one.put("b")
        copy_id = copy.following.copy_id
        assert not await one.store.replicas.give_back(copy_id, 0.02), "the copy has not answered"
        gate.set()
        assert (await held.answer()).status == 201
        assert (await one.put("c").answer()).status == 201, "it goes on where the change has failed"
        assert await one.store.replicas.give_back(copy_id, 60)
        assert copy.log.last == one.store.tables.log.last
        number = one.store.durable
        assert (await one.put("d").answer()).status == 503
        assert (await one.get("a").answer()).status == 503
        version = one.store.clock.version
        step = asyncio.create_task(one.store.pipeline.step(lambda batch: batch.changes.see(version + 1)))
        await until(lambda: one.store.durable > number)
        await asyncio.sleep(0.02)
        assert not step.done(), "not even what every copy has"
        await until(copy.lease.may_be_promoted)
        await one.store.close()
        one.is_closed = True
        with pytest.raises(OutcomeUnknown):
            await asyncio.wait_for(step, 60)


async def test_the_log_is_kept_for_a_copy_that_joins_up_to_a_bound(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.store.partitions.adopt(one.map(one.replica("n2", "joining", 3)))
        sender: Any = one.store.tables.sender
        await until(lambda: sender.requests())
        tables, applier = one.store.tables, one.store.applier
        assert applier._kept_from == tables.log.durable, "one that has all needs nothing"
        (link,), (at,) = sender.shipping.links, sender.links.by_key.values()
        sender.shipping = sender.shipping._replace(links=(link._replace(waited=0, acked=1),))
        at.keeps = 1
        assert applier._kept_from == 1
        tables.limits = msgspec.structs.replace(tables.limits, log_bytes_max=1)
        assert applier._kept_from == tables.log.durable


async def test_pages_of_a_move_are_given_only_with_the_lease(tmp_path: Path) -> None:
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        service = ShardService("s1", one.store, None, one.limits)  # type: ignore[arg-type]
        one.hold_up()
        one.environment.lease_step_s += TIMES.lease_s

        async def page(pull: Pull) -> Any:
            return messages.Ack(0)

        one.store.migration.pull = page  # type: ignore[method-assign, assignment]
        service.handle(Pull(7, [1], 0, 0, 10), sink := Sink())
        answer = await sink.answer()
        assert (answer.id, answer.status) == (7, 503)


async def test_locks_of_reads_that_were_refused_without_the_lease_keep_no_writer_out(tmp_path: Path) -> None:
    """The router was not told of the locks, so it cannot let them go, and its connection goes on."""
    async with primary(tmp_path) as one:
        await one.make_copy("n2")
        await one.in_sync("n2")
        one.store.tables.limits = msgspec.structs.replace(one.limits, txn_timeout_s=600, request_timeout_s=600)
        gate = one.hold_up()
        one.environment.lease_step_s += TIMES.lease_s
        refused = asked(one.store, ReadLock(next_id(), Attempt(100, 100, "router01"), ["k"]))
        assert (await refused.answer()).status == 503
        gate.set()
        await until(one.store.tables.may_answer)
        assert (await one.put("k").answer()).status == 201
