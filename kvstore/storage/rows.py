"""The rows of a store: what one is, and how damage to it is seen.

Owns: the row, its kinds, its checksum, and the version clock.
Promises: every durable thing of a store is a row with kind, key, partition, sequence and version; a deletion is a row
too (a tombstone: `body` is None), so "rows of these partitions with sequence > n" is all that changed.
Leaves to others: who may write which row (`kvstore.store`), how rows lie on disk (`record`, `schema`).

An intent, which a prepared attempt leaves on a key, is a column of that key's row and not a row beside it: then it
goes, and its value comes, in one change of one row, a reader finds both in one look-up, and a transaction leaves no
tombstones behind. (Measured in rows changed by four puts in one transaction: 11 instead of 19.)

The clock is part of every commit record: version clock and sequence must survive even when the rows that they were
given to are gone, or versions would be given twice after a delete.
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

from kvstore.errors import DataCorrupt

VALUE = "value"  # key: the user's; body: the value; intent: Intent as JSON
LEASE = "lease"  # key: the name; version: the token; body: LeaseBody as JSON
REPLY = "reply"  # key: see store.idempotency; body: the answer that was given, as JSON
DECISION = "decision"  # key: the attempt's name; partition: the anchor's; body: Decision as JSON


class Row(NamedTuple):
    """One row of `rows`. `expires_at_ms` 0 means never; `body` None is a tombstone."""

    kind: str
    key: str
    partition: int
    sequence: int
    version: int
    expires_at_ms: int
    body: bytes | None
    intent: bytes | None = None

    @property
    def is_tombstone(self) -> bool:
        """It says that there is nothing, not even an intent."""
        return self.body is None and self.intent is None

    @property
    def payload_bytes(self) -> int:
        """What the row counts for in `bytes`: key and value; a tombstone nothing."""
        return 0 if self.body is None else len(self.key.encode()) + len(self.body)


class Clock(NamedTuple):
    """The row of `clock`: numbers of a store that only rise, and what it counts.

    `version`: the highest given out or seen. `sequence`: that of the newest row. `tombstones_floor`: tombstones up to
    that sequence are trimmed. `keys`, `bytes`: live values in owned partitions, and the bytes of those keys and values.
    `attempts_floor`: decisions with stamps up to that may have been dropped.
    """

    version: int = 0
    sequence: int = 0
    tombstones_floor: int = 0
    keys: int = 0
    bytes: int = 0
    attempts_floor: int = 0


_signed = 1 << 63


def checksum(
    kind: str, key: str, version: int, expires_at_ms: int, body: bytes | None, intent: bytes | None = None
) -> int:
    """xxh3-64 of all that the row means, as a signed 64-bit integer.

    The sequence is not part of it: a copy of the row in another store has another one and the same checksum.
    """
    head = f"{kind}\0{version}\0{expires_at_ms}\0{body is None:d}\0{len(key)}\0{key}".encode()
    if intent is not None:
        head = f"{len(intent)}\0".encode() + intent + head
    return xxhash.xxh3_64_intdigest(head + (body or b"")) - _signed


def checked(row: Row, stored_checksum: int) -> Row:
    """The row, if it is what was once written. Raises DataCorrupt, which has the row."""
    # SQLite keeps any type in any column
    are_blobs = all(blob is None or isinstance(blob, bytes) for blob in (row.body, row.intent))
    kind, key, _, _, version, expires_at_ms, body, intent = row
    if not are_blobs or checksum(kind, key, version, expires_at_ms, body, intent) != stored_checksum:
        damage = DataCorrupt(f"the {row.kind} row of key {row.key!r} does not match its checksum.")
        damage.damaged_row = row
        raise damage
    return row
