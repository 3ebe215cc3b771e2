"""How a store lies in its SQLite file: tables, views for people, and conversions from older formats.

Owns: the on-disk format of the file, format 4, and how a row is written into it.
Promises: all in the file that is no row carries a checksum, as every row does. A conversion is one transaction.
Leaves to others: the file and its threads (`sqlite`), the log (`log`).

The table of rows has rowids, and no index holds a column that an overwrite changes: an overwrite dirties one page,
however the keys are spread. (An index on (partition, sequence) for the feed cost a third of a batch; the feed reads a
partition's rows and passes over the older ones. Clustering by key made values above 2 KiB three times as dear.)
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterable
from typing import Any

import xxhash

from kvstore.errors import DataCorrupt
from kvstore.storage.rows import Row, checksum

FORMAT = 4

_META = """
CREATE TABLE meta (
    name      TEXT PRIMARY KEY,   -- format, store_id, shard_id, partitions, cluster_id, cluster_map, freezes, drops,
                                  -- and snapshot while the rows of another file come, and afterwards
    value     TEXT NOT NULL,
    checksum  INTEGER NOT NULL    -- of name and value
) WITHOUT ROWID;
"""
_CLOCK = """
CREATE TABLE clock (
    one               INTEGER PRIMARY KEY CHECK (one = 1),
    version           INTEGER NOT NULL,   -- highest version given out or seen
    sequence          INTEGER NOT NULL,   -- sequence of the newest row
    tombstones_floor  INTEGER NOT NULL,   -- tombstones up to this sequence have been trimmed
    keys              INTEGER NOT NULL,   -- live values in the partitions that the store owns
    bytes             INTEGER NOT NULL,   -- of those keys and values
    attempts_floor    INTEGER NOT NULL,   -- decisions with stamps up to this may have been dropped
    log_number        INTEGER NOT NULL,   -- the last record of the log that is applied here
    log_checksum      INTEGER NOT NULL,   -- of that record
    checksum          INTEGER NOT NULL    -- of all of the above
);
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
_FREEZES = """
CREATE VIEW freezes AS
    SELECT moves.key AS move, frozen.value AS partition
    FROM meta, json_each(meta.value) AS moves, json_each(moves.value) AS frozen WHERE meta.name = 'freezes';
"""
SCHEMA = f"{_META}{_CLOCK}{_ROWS}{_FREEZES}"

_FENCES = """
CREATE TABLE fences (move TEXT NOT NULL, partition INTEGER NOT NULL, PRIMARY KEY (move, partition)) WITHOUT ROWID;
"""
_FROM_1 = f"""
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
"""
_FROM_3 = f"""
ALTER TABLE meta RENAME TO meta_3;
ALTER TABLE clock RENAME TO clock_3;
{_META}
{_CLOCK}
{_FREEZES}
"""
OLDER_FORMATS = frozenset({1, 2, 3})

_CLOCK_COLUMNS = "version, sequence, tombstones_floor, keys, bytes, attempts_floor"
COLUMNS = "SELECT kind, rows.key, partition, sequence, version, coalesce(expires_at_ms, 0), body, intent, checksum"
# The partition of a row never changes, and its index would be written again if it were set here.
_UPSERT = """INSERT INTO rows VALUES {} ON CONFLICT (kind, key) DO UPDATE SET
    sequence = excluded.sequence, version = excluded.version, expires_at_ms = excluded.expires_at_ms,
    checksum = excluded.checksum, body = excluded.body, intent = excluded.intent"""
_UPSERT_ROWS_MAX = 32
_UPSERTS = [_UPSERT.format(", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?)"] * count)) for count in range(_UPSERT_ROWS_MAX + 1)]
_BURY = """UPDATE rows SET sequence = ?, version = ?, expires_at_ms = NULL, checksum = ?, body = NULL, intent = NULL
    WHERE kind = ? AND key = ?"""

SIGNED = 1 << 63  # SQLite's integers are signed

# Without an adapter `sqlite3` looks at each blob and NULL for one of their own, in vain, at ten times the cost.
sqlite3.register_adapter(bytes, bytes)
sqlite3.register_adapter(type(None), {None: None}.__getitem__)


def stored(row: Row) -> tuple[Any, ...]:
    """The columns of the row, in the table's order."""
    kind, key, partition, sequence, version, expires_at_ms, body, intent = row
    check = checksum(kind, key, version, expires_at_ms, body, intent)
    return kind, key, partition, sequence, version, expires_at_ms or None, check, body, intent


def upsert(connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
    """Write the rows, many to a statement: after each one the thread has to get the interpreter's lock back."""
    waiting = map(stored, rows)
    while some := [*itertools.islice(waiting, _UPSERT_ROWS_MAX)]:
        connection.execute(_UPSERTS[len(some)], [*itertools.chain.from_iterable(some)])


def bury(connection: sqlite3.Connection, tombstones: Iterable[Row]) -> None:
    """Turn the rows that the file has into these tombstones; a row that it never had leaves no trace."""
    parameters = [
        (row.sequence, row.version, checksum(row.kind, row.key, row.version, 0, None), row.kind, row.key)
        for row in tombstones
    ]
    connection.executemany(_BURY, parameters)


def meta_checksum(name: str, value: str) -> int:
    """xxh3-64 of name and value, as a signed 64-bit integer."""
    return xxhash.xxh3_64_intdigest(f"{name}\0{value}".encode()) - SIGNED


def set_meta(connection: sqlite3.Connection, values: dict[str, str]) -> None:
    """Write these entries of `meta`."""
    entries = [(name, value, meta_checksum(name, value)) for name, value in values.items()]
    connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", entries)


def read_meta(connection: sqlite3.Connection) -> tuple[dict[str, str], set[str]]:
    """The entries of `meta` that verify, and the names of those that do not."""
    entries, damaged = {}, set()
    query = "SELECT CAST(name AS BLOB), CAST(value AS BLOB), checksum FROM meta"  # damaged text is not even UTF-8
    for name_bytes, value_bytes, check in connection.execute(query):
        name, value = (bytes(each or b"").decode(errors="replace") for each in (name_bytes, value_bytes))
        if check == meta_checksum(name, value):
            entries[name] = value
        else:
            damaged.add(name)
    return entries, damaged


def clock_checksum(values: tuple[int, ...]) -> int:
    """xxh3-64 of the clock's numbers and the position of the log, as a signed 64-bit integer."""
    return xxhash.xxh3_64_intdigest(json.dumps(values).encode()) - SIGNED


def set_clock(connection: sqlite3.Connection, values: tuple[int, ...]) -> None:
    """Write clock and position: (version, sequence, …, attempts_floor, log_number, log_checksum)."""
    connection.execute(
        "INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*values, clock_checksum(values))
    )


def read_clock(connection: sqlite3.Connection) -> tuple[int, ...]:
    """Clock and position. Raises DataCorrupt."""
    query = f"SELECT {_CLOCK_COLUMNS}, log_number, log_checksum, checksum FROM clock"
    found = connection.execute(query).fetchone()
    if found is None or not all(isinstance(value, int) for value in found) or found[-1] != clock_checksum(found[:-1]):
        raise DataCorrupt("The clock of the file does not match its checksum.")
    return tuple(found[:-1])


def format_of(connection: sqlite3.Connection) -> str | None:
    """The format that the file names; None if it has no tables. Raises sqlite3.DatabaseError."""
    if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
        return None
    found = connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchone()
    return str(found[0]) if found else ""


def convert(connection: sqlite3.Connection, older: int, log_number: int, log_checksum: int) -> None:
    """Bring a file of format 1, 2 or 3 to this one.
    The caller has begun a transaction, and commits it."""
    if older == 1:
        _run(connection, _FROM_1)
    if older <= 2:
        _run(connection, _FENCES)
    _run(connection, _FROM_3)
    meta = dict(connection.execute("SELECT name, value FROM meta_3").fetchall())
    fences: dict[str, list[int]] = {}
    for move, partition in connection.execute("SELECT move, partition FROM fences"):
        fences.setdefault(move, []).append(partition)
    set_meta(connection, meta | {"format": str(FORMAT), "freezes": json.dumps(fences), "drops": "{}"})
    clock = connection.execute(f"SELECT {_CLOCK_COLUMNS} FROM clock_3").fetchone()
    set_clock(connection, (*clock, log_number, log_checksum))
    for table in ("meta_3", "clock_3", "fences"):
        connection.execute(f"DROP TABLE {table}")


def _run(connection: sqlite3.Connection, script: str) -> None:
    """The statements of the script, within the transaction that is under way (executescript would commit it)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""


def create(connection: sqlite3.Connection, meta: dict[str, str]) -> None:
    """Lay out an empty file. The caller has begun a transaction, and commits it."""
    _run(connection, SCHEMA)
    set_meta(connection, meta | {"format": str(FORMAT), "freezes": "{}", "drops": "{}"})
    set_clock(connection, (0,) * 7 + (-SIGNED,))  # of the beginning, whose checksum is 0
