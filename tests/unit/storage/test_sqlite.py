"""The file: what it is opened as, what people and copies read in it, and how large it may grow."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from kvstore.config import Limits
from kvstore.errors import ForeignData
from kvstore.placement.ring import partition_of
from kvstore.storage.sqlite import Database

Opener = Callable[..., Awaitable[Any]]
PARTITIONS = 64


async def open_and_close(path: Path, shard_id: str = "s1", partitions: int = PARTITIONS) -> Database:
    database = await Database.open(path, Limits(), shard_id, partitions)
    await database.close()
    return database


def shell(path: Path, command: str) -> str:
    """What the sqlite3 command line prints."""
    done = subprocess.run(["sqlite3", str(path), command], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout


# --- whose file it is -------------------------------------------------------------------------------------------------


async def test_a_new_file_gets_a_random_id_and_keeps_it(tmp_path: Path) -> None:
    first = await open_and_close(tmp_path / "a" / "one.db")
    again = await open_and_close(tmp_path / "a" / "one.db")
    other = await open_and_close(tmp_path / "a" / "two.db")
    assert first.identity == again.identity
    assert first.identity.store_id != other.identity.store_id
    assert (first.identity.shard_id, first.identity.cluster_id) == ("s1", None)


async def test_the_cluster_that_a_file_belongs_to_is_kept(rig: Any) -> None:
    assert rig.store.database.identity.cluster_id == "c"
    await rig.reopen()
    assert rig.store.database.identity.cluster_id == "c"
    assert rig.store.cluster_map.epoch == 1


async def test_a_name_with_characters_that_mean_something_in_a_url_is_a_name(tmp_path: Path) -> None:
    await open_and_close(tmp_path / "50%?mode=memory#1" / "a b.db")
    assert (tmp_path / "50%?mode=memory#1" / "a b.db").stat().st_size > 0


async def test_the_file_of_another_shard_is_refused(tmp_path: Path) -> None:
    await open_and_close(tmp_path / "one.db")
    with pytest.raises(ForeignData, match="shard_id s1"):
        await Database.open(tmp_path / "one.db", Limits(), "s2", PARTITIONS)


async def test_the_file_of_a_cluster_keeps_its_number_of_partitions_whatever_the_configuration_says(
    rig: Any,
) -> None:
    path = rig.store.database.path
    await rig.store.close()
    database = await open_and_close(path, partitions=2 * PARTITIONS)
    assert (database.identity.partitions, len(database.tallies.changed)) == (PARTITIONS, PARTITIONS)
    assert shell(path, "SELECT value FROM meta WHERE name = 'partitions'").strip() == str(PARTITIONS)


async def test_a_file_of_no_cluster_takes_the_number_of_partitions_that_it_is_opened_with(tmp_path: Path) -> None:
    await open_and_close(tmp_path / "one.db")
    database = await open_and_close(tmp_path / "one.db", partitions=2 * PARTITIONS)
    assert database.identity.partitions == 2 * PARTITIONS
    assert shell(tmp_path / "one.db", "SELECT value FROM meta WHERE name = 'partitions'").strip() == str(2 * PARTITIONS)


async def test_a_file_that_does_not_say_its_number_of_partitions_is_refused(tmp_path: Path) -> None:
    await open_and_close(tmp_path / "one.db")
    shell(tmp_path / "one.db", "UPDATE meta SET value = 'many' WHERE name = 'partitions'")
    with pytest.raises(ForeignData, match="how many"):
        await Database.open(tmp_path / "one.db", Limits(), "s1", PARTITIONS)


async def test_the_file_of_another_format_is_refused(tmp_path: Path) -> None:
    await open_and_close(tmp_path / "one.db")
    shell(tmp_path / "one.db", "UPDATE meta SET value = 99 WHERE name = 'format'")
    with pytest.raises(ForeignData, match="format 99"):
        await Database.open(tmp_path / "one.db", Limits(), "s1", PARTITIONS)


async def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"these are my notes, not a database " * 200)
    before = path.read_bytes()
    with pytest.raises(ForeignData, match=r"notes\.txt"):
        await Database.open(path, Limits(), "s1", PARTITIONS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("table", ["CREATE TABLE recipes (name TEXT)", "CREATE TABLE meta (name TEXT, value TEXT)"])
async def test_the_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path, table: str) -> None:
    path = tmp_path / "recipes.db"
    shell(path, f"{table};")
    before = path.read_bytes()
    with pytest.raises(ForeignData):
        await Database.open(path, Limits(), "s1", PARTITIONS)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["recipes.db"]


# --- what people see --------------------------------------------------------------------------------------------------


async def test_a_person_reads_keys_values_and_versions_with_the_sqlite3_shell_while_the_store_runs(rig: Any) -> None:
    await rig.put("greeting", "grüß dich".encode())
    await rig.put("session", b"x", ttl_ms=3_600_000)
    await rig.put("gone", b"x")
    await rig.delete("gone")
    assert shell(rig.path, "SELECT key, value, version FROM kv ORDER BY key") == "greeting|grüß dich|1\nsession|x|2\n"
    expires = shell(rig.path, "SELECT expires_utc FROM kv WHERE key = 'session'").strip()
    assert expires.startswith(time.strftime("%Y-", time.gmtime(time.time() + 3600)))
    assert shell(rig.path, "SELECT value FROM meta WHERE name = 'format'") == "3\n"


async def test_the_file_passes_sqlites_own_check_while_open_and_when_closed(rig: Any) -> None:
    for number in range(300):
        await rig.put(f"key-{number % 100}", b"v" * number, ttl_ms=60_000 if number % 3 else 0)
        if number % 5 == 0:
            await rig.delete(f"key-{number % 7}")
    assert shell(rig.path, "PRAGMA integrity_check") == "ok\n"
    await rig.store.close()
    assert shell(rig.path, "PRAGMA integrity_check") == "ok\n"
    assert not Path(f"{rig.path}-wal").exists(), "an orderly end leaves one file"


async def test_every_commit_is_synced(rig: Any) -> None:
    def pragmas(connection: sqlite3.Connection) -> list[Any]:
        names = ("synchronous", "journal_mode", "wal_autocheckpoint")
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    writer = rig.store.database._writer
    assert await writer._execute(pragmas, writer._conn) == [2, "wal", 0]


# --- aiosqlite --------------------------------------------------------------------------------------------------------


async def test_aiosqlite_runs_a_whole_function_in_the_connections_own_thread(tmp_path: Path) -> None:
    async with aiosqlite.connect(tmp_path / "one.db", isolation_level=None) as connection:

        def whole(inner: sqlite3.Connection, first: int, *, second: int) -> tuple[str, int]:
            inner.execute("BEGIN")
            inner.execute("CREATE TABLE t (a)")
            inner.execute("INSERT INTO t VALUES (?)", (first + second,))
            inner.execute("COMMIT")
            return threading.current_thread().name, inner.execute("SELECT a FROM t").fetchone()[0]

        name, result = await connection._execute(whole, connection._conn, 1, second=2)
        again, _ = await connection._execute(lambda: (threading.current_thread().name, 0))
        assert result == 3
        assert name == again != threading.current_thread().name


async def test_aiosqlite_brings_the_functions_exception(tmp_path: Path) -> None:
    async with aiosqlite.connect(tmp_path / "one.db") as connection:
        with pytest.raises(ZeroDivisionError):
            await connection._execute(lambda: 1 // 0)


async def test_who_stops_waiting_for_aiosqlite_does_not_stop_the_function(tmp_path: Path) -> None:
    begun, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    ended: list[bool] = []

    def slow() -> None:
        loop.call_soon_threadsafe(begun.set)
        ended.append(may_end.wait(10))

    async with aiosqlite.connect(tmp_path / "one.db") as connection:
        waiting = asyncio.create_task(connection._execute(slow))
        await begun.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        may_end.set()
        await connection._execute(lambda: None)
        assert ended == [True]


# --- the feed ---------------------------------------------------------------------------------------------------------


def partitions_of(*keys: str) -> list[int]:
    return sorted({partition_of(key.encode(), PARTITIONS) for key in keys})


async def test_the_feed_brings_the_newest_row_of_each_key_in_the_order_of_the_changes(rig: Any) -> None:
    for key in ("a", "b", "c", "a", "d"):
        await rig.put(key, key.encode())
    page = await rig.changes()
    assert [row[1] for row in page.rows] == ["b", "c", "a", "d"]
    assert (page.floor, page.sequence, page.more) == (0, 5, False)
    assert page.rows[2][5] == b"a"


async def test_a_deletion_and_an_expiry_are_rows_of_the_feed(rig: Any) -> None:
    await rig.put("a")
    await rig.put("b", ttl_ms=1)
    await rig.delete("a")
    await asyncio.sleep(0.01)
    await rig.get("b")
    page = await rig.changes(2)
    assert [(row[1], row[5]) for row in page.rows] == [("a", None), ("b", None)]
    assert page.sequence == 4


async def test_the_feed_is_read_in_pages_and_goes_on_after_what_was_read(rig: Any) -> None:
    keys = [f"key-{number}" for number in range(40)]
    for key in keys:
        await rig.put(key)
    read: list[str] = []
    after, more = 0, True
    while more:
        page = await rig.changes(after, limit=7)
        assert len(page.rows) <= 7
        read += [row[1] for row in page.rows]
        after, more = page.sequence, page.more
        if after == 14:
            await rig.put("key-0", b"changed while it was read")
    assert read == [*keys, "key-0"]


async def test_the_feed_brings_only_the_partitions_that_were_asked_for(rig: Any) -> None:
    for number in range(100):
        await rig.put(f"key-{number}")
    wanted = partitions_of("key-3", "key-5")
    rows = (await rig.changes(0, wanted)).rows
    assert {row[1] for row in rows} >= {"key-3", "key-5"}
    assert {row[2] for row in rows} == set(wanted)
    assert all(partition_of(row[1].encode(), PARTITIONS) == row[2] for row in rows)


async def test_trimming_removes_old_tombstones_and_raises_the_floor_to_the_last_of_them(rig: Any) -> None:
    for key in ("a", "b", "c"):
        await rig.put(key)
        await rig.delete(key)
    database = rig.store.database
    assert await database.trim_tombstones(4, 100) == 2
    page = await rig.changes()
    assert ([row[1] for row in page.rows], page.floor, page.sequence) == (["c"], 4, 6)
    assert await database.trim_tombstones(4, 100) == 0
    assert await database.trim_tombstones(6, 100) == 1
    await rig.reopen()
    assert rig.store.database.clock.tombstones_floor == 6


async def test_trimming_takes_the_oldest_first_and_no_more_than_it_was_told(rig: Any) -> None:
    for number in range(5):
        await rig.put(f"key-{number}")
        await rig.delete(f"key-{number}")
    assert await rig.store.database.trim_tombstones(10, 2) == 2
    assert rig.store.database.clock.tombstones_floor == 4
    assert rig.sql("SELECT key FROM rows ORDER BY sequence") == [("key-2",), ("key-3",), ("key-4",)]


async def test_a_key_that_lives_again_is_not_trimmed(rig: Any) -> None:
    await rig.put("a")
    await rig.delete("a")
    await rig.put("a", b"again")
    assert await rig.store.database.trim_tombstones(100, 100) == 0
    assert (await rig.get("a")).value == b"again"


# --- how large it grows -----------------------------------------------------------------------------------------------


class SlowReaders:
    """Other connections that take turns so that there is never a moment without a reader in the file."""

    def __init__(self, path: Path, readers: int = 2, hold_s: float = 0.03) -> None:
        self._path = path
        self._hold_s = hold_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(number,)) for number in range(readers)]

    def _read(self, number: int) -> None:
        connection = sqlite3.connect(self._path, isolation_level=None)
        self._stop.wait(number * self._hold_s / 2)
        while not self._stop.is_set():
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM rows").fetchone()
            self._stop.wait(self._hold_s)
            connection.execute("COMMIT")
        connection.close()

    def __enter__(self) -> SlowReaders:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("value_bytes", [100, 20_000])
async def test_the_wal_stays_bounded_under_writes_that_never_pause_beside_slow_readers(
    open_rig: Opener, value_bytes: int
) -> None:
    bound = 1 << 20
    rig = await open_rig(wal_bytes_max=bound)
    chance = random.Random(1)
    largest = 0
    written = 0
    rows_a_batch = 64 if value_bytes == 100 else 8
    with SlowReaders(rig.path):
        while written < 8 * bound:
            batch = [rig.put(f"{chance.random()}", chance.randbytes(value_bytes)) for _ in range(rows_a_batch)]
            for call in batch:
                assert (await call).status == 201
            largest = max(largest, rig.store.database.wal_bytes)
            written += rows_a_batch * (value_bytes + 4096)
    assert largest <= 3 * bound, "one that is never emptied passes eight times the bound"


async def test_the_wal_stays_bounded_while_nothing_but_tombstones_is_trimmed(open_rig: Opener) -> None:
    bound = 256 * 1024
    rig = await open_rig(wal_bytes_max=bound)
    for step in (rig.put, rig.delete):
        for call in [step(f"{number * 7919 % 4000}") for number in range(4000)]:
            await call
    largest = 0
    while await rig.store.database.trim_tombstones(1 << 40, 100):
        largest = max(largest, rig.store.database.wal_bytes)
    assert largest <= 1.5 * bound
    assert rig.sql("SELECT count(*) FROM rows") == [(0,)]


async def test_a_reader_that_stays_does_not_stop_writes(open_rig: Opener) -> None:
    rig = await open_rig(wal_bytes_max=64 * 1024)
    reader = sqlite3.connect(rig.path, isolation_level=None)
    await rig.put("a", b"1")
    reader.execute("BEGIN")
    assert reader.execute("SELECT value FROM kv").fetchall() == [(b"1",)]
    for number in range(10):
        assert (await rig.put(f"key-{number}", b"v" * 4000)).status == 201
    assert reader.execute("SELECT value FROM kv").fetchall() == [(b"1",)], "its own moment, all the while"
    reader.close()


async def test_listing_by_prefix_does_not_read_what_sorts_before_it(open_rig: Opener) -> None:
    rig = await open_rig()
    for call in [rig.put(f"a-{number}") for number in range(3000)] + [rig.put("b-1")]:
        await call
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    reader = rig.store.database._scan_reader
    await reader._execute(lambda: reader._conn.set_progress_handler(count, 100))
    assert await rig.keys("b") == ["b-1"]
    assert steps < 5, "in hundreds of SQLite's instructions"


async def test_a_person_who_writes_with_a_shell_holds_writes_up_but_does_not_end_the_store(open_rig: Opener) -> None:
    rig = await open_rig()
    shell = sqlite3.connect(rig.path, isolation_level=None)
    shell.execute("BEGIN IMMEDIATE")
    call = rig.put("a", b"1")
    await asyncio.sleep(0.8)
    assert not call.done
    shell.execute("ROLLBACK")
    shell.close()
    assert (await call).status == 201
