"""The laws of an engine, held by the file and by its twin in memory, which are also asked the same and must agree."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import DataCorrupt
from kvstore.storage import sqlite_file
from kvstore.storage.engine import Application, Engine, FeedQuery, Identity, SnapshotProgress
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.rows import DECISION, LEASE, VALUE
from kvstore.storage.segments import Position
from kvstore.storage.sqlite import SqliteEngine
from tests.unit.storage.hands import EVERY, PARTITIONS, Hands

KEYS = [f"key-{number}" for number in range(40)]
IDENTITY = Identity("ab", None, "s1", PARTITIONS)


async def open_sqlite(path: Path) -> Engine:
    sqlite_file.create_file(path, {"store_id": "ab", "shard_id": "s1", "partitions": str(PARTITIONS)})
    return await SqliteEngine.open(path, "s1", PARTITIONS, 1 << 20)


@pytest.fixture(params=["sqlite", "memory"])
async def hands(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Hands]:
    engine = await open_sqlite(tmp_path / "one.db") if request.param == "sqlite" else MemoryEngine(IDENTITY)
    yield Hands(engine)
    await engine.close()


async def test_the_feed_brings_the_newest_row_of_each_key_in_the_order_of_the_changes(hands: Hands) -> None:
    for key in ("a", "b", "c", "a", "d"):
        await hands.put(key, key.encode())
    await hands.delete("b")
    page = await hands.changes()
    assert [(row[1], row[5]) for row in page.rows] == [("c", b"c"), ("a", b"a"), ("d", b"d"), ("b", None)]
    assert (page.floor, page.sequence, page.more) == (0, 6, False)


async def test_the_feed_is_read_in_pages_and_goes_on_after_what_was_read(hands: Hands) -> None:
    for key in KEYS:
        await hands.put(key)
    read: list[str] = []
    after, more = 0, True
    while more:
        page = await hands.changes(after, rows_max=7)
        read += [row[1] for row in page.rows]
        after, more = page.sequence, page.more
        if after == 14:
            await hands.put(KEYS[0], b"changed while it was read")
    assert read == [*KEYS, KEYS[0]]


async def test_trimming_takes_the_oldest_first_and_no_more_than_it_was_told(hands: Hands) -> None:
    for key in KEYS[:5]:
        await hands.put(key)
        await hands.delete(key)
    await hands.put(KEYS[4], b"again")
    assert await hands.trim(10, 2) == 4
    assert [row[1] for row in (await hands.changes()).rows] == [KEYS[2], KEYS[3], KEYS[4]]
    assert await hands.trim(100, 100) == 8, "a key that lives again is not trimmed"
    assert [row[1] for row in (await hands.changes()).rows] == [KEYS[4]]


async def test_how_far_a_snapshot_has_come_is_kept_with_its_rows_and_pages_tell_what_the_engine_stood_for(
    hands: Hands,
) -> None:
    await hands.put("a")
    applied = hands.engine.applied
    assert applied.snapshot is None
    at = Position(7, (1 << 64) - 1, 3)
    progress = SnapshotProgress(at, at, partitions=2, rows=5, total=9)
    await hands.engine.apply(Application([], at, applied.clock, snapshot=progress))
    await hands.engine.apply(Application([], at, applied.clock))
    assert hands.engine.applied.snapshot == progress
    if isinstance(hands.engine, SqliteEngine):
        opened = await SqliteEngine.open(hands.engine.path, "s1", PARTITIONS, 1 << 20)
        assert opened.applied.snapshot == progress
        await opened.close()
    for after_row in (0, -1):
        page = await hands.engine.feed(FeedQuery([*EVERY], 0, after_row, 10, 1 << 20))
        assert page.position[:2] == at[:2]


async def step(chance: random.Random, both: list[Hands]) -> None:
    """One random change, the same in both."""
    kinds = chance.choices(["write", "drop", "trim", "clean"], [12, 1, 1, 2])[0]
    if kinds == "write":
        rows = []
        for key in chance.sample(KEYS, chance.randint(1, 6)):
            kind = chance.choices([VALUE, LEASE, DECISION], [8, 1, 1])[0]
            body = chance.choice([None, chance.randbytes(5)])
            intent = b"{}" if kind == VALUE and chance.random() < 0.1 else None
            due = chance.choice([0, 50]) if body is not None else 0
            rows.append(both[0].row(key, body, kind=kind, expires_at_ms=due, intent=intent))
        kept = chance.choice([frozenset(), EVERY, frozenset(chance.sample(sorted(EVERY), 32))])
        for hands in both:
            await hands.apply(rows, kept=kept)
    elif kinds == "drop":
        gone = chance.sample(sorted(EVERY), 8)
        for hands in both:
            await hands.drop(gone)
    else:
        up_to = chance.randint(0, both[0].engine.applied.clock.sequence) if kinds == "trim" else 0
        assert len({await hands.trim(up_to, 5) for hands in both}) == 1  # 0: only what is covered is removed


async def listed(hands: Hands, **query: Any) -> list[Any]:
    """All pages behind a key. Where one ends may differ: an engine may or may not count rows that a drop covers."""
    found: list[Any] = []
    after, more = KEYS[3], True
    while more:
        page = await hands.list("key-", after, 4, **query)
        assert len(page.rows) + len(page.due) + len(page.locked) <= 4
        assert page.last > after or not page.more
        found += [*zip(page.rows, page.partitions, strict=True), *page.due, *page.locked]
        after, more = page.last, page.more
    return sorted(found, key=repr)


async def view(hands: Hands, chance: random.Random) -> dict[str, Any]:
    """All that can be asked."""
    engine, wanted = hands.engine, frozenset(chance.sample(sorted(EVERY), 40))
    after, generations = chance.randint(0, engine.applied.clock.sequence), [chance.randint(0, 3) for _ in EVERY]
    copy = await engine.feed(FeedQuery(sorted(wanted), 0, 0, 1000, 1 << 24))
    due = await engine.due(100, generations, 1000)
    return {
        "rows": await engine.read([(kind, key) for kind in (VALUE, LEASE, DECISION) for key in KEYS]),
        "now": engine.read_now((VALUE, KEYS[0])),
        "scan": await listed(hands, now_ms=chance.choice([0, 100]), generations=generations),
        "changes": await hands.changes(after, sorted(wanted), 7),
        "copy": (sorted(copy.rows, key=lambda row: row[:2]), copy.sequence, copy.floor, copy.done),
        "due": sorted(due),
        "kept": sorted(map(repr, await engine.kept_in_memory(wanted))),
        "digest": (await engine.digest(wanted))[1],
        "occupied": await engine.occupied(),
        "tombstones": await engine.old_tombstones(after, 3),
        "applied": (engine.applied.position, engine.applied.clock, engine.applied.freezes),
    }


@pytest.mark.parametrize("seed", range(8))
async def test_file_and_twin_agree_after_each_of_many_random_changes(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    both = [Hands(await open_sqlite(tmp_path / "one.db")), Hands(MemoryEngine(IDENTITY))]
    try:
        for _ in range(40):
            await step(chance, both)
            question = chance.random()
            of_file, of_memory = [await view(hands, random.Random(question)) for hands in both]
            assert of_file == of_memory
    finally:
        for hands in both:
            await hands.engine.close()


async def test_a_damaged_row_is_an_error_of_that_row_alone(tmp_path: Path) -> None:
    engine = await open_sqlite(tmp_path / "one.db")
    hands = Hands(engine)
    await hands.put("a")
    await hands.put("b")
    with sqlite3.connect(tmp_path / "one.db") as other:
        other.execute("UPDATE rows SET body = X'00' WHERE key = 'a'")
    other.close()
    damaged, whole = await engine.read([(VALUE, "a"), (VALUE, "b")])
    assert isinstance(damaged, DataCorrupt)
    assert whole is not None
    with pytest.raises(DataCorrupt):
        await hands.list()
    await engine.close()
