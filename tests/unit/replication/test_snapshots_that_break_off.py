"""Snapshots that break off and go on: real logs on disks that lose what is not synced, against what was written."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from kvstore.replication import shipping
from kvstore.replication.copy_link import Surroundings
from kvstore.replication.files import open_copy
from kvstore.replication.promise import read_identity
from kvstore.replication.sender import Sender
from kvstore.replication.session import Session, goes_on
from kvstore.replication.snapshot_pace import HURRY_TO_S
from kvstore.storage.engine import FeedPage, FeedQuery, Identity, SnapshotProgress
from kvstore.storage.log import Log
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.record import CommitRecord
from kvstore.storage.replay import replay
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.storage.segments import Position
from loadtest.simulate.disk import Fate, SimulatedDisk, keep_all, lose_all
from tests.unit.replication.one_copy import FOLDER, STORE, STORE_ID, rows_of
from tests.unit.replication.primary_with_copies import TIMES, Cluster
from tests.unit.waiting import until

SEGMENT_BYTES = 8192
SMALL_PAGES = TIMES._replace(snapshot_page_rows_max=7, snapshot_busy_share=1.0)
PARTITIONS = 64


class Source(MemoryEngine):
    """A primary's engine. `begun`: how often each partition was; `largest`: rows of the largest page;
    `turn`: each page of a snapshot waits for it."""

    def __init__(self) -> None:
        super().__init__(Identity(STORE_ID, None, "s1", PARTITIONS))
        self.begun: Counter[int] = Counter()
        self.pages = 0
        self.largest = 0
        self.turn = asyncio.Semaphore(0)

    async def feed(self, query: FeedQuery) -> FeedPage:
        await self.turn.acquire()
        page = await super().feed(query)
        self.pages += 1
        self.largest = max(self.largest, len(page.rows))
        self.begun.update(list(query.partitions)[int(query.after_row > 0) : page.done + 1])
        return page


class Moving(Cluster):
    """A cluster whose copy, primary and connections come and go. `rows`: what was written, as a dictionary."""

    def __init__(self) -> None:
        super().__init__("n2", segment_bytes=SEGMENT_BYTES, times=SMALL_PAGES)
        self.engine: Source = Source()
        self.rows: dict[str, bytes] = {}
        self._works: list[asyncio.Task[None]] = []

    def write(self, key: int, value: bytes | None) -> None:
        """Append and sync a put, or a deletion."""
        number, name = self.log.last.number + 1, f"key-{key}"
        row = Row(VALUE, name, key % PARTITIONS, number, number, 0, value)
        while self.log.wants_segment:
            self.log.prepare_segment()
        self.log.append(CommitRecord(Clock(number, number), [row]).encode(), self.config.term, frees=True)
        self.log.sync()
        (entry,) = self.log.entries(number - 1)
        self.sender.appended(entry)
        self.sender.synced(number)
        if value is None:
            self.rows.pop(name, None)
        else:
            self.rows[name] = value

    def release(self) -> None:
        """Let go of all records that the primary's file has and no copy needs."""
        kept = self.sender.links.keeps
        self.log.release(min(self.engine.applied.position.number, self.log.durable if kept is None else kept))

    async def restart_copy(self, fate: Fate = keep_all, kept: int = 99) -> None:
        """The copy's process ends, perhaps with the power, and another one opens its files."""
        await self.cut("n2")
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        node = self.nodes["n2"]
        if fate is not keep_all:
            node.engine.crash(kept)
        node.disk.restart(fate)
        identity = read_identity(node.disk, FOLDER, STORE)
        assert identity is not None
        self.copies["n2"] = copy = await open_copy(node.place, identity, self.environment, self._times)
        self._works.append(asyncio.create_task(copy.applier.run()))

    async def become_another_primary(self, chance: random.Random) -> None:
        """A copy that has all takes over; its file has the same rows in other places."""
        entries = list(self.log.entries(self.log.first - 1))
        after = Source()
        rows = list(self.engine._rows.items())
        chance.shuffle(rows)
        after._applied, after._rows = self.engine._applied, dict(rows)
        after._places = {key: at + 1 for at, (key, _) in enumerate(rows)}
        after._count = iter(range(len(rows) + 1, 1 << 40))  # type: ignore[assignment]
        start = Position(self.log.first - 1, entries[0].previous)
        log = Log.create(SimulatedDisk(), FOLDER, "shard-s1", STORE_ID, start, SEGMENT_BYTES)
        for entry in entries:
            while log.wants_segment:
                log.prepare_segment()
            log.extend(entry)
        log.sync()
        await replay(after, list(log.entries(after.applied.position.number)))
        await self.sender.close()
        self.log, self.engine = log, after
        self.config = self.config._replace(epoch=self.config.epoch + 1, term=self.config.term + 1)
        self.begin_term()

    def begin_term(self) -> None:
        number = self.log.append(CommitRecord(Clock(self.log.last.number + 1, 1 << 20)).encode(), self.config.term)
        self.log.sync()
        state = shipping.opened(self.config, "n1", f"start-{self.config.term}", number, number)
        on_news = self._note_news
        around = Surroundings(
            self.log, self.engine, self.environment, self.connect, SMALL_PAGES, self.committed.append, on_news
        )
        self.sender = Sender(state, around)
        self._works.append(asyncio.create_task(self.sender.run()))

    async def to_fill(self, count: int = 300) -> None:
        """The copy joins, and records are released, so it gets a snapshot; none of its pages is let go yet."""
        for key in range(count):
            self.write(key, b"first")
        await self.apply()
        self.release()
        assert self.log.first > 1
        self.follow(self.replica("n2", joined=self.config.epoch + 1))
        await self.apply()

    async def pages(self, count: int) -> None:
        """Let so many pages go; returns once they are read, or the copy has all."""
        wanted = self.engine.pages + count
        for _ in range(count):
            self.engine.turn.release()
        await until(lambda: self.engine.pages >= wanted or self._has_all_pages())

    def _has_all_pages(self) -> bool:
        copy = self.copies["n2"]
        known = copy.filling.snapshot if copy.is_filling else copy.engine.applied.snapshot
        return known is not None and known.filled_to > 0

    async def filled(self) -> None:
        """Let all pages go, until the copy has what the primary has."""
        for _ in range(10_000):
            self.engine.turn.release()
        await self.apply()
        last = self.log.last
        await until(lambda: not self.copies["n2"].is_filling and self.copies["n2"].log.synced == last)
        await until(lambda: self.copies["n2"].engine.applied.position.number == last.number)

    def values(self) -> dict[str, bytes | None]:
        found = rows_of(self.copies["n2"].engine)
        return {key: value for key, (value, _) in found.items() if key.startswith("key-")}

    async def end(self) -> None:
        for work in self._works:
            work.cancel()
        await asyncio.gather(*self._works, return_exceptions=True)
        await self.sender.close()


def _read_again(source: Source) -> set[int]:
    return {partition for partition, count in source.begun.items() if count > 1}


async def test_a_snapshot_whose_connection_is_lost_goes_on_with_the_first_partition_that_is_not_whole() -> None:
    async with Moving().running() as cluster:
        await cluster.to_fill()
        for _ in range(3):
            await cluster.pages(10)
            await until(lambda: (found := cluster.copies["n2"].filling.snapshot) is not None and found.rows > 0)
            await cluster.cut("n2")
        await cluster.filled()
        assert cluster.values() == cluster.rows
        assert len(_read_again(cluster.engine)) <= 9, "of a page that was on its way, each time"
        await until(lambda: cluster.sender.links.snapshots() == {})


async def test_once_all_rows_are_sent_it_is_told_how_many_records_are_left_to_send() -> None:
    async with Moving().running() as cluster:
        await cluster.to_fill()
        await cluster.pages(20)
        links, left = cluster.sender.links, list[int]()
        (copy_id,) = links.snapshots()
        assert links.snapshots()[copy_id][0] > 0
        for key in range(2_000):
            cluster.write(key, bytes(1_000))
        await cluster.apply()
        for _ in range(10_000):
            cluster.engine.turn.release()
        async with asyncio.timeout(60):
            while cluster.copies["n2"].is_filling:
                lacks = links.behind(cluster.sender.shipping).get(copy_id)
                assert lacks is None or not links.snapshots()
                left += [lacks] if lacks is not None else []
                await asyncio.sleep(0)
        assert left == sorted(left, reverse=True)
        assert 2_000 >= left[0] > left[-1] >= 1, "as long as it has told nothing it lacks something"
        await until(lambda: links.behind(cluster.sender.shipping)[copy_id] == 0)


async def test_records_that_come_while_a_snapshot_is_broken_off_are_kept_for_it_and_change_what_has_come() -> None:
    async with Moving().running() as cluster:
        await cluster.to_fill()
        await cluster.pages(20)
        cluster.is_down.add("n2")
        await cluster.cut("n2")
        for key in range(0, 300, 3):
            cluster.write(key, None if key % 2 else b"second")
        for key in range(300, 400):
            cluster.write(key, b"new")
        await cluster.apply()
        cluster.release()
        cluster.is_down.clear()
        await cluster.filled()
        assert cluster.values() == cluster.rows
        assert len(_read_again(cluster.engine)) <= 3


@pytest.mark.parametrize("fate", [keep_all, lose_all])
async def test_a_copy_whose_process_ends_goes_on_with_the_pages_that_its_file_has(fate: Fate) -> None:
    async with Moving().running() as cluster:
        await cluster.to_fill()
        await cluster.pages(20)
        await until(lambda: (found := cluster.copies["n2"].filling.snapshot) is not None and found.partitions > 20)
        await cluster.restart_copy(fate, kept=8)
        found = cluster.copies["n2"].filling.snapshot
        assert found is not None
        assert found.partitions > 3
        await cluster.filled()
        assert cluster.values() == cluster.rows
        again = {partition for partition, count in cluster.engine.begun.items() if count > 1}
        assert min(again, default=PARTITIONS) >= found.partitions
        await cluster.end()


async def test_a_snapshot_goes_on_from_another_primary_that_has_all_which_was_seen() -> None:
    async with Moving().running() as cluster:
        await cluster.to_fill()
        await cluster.pages(20)
        await until(lambda: (found := cluster.copies["n2"].filling.snapshot) is not None and found.partitions > 10)
        for key in range(0, 300, 7):
            cluster.write(key, b"second")
        await cluster.apply()
        await cluster.become_another_primary(random.Random(1))
        await cluster.filled()
        assert cluster.values() == cluster.rows
        assert min(cluster.engine.begun) > 10
        await cluster.end()


async def test_another_primary_sends_all_records_that_make_a_snapshot_good_though_the_copy_acknowledges_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Moving().running() as cluster:
        await cluster.to_fill()
        await cluster.pages(20)
        for key in range(300):
            cluster.write(key, b"second" * 150)
        await cluster.apply()
        ends = cluster.copies["n2"].filling.ends

        async def ends_and_is_cut(named: Session, at: Position, highest: int) -> bool:
            cluster.is_down.add("n2")
            await cluster.cut("n2")
            return await ends(named, at, highest)

        monkeypatch.setattr(cluster.copies["n2"].filling, "ends", ends_and_is_cut)
        await cluster.pages(1000)
        found = cluster.copies["n2"].filling.snapshot
        assert found is not None
        assert found.filled_to - cluster.copies["n2"].log.last.number == 300
        await cluster.become_another_primary(random.Random(1))
        cluster.is_down.clear()
        await cluster.filled()
        assert cluster.values() == cluster.rows
        await cluster.end()


async def test_a_snapshot_begins_again_where_the_records_from_its_beginning_on_are_kept_no_more() -> None:
    async with Moving().running() as cluster:
        await cluster.to_fill()
        await cluster.pages(20)
        cluster.is_down.add("n2")
        await cluster.cut("n2")
        for key in range(300):
            cluster.write(key, b"second" * 8)
        await cluster.apply()
        cluster.log.release(cluster.engine.applied.position.number)
        cluster.is_down.clear()
        await cluster.filled()
        assert cluster.values() == cluster.rows
        assert cluster.engine.begun[0] == 2


async def test_a_snapshot_that_begins_again_is_in_the_hurry_of_those_before() -> None:
    """It would never arrive where too much of the log comes during each snapshot that makes room for clients."""
    async with Moving().running() as cluster:
        cluster.is_busy = True
        await cluster.to_fill()
        await cluster.pages(20)
        assert cluster.engine.largest == 1
        since_boot_s = cluster.environment.monotonic_s
        cluster.environment.monotonic_s = lambda: since_boot_s() + HURRY_TO_S  # type: ignore[method-assign]
        cluster.is_down.add("n2")
        await cluster.cut("n2")
        for key in range(300):
            cluster.write(key, b"second" * 8)
        await cluster.apply()
        cluster.log.release(cluster.engine.applied.position.number)
        cluster.is_down.clear()
        await cluster.filled()
        assert cluster.values() == cluster.rows
        assert cluster.engine.begun[0] == 2
        assert cluster.engine.largest == 7


@pytest.mark.parametrize("seed", range(25))
async def test_whatever_breaks_a_snapshot_off_the_copy_has_in_the_end_what_was_written(seed: int) -> None:
    chance = random.Random(seed)
    async with Moving().running() as cluster:
        await cluster.to_fill(chance.randint(100, 300))
        for _ in range(chance.randint(2, 6)):
            for _ in range(chance.randint(0, 40)):
                cluster.write(chance.randrange(350), None if chance.random() < 0.3 else chance.randbytes(20))
            await cluster.apply()
            if chance.random() < 0.7:
                await cluster.pages(chance.randint(1, 12))
            match chance.choice(["cut", "restart", "power", "primary", "release", "records"]):
                case "cut":
                    await cluster.cut("n2")
                case "restart":
                    await cluster.restart_copy()
                case "power":
                    await cluster.restart_copy(chance.choice([lose_all, keep_all]), chance.randrange(20))
                case "primary":
                    await cluster.become_another_primary(chance)
                case "release":
                    cluster.release()
                case "records":
                    cluster.log.release(cluster.engine.applied.position.number)
        await cluster.filled()
        assert cluster.values() == cluster.rows
        await cluster.end()


def test_a_snapshot_goes_on_only_where_all_that_it_shows_is_in_the_primarys_chain() -> None:
    broken_off = SnapshotProgress(Position(10, 1), Position(20, 7), partitions=3)
    assert goes_on(broken_off, {20: 7}, applied=25, first_kept=11) == broken_off
    assert goes_on(None, {20: 7}, applied=25, first_kept=11) is None
    assert goes_on(broken_off, {20: 8}, applied=25, first_kept=11) is None, "records that it shows were lost"
    assert goes_on(broken_off, {}, applied=25, first_kept=11) is None
    assert goes_on(broken_off, {20: 7}, applied=19, first_kept=11) is None, "the file is behind what was seen"
    assert goes_on(broken_off, {20: 7}, applied=25, first_kept=12) is None, "record 11 is kept no more"
