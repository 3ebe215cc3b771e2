"""The naive twin of the SQLite engine: dictionaries in memory, for tests and simulation.

Owns: the same promises as every engine, told in the simplest code that keeps them.
Promises: after `crash` it stands where a file would after a loss of power: at any application between the last complete
checkpoint and the newest.
Leaves to others: speed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path

from kvstore.errors import DataCorrupt
from kvstore.storage.digests import total
from kvstore.storage.engine import (
    Application,
    Applied,
    Digest,
    FeedPage,
    FeedQuery,
    Identity,
    RowKey,
    ScanPage,
    ScanQuery,
    Sizes,
)
from kvstore.storage.rows import VALUE, Row, checksum
from kvstore.storage.verification import Verified, VerifyQuery

_HISTORY_MAX = 8
_State = tuple[Applied, dict[RowKey, Row], Identity, dict[RowKey, int]]


class MemoryEngine:
    """See `engine.Engine`. `fail`, where a test sets it, is called before each application and may raise."""

    def __init__(self, identity: Identity, path: Path = Path("memory")) -> None:
        self.identity = identity
        self.path = path
        self.fail: Callable[[], None] = lambda: None
        self._applied = Applied()
        self._rows: dict[RowKey, Row] = {}
        self._places: dict[RowKey, int] = {}
        self._history: list[_State] = [(self._applied, {}, identity, {})]
        self._count = itertools.count(1)

    def crash(self, kept: int) -> None:
        """Lose the newest applications but the first `kept` (modulo how many there are) since the last checkpoint."""
        survived = self._history[: kept % len(self._history) + 1]
        self._applied, rows, self.identity, places = survived[-1]
        self._rows, self._places = dict(rows), dict(places)
        self._history = survived

    async def close(self) -> None:
        return None

    @property
    def applied(self) -> Applied:
        return self._applied

    @property
    def sizes(self) -> Sizes:
        return Sizes(sum(len(row.key) + len(row.body or b"") for row in self._rows.values()), 0, 0)

    # --- writing ------------------------------------------------------------------------------------------------------

    async def apply(self, application: Application) -> None:
        self.fail()
        before = self._applied
        self._applied = Applied(
            application.position,
            application.clock,
            application.cluster_map if application.cluster_map is not None else before.cluster_map,
            application.freezes if application.freezes is not None else before.freezes,
            {**before.drops, **application.drops},
            application.snapshot or before.snapshot,
        )
        if application.cluster_map is not None:
            self.identity = self.identity._replace(cluster_id=json.loads(application.cluster_map)["cluster_id"])
        for row in application.rows:
            key = (row.kind, row.key)
            if row.is_tombstone and row.partition not in application.kept and key not in self._rows:
                continue
            self._places.setdefault(key, next(self._count))
            self._rows[key] = row
        self._history.append((self._applied, dict(self._rows), self.identity, dict(self._places)))

    async def checkpoint(self, *, only_if_due: bool = False) -> int:
        if only_if_due and len(self._history) <= _HISTORY_MAX:
            return 0
        self._history = self._history[-1:]
        return self._applied.position.number

    async def clean(self, rows_max: int) -> int:
        floor = self._applied.clock.tombstones_floor
        dead = [
            key
            for key, row in self._rows.items()
            if not self._is_there(row) or (row.is_tombstone and row.sequence <= floor)
        ]
        for key in dead[:rows_max]:
            del self._rows[key]
            self._places.pop(key, None)
        if not dead:
            self._applied = self._applied._replace(drops={})
        return len(dead[:rows_max])

    # --- reading ------------------------------------------------------------------------------------------------------

    def _is_there(self, row: Row) -> bool:
        return row.sequence > self._applied.drops.get(row.partition, 0)

    def _all(self) -> Iterator[Row]:
        return (row for row in self._rows.values() if self._is_there(row))

    async def read(self, keys: list[RowKey]) -> list[Row | DataCorrupt | None]:
        return [self.read_now(key) for key in keys]

    def read_now(self, key: RowKey) -> Row | None:
        row = self._rows.get(key)
        return row if row is not None and self._is_there(row) else None

    async def scan(self, query: ScanQuery) -> ScanPage:
        page = ScanPage([], [], [], [], {}, query.after, False)
        last, size = query.after, 0
        for row in sorted(self._all(), key=lambda row: row.key.encode()):
            key = row.key
            if row.kind != query.kind or row.is_tombstone or not key.startswith(query.prefix):
                continue
            if (query.after and key <= query.after) or (query.until and key > query.until):
                continue
            if len(page.rows) + len(page.due) + len(page.locked) >= query.limit or size >= query.bytes_max:
                return page._replace(last=last, more=True)
            last = key
            if not query.generations[row.partition]:
                continue
            if row.intent is not None:
                page.locked.append(key)
            elif 0 < row.expires_at_ms <= query.now_ms:
                page.due.append(key)
            else:
                left_ms = row.expires_at_ms - query.now_ms if row.expires_at_ms else 0
                body = row.body if query.values else None
                if body is not None and 0 < query.value_bytes_max < len(body):
                    page.left_out[key], body = len(body), None
                page.rows.append((key, row.version, body, left_ms))
                page.partitions.append(row.partition)
                size += len(key) + (query.value_bytes_max if key in page.left_out else len(body or b"")) + 32
        return page._replace(last=last)

    async def feed(self, query: FeedQuery) -> FeedPage:
        clock = self._applied.clock
        if query.after_row >= 0:
            return _copy_page(self, query)
        rows = sorted(
            (row for row in self._all() if row.partition in query.partitions and row.sequence > query.sequence),
            key=lambda row: row.sequence,
        )
        page, size = [], 0
        for row in rows:
            page.append(_copied(row))
            size += len(row.body or b"") + len(row.intent or b"") + 64
            if len(page) == query.rows_max or size >= query.bytes_max:
                return FeedPage(page, True, row.sequence, -1, 0, clock.tombstones_floor, 0, self._applied.position)
        return FeedPage(page, False, clock.sequence, -1, 0, clock.tombstones_floor, 0, self._applied.position)

    async def kept_in_memory(self, partitions: Set[int]) -> list[Row]:
        def is_kept(row: Row) -> bool:
            return row.intent is not None or (row.body is not None and row.kind in ("lease", "decision"))

        return [row for row in self._all() if row.partition in partitions and is_kept(row)]

    async def due(self, now_ms: int, generations: Sequence[int], count_max: int) -> list[tuple[str, str, int]]:
        rows = [
            row
            for row in self._all()
            if 0 < row.expires_at_ms <= now_ms and row.intent is None and generations[row.partition]
        ]
        rows.sort(key=lambda row: row.expires_at_ms)
        return [(row.kind, row.key, row.partition) for row in rows[:count_max]]

    async def digest(self, partitions: Set[int]) -> tuple[int, Digest]:
        rows = [row for row in self._all() if row.partition in partitions and not row.is_tombstone]
        return self._applied.position.number, total(map(_digest, rows))

    async def occupied(self) -> set[int]:
        return {
            row.partition for row in self._rows.values() if row.sequence > self._applied.drops.get(row.partition, 0)
        }

    async def old_tombstones(self, sequence: int, count_max: int) -> int:
        floor = self._applied.clock.tombstones_floor
        found = sorted(row.sequence for row in self._rows.values() if row.is_tombstone)
        oldest = [at for at in found if floor < at <= sequence][:count_max]
        return oldest[-1] if oldest else 0

    async def verify(self, query: VerifyQuery | None) -> Verified:
        rows = [row for row in self._all() if query is None or query.partition in (-1, row.partition)]
        return Verified(len(rows), 0, False, [])


def _copy_page(engine: MemoryEngine, query: FeedQuery) -> FeedPage:
    clock, position = engine._applied.clock, engine._applied.position
    begun = query.sequence or clock.sequence
    total_rows = 0 if query.sequence else sum(row.partition in query.partitions for row in engine._rows.values())
    page: list[tuple[str, str, int, int, int, bytes | None, bytes | None, int]] = []
    size, after_row, done = 0, query.after_row, 0
    for partition in query.partitions:
        rows = [row for row in engine._all() if row.partition == partition and not row.is_tombstone]
        for row in sorted(rows, key=lambda row: engine._places[row.kind, row.key]):
            place = engine._places[row.kind, row.key]
            if place <= after_row:
                continue
            page.append(_copied(row))
            after_row = place
            size += len(row.body or b"") + len(row.intent or b"") + 64
            if len(page) == query.rows_max or size >= query.bytes_max:
                return FeedPage(page, True, begun, after_row, done, clock.tombstones_floor, total_rows, position)
        done += 1
        after_row = 0
    return FeedPage(page, False, begun, after_row, done, clock.tombstones_floor, total_rows, position)


def _checksum(row: Row) -> int:
    return checksum(row.kind, row.key, row.version, row.expires_at_ms, row.body, row.intent)


def _copied(row: Row) -> tuple[str, str, int, int, int, bytes | None, bytes | None, int]:
    kind, key, partition, _, version, expires_at_ms, body, intent = row
    return kind, key, partition, version, expires_at_ms, body, intent, _checksum(row)


def _digest(row: Row) -> Digest:
    check = _checksum(row)
    is_value = row.kind == VALUE and row.body is not None
    size = row.payload_bytes if is_value else 0
    return Digest(1, check & 0xFFFFFFFF, check >> 32, int(is_value), size)
