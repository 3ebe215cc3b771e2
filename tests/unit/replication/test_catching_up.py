"""Records for a copy that is not waited for: how much is under way, and the pauses."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore.replication import copy_link, messages
from kvstore.replication.catching_up import PAUSE_S_MAX, ROOM_BYTES_MAX, ROOM_BYTES_MIN, CatchingUp
from kvstore.replication.tail import cost
from kvstore.storage.engine import Identity
from kvstore.storage.log import Log
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.record import CommitRecord
from kvstore.storage.replay import replay
from kvstore.storage.rows import VALUE, Clock, Row
from loadtest.simulate.disk import SimulatedDisk
from tests.unit.replication.one_copy import FOLDER, STORE_ID
from tests.unit.replication.primary_with_copies import TIMES, Cluster, Inline, QueueWire
from tests.unit.store.harness import turns_counted
from tests.unit.waiting import until


def test_behind_a_full_frame_nothing_is_sent_for_the_rest_of_the_time() -> None:
    pace = CatchingUp(0.25)
    assert pace.take_pause() == 0
    pace.sent(ROOM_BYTES_MIN, 0, now=10.0)
    pace.acknowledged(now=10.25)
    applying_s = ROOM_BYTES_MIN / (16 << 20)
    assert pace.take_pause() == pytest.approx(3 * (0.25 + applying_s))
    assert pace.take_pause() == 0, "once behind each frame"
    pace.sent(ROOM_BYTES_MIN, 0, now=11.0)
    pace.acknowledged(now=21.0)
    assert pace.take_pause() == PAUSE_S_MAX


def test_a_copy_that_is_nearly_there_gets_what_comes_at_once() -> None:
    pace = CatchingUp(0.25)
    pace.sent(ROOM_BYTES_MIN - 1, 0, now=10.0)
    pace.acknowledged(now=10.5)
    assert pace.take_pause() == 0


def test_where_as_much_comes_as_is_sent_more_and_more_is_under_way_without_pauses() -> None:
    pace, come, rooms = CatchingUp(0.25), 0, []
    for _ in range(9):
        pace.sent(pace.room_bytes, come, now=10.0)
        pace.acknowledged(now=10.5)
        rooms.append(pace.room_bytes)
        come += pace.frame_bytes
        assert (pace.take_pause() == 0) == (pace.room_bytes > ROOM_BYTES_MIN)
    assert rooms[:3] == [ROOM_BYTES_MIN, 2 * ROOM_BYTES_MIN, 4 * ROOM_BYTES_MIN]
    assert pace.frame_bytes == 1 << 20


def test_where_little_comes_the_room_stays_as_it_is() -> None:
    pace = CatchingUp(0.25)
    for number in range(9):
        pace.sent(ROOM_BYTES_MIN, number * ROOM_BYTES_MIN // 3, now=10.0)
    assert pace.room_bytes == ROOM_BYTES_MIN < ROOM_BYTES_MAX


def with_room(cluster: Cluster) -> Cluster:
    """The segments of its copies are large."""
    for node in cluster.nodes.values():
        node.place = node.place._replace(segment_bytes=1 << 20)
    return cluster


class StandingStill(Inline):
    """Its clock stands still, and each sleep is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    def boottime_s(self) -> float:
        return 1000.0

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(min(seconds, 0.002))


@pytest.mark.parametrize("size", [0, 20_000], ids=["small records", "large records"])
async def test_records_that_a_joining_copy_lacks_go_out_a_little_at_a_time_with_a_pause_behind_each(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = with_room(Cluster("n2", segment_bytes=4 << 20))
    clock = cluster.environment = StandingStill()
    frames: list[int] = []
    send = QueueWire.send

    async def noted(wire: QueueWire, message: Any) -> None:
        if isinstance(message, messages.Records):
            frames.append(sum(map(cost, message.entries)))
        await send(wire, message)

    monkeypatch.setattr(QueueWire, "send", noted)
    async with cluster.running():
        for number in range(60 if size else 600):
            cluster.put(f"key-{number}", bytes(size))
        await cluster.in_sync("n2")
        await until(lambda: cluster.copies["n2"].log.synced == cluster.log.last)
    full = [frame for frame in frames if frame >= ROOM_BYTES_MIN]
    assert len(full) >= 4
    assert max(frames) < ROOM_BYTES_MIN + size + 2000
    pauses = [3 * frame / (16 << 20) for frame in full]
    assert [pause for pause in clock.slept if pause in set(pauses)][: len(pauses) - 1] == pauses[:-1]


async def test_what_takes_long_to_sync_is_synced_beside_the_event_loop_of_the_copy() -> None:
    times = TIMES._replace(sync_inline_ms_max=1e6, apply_delay_s=60.0)
    async with with_room(Cluster("n2", times=times)).running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        hops = cluster.environment.hops
        last = cluster.put("small", bytes(1000))
        await until(lambda: cluster.sender.shipping.committed == last)
        assert cluster.environment.hops == hops
        last = cluster.put("large", bytes(100_000))
        await until(lambda: cluster.sender.shipping.committed == last)
        assert cluster.environment.hops == hops + 1
        last = cluster.put("small", bytes(1000))
        await until(lambda: cluster.sender.shipping.committed == last)
        assert cluster.environment.hops == hops + 1


async def test_while_many_records_are_decoded_the_event_loop_has_its_turns() -> None:
    log = Log.create(SimulatedDisk(), FOLDER, "shard-s1", STORE_ID, segment_bytes=4 << 20)
    for number in range(1, 41):
        log.append(CommitRecord(Clock(number, number), [Row(VALUE, "k", 0, number, number, 0, bytes(50_000))]).encode())
    async with turns_counted() as turns:
        await replay(MemoryEngine(Identity(STORE_ID, None, "s1", 64)), list(log.entries(0)))
    assert len(turns) >= 10


async def in_sync_by_a_snapshot(cluster: Cluster) -> None:
    """Records are written and released, so that the copy on n2 gets a snapshot; returns when it is in sync."""
    for number in range(200):
        cluster.put(f"key-{number % 50}", b"%05d" % number * 20)
        cluster.log.prepare_segment()
    await cluster.apply()
    cluster.log.release(cluster.engine.applied.position.number)
    await cluster.in_sync("n2")
    assert not cluster.copies["n2"].is_filling


async def test_records_that_a_snapshot_needs_to_be_whole_are_sent_however_many_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy acknowledges none before it is whole, so what may be under way must not bound them."""
    monkeypatch.setattr(copy_link, "ROOM_BYTES_MAX", 20_000)
    monkeypatch.setattr(copy_link, "_FRAME_BYTES", 5_000)
    cluster = Cluster("n2", segment_bytes=8192, times=TIMES._replace(snapshot_page_rows_max=10))
    send = QueueWire.send

    async def busy(wire: QueueWire, message: Any) -> None:
        if isinstance(message, messages.SnapshotPage):
            for number in range(10):
                cluster.put(f"late-{number}")
                cluster.log.prepare_segment()
            await cluster.apply()
        await send(wire, message)

    monkeypatch.setattr(QueueWire, "send", busy)
    async with cluster.running():
        await in_sync_by_a_snapshot(cluster)


async def test_records_behind_a_snapshot_go_out_a_little_at_a_time_with_a_pause_behind_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = with_room(Cluster("n2", segment_bytes=8192, times=TIMES._replace(snapshot_page_rows_max=10)))
    clock = cluster.environment = StandingStill()
    frames: list[int] = []
    send = QueueWire.send

    async def busy(wire: QueueWire, message: Any) -> None:
        if isinstance(message, messages.SnapshotEnds):
            for number in range(400):
                cluster.put(f"late-{number}", bytes(2000))
                cluster.log.prepare_segment()
            await cluster.apply()
        elif isinstance(message, messages.Records):
            frames.append(sum(map(cost, message.entries)))
        await send(wire, message)

    monkeypatch.setattr(QueueWire, "send", busy)
    async with cluster.running():
        await in_sync_by_a_snapshot(cluster)
    full = [frame for frame in frames if frame >= ROOM_BYTES_MIN]
    assert len(full) >= 4
    assert max(frames) < ROOM_BYTES_MIN + 6000
    pauses = [3 * frame / (16 << 20) for frame in full]
    assert [pause for pause in clock.slept if pause in set(pauses)][: len(pauses) - 1] == pauses[:-1]
