"""Files in the layouts of formats 1, 2 and 3, as the releases that had them wrote them."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from kvstore.storage.rows import DECISION, LEASE, REPLY, VALUE, checksum
from tests.unit.storage.hands import PARTITIONS, partition

STORE_ID = "ab" * 16

_META = "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;"
_FORMAT_1 = f"""{_META}
CREATE TABLE clock (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, sequence INTEGER NOT NULL,
    tombstones_floor INTEGER NOT NULL, keys INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE rows (kind TEXT NOT NULL, key TEXT NOT NULL, partition INTEGER NOT NULL, sequence INTEGER NOT NULL,
    version INTEGER NOT NULL, expires_at_ms INTEGER, body BLOB, checksum INTEGER NOT NULL,
    PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE INDEX rows_feed ON rows (partition, sequence);
CREATE INDEX rows_expiry ON rows (expires_at_ms) WHERE expires_at_ms IS NOT NULL;
CREATE INDEX rows_tombstones ON rows (sequence) WHERE body IS NULL;
CREATE VIEW kv AS SELECT key, body AS value FROM rows WHERE kind = 'value' AND body IS NOT NULL;
CREATE VIEW locks AS SELECT key AS name FROM rows WHERE kind = 'lease' AND body IS NOT NULL;
"""
_FORMAT_2 = f"""{_META}
CREATE TABLE clock (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL, sequence INTEGER NOT NULL,
    tombstones_floor INTEGER NOT NULL, keys INTEGER NOT NULL, bytes INTEGER NOT NULL,
    attempts_floor INTEGER NOT NULL DEFAULT 0);
CREATE TABLE rows (kind TEXT NOT NULL, key TEXT NOT NULL, partition INTEGER NOT NULL, sequence INTEGER NOT NULL,
    version INTEGER NOT NULL, expires_at_ms INTEGER, checksum INTEGER NOT NULL, body BLOB, intent BLOB,
    UNIQUE (kind, key));
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
_FORMAT_3 = f"""{_FORMAT_2}
CREATE TABLE fences (move TEXT NOT NULL, partition INTEGER NOT NULL, PRIMARY KEY (move, partition)) WITHOUT ROWID;
"""
_SCHEMAS = {1: _FORMAT_1, 2: _FORMAT_2, 3: _FORMAT_3}


class OldRow(NamedTuple):
    """`home`: the key that decides on the partition, where that is not the row's own."""

    kind: str
    key: str
    sequence: int
    version: int
    expires_at_ms: int | None
    body: bytes | None
    intent: bytes | None = None
    home: str = ""


_LATER_MS = 4_000_000_000_000
_PUT = {"then": ["put", "held", "YWZ0ZXI=", 0]}  # "after"
# attempts are as they were before they had an epoch
_INTENT = {"attempt": [300, 300, "router01"], "anchor": "away", "vote": 15, "prepared_ms": 1}
_DECISION = {"outcome": "committed", "attempt": [200, 200, "router01"], "anchor": "a", "keys": ["far"], "version": 17}
_OF_1 = [
    OldRow(VALUE, "a", 1, 11, None, b"1"),
    OldRow(VALUE, "b", 2, 12, None, b"\xff" * 3000),
    OldRow(VALUE, "gone", 3, 13, None, None),
    OldRow(LEASE, "name", 4, 14, None, b'{"owner":"me","ttl_ms":3600000}'),
    OldRow(VALUE, "later", 5, 15, _LATER_MS, b"x"),
]
_OF_2 = [
    *_OF_1,
    OldRow(REPLY, "my-key\nPut\na", 6, 16, _LATER_MS, b'{"digest":"d","status":201,"version":11}', home="a"),
    OldRow(DECISION, "c8-router01", 7, 17, None, json.dumps(_DECISION).encode(), home="a"),
    OldRow(VALUE, "held", 8, 12, None, b"before", json.dumps(_INTENT | _PUT).encode()),
    OldRow(VALUE, "new", 9, 0, None, None, json.dumps(_INTENT).encode()),
]
OLD_ROWS = {1: _OF_1, 2: _OF_2, 3: _OF_2}
OLD_CLOCK = (4100, 5000, 2, 3, 3010, 77)  # above what the rows have: newer ones are gone again
FENCES = {"move-1": [3, 5], "move-2": [7]}


def write_old(path: Path, older: int, cluster_map: bytes = b"", big_rows: int = 0) -> None:
    """A file of that format with some of each kind of row, and so many values of 4000 bytes: big-0 and so on.

    With a map it is of a cluster.
    """
    path.parent.mkdir(exist_ok=True)
    big = [OldRow(VALUE, f"big-{n}", 100 + n, 100 + n, None, b"%d" % n * 1000) for n in range(big_rows)]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMAS[older])
        connection.execute("BEGIN")
        meta = {"format": str(older), "store_id": STORE_ID, "shard_id": "s1", "partitions": str(PARTITIONS)}
        if cluster_map:
            meta |= {"cluster_map": cluster_map.decode(), "cluster_id": json.loads(cluster_map)["cluster_id"]}
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        clock = OLD_CLOCK if older > 1 else OLD_CLOCK[:5]
        connection.execute(f"INSERT INTO clock VALUES (1{', ?' * len(clock)})", clock)
        for row in OLD_ROWS[older] + big:
            _insert(connection, older, row)
        if older == 3:
            fences = [(move, at) for move, partitions in FENCES.items() for at in partitions]
            connection.executemany("INSERT INTO fences VALUES (?, ?)", fences)
        connection.execute("COMMIT")


def _insert(connection: sqlite3.Connection, older: int, row: OldRow) -> None:
    kind, key, sequence, version, expires_at_ms, body, intent, home = row
    check = checksum(kind, key, version, expires_at_ms or 0, body, intent)
    head = (kind, key, partition(home or key), sequence, version, expires_at_ms)
    if older == 1:
        connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*head, body, check))
    else:
        connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*head, check, body, intent))
