"""A copy's store: real log and promise on a disk that loses what is not synced, rows in memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import pytest

from kvstore.environment import Environment
from kvstore.replication import applying, session
from kvstore.replication.copy import StoreCopy
from kvstore.replication.copy_greeting import Deposed, Told
from kvstore.replication.files import Place, Times, make_copy, open_copy
from kvstore.replication.promise import read_identity, write_identity
from kvstore.replication.session import Join, Session
from kvstore.storage.engine import Engine, FeedQuery, Identity
from kvstore.storage.log import BEGINNING, Log
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.record import CommitRecord
from kvstore.storage.replay import replay
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.storage.segments import Entry
from loadtest.simulate.disk import Fate, PowerCut, SimulatedDisk, keep_all, lose_all

T = TypeVar("T")
FOLDER, STORE, STORE_ID = Path("/data"), "shard-s1.copy-n2", "0123456789abcdef"
SEGMENT_BYTES = 8192
TIMES = Times(lease_s=1.0, disk_stall_s=2.0)


class Machine(Environment):
    """A clock to turn, and threads that are no threads; `gate`, where it is set, holds the work of threads up."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 100.0
        self.gate: asyncio.Event | None = None

    def boottime_s(self) -> float:
        return self.now_s

    async def in_thread(self, function: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        return function()


class Node:
    """A machine with a copy on it."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.machine: Machine = Machine()
        self.engine = MemoryEngine(Identity(STORE_ID, None, "s1", 64))
        self.place = Place(self.disk, FOLDER, STORE, self._open, self._renew, SEGMENT_BYTES)

    async def _open(self) -> Engine:
        return self.engine

    async def _renew(self) -> Engine:
        self.engine = MemoryEngine(Identity(STORE_ID, None, "s1", 64))
        return self.engine

    async def make(self) -> StoreCopy:
        return await make_copy(self.place, STORE_ID, self.machine, TIMES)

    async def restart(self, fate: Fate = lose_all, kept: int = 0) -> StoreCopy:
        """Open the copy after a power cut."""
        self.disk.restart(fate)
        self.engine.crash(kept)
        identity = read_identity(self.disk, FOLDER, STORE)
        assert identity is not None
        return await open_copy(self.place, identity, self.machine, TIMES)


class Primary:
    """A primary's log and engine, and its side of a session with one copy."""

    def __init__(self, term: int = 1, start: str = "first") -> None:
        self.log = Log.create(SimulatedDisk(), FOLDER, "shard-s1", STORE_ID, segment_bytes=1 << 20)
        self.engine = MemoryEngine(Identity(STORE_ID, None, "s1", 64))
        self.term = term
        self.start = start
        self.round = 0
        self.entries: list[Entry] = []

    def session(self, copy: StoreCopy) -> Session:
        return Session(STORE_ID, self.term, self.start, copy.following.copy_id, 1, self.round)

    async def put(self, key: str, value: bytes, *, apply: bool = True) -> Entry:
        number = self.log.last.number + 1
        row = Row(VALUE, key, 1, number, number, 0, value)
        return await self.append(CommitRecord(Clock(number, number), [row]), apply=apply)

    async def append(self, record: CommitRecord, *, apply: bool = True) -> Entry:
        number = self.log.append(record.encode(), self.term)
        (entry,) = self.log.entries(number - 1)
        self.entries.append(entry)
        if apply:
            await replay(self.engine, list(self.log.entries(self.engine.applied.position.number)))
        return entry

    async def common(self, copy: StoreCopy, told: Told) -> int | None:
        """Compare both chains, a few numbers at a time."""
        comparison = session.compare((0, self.log.last.number), told.known)
        while not comparison.done:
            numbers = session.probes(comparison, 3)
            ours = {number: self._checksum(number) for number in numbers}
            comparison = session.compared(comparison, ours, await copy.greeting.checksums(numbers))
        return comparison.agreed

    def _checksum(self, number: int) -> int:
        return self.entries[number - 1].checksum if number else 0

    async def greet(self, copy: StoreCopy, *, first_kept: int = 1) -> tuple[Told, Join]:
        self.round += 1
        told = await copy.greeting.hello(self.session(copy))
        assert told is not None
        common = None if told.filling else await self.common(copy, told)
        return told, session.how_to_join(
            common, told.position.number, told.applied, awaited=False, first_kept=first_kept
        )

    async def join(self, copy: StoreCopy) -> int | None:
        told, join = await self.greet(copy)
        return await copy.greeting.begin(self.session(copy), told.position, join)

    async def ship(self, copy: StoreCopy, committed: int = 0) -> int | None:
        behind = [entry for entry in self.entries if entry.number > copy.log.last.number]
        return await copy.records.take(self.session(copy), behind, committed)


def rows_of(engine: Engine) -> dict[str, tuple[bytes | None, int]]:
    assert isinstance(engine, MemoryEngine)
    return {row.key: (row.body, row.version) for row in engine._all() if row.body is not None}


async def test_what_is_acknowledged_is_durable_and_only_what_is_committed_is_applied() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    for number in range(5):
        await primary.put(f"key-{number}", b"value")
    assert await primary.join(copy) == 0
    assert await primary.ship(copy, committed=3) == 5
    assert await copy.applier.apply_some() == 3
    assert await copy.applier.apply_some() == 0
    assert set(rows_of(copy.engine)) == {"key-0", "key-1", "key-2"}
    again = await node.restart()
    assert again.log.last.number == 5
    assert await primary.join(again) == 5


async def test_a_record_is_applied_once_it_is_on_the_copys_own_disk_whatever_is_committed() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    for key in ("a", "b"):
        await primary.put(key, b"1")
    assert await primary.join(copy) == 0
    assert await primary.ship(copy, committed=0) == 2
    copy.log.extend(await primary.put("c", b"1"))  # its sync is under way
    copy.records.committed(primary.session(copy), 3)
    while await copy.applier.apply_some():
        pass
    assert set(rows_of(copy.engine)) == {"a", "b"}
    again = await node.restart()
    assert again.log.last.number == 2
    again.log.extend(primary.entries[2])
    await again.applier.hand_over()
    assert again.log.synced.number == 3
    assert set(rows_of(again.engine)) == {"a", "b", "c"}


async def test_rows_that_are_gone_for_good_leave_the_copys_file_too() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    rows = [Row(VALUE, f"key-{number}", number % 2, number, number, 0, None) for number in (1, 2, 3)]
    for record in (
        CommitRecord(Clock(3, 3), rows),
        CommitRecord(Clock(4, 4, tombstones_floor=2)),
        CommitRecord(Clock(5, 5, tombstones_floor=2), dropped=[1]),
    ):
        await primary.append(record)
    assert await primary.join(copy) == 0
    assert await primary.ship(copy, committed=1) == 3
    applying = asyncio.create_task(copy.applier.run())
    for committed, left in ((1, 3), (2, 1), (3, 0)):
        await primary.ship(copy, committed)
        async with asyncio.timeout(10):
            while copy.engine.applied.position.number < committed or len(node.engine._rows) > left:
                await asyncio.sleep(0)
        assert len(node.engine._rows) == left
    applying.cancel()
    await asyncio.gather(applying, return_exceptions=True)


async def test_a_tail_that_differs_is_cut_off_before_records_follow() -> None:
    node, first = Node(), Primary()
    copy = await node.make()
    for key in ("a", "b", "lost"):
        await first.put(key, b"1")
    await first.join(copy)
    assert await first.ship(copy, committed=2) == 3
    await copy.applier.apply_some()
    second = Primary(term=2, start="second")
    for entry in first.entries[:2]:
        second.log.extend(entry)
        second.entries.append(entry)
    await second.put("kept", b"2")
    assert await second.join(copy) == 2
    assert await second.ship(copy, committed=3) == 3
    await copy.applier.apply_some()
    assert rows_of(copy.engine) == rows_of(second.engine)
    assert "lost" not in rows_of(copy.engine)


async def test_before_a_session_begins_and_in_another_one_nothing_is_taken() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    entry = await primary.put("a", b"1")
    assert await copy.records.take(primary.session(copy), [entry], 1) is None
    await primary.join(copy)
    for other in ({"term": 2}, {"start": "x"}, {"copy_id": "x"}, {"joined": 9}, {"round": 9}):
        named = primary.session(copy)._replace(**other)  # type: ignore[arg-type]
        assert await copy.records.take(named, [entry], 1) is None
        assert copy.lease.beacon(named) is False
    assert copy.log.last == BEGINNING
    assert await primary.ship(copy, committed=1) == 1


async def test_a_promise_is_durable_before_the_hello_is_answered() -> None:
    node = Node()
    copy = await node.make()
    await Primary(term=7).greet(copy)
    again = await node.restart()
    with pytest.raises(Deposed) as error:
        await Primary(term=6).greet(again)
    assert error.value.promised == 7
    node.machine.now_s += 2.0  # until what it may have granted has run out
    assert await again.opening.promise(8)
    assert not await again.opening.promise(8)
    assert (await node.restart()).following.promised == 8


async def test_a_hello_to_another_copy_is_not_answered() -> None:
    copy = await Node().make()
    assert await copy.greeting.hello(Session(STORE_ID, 9, "first", "another", 1)) is None
    assert copy.following.promised == 0


async def test_what_is_not_synced_is_synced_before_the_position_is_told() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.join(copy)
    copy.log.extend(await primary.put("a", b"1"))
    assert copy.log.synced.number == 0
    told, _ = await primary.greet(copy)
    assert told.position.number == 1
    assert (await node.restart()).log.last == told.position


async def test_a_copy_that_does_not_sync_for_too_long_answers_no_beacon() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.join(copy)
    assert copy.lease.beacon(primary.session(copy))
    await primary.put("a", b"1")
    node.machine.gate = asyncio.Event()
    shipping = asyncio.create_task(primary.ship(copy))
    while copy.log.last.number == 0 or copy.own_log.sync_since is None:
        await asyncio.sleep(0)
    assert copy.records.committed(primary.session(copy), 0) == 0, "what is not synced is not acknowledged"
    node.machine.now_s += 1.9
    assert copy.lease.beacon(primary.session(copy))
    node.machine.now_s += 0.2
    assert not copy.lease.beacon(primary.session(copy))
    node.machine.gate.set()
    assert await shipping == 1
    assert copy.lease.beacon(primary.session(copy))


async def test_where_the_disk_is_quick_a_record_is_durable_when_the_call_returns() -> None:
    node, primary = Node(), Primary()
    copy = await make_copy(node.place, STORE_ID, node.machine, TIMES._replace(sync_inline_ms_max=1e6))
    await primary.join(copy)
    entries = [await primary.put(key, b"1") for key in ("a", "b")]
    assert copy.own_log.takes_at_once(entries)
    assert copy.records.take_now(primary.session(copy), entries, 1) == 2
    assert copy.records.take_now(primary.session(copy)._replace(round=9), [await primary.put("c", b"1")], 3) is None
    assert await copy.applier.apply_some() == 1, "of another session nothing is learned"
    assert (await node.restart()).log.last.number == 2


async def test_nothing_is_taken_at_once_while_the_log_is_in_use_elsewhere_or_lacks_room() -> None:
    node, primary = Node(), Primary()
    copy = await make_copy(node.place, STORE_ID, node.machine, TIMES._replace(sync_inline_ms_max=1e6))
    await primary.join(copy)
    entry = await primary.put("a", b"1")
    async with copy.own_log.turn:
        assert not copy.own_log.takes_at_once([entry])
    assert not copy.own_log.takes_at_once([entry._replace(payload=bytes(copy.log.room(frees=True)))] * 2)
    assert copy.own_log.takes_at_once([entry])
    slow = await Node().make()
    assert not slow.own_log.takes_at_once([entry]), "its disk is synced in a thread"


async def test_a_copy_makes_its_next_segment_ahead_of_need() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.join(copy)
    await primary.put("a", b"1")
    await primary.ship(copy, committed=1)
    assert copy.log.wants_segment
    work = asyncio.create_task(copy.applier.run())
    while copy.log.wants_segment:
        await asyncio.sleep(0)
    work.cancel()


class Threads(Machine):
    """Real threads, which cannot be ended; `let_go`, once set, lets the work of one begin."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = Event()
        self.let_go.set()

    async def in_thread(self, function: Callable[[], T]) -> T:
        def held_up() -> T:
            assert self.let_go.wait(30)
            return function()

        return await asyncio.get_running_loop().run_in_executor(None, held_up)


async def test_a_connection_that_is_lost_while_the_log_is_cut_leaves_the_log_to_the_cut() -> None:
    node, first = Node(), Primary()
    node.machine = machine = Threads()
    copy = await node.make()
    for key in ("a", "lost"):
        await first.put(key, b"1")
    await first.join(copy)
    assert await first.ship(copy) == 2
    second = Primary(term=2, start="second")
    second.log.extend(first.entries[0])
    second.entries.append(first.entries[0])
    told, join = await second.greet(copy)
    machine.let_go.clear()
    beginning = asyncio.ensure_future(copy.greeting.begin(second.session(copy), told.position, join))
    await asyncio.sleep(0.01)
    beginning.cancel()
    second.round += 1
    greeting = asyncio.ensure_future(copy.greeting.hello(second.session(copy)))
    await asyncio.sleep(0.01)
    assert not greeting.done()
    machine.let_go.set()
    greeted = await greeting
    assert greeted is not None
    assert greeted.position.number == 1
    assert beginning.cancelled()


async def test_a_connection_that_is_lost_during_a_sync_does_not_stop_the_answers_to_later_beacons() -> None:
    node, primary = Node(), Primary()
    node.machine = machine = Threads()
    copy = await node.make()
    await primary.put("key", b"value")
    await primary.join(copy)
    machine.let_go.clear()
    shipping = asyncio.ensure_future(primary.ship(copy))
    await asyncio.sleep(0.01)
    shipping.cancel()
    machine.let_go.set()
    await asyncio.wait((shipping,))
    while copy.log.synced.number < 1:
        await asyncio.sleep(0.01)
    await primary.join(copy)
    machine.now_s += 10 * TIMES.disk_stall_s
    assert copy.lease.beacon(primary.session(copy))


async def test_a_promise_whose_connection_is_lost_is_kept_all_the_same() -> None:
    """Else the next one, of a term in between, would take the place of the higher one on the disk."""
    node, primary = Node(), Primary(term=7)
    node.machine = machine = Threads()
    copy = await node.make()
    machine.let_go.clear()
    greeting = asyncio.ensure_future(copy.greeting.hello(primary.session(copy)))
    await asyncio.sleep(0.01)
    greeting.cancel()
    machine.let_go.set()
    await asyncio.wait((greeting,))
    assert greeting.cancelled()
    assert not await copy.opening.promise(6)
    kept = read_identity(node.disk, FOLDER, STORE)
    assert kept is not None
    assert kept.promised == copy.following.promised == 7


async def test_a_copy_that_granted_takes_no_promotion_until_that_has_run_out() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.join(copy)
    assert copy.lease.may_be_promoted()
    assert copy.lease.beacon(primary.session(copy))
    assert not copy.lease.may_be_promoted()
    node.machine.now_s += 1.0
    assert not copy.lease.may_be_promoted()
    again = await node.restart()
    node.machine.now_s += 1.0
    assert not again.lease.may_be_promoted()
    node.machine.now_s += 0.1
    assert again.lease.may_be_promoted()
    assert again.lease.silent_s == pytest.approx(1.1)


async def test_a_copy_promises_nothing_to_itself_once_it_has_granted_after_it_was_asked() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.join(copy)
    assert copy.lease.may_be_promoted()
    assert copy.lease.beacon(primary.session(copy))
    assert not await copy.opening.promise(8)
    node.machine.now_s += 2.0
    assert await copy.opening.promise(8)


async def test_a_copy_grants_nothing_while_a_promise_to_itself_is_written() -> None:
    """Its primary could answer reads while the copy opens a higher term."""
    node, primary = Node(), Primary()
    node.machine = machine = Threads()
    copy = await node.make()
    await primary.join(copy)
    machine.let_go.clear()
    promising = asyncio.ensure_future(copy.opening.promise(8))
    await asyncio.sleep(0.01)
    assert copy.following.promised < 8
    assert not copy.lease.beacon(primary.session(copy))
    machine.let_go.set()
    assert await promising


async def test_records_that_come_while_the_log_is_cut_are_not_appended() -> None:
    node, first = Node(), Primary()
    copy = await node.make()
    await first.put("a", b"1")
    await first.put("b", b"1")
    await first.join(copy)
    await first.ship(copy)
    second = Primary(term=1, start="first")
    second.round = first.round
    second.log.extend(first.entries[0])
    second.entries.append(first.entries[0])
    told, join = await second.greet(copy)
    late = await first.put("c", b"1")
    node.machine.gate = asyncio.Event()
    begins = asyncio.create_task(copy.greeting.begin(second.session(copy), told.position, join))
    while not copy.own_log.is_changing:
        await asyncio.sleep(0)
    shipped = asyncio.create_task(copy.records.take(first.session(copy), [late], 0))
    for _ in range(5):
        await asyncio.sleep(0)
    assert copy.log.last.number == 2
    node.machine.gate.set()
    assert await begins == 1
    await shipped
    assert copy.log.last.number == 1


# --- power cuts


@pytest.mark.parametrize("seed", range(40))
async def test_after_a_power_cut_at_any_call_a_copy_has_what_it_acknowledged_and_joins_again(seed: int) -> None:
    chance = random.Random(seed)
    node, primary = Node(), Primary()
    copy = await node.make()
    fates: list[Fate] = [lose_all, keep_all, lambda newest: chance.randint(0, newest)]
    acknowledged = 0
    for _ in range(6):
        node.disk.power_cut_at = node.disk.calls + chance.randint(1, 25)
        try:
            for _ in range(10):
                await primary.join(copy)
                for _ in range(chance.randint(1, 4)):
                    await primary.put(f"key-{chance.randint(0, 9)}", chance.randbytes(chance.randint(1, 400)))
                committed = chance.randint(0, primary.log.last.number)
                acknowledged = await primary.ship(copy, min(committed, acknowledged)) or acknowledged
                await copy.applier.apply_some()
        except PowerCut:
            pass
        copy = await node.restart(fates[chance.randint(0, 2)], chance.randint(0, 9))
        assert copy.log.last.number >= acknowledged
        assert [entry.checksum for entry in copy.log.entries(copy.log.first - 1)] == [
            entry.checksum for entry in primary.entries[copy.log.first - 1 : copy.log.last.number]
        ]
    assert await primary.join(copy) is not None
    last = primary.log.last.number
    assert await primary.ship(copy, last) == last
    while await copy.applier.apply_some():
        pass
    assert rows_of(copy.engine) == rows_of(primary.engine)


# --- snapshots


async def _pages(primary: Primary, rows_max: int) -> list[list[Row]]:
    """The rows of the primary's engine as a feed brings them, in pages; what is between two pages may be written to."""
    pages, after_row, more = [], 0, True
    while more:
        page = await primary.engine.feed(FeedQuery([1], 0, after_row, rows_max, 1 << 20))
        pages.append(
            [Row(kind, key, p, 0, version, expires, body, intent)
             for kind, key, p, version, expires, body, intent, _ in page.rows]
        )  # fmt: skip
        after_row, more = page.after_row, page.more
    return pages


async def _to_fill(node: Node, primary: Primary) -> StoreCopy:
    copy = await node.make()
    for number in range(20):
        await primary.put(f"key-{number}", b"old")
    told, join = await primary.greet(copy, first_kept=21)
    assert join == Join(0, snapshot=True)
    assert await copy.greeting.begin(primary.session(copy), told.position, join) == 0
    return copy


async def test_a_snapshot_with_the_records_behind_it_makes_an_equal_file_while_the_primary_is_written_to() -> None:
    node, primary = Node(), Primary()
    copy = await _to_fill(node, primary)
    named, of = primary.session(copy), primary.engine.applied
    assert await copy.filling.begins(named, of)
    for at, page in enumerate(await _pages(primary, 6)):
        await primary.put(f"key-{at}", b"new")
        await primary.put(f"more-{at}", b"new")
        assert await copy.filling.page(named, of.position, page)
        assert await primary.ship(copy, committed=primary.log.last.number) == 0, "nothing counts before it is whole"
        assert await copy.applier.apply_some() == 0
    highest = primary.log.last.number
    await primary.put("last", b"new")
    assert await copy.filling.ends(named, of.position, highest)
    await primary.ship(copy, committed=highest)
    assert copy.is_filling
    while await copy.applier.apply_some():
        pass
    assert not copy.is_filling
    assert copy.records.committed(named, highest + 1) == highest + 1
    while await copy.applier.apply_some():
        pass
    assert rows_of(copy.engine) == rows_of(primary.engine)
    again = await node.restart()
    assert not again.is_filling
    assert await primary.join(again) == highest + 1


async def test_after_a_power_cut_within_a_snapshot_it_goes_on_or_begins_again_with_an_empty_copy() -> None:
    went_on = 0
    for at in range(1, 30):
        node, primary = Node(), Primary()
        copy = await _to_fill(node, primary)
        named, of = primary.session(copy), primary.engine.applied
        node.disk.power_cut_at = node.disk.calls + at
        try:
            assert await copy.filling.begins(named, of)
            for page in await _pages(primary, 6):
                assert await copy.filling.page(named, of.position, page)
            await primary.put("more", b"new")
            await primary.ship(copy, committed=21)
            assert await copy.filling.ends(named, of.position, 21)
            await copy.applier.apply_some()
        except PowerCut:
            pass
        again = await node.restart(keep_all if at % 2 else lose_all)
        told, join = await primary.greet(again)
        if told.filling:
            assert (rows_of(again.engine) == {}) or (told.snapshot is not None and told.snapshot.at == of.position)
            went_on += told.snapshot is not None
            assert join.snapshot
        else:
            assert rows_of(again.engine) == rows_of(primary.engine)
            assert not join.snapshot
    assert went_on


async def test_records_are_taken_again_where_the_power_took_only_what_the_file_had_last() -> None:
    node, primary = Node(), Primary()
    copy = await _to_fill(node, primary)
    named, of = primary.session(copy), primary.engine.applied
    assert await copy.filling.begins(named, of)
    for page in await _pages(primary, 6):
        assert await copy.filling.page(named, of.position, page)
    for at in range(3):
        await primary.put(f"key-{at}", b"new")
    assert await copy.filling.ends(named, of.position, 23)
    await primary.ship(copy)
    again = await node.restart(kept=len(node.engine._history) - 2)
    assert again.log.last.number == 23
    assert again.filling.snapshot is not None
    assert not again.filling.snapshot.filled_to, "its end was in the file only"
    told, _ = await primary.greet(again)
    named = primary.session(again)
    assert await again.greeting.begin(named, told.position, Join(20, snapshot=True), told.snapshot) == 0
    await primary.put("last", b"new")
    assert await again.filling.ends(named, of.position, 24)
    await again.records.take(named, primary.entries[20:], committed=24)
    while await again.applier.apply_some():
        pass
    assert not again.is_filling
    assert rows_of(again.engine) == rows_of(primary.engine)


async def test_pages_and_ends_of_another_snapshot_or_session_are_thrown_away() -> None:
    node, primary = Node(), Primary()
    copy = await _to_fill(node, primary)
    named, of = primary.session(copy), primary.engine.applied
    other = named._replace(round=99)
    assert not await copy.filling.begins(other, of)
    assert not await copy.filling.page(named, of.position, [])
    assert await copy.filling.begins(named, of)
    assert not await copy.filling.begins(named, of), "a snapshot that is not ahead of the log is not taken"
    assert not await copy.filling.page(other, of.position, [])
    assert not await copy.filling.page(named, of.position._replace(number=3), [])
    assert not await copy.filling.ends(other, of.position, 20)
    assert copy.is_filling


async def test_a_copy_that_is_whole_takes_no_snapshot() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.put("a", b"1")
    await primary.join(copy)
    assert not await copy.filling.begins(primary.session(copy), primary.engine.applied)
    assert await primary.ship(copy, committed=1) == 1


class Delays(Machine):
    """Its sleeps end when they are told to: one `turn` after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.asleep = asyncio.Event()
        self._turn = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.asleep.set()
        await self._turn.wait()
        self._turn.clear()

    async def turn(self) -> None:
        """Let the sleep that is under way end, and wait for the next one."""
        self.asleep.clear()
        self._turn.set()
        await self.asleep.wait()


async def test_while_many_records_come_a_copy_gathers_them_and_then_applies_all_at_once() -> None:
    node, primary = Node(), Primary()
    node.machine = delays = Delays()
    copy = await node.make()
    assert await primary.join(copy) == 0
    running = asyncio.create_task(copy.applier.run())
    copy.records.committed(primary.session(copy), 0)  # there is something to learn
    await asyncio.wait_for(delays.asleep.wait(), 60)
    for _ in range(5):
        for number in range(20):
            await primary.put(f"key-{number}", b"value")
        await primary.ship(copy, committed=len(primary.entries))
        assert copy.engine.applied.position.number == 0
        await asyncio.wait_for(delays.turn(), 60)
    delays._turn.set()  # none came during the last delay
    async with asyncio.timeout(60):
        while copy.engine.applied.position.number < 100:
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(rows_of(copy.engine)) == 20


async def test_of_large_records_few_are_applied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applying, "PIECE_BYTES_MIN", 10_000)
    node, primary = Node(), Primary()
    copy = await node.make()
    assert await primary.join(copy) == 0
    for number in range(12):
        await primary.put(f"key-{number}", bytes(3000))
    await primary.ship(copy, committed=12)
    assert await copy.applier.apply_some() == 4
    assert await copy.applier.apply_some() == 4


async def test_a_promise_made_while_the_file_is_noted_as_whole_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    node, primary = Node(), Primary()
    copy = await _to_fill(node, primary)
    named, of = primary.session(copy), primary.engine.applied
    assert await copy.filling.begins(named, of)
    for page in await _pages(primary, 6):
        assert await copy.filling.page(named, of.position, page)
    in_thread, reached, goes_on = node.machine.in_thread, asyncio.Event(), asyncio.Event()

    async def slow(function: Callable[[], Any]) -> Any:
        if getattr(function, "func", None) is write_identity and not reached.is_set():
            reached.set()
            await goes_on.wait()
        return await in_thread(function)

    monkeypatch.setattr(node.machine, "in_thread", slow)
    ending = asyncio.ensure_future(copy.filling.ends(named, of.position, of.position.number))
    await reached.wait()
    greeting = asyncio.ensure_future(copy.greeting.hello(named._replace(term=7, start="second")))
    await asyncio.wait((greeting,), timeout=0.1)  # it may be answered at once, or has to wait
    goes_on.set()
    assert await ending
    assert await greeting is not None
    assert read_identity(node.disk, FOLDER, STORE) == copy.identity
    assert copy.identity.promised == copy.following.promised == 7
    assert not copy.is_filling
