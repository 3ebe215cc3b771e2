"""The rows of a store: what one is, how it lies in SQLite, and how damage to it is seen.

Owns: the schema (the on-disk format), the row, its checksum.
Promises: every durable thing of a store is a row in `rows` with kind, key, partition, sequence, version and checksum;
a deletion is a row too (a tombstone: `body` is NULL), so "rows of these partitions with sequence > n" is all that
changed.
Leaves to others: who may write which row (`batch`, `participant`), the file and its threads (`sqlite`).

An intent, which a prepared attempt leaves on a key, is a column of that key's row and not a row beside it: then it
goes, and its value comes, in one change of one row, a reader finds both in one look-up, and a transaction leaves no
tombstones behind. (Measured in rows changed by four puts in one transaction: 11 instead of 19.)

The table has rowids, and no index holds a column that an overwrite changes: an overwrite dirties one page, however
the keys are spread. (An index on (partition, sequence) for the feed cost a third of a batch; the feed now reads a
partition's rows and passes over the older ones. Clustering by key made values above 2 KiB three times as dear.)

`clock` is a single row, written in every batch: the version clock and the sequence must survive even when the rows
they were given to are gone, or versions would be given twice after a delete.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable
from typing import Any, NamedTuple

import xxhash

from kvstore.errors import DataCorrupt

FORMAT = 3
VALUE = "value"  # key: the user's; body: the value; intent: Intent as JSON
LEASE = "lease"  # key: the name; version: the token; body: LeaseBody as JSON
REPLY = "reply"  # key: see storage.replies; body: the answer that was given, as JSON
DECISION = "decision"  # key: the attempt's name; partition: the anchor's; body: Decision as JSON

_CLOCK = """
CREATE TABLE clock (
    one               INTEGER PRIMARY KEY CHECK (one = 1),
    version           INTEGER NOT NULL,   -- highest version given out or seen
    sequence          INTEGER NOT NULL,   -- sequence of the newest row
    tombstones_floor  INTEGER NOT NULL,   -- tombstones up to this sequence have been trimmed
    keys              INTEGER NOT NULL,   -- live values in the partitions that the store owns
    bytes             INTEGER NOT NULL,   -- of those keys and values
    attempts_floor    INTEGER NOT NULL DEFAULT 0   -- decisions with stamps up to this may have been dropped
);
"""
_FENCES = """
CREATE TABLE fences (
    move       TEXT    NOT NULL,
    partition  INTEGER NOT NULL,   -- nobody answers for it until a map is durable here in which the move stands no more
    PRIMARY KEY (move, partition)
) WITHOUT ROWID;
"""
_ROWS = """
CREATE TABLE rows (
    kind           TEXT    NOT NULL,   -- 'value', 'lease', 'reply' or 'decision'
    key            TEXT    NOT NULL,
    partition      INTEGER NOT NULL,
    sequence       INTEGER NOT NULL,   -- position in this store's order of changes
    version        INTEGER NOT NULL,
    expires_at_ms  INTEGER,            -- Unix time; NULL: never
    checksum       INTEGER NOT NULL,   -- see rows.checksum
    body           BLOB,               -- NULL: deleted (a tombstone)
    intent         BLOB,               -- what a transaction that is not yet finished will do to the key; NULL: none
    UNIQUE (kind, key)
);
CREATE INDEX rows_partition ON rows (partition);
CREATE INDEX rows_expiry ON rows (expires_at_ms) WHERE expires_at_ms IS NOT NULL;
CREATE INDEX rows_tombstones ON rows (sequence) WHERE body IS NULL AND intent IS NULL;
CREATE INDEX rows_intents ON rows (partition) WHERE intent IS NOT NULL;
CREATE VIEW kv AS
    SELECT key, body AS value, version, partition,
           strftime('%Y-%m-%d %H:%M:%f', expires_at_ms / 1000.0, 'unixepoch') AS expires_utc
    FROM rows WHERE kind = 'value' AND body IS NOT NULL;
CREATE VIEW locks AS
    SELECT key AS name, version AS token, body AS lease FROM rows WHERE kind = 'lease' AND body IS NOT NULL;
CREATE VIEW intents AS SELECT key, CAST(intent AS TEXT) AS intent FROM rows WHERE intent IS NOT NULL;
"""
SCHEMA = f"""
CREATE TABLE meta (
    name   TEXT PRIMARY KEY,   -- format, store_id, cluster_id, shard_id, partitions, cluster_map
    value  TEXT NOT NULL
) WITHOUT ROWID;
{_CLOCK}
INSERT INTO clock (one, version, sequence, tombstones_floor, keys, bytes) VALUES (1, 0, 0, 0, 0, 0);
{_FENCES}
{_ROWS}
"""
FROM_FORMAT_2 = f"""
{_FENCES}
UPDATE meta SET value = '3' WHERE name = 'format';
"""
FROM_FORMAT_1 = f"""
DROP VIEW kv;
DROP VIEW locks;
DROP INDEX rows_feed;
DROP INDEX rows_expiry;
DROP INDEX rows_tombstones;
ALTER TABLE rows RENAME TO rows_1;
{_ROWS}
INSERT INTO rows SELECT kind, key, partition, sequence, version, expires_at_ms, checksum, body, NULL FROM rows_1;
DROP TABLE rows_1;
ALTER TABLE clock ADD COLUMN attempts_floor INTEGER NOT NULL DEFAULT 0;
{FROM_FORMAT_2}
"""


COLUMNS = """SELECT kind, rows.key, partition, sequence, version, coalesce(expires_at_ms, 0), body, intent, checksum"""
# The partition of a row never changes, and its index would be written anew if it were set here.
_UPSERT = """INSERT INTO rows VALUES {} ON CONFLICT (kind, key) DO UPDATE SET
    sequence = excluded.sequence, version = excluded.version, expires_at_ms = excluded.expires_at_ms,
    checksum = excluded.checksum, body = excluded.body, intent = excluded.intent"""
_UPSERT_ROWS_MAX = 32
_UPSERTS = [_UPSERT.format(", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?)"] * count)) for count in range(_UPSERT_ROWS_MAX + 1)]


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


def upsert(connection: sqlite3.Connection, rows: Iterable[tuple[Any, ...]]) -> None:
    """Write the rows, as `stored` gives them. Many to a statement: after each one the thread has to get the
    interpreter's lock back, for which it may wait while the event loop is busy."""
    waiting = iter(rows)
    while some := [*itertools.islice(waiting, _UPSERT_ROWS_MAX)]:
        connection.execute(_UPSERTS[len(some)], [*itertools.chain.from_iterable(some)])


def stored(row: Row) -> tuple[Any, ...]:
    """The row as `upsert` takes it."""
    kind, key, partition, sequence, version, expires_at_ms, body, intent = row
    check = checksum(kind, key, version, expires_at_ms, body, intent)
    return kind, key, partition, sequence, version, expires_at_ms or None, check, body, intent


def checked(row: Row, stored_checksum: int) -> Row:
    """The row, if it is what was once written. Raises DataCorrupt."""
    # SQLite keeps any type in any column
    are_blobs = all(blob is None or isinstance(blob, bytes) for blob in (row.body, row.intent))
    kind, key, _, _, version, expires_at_ms, body, intent = row
    if not are_blobs or checksum(kind, key, version, expires_at_ms, body, intent) != stored_checksum:
        raise DataCorrupt(f"the {row.kind} row of key {row.key!r} does not match its checksum")
    return row
