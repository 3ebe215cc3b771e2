"""A file of format 1 is brought to the present format when it is opened, with all that it holds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from kvstore.config import Limits
from kvstore.placement.ring import partition_of
from kvstore.protocol import Get, Pull, Put, Scan
from kvstore.storage.rows import FORMAT, LEASE, VALUE, checksum
from kvstore.storage.sqlite import Database
from kvstore.store.leases import LeaseBody
from tests.unit.store.rig import PARTITIONS, Sink, ask, opened

FORMAT_1 = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
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


def write_format_1(path: Path) -> None:
    """Two values, a tombstone and a lease, as the first release wrote them."""
    lease = msgspec.json.encode(LeaseBody("me", 30_000))
    rows = [(VALUE, "a", 1, b"1"), (VALUE, "b", 2, b"\xff" * 3000), (VALUE, "gone", 3, None), (LEASE, "name", 4, lease)]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(FORMAT_1)
        meta = {"format": "1", "store_id": "ab" * 16, "shard_id": "s1", "partitions": str(PARTITIONS)}
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        connection.execute("INSERT INTO clock VALUES (1, 41, 4, 0, 2, 3002)")
        for kind, key, sequence, body in rows:
            partition = partition_of(key.encode(), PARTITIONS)
            check = checksum(kind, key, 10 + sequence, 0, body)
            row = (kind, key, partition, sequence, 10 + sequence, None, body, check)
            connection.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)


async def test_a_file_of_format_1_is_opened_with_all_that_it_holds(tmp_path: Path) -> None:
    write_format_1(tmp_path / "store.db")
    async with opened(tmp_path) as store:
        assert store.identity.store_id == "ab" * 16
        page = await store.scans.scan(Scan(1, "", "", 10, True))
        assert page.items == [("a", 11, b"1", 0), ("b", 12, b"\xff" * 3000, 0)]
        assert (await ask(store, Put(1, "name", b"x"))).status == 423  # the lease stands
        written = await ask(store, Put(2, "gone", b"back"))
        assert (written.status, written.version) == (201, 42)  # the clock went on
        sink = Sink()
        store.get(Get(3, "a"), sink)
        assert (await sink.answer()).value == b"1"
        page = await store.tables.engine.pull(Pull(0, list(range(PARTITIONS)), 0, -1, 100), 1 << 20)
        assert page.sequence == 5
        assert [row[:2] for row in page.rows] == [(VALUE, "a"), (VALUE, "b"), (LEASE, "name"), (VALUE, "gone")]


async def test_the_change_of_format_is_done_once(tmp_path: Path) -> None:
    write_format_1(tmp_path / "store.db")
    for _ in range(2):
        database = await Database.open(tmp_path / "store.db", Limits(), "s1", PARTITIONS)
        await database.close()
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        assert connection.execute("SELECT value FROM meta WHERE name = 'format'").fetchone() == (str(FORMAT),)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM rows").fetchone() == (4,)
