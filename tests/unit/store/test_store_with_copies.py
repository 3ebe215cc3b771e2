"""A store that has copies: when its records leave for them, and who is waited for."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.environment import SYSTEM
from kvstore.replication import messages
from kvstore.shard.disk_watch import DiskWatch
from kvstore.storage.disk import OsFile
from kvstore.storage.sync_pace import SyncPace
from kvstore.store import gathering
from tests.unit.replication.one_copy import rows_of
from tests.unit.store.conftest import Gate
from tests.unit.store.store_with_copies import TIMES, primary
from tests.unit.waiting import until


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
