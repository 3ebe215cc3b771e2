"""The pace of a snapshot: small pages with long pauses beside clients, and larger ones where nobody is kept waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from kvstore.replication import messages
from kvstore.replication.places import Times
from kvstore.replication.serving import serve_copy
from kvstore.replication.session import Join
from kvstore.replication.snapshot import Snapshot, Source
from kvstore.replication.snapshot_pace import (
    BUSY_SHARE,
    HURRY_FROM,
    HURRY_FROM_S,
    HURRY_TO,
    HURRY_TO_S,
    PAGE_BYTES,
    PAUSE_S_MAX,
    SnapshotPace,
)
from kvstore.replication.wire import expect, greet
from kvstore.storage import memory
from kvstore.storage.engine import Application, Engine, FeedPage, FeedQuery, Identity
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.record import CommitRecord
from kvstore.storage.rows import VALUE, Clock, Row
from tests.unit.replication.one_copy import STORE_ID, TIMES, Moving, Node, Primary, rows_of
from tests.unit.replication.primary_with_copies import QueueWire

PACED = TIMES._replace(snapshot_share=0.5, snapshot_busy_share=0.1, snapshot_page_rows_max=320, log_bytes_max=1000)
ROW_S, CHECKPOINT_S = 0.0001, 0.02


def pace(*, is_busy: bool, kept_bytes: int = 0, filling_s: float = 0.0, times: Times = PACED) -> SnapshotPace:
    found = SnapshotPace(times)
    found.look(is_busy=is_busy, kept_bytes=kept_bytes, filling_s=filling_s)
    return found


def steps_of(paces: list[SnapshotPace]) -> list[tuple[int, int, float]]:
    return [(each.rows_max, each.bytes_max, -each.pause_s(0.004)) for each in paces]


def test_beside_clients_a_page_is_small_and_for_most_of_the_time_none_is_under_way() -> None:
    beside = pace(is_busy=True)
    assert (beside.rows_max, beside.bytes_max) == (320 // BUSY_SHARE, PAGE_BYTES // BUSY_SHARE)
    assert beside.pause_s(0.004) == pytest.approx(9 * 0.004)
    assert beside.pause_s(5.0) == PAUSE_S_MAX, "a disk that stood still is not waited for many times as long"
    assert pace(is_busy=True, times=PACED._replace(snapshot_page_rows_max=3)).rows_max == 1


def test_without_clients_a_page_is_large_and_the_next_one_follows_soon() -> None:
    alone = pace(is_busy=False)
    assert (alone.rows_max, alone.bytes_max) == (320, PAGE_BYTES)
    assert alone.pause_s(0.04) == pytest.approx(0.04)


def test_a_share_beside_clients_that_is_the_larger_one_changes_nothing() -> None:
    assert pace(is_busy=True, times=PACED._replace(snapshot_busy_share=0.9)).pause_s(0.04) == pytest.approx(0.04)


def test_the_more_of_the_log_is_kept_the_less_clients_count() -> None:
    kept = [0, int(1000 * HURRY_FROM), 200, 300, 400, int(1000 * HURRY_TO), 1000]
    steps = steps_of([pace(is_busy=True, kept_bytes=each) for each in kept])
    assert sorted(steps) == steps
    assert steps[0] == steps[1]
    assert len(set(steps[1:6])) == 5
    assert steps[5:] == [(320, PAGE_BYTES, pytest.approx(-0.004))] * 2


def test_the_longer_a_copy_is_being_filled_the_less_clients_count() -> None:
    filling_s = [0.0, HURRY_FROM_S, 900.0, 1200.0, 1500.0, HURRY_TO_S, 86_400.0]
    steps = steps_of([pace(is_busy=True, filling_s=each) for each in filling_s])
    assert sorted(steps) == steps
    assert steps[0] == steps[1]
    assert len(set(steps[1:6])) == 5
    assert steps[5:] == [(320, PAGE_BYTES, pytest.approx(-0.004))] * 2


def test_a_large_store_is_copied_within_an_hour_though_its_clients_never_stop() -> None:
    """10,000,000 rows, 5 ms for each page and 0.02 ms for each row. Little is written: the log is no reason to hurry.
    Without clients it takes 336 s."""
    found, left, took_s = SnapshotPace(Times(1.5, 2.0, 0.8, 2.0)), 10_000_000, 0.0
    while left > 0:
        found.look(is_busy=True, kept_bytes=96 << 20, filling_s=took_s)
        page = min(left, found.rows_max)
        worked_s = 0.005 + page * 0.00002
        left, took_s = left - page, took_s + worked_s + found.pause_s(worked_s)
    assert took_s < 3600


class Slow(MemoryEngine):
    """Each row that is read or written takes a while, and each checkpoint. `read`: rows of each page."""

    def __init__(self, clock: Moving) -> None:
        super().__init__(Identity(STORE_ID, None, "s1", 64))
        self.checkpoints = 0
        self.read: list[int] = []
        self.worked_s = 0.0
        self._clock = clock

    def _work(self, seconds: float) -> None:
        self._clock.now += seconds
        self.worked_s += seconds

    async def feed(self, query: FeedQuery) -> FeedPage:
        page = await super().feed(query)
        self._work(len(page.rows) * ROW_S)
        self.read.append(len(page.rows))
        return page

    async def apply(self, application: Application) -> None:
        await super().apply(application)
        self._work(len(application.rows) * ROW_S)

    async def checkpoint(self, *, only_if_due: bool = False) -> int:
        number = await super().checkpoint(only_if_due=only_if_due)
        if number or not only_if_due:
            self.checkpoints += 1
            self._work(CHECKPOINT_S)
        return number


class SlowNode(Node):
    def __init__(self, clock: Moving) -> None:
        super().__init__()
        self._clock = clock
        self.slow = Slow(clock)

    async def _renew(self) -> Engine:
        self.engine = self.slow = Slow(self._clock)
        return self.engine


class Filling:
    """A snapshot of 2000 rows, from a primary to a copy, on a clock that only work and pauses move.

    `busy` and `copy_busy`: whether clients are at work on the node of the one and of the other.
    """

    def __init__(self, busy: Callable[[], bool], copy_busy: Callable[[], bool]) -> None:
        self.clock = Moving()
        self.node = SlowNode(self.clock)
        self.primary = Primary()
        self.engine = Slow(self.clock)
        self._busy, self._copy_busy = busy, copy_busy

    async def fill(self) -> float:
        """Returns how many seconds it took."""
        node, primary, times = self.node, self.primary, PACED._replace(log_bytes_max=1 << 30)
        primary.engine = self.engine
        rows = [Row(VALUE, f"key-{number}", 1, number, number, 0, b"value") for number in range(1, 2001)]
        await primary.append(CommitRecord(Clock(2000, 2000), rows))
        self.engine.worked_s = 0
        copy = await node.make()
        primary.round += 1
        ours, theirs = QueueWire(messages.decode_from_copy), QueueWire(messages.decode_from_primary)
        ours.other, theirs.other = theirs, ours
        serving = asyncio.create_task(serve_copy(theirs, lambda _: copy, node.machine, self._copy_busy))
        told = await greet(ours, primary.session(copy))
        await ours.send(messages.Begin(told.position, Join(0, snapshot=True)))
        await expect(ours, messages.Ack)
        began_s = self.clock.now
        source = Source(primary.log, self.engine, self.clock, times, lambda _: True, self._busy)
        await Snapshot(ours, source, began_s).send()
        took_s = self.clock.now - began_s
        await ours.close()
        await serving
        assert rows_of(copy.engine) == rows_of(self.engine)
        return took_s

    @property
    def worked_s(self) -> float:
        return self.engine.worked_s + self.node.slow.worked_s


@pytest.mark.parametrize(("busy", "copy_busy"), [(True, False), (False, True)])
async def test_beside_clients_of_either_end_reading_writing_and_checkpoints_take_their_share_of_the_time(
    busy: bool, copy_busy: bool
) -> None:
    filling = Filling(lambda: busy, lambda: copy_busy)
    took_s = await filling.fill()
    assert filling.worked_s == pytest.approx(0.1 * took_s, rel=0.1)
    assert set(filling.engine.read[:-1]) == {320 // BUSY_SHARE}


async def test_without_clients_pages_are_large_and_the_copy_is_filled_soon() -> None:
    filling = Filling(lambda: False, lambda: False)
    took_s = await filling.fill()
    assert filling.worked_s == pytest.approx(0.5 * took_s, rel=0.1)
    assert set(filling.engine.read[:-1]) == {320}


async def test_once_clients_go_the_pages_grow_and_the_pauses_end() -> None:
    left = iter([True] * 40)
    filling = Filling(lambda: next(left, False), lambda: False)
    await filling.fill()
    pages = filling.engine.read
    assert pages[0] == 320 // BUSY_SHARE
    assert 320 in pages
    assert sorted(pages[:-1]) == pages[:-1]


async def test_the_file_of_a_copy_is_made_durable_little_by_little_while_it_is_filled() -> None:
    filling = Filling(lambda: True, lambda: False)
    await filling.fill()
    pages = len(filling.engine.read)
    assert filling.node.slow.checkpoints >= pages // (memory._HISTORY_MAX + 1)
    assert len(filling.node.slow._history) <= memory._HISTORY_MAX + 3
