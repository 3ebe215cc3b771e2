"""Listings and counts of a store: pages in key order, of what is owned all the time that it takes to read them.

Owns: pages of values and of leases; counts.
Promises: a page shows visible live rows of partitions that were owned, under the same arrival, from before it was read
until it is done, all of those, and says which they are; it is never made again because partitions come or go.
Leaves to others: the rows in the file (`sqlite`), single keys, expiry and visibility (`store`), merging the pages of
several shards (the router).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Protocol

import msgspec

from kvstore.config import Limits
from kvstore.errors import WrongOwner, from_problem
from kvstore.placement import partition_set
from kvstore.placement.ring import partition_of
from kvstore.protocol import Answer, Count, Page, Reply, Scan, ScanLeases
from kvstore.storage.batch import Expire, Locks
from kvstore.storage.leases import LeaseBody
from kvstore.storage.rows import LEASE, VALUE
from kvstore.storage.sqlite import Database, ScanPage, ScanQuery

_COUNT_KEYS_MAX = 20_000


class Readable(Protocol):
    """What a listing needs of its store."""

    database: Database
    arrivals: list[int]

    def now_ms(self) -> int: ...

    def read(self, key: str) -> asyncio.Future[Reply]: ...

    async def expire(self, ops: list[Expire]) -> None: ...

    async def until_visible(self, sequence: int) -> None: ...


class Listings:
    def __init__(self, store: Readable, limits: Limits) -> None:
        self._store = store
        self._limits = limits

    async def scan(self, op: Scan) -> Page:
        """A page of visible live values of the owned partitions. Raises DataCorrupt."""
        return await self._scan(op, VALUE, values=op.values)

    async def _scan(self, op: Scan | ScanLeases, kind: str, *, values: bool) -> Page:
        """What it shows is of the partitions that were owned from before it was read until now."""
        arrivals = self._asked_for(op.wanted)
        if not any(arrivals):
            return Page(op.id, b"", False, op.after, [])
        bytes_max = self._limits.page_bytes_max
        if isinstance(op, Scan) and op.bytes_max > 0:
            bytes_max = min(bytes_max, op.bytes_max)
        query = ScanQuery(kind, op.prefix, op.after, op.limit, values, 0, arrivals, bytes_max, op.until)
        page, undecided = await self._read_page(query)
        rows = sorted(page.rows + undecided) if undecided else page.rows
        partitions = len(arrivals)
        owned = self._owned_since(arrivals)
        if owned != arrivals:
            rows = [row for row in rows if owned[partition_of(row[0].encode(), partitions)]]
        return Page(op.id, self._as_set(owned), page.more, page.last, rows)

    def _asked_for(self, wanted: bytes) -> list[int]:
        """The arrivals as they are now, but 0 for partitions that are not wanted."""
        if not wanted:
            return self._store.arrivals
        flags = partition_set.to_flags(partition_set.decode(wanted), len(self._store.arrivals))
        return [arrival if flag else 0 for arrival, flag in zip(self._store.arrivals, flags, strict=True)]

    def _owned_since(self, arrivals: list[int]) -> list[int]:
        """Those of these arrivals that still stand; 0 for the others."""
        if arrivals is self._store.arrivals:
            return arrivals
        return [then if then == now else 0 for then, now in zip(arrivals, self._store.arrivals, strict=True)]

    def _as_set(self, arrivals: list[int]) -> bytes:
        return partition_set.encode(partition_set.from_flags(arrivals), len(arrivals))

    async def _read_page(self, query: ScanQuery) -> tuple[ScanPage, list[tuple[str, int, bytes | None, int]]]:
        """A page all of which is visible, its expiries made; and the rows of it that were undecided, as they are now.

        Raises DataCorrupt, TooManyRequests.
        """
        page = await self._store.database.scan(query._replace(now_ms=self._store.now_ms()))
        await self._store.until_visible(page.as_of)
        if page.due:
            await self._store.expire([Expire(key) for key in page.due])
        return page, await self._undecided(page.locked, query.values) if page.locked else []

    async def _undecided(self, keys: list[str], values: bool) -> list[tuple[str, int, bytes | None, int]]:
        """The rows of keys that carried an intent, as they are when it is gone; each for itself."""
        asked = [(key, self._store.read(key)) for key in keys]
        rows: list[tuple[str, int, bytes | None, int]] = []
        for key, future in asked:
            answer = await future
            assert isinstance(answer, Answer)
            if answer.status == 200:
                rows.append((key, answer.version, answer.value if values else None, answer.ttl_left_ms))
            elif answer.status not in (404, WrongOwner.status):
                raise from_problem(answer.problem)
        return rows

    async def count(self, op: Count) -> Page:
        """How many visible live values whose key starts with the prefix are in partitions that were owned throughout.

        Counted for each partition, since which of them leave meanwhile is known only at the end. Raises DataCorrupt.
        """
        arrivals = self._asked_for(op.wanted)
        partitions = len(arrivals)
        counts: Counter[int] = Counter()
        query = ScanQuery(VALUE, op.prefix, "", _COUNT_KEYS_MAX, False, 0, arrivals, self._limits.page_bytes_max)
        more = any(arrivals)
        while more:
            page, undecided = await self._read_page(query)
            counts.update(page.partitions)
            counts.update([partition_of(row[0].encode(), partitions) for row in undecided])
            query, more = query._replace(after=page.last), page.more
        owned = self._owned_since(arrivals)
        count = sum([number for partition, number in counts.items() if owned[partition]])
        return Page(op.id, self._as_set(owned), False, "", [], count)

    async def leases(self, op: ScanLeases, locks: Locks) -> Page:
        """A page of leases that stand, in order of their names: (name, token, owner, milliseconds left)."""
        page = await self._scan(op, LEASE, values=True)
        now_s = time.monotonic()
        items: list[tuple[str, int, bytes | None, int]] = []
        for name, token, body, _ in page.items:
            held = locks.lease(name)
            lease = msgspec.json.decode(body or b"", type=LeaseBody)
            left_s = held.left_s(now_s) if held is not None and held.token == token else 0.0
            items.append((name, token, lease.owner.encode(), round(left_s * 1000)))
        return Page(op.id, page.owned, page.more, page.last, items)
