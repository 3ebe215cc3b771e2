"""What each partition of a store holds: how many rows, their digest, keys and bytes; and when it changed last.

Owns: the sums over a partition's rows, remembered for as long as nothing in it changes.
Promises: what is asked for is right as of the transaction in which it is asked. `changed` is raised before the commit
of a change, so whoever has begun to read sees it raised for all that it can find.
Leaves to others: who asks (`handover`, `sqlite`).

A move reads the rows of its partitions once, to copy them. The tail, the last pull, the digest and the counts would
each read them all again, some of that while nobody answers; with this they read only partitions that have changed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

# Two sums of halves: those of whole checksums would overflow. A sum does not depend on the order of the rows.
_SUMS = """SELECT partition, count(*), sum(checksum & 4294967295), sum(checksum >> 32),
        sum(kind = 'value' AND body IS NOT NULL),
        sum(CASE WHEN kind = 'value' AND body IS NOT NULL THEN length(CAST(rows.key AS BLOB)) + length(body) ELSE 0 END)
    FROM json_each(?) AS wanted CROSS JOIN rows INDEXED BY rows_partition ON rows.partition = wanted.value
    WHERE body IS NOT NULL OR intent IS NOT NULL GROUP BY partition"""


class Tally(NamedTuple):
    """`rows`, with the digest (`low`, `high`) of their checksums, without tombstones; `keys` and `bytes` of values."""

    rows: int = 0
    low: int = 0
    high: int = 0
    keys: int = 0
    bytes: int = 0


class Tallies:
    """`changed`: for each partition, the sequence of its last change, or a higher one."""

    def __init__(self, partitions: int, sequence: int) -> None:
        self.changed = [sequence] * partitions
        self._known: dict[int, tuple[int, Tally]] = {}

    def forget(self, partitions: Iterable[int]) -> None:
        """Rows of these were removed, which is no change with a sequence."""
        for partition in partitions:
            self._known.pop(partition, None)

    def total(self, connection: sqlite3.Connection, partitions: Iterable[int], sequence: int) -> Tally:
        """Of all these partitions together, in a transaction that sees all changes up to that sequence."""
        wanted = list(partitions)
        changed, known = self.changed, self._known
        stale = [p for p in wanted if p not in known or known[p][0] < changed[p]]
        if stale:
            found = {row[0]: Tally(*row[1:]) for row in connection.execute(_SUMS, (json.dumps(stale),))}
            for partition in stale:
                known[partition] = sequence, found.get(partition, _NOTHING)
        return Tally(*map(sum, zip(_NOTHING, *(known[partition][1] for partition in wanted), strict=True)))


_NOTHING = Tally()
