"""Hands that write to an engine as a store would: with positions, sequences and versions that grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.placement.ring import partition_of
from kvstore.storage.engine import Application, Engine, FeedPage, FeedQuery, ScanPage, ScanQuery
from kvstore.storage.rows import VALUE, Row
from kvstore.storage.segments import Position

PARTITIONS = 64
EVERY = frozenset(range(PARTITIONS))


def partition(key: str) -> int:
    return partition_of(key.encode(), PARTITIONS)


class Hands:
    """One application for each call, as the next record would be."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def row(self, key: str, body: bytes | None, kind: str = VALUE, expires_at_ms: int = 0, intent: Any = None) -> Row:
        """The next state of a key. Its sequence and version are given when it is applied."""
        return Row(kind, key, partition(key), 0, 0, expires_at_ms, body, intent)

    async def apply(self, rows: Sequence[Row], clock: Any = None, **changes: Any) -> None:
        """The rows get the next sequences and versions; `clock`: fields of the clock that change beside them."""
        applied = self.engine.applied
        before = applied.clock
        numbered = [
            row._replace(sequence=before.sequence + at, version=before.version + at)
            for at, row in enumerate(rows, start=1)
        ]
        reached = {"sequence": before.sequence + len(rows), "version": before.version + len(rows)}
        after = before._replace(**{**reached, **(clock or {})})
        position = Position(applied.position.number + 1, applied.position.checksum + 7)
        await self.engine.apply(Application(numbered, position, after, **changes))

    async def put(self, key: str, body: bytes = b"value", **row: Any) -> None:
        await self.apply([self.row(key, body, **row)])

    async def delete(self, key: str) -> None:
        await self.apply([self.row(key, None)])

    async def drop(self, partitions: Sequence[int]) -> None:
        """A drop has a sequence of its own, as a batch with one gives it."""
        sequence = self.engine.applied.clock.sequence + 1
        await self.apply([], {"sequence": sequence}, drops=dict.fromkeys(partitions, sequence))

    async def trim(self, sequence: int, count_max: int) -> int:
        """Raise the floor to the last of the oldest tombstones, and remove what it covers; that floor, or 0."""
        floor = await self.engine.old_tombstones(sequence, count_max)
        if floor:
            await self.apply([], {"tombstones_floor": floor})
        while await self.engine.clean(7):
            pass
        return floor

    async def changes(
        self, after: int = 0, partitions: Sequence[int] = sorted(EVERY), rows_max: int = 1000
    ) -> FeedPage:
        return await self.engine.feed(FeedQuery(list(partitions), after, -1, rows_max, 1 << 24))

    async def list(self, prefix: str = "", after: str = "", limit: int = 1000, **query: Any) -> ScanPage:
        known = {"values": True, "now_ms": 0, "generations": [1] * PARTITIONS, "bytes_max": 1 << 24}
        return await self.engine.scan(ScanQuery(VALUE, prefix, after, limit, **{**known, **query}))
