"""Listings and counts of a store.
Pages in key order, of what is served all the time that it takes to read them.

Owns: pages of values and of leases; counts.
Promises: a page shows visible live rows of partitions that were served, under the same generation, from before it was
read until it is done, all of those, and says which they are; it is never made again because partitions come or go.
What was acknowledged before the page was asked for is in it: the file is first brought up to what is visible, so log
and file are read as one state.
Leaves to others: the rows in the file (`storage.engine`), single keys (`reads`), expiry (`maintenance`), merging the
pages of several shards (the router).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from kvstore.errors import WrongOwner, from_problem
from kvstore.placement import partition_set
from kvstore.placement.ring import partition_of
from kvstore.protocol import Answer, Count, Page, Scan, ScanLeases
from kvstore.storage.engine import ScanPage, ScanQuery
from kvstore.storage.rows import LEASE, VALUE
from kvstore.store.applier import Applier
from kvstore.store.leases import LeaseBody
from kvstore.store.maintenance import Maintenance
from kvstore.store.ops import Expire
from kvstore.store.reads import Reads
from kvstore.store.tables import Tables

_COUNT_KEYS_MAX = 20_000


class Scans:
    """The listings of one store."""

    def __init__(self, tables: Tables, reads: Reads, maintenance: Maintenance, applier: Applier) -> None:
        self._tables = tables
        self._reads = reads
        self._maintenance = maintenance
        self._applier = applier

    async def scan(self, op: Scan) -> Page:
        """A page of visible live values of the owned partitions. Raises DataCorrupt, TryLater."""
        return await self._scan(op, VALUE, values=op.values)

    async def _scan(self, op: Scan | ScanLeases, kind: str, *, values: bool) -> Page:
        """What it shows is of the partitions that were owned from before it was read until now."""
        generations = self._asked_for(op.wanted)
        if not any(generations):
            return Page(op.id, b"", False, op.after, [])
        read = values or not self._tables.verification.rounds  # rows not yet verified are, by being read whole
        bytes_max, value_bytes_max = self._tables.limits.page_bytes_max, 0
        if isinstance(op, Scan):
            bytes_max = min(bytes_max, op.bytes_max or bytes_max)
            value_bytes_max = op.value_bytes_max if values else 0
        query = ScanQuery(
            kind, op.prefix, op.after, op.limit, read, 0, generations, bytes_max, op.until, value_bytes_max
        )
        page, undecided = await self._read_page(query)
        rows = sorted(page.rows + undecided) if undecided else page.rows
        if read and not values:
            rows = [(key, version, None, left_ms) for key, version, _, left_ms in rows]
        partitions = len(generations)
        owned = self._owned_since(generations)
        if owned != generations:
            rows = [row for row in rows if owned[partition_of(row[0].encode(), partitions)]]
        return Page(op.id, self._as_set(owned), page.more, page.last, rows, left_out=page.left_out)

    def _asked_for(self, wanted: bytes) -> list[int]:
        """The generations as they are now, but 0 for partitions that are not wanted."""
        generations = self._tables.served.generations
        if not wanted:
            return generations
        flags = partition_set.to_flags(partition_set.decode(wanted), len(generations))
        return [generation if flag else 0 for generation, flag in zip(generations, flags, strict=True)]

    def _owned_since(self, generations: list[int]) -> list[int]:
        """Those of these generations that still stand; 0 for the others."""
        served = self._tables.served.generations
        if generations is served:
            return generations
        return [then if then == now else 0 for then, now in zip(generations, served, strict=True)]

    def _as_set(self, generations: list[int]) -> bytes:
        return partition_set.encode(partition_set.from_flags(generations), len(generations))

    async def _read_page(self, query: ScanQuery) -> tuple[ScanPage, list[tuple[str, int, bytes | None, int]]]:
        """A page all of which is visible, its expiries made.
        And the rows of it that were undecided, as they are now.

        Raises DataCorrupt, TooManyRequests.
        """
        self._check(query.generations)
        await self._applier.flush()
        page = await self._tables.engine.scan(query._replace(now_ms=self._tables.environment.now_ms()))
        if page.due:
            await self._maintenance.expire([Expire(key) for key in page.due])
        return page, await self._undecided(page, query) if page.locked else []

    def _check(self, generations: Sequence[int]) -> None:
        """Raises DataCorrupt if rows of these partitions may be missing."""
        verification = self._tables.verification
        for partition in sorted(verification.damaged):
            if generations[partition] and (damage := verification.miss_in(partition)) is not None:
                raise damage

    async def _undecided(self, page: ScanPage, query: ScanQuery) -> list[tuple[str, int, bytes | None, int]]:
        """The rows of keys that carried an intent, as they are when it is gone; each for itself."""
        asked = [(key, self._reads.read(key, query.value_bytes_max)) for key in page.locked]
        rows: list[tuple[str, int, bytes | None, int]] = []
        for key, future in asked:
            answer = await future
            assert isinstance(answer, Answer)
            if answer.status == 200:
                if answer.left_out_bytes:
                    page.left_out[key] = answer.left_out_bytes
                rows.append((key, answer.version, answer.value if query.values else None, answer.ttl_left_ms))
            elif answer.status not in (404, WrongOwner.status):
                raise from_problem(answer.problem)
        return rows

    async def count(self, op: Count) -> Page:
        """How many visible live values whose key starts with the prefix are in partitions that were owned throughout.

        Counted for each partition, since which of them leave is known only at its end. Raises DataCorrupt.
        """
        generations = self._asked_for(op.wanted)
        partitions = len(generations)
        counts: Counter[int] = Counter()
        query = ScanQuery(
            VALUE, op.prefix, "", _COUNT_KEYS_MAX, False, 0, generations, self._tables.limits.page_bytes_max
        )
        more = any(generations)
        while more:
            page, undecided = await self._read_page(query)
            counts.update(page.partitions)
            counts.update([partition_of(row[0].encode(), partitions) for row in undecided])
            query, more = query._replace(after=page.last), page.more
        owned = self._owned_since(generations)
        count = sum([number for partition, number in counts.items() if owned[partition]])
        return Page(op.id, self._as_set(owned), False, "", [], count)

    async def leases(self, op: ScanLeases) -> Page:
        """A page of leases that stand, in order of their names: (name, token, owner, milliseconds left)."""
        page = await self._scan(op, LEASE, values=True)
        now_s = self._tables.environment.monotonic_s()
        items: list[tuple[str, int, bytes | None, int]] = []
        for name, token, body, _ in page.items:
            held = self._tables.locks.lease(name)
            lease = msgspec.json.decode(body or b"", type=LeaseBody)
            left_s = held.left_s(now_s) if held is not None and held.token == token else 0.0
            items.append((name, token, lease.owner.encode(), round(left_s * 1000)))
        return Page(op.id, page.owned, page.more, page.last, items)
