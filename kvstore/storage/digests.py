"""The digest of each partition of a file, remembered for as long as nothing in the partition changes.

Owns: the sums over a partition's rows; for each partition the sequence of its last change.
Promises: a digest is right as of the transaction in which it is asked for. `changed` is raised before the commit of a
change, so a reader that has begun sees it raised for all that it can find.
Leaves to others: who asks (`sqlite_reads`).

A move reads the rows of its partitions once, to copy them. The tail, the last pull, the digest and the counts would
each read them all again, some of that while no shard answers; with this they read only partitions that have changed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable

from kvstore.storage.engine import Digest

_SUMS = """SELECT partition, count(*), sum(checksum & 4294967295), sum(checksum >> 32),
        sum(kind = 'value' AND body IS NOT NULL),
        sum(CASE WHEN kind = 'value' AND body IS NOT NULL THEN length(CAST(rows.key AS BLOB)) + length(body) ELSE 0 END)
    FROM json_each(?) AS wanted CROSS JOIN rows INDEXED BY rows_partition
        ON rows.partition = json_extract(wanted.value, '$[0]') AND sequence > json_extract(wanted.value, '$[1]')
    WHERE body IS NOT NULL OR intent IS NOT NULL GROUP BY partition"""
NOTHING = Digest()


class Digests:
    """`changed`: for each partition, the sequence of its last change, or a higher one."""

    def __init__(self, partitions: int, sequence: int) -> None:
        self.changed = [sequence] * partitions
        self._known: dict[int, tuple[int, Digest]] = {}

    def of(
        self, connection: sqlite3.Connection, partitions: Iterable[int], sequence: int, dropped: dict[int, int]
    ) -> Digest:
        """Of all these partitions together, in a transaction that sees all changes up to that sequence."""
        wanted = list(partitions)
        changed, known = self.changed, self._known
        stale = [p for p in wanted if p not in known or known[p][0] < changed[p]]
        if stale:
            pairs = json.dumps([[partition, dropped.get(partition, 0)] for partition in stale])
            found = {row[0]: Digest(*row[1:]) for row in connection.execute(_SUMS, (pairs,))}
            for partition in stale:
                known[partition] = sequence, found.get(partition, NOTHING)
        return total(known[partition][1] for partition in wanted)


def total(digests: Iterable[Digest]) -> Digest:
    """The digest of all these partitions together."""
    return Digest(*map(sum, zip(NOTHING, *digests, strict=True)))
