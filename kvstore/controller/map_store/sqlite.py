"""The embedded backend: one SQLite file, one row.

Owns: `controller-<id>.db`: its format, and the lock that lets one process at a time open it; copies that are kept
beside it, such as `controller-<id>.db.format3`; `controller-<id>.db.reserve`, which takes room that is given back when
a statement finds the disk full.
Promises: what `MapStore` asks for; an acknowledged swap survives kill -9 and a power cut (WAL,
synchronous=FULL).
Leaves to others: the meaning of the document.

A swap is a single UPDATE that names the revision it expects: SQLite makes it atomic, and autocommit makes it
durable before it returns. A crash before its commit leaves the old row, a crash after it the new one; in both
cases the revision tells. locking_mode=EXCLUSIVE keeps a second process out, so every change passes through
this object and watchers can be woken from memory instead of polling the file.
"""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import aiosqlite

from kvstore.controller.map_store.interface import Stored, Told
from kvstore.data_file import Reserve, opening_error, prepare_data_file, write_durably
from kvstore.errors import ForeignData, Unavailable
from kvstore.storage.sqlite import connect

APPLICATION_ID = 0x6B76_6374  # "kvct" in the header of the file; shards write another
FORMAT = 1
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)  # the second: a quota, or a limit of file sizes
_RESERVE_BYTES = 8 * 1024 * 1024  # more than the WAL takes between two checkpoints

_CREATE = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
    "CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL, document BLOB)",
    "INSERT INTO state VALUES (1, 0, NULL)",
)
_CREATE_TOLD = """CREATE TABLE IF NOT EXISTS told
    (store_id TEXT PRIMARY KEY, number INTEGER NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID"""
_CREATE_FLOORS = """CREATE TABLE IF NOT EXISTS clock_floors
    (store_id TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID"""
_FLOOR = "coalesce((SELECT version FROM clock_floors WHERE clock_floors.store_id = told.store_id), 0)"
_TOLD = """SELECT coalesce((SELECT number FROM told WHERE store_id = ?1), 0),
    coalesce((SELECT version FROM told WHERE store_id = ?1), 0),
    coalesce((SELECT version FROM clock_floors WHERE store_id = ?1), 0)"""
_TELL = f"""INSERT INTO told VALUES (?, ?, ?) ON CONFLICT (store_id) DO UPDATE SET
    number = max(number, excluded.number), version = max(version, excluded.version)
    RETURNING number, version, {_FLOOR}"""
_RAISE_FLOOR = """INSERT INTO clock_floors VALUES (?, ?) ON CONFLICT (store_id) DO UPDATE SET
    version = max(version, excluded.version)"""
_FORGET = f"DELETE FROM told WHERE store_id = ? RETURNING number, version, {_FLOOR}"
_SWAP = "UPDATE state SET revision = revision + 1, document = ? WHERE id = 1 AND revision = ? RETURNING revision"


async def open_sqlite(path: Path) -> SqliteMapStore:
    """Open the file, or create it (its folder too).

    Raises ForeignData for a file that is not a controller's or has another format, DataInUse for one that another
    process has open, and what `data_file` raises for a place where no file can be opened.
    """
    # Looked at first: where its connect fails, aiosqlite leaves a thread behind that still uses the event loop.
    prepare_data_file(path)
    connection = await connect(path, isolation_level=None, timeout=1.0)
    try:
        await _prepare(connection, path)
    except sqlite3.Error as error:
        await connection.close()
        raise opening_error(path, error, "a controller's file") from error
    except BaseException:
        await connection.close()
        raise
    return SqliteMapStore(connection, path)


async def _prepare(connection: aiosqlite.Connection, path: Path) -> None:
    await connection.execute_fetchall("PRAGMA locking_mode = EXCLUSIVE")
    await connection.execute_fetchall("BEGIN EXCLUSIVE")  # never released: a second process is refused here
    if await _number(connection, "SELECT count(*) FROM sqlite_master") == 0:
        for statement in _CREATE:
            await connection.execute_fetchall(statement)
    if await _number(connection, "PRAGMA application_id") != APPLICATION_ID:
        raise ForeignData(f"{path} was not written by a controller.")
    found = await _number(connection, "PRAGMA user_version")
    if found != FORMAT:
        raise ForeignData(f"{path} has format {found}; this version of kvstore knows format {FORMAT}.")
    await connection.execute_fetchall(_CREATE_TOLD)  # files of earlier programs lack both
    await connection.execute_fetchall(_CREATE_FLOORS)
    await connection.execute_fetchall("COMMIT")
    await connection.execute_fetchall("PRAGMA journal_mode = WAL")
    await connection.execute_fetchall("PRAGMA synchronous = FULL")


async def _number(connection: aiosqlite.Connection, query: str) -> int:
    for row in await connection.execute_fetchall(query):
        return int(row[0])
    raise AssertionError(f"no row: {query}")


class SqliteMapStore:
    """See `MapStore`."""

    def __init__(self, connection: aiosqlite.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._reserve = Reserve(path.with_name(f"{path.name}.reserve"), _RESERVE_BYTES)
        self._reserve.fill()
        self._closed = False
        self._changed = asyncio.Event()
        self._swaps: set[asyncio.Task[int | None]] = set()

    async def read(self) -> Stored:
        self._refuse_if_closed()
        rows = await self._execute("SELECT revision, document FROM state WHERE id = 1", ())
        return Stored(*rows[0])

    async def compare_and_swap(self, revision: int, document: bytes) -> int | None:
        self._refuse_if_closed()
        # Cancelling an await does not stop the statement in its thread. The task of its own sees the outcome
        # even if the caller does not, so that watchers are woken by every change.
        swap = asyncio.create_task(self._swap(revision, document))
        self._swaps.add(swap)
        swap.add_done_callback(self._swaps.discard)
        return await asyncio.shield(swap)

    async def watch(self, revision: int) -> Stored:
        while True:
            changed = self._changed  # taken before the read: a swap in between sets this very event
            stored = await self.read()
            if stored.revision > revision:
                return stored
            await changed.wait()

    async def tell(self, store_id: str, told: Told) -> Told:
        self._refuse_if_closed()
        (row,) = await self._execute(_TOLD, (store_id,))
        kept = Told(*row)
        if told.number > kept.number or told.version > kept.version:  # a full disk keeps no store from asking
            (row,) = await self._execute(_TELL, (store_id, told.number, told.version))
            kept = Told(*row)
        return kept

    async def forget(self, store_id: str, clock_floor: int = 0) -> Told:
        self._refuse_if_closed()
        if clock_floor:
            await self._execute(_RAISE_FLOOR, (store_id, clock_floor))
        rows = await self._execute(_FORGET, (store_id,))
        return Told(*rows[0]) if rows else Told()

    async def keep(self, name: str, document: bytes) -> None:
        self._refuse_if_closed()
        path = self._path.with_name(f"{self._path.name}.{name}")
        try:
            await asyncio.to_thread(write_durably, path, document)
        except OSError as error:
            raise Unavailable(f"{path} cannot be written: {error.strerror}.", retry_after_ms=1000) from error

    async def close(self) -> None:
        self._closed = True
        await asyncio.gather(*self._swaps, return_exceptions=True)
        self._wake_watchers()
        await self._connection.close()

    async def _swap(self, revision: int, document: bytes) -> int | None:
        rows = await self._execute(_SWAP, (document, revision))
        if not rows:
            return None
        self._reserve.fill()
        self._wake_watchers()
        return int(rows[0][0])

    async def _execute(self, statement: str, parameters: tuple[object, ...]) -> list[Any]:
        """One statement, to its end and committed, in one visit to the connection's thread."""
        try:
            try:
                return list(await self._connection.execute_fetchall(statement, parameters))
            except sqlite3.Error as error:
                if error.sqlite_errorcode not in _FULL or not self._reserve.give():
                    raise
                return list(await self._connection.execute_fetchall(statement, parameters))
        except sqlite3.Error as error:
            raise Unavailable(f"the controller's file cannot be used: {error}.", retry_after_ms=1000) from error

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Unavailable("the controller is stopping.", retry_after_ms=1000)
