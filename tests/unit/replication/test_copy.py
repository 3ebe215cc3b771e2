"""What a copy takes, syncs, acknowledges and applies: a real log on a disk that loses what is not synced."""

from __future__ import annotations

import asyncio
import random

import pytest

from kvstore.replication.files import make_copy
from kvstore.storage.log import BEGINNING
from kvstore.storage.record import CommitRecord
from kvstore.storage.rows import VALUE, Clock, Row
from loadtest.simulate.disk import Fate, PowerCut, keep_all, lose_all
from tests.unit.replication.one_copy import STORE_ID, TIMES, Node, Primary, Threads, rows_of


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
