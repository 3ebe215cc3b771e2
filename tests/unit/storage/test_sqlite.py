"""The file: what it is opened as, what people read in it, and how large it may grow."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.errors import DataCorrupt, ForeignData
from kvstore.storage import sqlite_writer
from kvstore.storage.engine import Application, Identity
from kvstore.storage.sqlite import SqliteEngine, in_thread
from kvstore.store import applier
from kvstore.store.opening import open_files
from tests.unit.storage.hands import PARTITIONS, Hands
from tests.unit.store import real_files

LIMITS = Limits(log_segment_bytes=1 << 16)


async def open_and_close(path: Path, shard_id: str = "s1", partitions: int = PARTITIONS) -> Identity:
    """Open file and log as a store does; whose they are."""
    opened = await open_files(path, shard_id, partitions, LIMITS, SYSTEM)
    assert opened.lock_fd is not None
    await opened.close()
    return opened.engine.identity


def shell(path: Path, command: str) -> str:
    """What the sqlite3 command line prints."""
    done = subprocess.run(["sqlite3", str(path), command], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout


@pytest.fixture
async def hands(tmp_path: Path) -> AsyncIterator[Hands]:
    """On the engine of a new file whose WAL may hold 1 MiB."""
    await open_and_close(tmp_path / "one.db")
    engine = await SqliteEngine.open(tmp_path / "one.db", "s1", PARTITIONS, 1 << 20)
    yield Hands(engine)
    await engine.close()


# --- whose file it is -------------------------------------------------------------------------------------------------


async def test_a_new_file_gets_a_random_id_and_keeps_it(tmp_path: Path) -> None:
    first = await open_and_close(tmp_path / "a" / "one.db")
    again = await open_and_close(tmp_path / "a" / "one.db")
    other = await open_and_close(tmp_path / "a" / "two.db")
    assert first == again
    assert first.store_id != other.store_id
    assert (first.shard_id, first.cluster_id) == ("s1", None)


async def test_the_cluster_that_a_file_belongs_to_is_kept(tmp_path: Path) -> None:
    await real_files.filled(tmp_path / "one.db", 1)
    async with real_files.opened(tmp_path / "one.db") as hands:
        assert hands.store.identity.cluster_id == "c"
        assert hands.store.cluster_map is not None
        assert hands.store.cluster_map.epoch == 2


async def test_a_name_with_characters_that_mean_something_in_a_url_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "50%?mode=memory#1" / "a b.db"
    await real_files.filled(path, 3)
    assert path.stat().st_size > 0
    async with real_files.opened(path) as hands:
        assert (await hands.get("key-01")).status == 200


async def test_the_file_of_another_shard_is_refused(tmp_path: Path) -> None:
    await open_and_close(tmp_path / "one.db")
    with pytest.raises(ForeignData, match="shard_id s1"):
        await open_and_close(tmp_path / "one.db", shard_id="s2")


async def test_the_file_of_a_cluster_keeps_its_number_of_partitions_whatever_the_configuration_says(
    tmp_path: Path,
) -> None:
    path = tmp_path / "one.db"
    await real_files.filled(path, 1)
    assert (await open_and_close(path, partitions=2 * PARTITIONS)).partitions == PARTITIONS
    assert shell(path, "SELECT value FROM meta WHERE name = 'partitions'").strip() == str(PARTITIONS)


async def test_a_file_of_no_cluster_takes_the_number_of_partitions_that_it_is_opened_with(tmp_path: Path) -> None:
    path = tmp_path / "one.db"
    await open_and_close(path)
    assert (await open_and_close(path, partitions=2 * PARTITIONS)).partitions == 2 * PARTITIONS
    assert (await open_and_close(path, partitions=2 * PARTITIONS)).partitions == 2 * PARTITIONS
    assert shell(path, "SELECT value FROM meta WHERE name = 'partitions'").strip() == str(2 * PARTITIONS)


@pytest.mark.parametrize("entry", ["store_id", "shard_id", "partitions", "freezes", "drops"])
async def test_an_entry_that_was_changed_by_hand_is_refused_and_named(tmp_path: Path, entry: str) -> None:
    await open_and_close(tmp_path / "one.db")
    shell(tmp_path / "one.db", f"UPDATE meta SET value = 'many' WHERE name = '{entry}'")
    with pytest.raises(DataCorrupt, match=entry):
        await open_and_close(tmp_path / "one.db")


async def test_the_file_of_another_format_is_refused(tmp_path: Path) -> None:
    await open_and_close(tmp_path / "one.db")
    shell(tmp_path / "one.db", "UPDATE meta SET value = 99 WHERE name = 'format'")
    with pytest.raises(ForeignData, match="format 99"):
        await open_and_close(tmp_path / "one.db")


async def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"these are my notes, not a database " * 200)
    before = path.read_bytes()
    with pytest.raises(ForeignData, match=r"notes\.txt"):
        await open_and_close(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("table", ["CREATE TABLE recipes (name TEXT)", "CREATE TABLE meta (name TEXT, value TEXT)"])
async def test_the_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path, table: str) -> None:
    path = tmp_path / "recipes.db"
    shell(path, f"{table};")
    before = path.read_bytes()
    with pytest.raises(ForeignData):
        await open_and_close(path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["recipes.db", "recipes.lock"], "and no log is made"


# --- what people see --------------------------------------------------------------------------------------------------


async def test_a_person_reads_keys_values_and_versions_with_the_sqlite3_shell_while_the_file_is_open(
    hands: Hands,
) -> None:
    path, in_an_hour_s = hands.engine.path, time.time() + 3600
    await hands.put("greeting", "grüß dich".encode())
    await hands.put("session", b"x", expires_at_ms=round(in_an_hour_s * 1000))
    await hands.put("gone")
    await hands.delete("gone")
    assert shell(path, "SELECT key, value, version FROM kv ORDER BY key") == "greeting|grüß dich|1\nsession|x|2\n"
    expires = shell(path, "SELECT expires_utc FROM kv WHERE key = 'session'").strip()
    assert expires.startswith(time.strftime("%Y-%m-%d %H:%M", time.gmtime(in_an_hour_s)))
    assert shell(path, "SELECT value FROM meta WHERE name = 'format'") == "4\n"


async def test_a_person_reads_locks_intents_and_freezes(hands: Hands) -> None:
    path = hands.engine.path
    await hands.put("name", b'{"owner":"me"}', kind="lease")
    await hands.put("held", b"x", intent=b'{"vote":7}')
    await hands.apply([], freezes={"move-1": frozenset({5, 3})})
    assert shell(path, "SELECT name, token FROM locks") == "name|1\n"
    assert shell(path, "SELECT key, intent FROM intents") == 'held|{"vote":7}\n'
    assert shell(path, "SELECT move, partition FROM freezes ORDER BY partition") == "move-1|3\nmove-1|5\n"


async def test_the_file_passes_sqlites_own_check_while_open_and_when_closed(hands: Hands) -> None:
    path = hands.engine.path
    for number in range(300):
        await hands.put(f"key-{number % 100}", b"v" * number, expires_at_ms=60_000 if number % 3 else 0)
        if number % 5 == 0:
            await hands.delete(f"key-{number % 7}")
    await hands.drop([1, 2, 3])
    await hands.engine.clean(5)
    assert shell(path, "PRAGMA integrity_check") == "ok\n"
    await hands.engine.close()
    assert shell(path, "PRAGMA integrity_check") == "ok\n"
    assert not Path(f"{path}-wal").exists(), "an orderly end leaves one file"


async def test_applying_does_not_sync_and_sqlite_makes_no_checkpoints_of_its_own(hands: Hands) -> None:
    def pragmas(connection: sqlite3.Connection) -> list[Any]:
        names = ("synchronous", "journal_mode", "wal_autocheckpoint")
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    assert await in_thread(hands.engine._writing, pragmas) == [1, "wal", 0]  # type: ignore[attr-defined]


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
        ended.append(may_end.wait(60))

    async with aiosqlite.connect(tmp_path / "one.db") as connection:
        waiting = asyncio.create_task(connection._execute(slow))
        await begun.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        may_end.set()
        await connection._execute(lambda: None)
        assert ended == [True]


LEFT_OPEN = {
    "a store": """
from kvstore.storage.sqlite import SqliteEngine
async def main(path):
    kept.append(await SqliteEngine.open(Path(path), "s1", int(sys.argv[2]), 1 << 20))
""",
    "a controller": """
from kvstore.controller.map_store.sqlite import open_sqlite
async def main(path):
    kept.append(await open_sqlite(Path(path + ".controller")))
""",
}


@pytest.mark.parametrize("opening", LEFT_OPEN.values(), ids=LEFT_OPEN)
def test_a_file_that_an_error_has_left_open_does_not_keep_the_process_from_ending(opening: str, tmp_path: Path) -> None:
    asyncio.run(open_and_close(tmp_path / "one.db"))
    begin, fail = "import asyncio, sys\nfrom pathlib import Path\nkept = []\n", "asyncio.run(main(sys.argv[1]))\n1 / 0"
    script = f"{begin}{opening}\n{fail}"
    command = [sys.executable, "-c", script, str(tmp_path / "one.db"), str(PARTITIONS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


async def test_all_connections_are_closed_although_closing_is_cancelled(tmp_path: Path) -> None:
    await open_and_close(tmp_path / "one.db")
    engine = await SqliteEngine.open(tmp_path / "one.db", "s1", PARTITIONS, 1 << 20)
    threads = [each._thread for each in (engine._point_reader, engine._scan_reader, engine._writing)]
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    for thread in threads:
        await asyncio.to_thread(thread.join, 60)
    assert not any(thread.is_alive() for thread in threads)


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
async def test_the_wal_stays_bounded_under_applications_that_never_pause_beside_slow_readers(
    hands: Hands, value_bytes: int
) -> None:
    bound = 1 << 20
    chance = random.Random(1)
    largest = written = 0
    rows_each = 64 if value_bytes == 100 else 8
    with SlowReaders(hands.engine.path):
        while written < 8 * bound:
            await hands.apply(
                [hands.row(f"{chance.random()}", chance.randbytes(value_bytes)) for _ in range(rows_each)]
            )
            await hands.engine.checkpoint(only_if_due=True)
            largest = max(largest, hands.engine.sizes.wal)
            written += rows_each * (value_bytes + 4096)
    assert largest <= 3 * bound, "one that is never emptied passes eight times the bound"


@pytest.mark.parametrize("covered_by", ["floor", "drops"])
async def test_the_wal_stays_bounded_while_rows_are_only_removed(hands: Hands, covered_by: str) -> None:
    bound = 1 << 20
    rows = [hands.row(f"{number * 7919 % 12_000}", b"v" * 100) for number in range(12_000)]
    await hands.apply(rows)
    if covered_by == "floor":
        await hands.apply([row._replace(body=None) for row in rows])
        await hands.apply([], {"tombstones_floor": hands.engine.applied.clock.sequence})
    else:
        await hands.drop(range(PARTITIONS))
    while not await hands.engine.checkpoint():
        pass
    with closing(sqlite3.connect(hands.engine.path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    largest = 0
    while await hands.engine.clean(100):
        await hands.engine.checkpoint(only_if_due=True)
        largest = max(largest, hands.engine.sizes.wal)
    assert largest <= 1.5 * bound
    assert await hands.engine.occupied() == set()


async def test_a_checkpoint_beside_a_reader_that_stays_does_not_say_that_all_is_durable(hands: Hands) -> None:
    await hands.put("a", b"1")
    with closing(sqlite3.connect(hands.engine.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT value FROM kv").fetchall() == [(b"1",)]
        for number in range(10):
            await hands.put(f"key-{number}", b"v" * 4000)
        assert await hands.engine.checkpoint() == 0
        assert reader.execute("SELECT value FROM kv").fetchall() == [(b"1",)], "its own moment, all the while"
    assert await hands.engine.checkpoint() == 11


async def test_a_reader_that_is_forgotten_open_is_told_of_once_the_wal_has_grown(
    hands: Hands, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(hands.engine.path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT value FROM kv").fetchall()
        async with asyncio.timeout(60):
            while "another program has been reading the file for long" not in caplog.text:
                await hands.apply([hands.row(f"key-{number}", os.urandom(4000)) for number in range(200)])
                await hands.engine.checkpoint()
    assert caplog.text.count("another program has been reading") == 1


async def test_listing_by_prefix_does_not_read_what_sorts_before_it(hands: Hands) -> None:
    await hands.apply([hands.row(f"a-{number}", b"x") for number in range(3000)] + [hands.row("b-1", b"x")])
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    def watch(connection: sqlite3.Connection) -> None:
        connection.set_progress_handler(count, 100)

    await in_thread(hands.engine._scan_reader, watch)  # type: ignore[attr-defined]
    assert [row[0] for row in (await hands.list("b")).rows] == ["b-1"]
    assert steps < 5, "in hundreds of SQLite's instructions"


async def test_a_person_who_writes_with_a_shell_holds_up_the_file_and_not_the_answers(tmp_path: Path) -> None:
    path = tmp_path / "one.db"
    async with real_files.opened(path) as hands:
        await hands.store.applier.flush()
        with closing(sqlite3.connect(path, isolation_level=None)) as person:
            person.execute("BEGIN IMMEDIATE")
            assert (await hands.put("a", b"1")).status == 201
            assert (await hands.get("a")).value == b"1"
            assert person.execute("SELECT * FROM kv").fetchall() == []
            person.execute("ROLLBACK")
            await hands.store.applier.flush()
            assert person.execute("SELECT key, value FROM kv").fetchall() == [("a", b"1")]


async def test_a_person_who_writes_for_long_ends_nothing_and_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite_writer, "_BEGIN_TRIES", 1)
    monkeypatch.setattr(applier, "_RETRY_S", 0.01)
    path = tmp_path / "one.db"
    async with asyncio.timeout(60), real_files.opened(path) as hands:
        await hands.store.applier.flush()
        engine: Any = hands.store.tables.engine
        await in_thread(engine._writing, lambda connection: connection.execute("PRAGMA busy_timeout = 1").close())
        tries, apply = list[Application](), engine.apply

        async def counted(application: Application) -> None:
            tries.append(application)
            await apply(application)

        monkeypatch.setattr(engine, "apply", counted)
        with closing(sqlite3.connect(path, isolation_level=None)) as person:
            person.execute("BEGIN IMMEDIATE")
            assert (await hands.put("a", b"1")).status == 201
            while len(tries) <= 2 * applier._DISK_ERRORS_MAX:
                await asyncio.sleep(0.01)
            assert caplog.text.count("applying to the file waits: another program is writing to the file") == 1
            assert (await hands.get("a")).value == b"1"
            assert (await hands.put("b", b"2")).status == 201, "the disk is not full"
            person.execute("ROLLBACK")
            await hands.store.applier.flush()
            assert person.execute("SELECT key FROM kv ORDER BY key").fetchall() == [("a",), ("b",)]
