"""The pace at which a copy applies: small pieces with pauses, and more where more waits than may."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.replication import applying
from kvstore.replication.applying import (
    HURRY_BYTES,
    PAUSE_S_MAX,
    PIECE_BYTES_MAX,
    PIECE_BYTES_MIN,
    WAITING_BYTES_MAX,
    WAITING_BYTES_MIN,
    ApplyPace,
)
from kvstore.replication.copy_log import CopyLog
from kvstore.storage.log import Log
from loadtest.simulate.disk import SimulatedDisk
from tests.unit.replication.one_copy import FOLDER, STORE_ID, Machine, Moving, Node, Primary, rows_of

_MIB = 1 << 20


def test_behind_a_small_piece_nothing_is_applied_for_the_rest_of_the_time() -> None:
    pace = ApplyPace(0.05)
    pace.come(WAITING_BYTES_MIN)
    assert pace.piece_bytes == PIECE_BYTES_MIN
    assert pace.pause_s(0.004) == pytest.approx(0.004 * 19)
    assert pace.pause_s(5.0) == PAUSE_S_MAX, "a disk that stood still is not waited for many times as long"


def test_the_more_waits_beyond_what_may_the_larger_the_pieces_and_the_shorter_the_pauses() -> None:
    pace = ApplyPace(0.05)
    pace.come(WAITING_BYTES_MIN)
    steps = []
    for _ in range(8):
        pace.come(HURRY_BYTES // 8)
        steps.append((pace.piece_bytes, -pace.pause_s(0.004)))
    assert sorted(steps) == steps
    assert len(set(steps)) == 8
    assert steps[-1] == (PIECE_BYTES_MAX, 0)
    pace.come(HURRY_BYTES)
    assert (pace.piece_bytes, pace.pause_s(0.004)) == (PIECE_BYTES_MAX, 0)


def test_what_a_copy_lacks_when_it_joins_may_wait_and_what_comes_later_may_not() -> None:
    pace = ApplyPace(0.05)
    for _ in range(20):
        pace.come(_MIB)
        pace.heard(lacks=True)
    assert pace.hurry == 0, "all that came in one go may wait"
    pace.heard(lacks=False)
    pace.come(_MIB)
    assert pace.hurry == pytest.approx(_MIB / HURRY_BYTES), "the copy is there, and falls behind what its clients write"
    pace.applied(11 * _MIB)
    assert pace.hurry == 0
    pace.come(2 * _MIB)
    assert pace.hurry == pytest.approx(2 * _MIB / HURRY_BYTES), "what was applied once does not wait again"


def test_however_much_a_copy_lacks_when_it_joins_what_waits_is_bounded() -> None:
    pace = ApplyPace(0.05)
    for _ in range((WAITING_BYTES_MAX + HURRY_BYTES) // _MIB):
        pace.come(_MIB)
        pace.heard(lacks=True)
    assert pace.pause_s(0.004) == 0


def test_a_copy_that_gets_more_than_it_applies_with_pauses_keeps_up_all_the_same() -> None:
    """A second's records at a time; each piece takes a millisecond and as long as its bytes take at that speed."""
    pace, bytes_per_s = ApplyPace(0.05), 12 * _MIB
    waiting: list[int] = []
    now = next_s = 0.0
    while now < 60:
        while next_s <= now:
            pace.come(4 * _MIB)
            next_s += 1
        size = min(pace.piece_bytes, pace.waiting_bytes)
        took_s = 0.001 + size / bytes_per_s
        pace.applied(size)
        waiting.append(pace.waiting_bytes)
        now += took_s + pace.pause_s(took_s)
    assert max(waiting) < WAITING_BYTES_MIN + HURRY_BYTES


async def test_a_copy_that_applies_many_rests_between_its_pieces_and_forgets_what_is_cut_off() -> None:
    log = Log.create(SimulatedDisk(), FOLDER, "shard-s1", STORE_ID, segment_bytes=1 << 20)
    other = Log.create(SimulatedDisk(), FOLDER, "shard-s1", STORE_ID, segment_bytes=1 << 20)
    clock = Moving()
    taking = CopyLog(log, clock, 0.0, 0.25)
    await taking.gather(0.0)
    clock.now = 50.25
    await taking.rest()
    assert clock.now == 50.25 + 3 * 0.25
    clock.now = 55.0
    await taking.rest()
    assert clock.now == 55.0 + PAUSE_S_MAX
    other.append(bytes(1000))
    assert taking.append(next(other.entries(0)))
    assert taking.applying.waiting_bytes == 1000
    await taking.change(lambda: log.cut(0))
    assert taking.applying.waiting_bytes == 0


async def test_what_a_copy_gets_while_more_is_committed_than_it_has_is_applied_little_by_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, size in {"PIECE_BYTES_MIN": 3000, "WAITING_BYTES_MIN": 9000, "HURRY_BYTES": 9000}.items():
        monkeypatch.setattr(applying, name, size)
    pieces = []
    for committed in (13, 12):
        node, primary = Node(), Primary()
        copy = await node.make()
        assert await primary.join(copy) == 0
        for number in range(12):
            await primary.put(f"key-{number}", bytes(3000))
        await primary.ship(copy, committed)
        pieces.append([await copy.applier.apply_some() for _ in range(3)])
    catching_up, falling_behind = pieces
    assert catching_up == [1, 1, 1]
    assert falling_behind[0] == 12, "so much waits that it goes into one piece"


async def test_what_waited_when_the_process_ended_counts_when_it_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"PIECE_BYTES_MIN": 3000, "WAITING_BYTES_MIN": 9000, "HURRY_BYTES": 9000}.items():
        monkeypatch.setattr(applying, name, size)
    node, primary = Node(), Primary()
    copy = await node.make()
    assert await primary.join(copy) == 0
    for number in range(12):
        await primary.put(f"key-{number}", bytes(3000))
    await primary.ship(copy)
    copy = await node.restart()
    assert await primary.join(copy) == 12
    copy.records.committed(primary.session(copy), 12)
    assert await copy.applier.apply_some() == 12, "so much waits that it goes into one piece"


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
