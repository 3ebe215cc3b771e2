"""The rows of a store: what one is, how it lies in SQLite, and how damage to it is seen.

Owns: the schema (the on-disk format), the row, its checksum.
Promises: every durable thing of a store is a row in `rows` with kind, key, partition, sequence, version and checksum;
a deletion is a row too (a tombstone: `body` is NULL), so "rows of these partitions with sequence > n" is all that
changed.
Leaves to others: who may write which row (`batch`), the file and its threads (`sqlite`).

`clock` is a single row, written in every batch: the version clock and the sequence must survive even when the rows
they were given to are gone, or versions would be given twice after a delete.
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

FORMAT = 1
VALUE = "value"
LEASE = "lease"  # key: the name; version: the token; body: LeaseBody as JSON
REPLY = "reply"  # key: see storage.idempotency; body: the answer that was given, as JSON

SCHEMA = """
CREATE TABLE meta (
    name   TEXT PRIMARY KEY,   -- format, store_id, cluster_id, shard_id, partitions, cluster_map
    value  TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE clock (
    one               INTEGER PRIMARY KEY CHECK (one = 1),
    version           INTEGER NOT NULL,   -- highest version given out or seen
    sequence          INTEGER NOT NULL,   -- sequence of the newest row
    tombstones_floor  INTEGER NOT NULL,   -- tombstones up to this sequence have been trimmed
    keys              INTEGER NOT NULL,   -- live values
    bytes             INTEGER NOT NULL    -- of those keys and values
);
INSERT INTO clock VALUES (1, 0, 0, 0, 0, 0);
CREATE TABLE rows (
    kind           TEXT    NOT NULL,   -- 'value', 'lease' or 'reply'
    key            TEXT    NOT NULL,
    partition      INTEGER NOT NULL,
    sequence       INTEGER NOT NULL,   -- position in this store's order of changes
    version        INTEGER NOT NULL,
    expires_at_ms  INTEGER,            -- Unix time; NULL: never
    body           BLOB,               -- NULL: deleted (a tombstone)
    checksum       INTEGER NOT NULL,   -- see rows.checksum
    PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE INDEX rows_feed ON rows (partition, sequence);
CREATE INDEX rows_expiry ON rows (expires_at_ms) WHERE expires_at_ms IS NOT NULL;
CREATE INDEX rows_tombstones ON rows (sequence) WHERE body IS NULL;
CREATE VIEW kv AS
    SELECT key, body AS value, version, partition,
           strftime('%Y-%m-%d %H:%M:%f', expires_at_ms / 1000.0, 'unixepoch') AS expires_utc
    FROM rows WHERE kind = 'value' AND body IS NOT NULL;
CREATE VIEW locks AS
    SELECT key AS name, version AS token, body AS lease FROM rows WHERE kind = 'lease' AND body IS NOT NULL;
"""


class Row(NamedTuple):
    """One row of `rows`. `expires_at_ms` 0 means never; `body` None is a tombstone."""

    kind: str
    key: str
    partition: int
    sequence: int
    version: int
    expires_at_ms: int
    body: bytes | None

    @property
    def payload_bytes(self) -> int:
        """What the row counts for in `bytes`: key and value; a tombstone nothing."""
        return 0 if self.body is None else len(self.key.encode()) + len(self.body)


class Clock(NamedTuple):
    """The row of `clock`."""

    version: int = 0
    sequence: int = 0
    tombstones_floor: int = 0
    keys: int = 0
    bytes: int = 0


_signed = 1 << 63


def checksum(kind: str, key: str, version: int, expires_at_ms: int, body: bytes | None) -> int:
    """xxh3-64 of all that the row means, as a signed 64-bit integer.

    The sequence is not part of it: a copy of the row in another store has another one and the same checksum.
    """
    head = f"{kind}\0{version}\0{expires_at_ms}\0{body is None:d}\0{len(key)}\0{key}".encode()
    return xxhash.xxh3_64_intdigest(head + (body or b"")) - _signed
