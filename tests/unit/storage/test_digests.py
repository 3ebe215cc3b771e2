"""What a partition is known to have changed last, so that the tail of a move passes over those that have not."""

from __future__ import annotations

from pathlib import Path

from kvstore.placement.ring import partition_of
from kvstore.protocol import Pull, Put
from tests.unit.store.rig import PARTITIONS, asked, next_id, opened


async def test_a_key_that_a_batch_changes_twice_around_another_one_is_not_passed_over(tmp_path: Path) -> None:
    twice = "k0"
    partition = partition_of(twice.encode(), PARTITIONS)
    names = (f"k{number}" for number in range(1, 10_000))
    once = next(name for name in names if partition_of(name.encode(), PARTITIONS) == partition)
    async with opened(tmp_path) as store:
        for sink in [asked(store, Put(next_id(), key, b"x")) for key in (twice, once, twice)]:  # one batch
            await sink.answer()
        first = await store.migration.pull(Pull(0, [partition], 0, -1, 1))
        second = await store.migration.pull(Pull(0, [partition], first.sequence, -1, 1))
    assert [row[1] for row in first.rows] == [once]
    assert [row[1] for row in second.rows] == [twice]
