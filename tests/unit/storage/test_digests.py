"""What a partition is known to have changed last, and the digest that is remembered until it changes again."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvstore.storage import sqlite_file
from kvstore.storage.engine import Digest
from kvstore.storage.sqlite import SqliteEngine, in_thread
from tests.unit.storage.hands import PARTITIONS, Hands, partition


@pytest.fixture
async def hands(tmp_path: Path) -> AsyncIterator[Hands]:
    path = tmp_path / "one.db"
    sqlite_file.create_file(path, {"store_id": "ab", "shard_id": "s1", "partitions": str(PARTITIONS)})
    engine = await SqliteEngine.open(path, "s1", PARTITIONS, 1 << 20)
    yield Hands(engine)
    await engine.close()


def neighbour(key: str) -> str:
    """Another key of the same partition, which sorts behind it."""
    names = (f"{key}-{number}" for number in range(10_000))
    return next(name for name in names if partition(name) == partition(key))


async def test_a_partition_whose_rows_are_applied_out_of_the_order_of_their_changes_is_not_passed_over(
    hands: Hands,
) -> None:
    twice = "k0"  # changed twice around the other one: its newest state sorts first and is the newer change
    once = neighbour(twice)
    rows = [hands.row(once, b"x"), hands.row(twice, b"x")]
    await hands.apply(rows)
    first = await hands.changes(0, [partition(twice)], rows_max=1)
    second = await hands.changes(first.sequence, [partition(twice)], rows_max=1)
    assert [row[1] for row in first.rows] == [once]
    assert [row[1] for row in second.rows] == [twice]


async def test_a_remembered_digest_is_not_told_after_any_kind_of_change(hands: Hands) -> None:
    key, engine = "k0", hands.engine
    other, here = neighbour(key), frozenset({partition(key)})
    await hands.put(key, b"12")
    one = (await engine.digest(here))[1]
    assert (one.rows, one.keys, one.bytes) == (1, 1, 4)
    await hands.put(other, b"12")
    two = (await engine.digest(here))[1]
    assert (two.rows, two.keys) == (2, 2)
    await hands.put(key, b"34")
    changed = (await engine.digest(here))[1]
    assert (changed.rows, changed.bytes) == (2, two.bytes)
    assert (changed.low, changed.high) != (two.low, two.high)
    await hands.delete(other)
    assert (await engine.digest(here))[1].rows == 1
    await hands.drop(sorted(here))
    assert (await engine.digest(here))[1] == Digest()
    await hands.put(key, b"12")
    again = (await engine.digest(here))[1]
    assert (again.rows, again.keys, again.bytes) == (1, 1, 4)


async def test_a_partition_that_has_not_changed_is_not_read_again(hands: Hands) -> None:
    key = "k0"
    await hands.put(key, b"12")
    known = (await hands.engine.digest(frozenset({partition(key)})))[1]
    statements: list[str] = []

    def watch(connection: sqlite3.Connection) -> None:
        connection.set_trace_callback(statements.append)

    await in_thread(hands.engine._scan_reader, watch)  # type: ignore[attr-defined]
    other = next(name for name in map(str, range(100)) if partition(name) != partition(key))
    await hands.put(other)
    assert (await hands.engine.digest(frozenset({partition(key)})))[1] == known
    assert not any("sum(checksum" in statement for statement in statements)
    await hands.put(key)
    (await hands.engine.digest(frozenset({partition(key)})))[1]
    assert any("sum(checksum" in statement for statement in statements), "what is watched for does happen"
