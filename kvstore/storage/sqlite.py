"""The engine of files: one SQLite database in WAL mode, one connection that writes, three that read.

Owns: the connections and their threads.
Promises: those of `engine`. The writing connection does all checkpoints and readers are read-only, which also keeps
clear of SQLite's WAL-reset bug (fixed in 3.51.3). Applying makes nothing durable (`synchronous=NORMAL`): the log is the
commit, and a checkpoint bounds how much of it must be kept.
Leaves to others: what is applied and when (`kvstore.store.applier`), the log (`log`), what each thread does
(`sqlite_writer`, `sqlite_reads`).

A crash before or in COMMIT means: the file stands where it stood, and the log has the rest. A power loss takes away any
number of the newest applications, together with the positions that they stand for.

aiosqlite runs one thread per connection and one hop per call. Its `_execute` is private but is the only way to run a
whole function in that thread; so is its `_thread`, which would keep a process from ending while a connection is left
open. Each is used in one place here, and a contract test fails when a release changes it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence, Set
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import aiosqlite

from kvstore.data_file import opening_error
from kvstore.errors import DataCorrupt
from kvstore.storage import sqlite_reads
from kvstore.storage.engine import (
    Application,
    Applied,
    Digest,
    FeedPage,
    FeedQuery,
    Identity,
    RowKey,
    ScanPage,
    ScanQuery,
    Sizes,
)
from kvstore.storage.rows import Row
from kvstore.storage.sqlite_file import uri_path
from kvstore.storage.sqlite_writer import SqliteWriter
from kvstore.storage.verification import Verified, VerifyQuery, examine

P = ParamSpec("P")
T = TypeVar("T")


class SqliteEngine:
    """The opened file. See `engine.Engine` for its methods."""

    def __init__(self, path: Path, writing: aiosqlite.Connection, writer: SqliteWriter) -> None:
        self.path = path
        self._writer = writer
        self._writing = writing
        self._point_reader = writing
        self._scan_reader = writing
        self._inline: sqlite3.Connection | None = None

    @classmethod
    async def open(cls, path: Path, shard_id: str, partitions: int, wal_bytes_max: int) -> SqliteEngine:
        """Open a file of the present format.

        Raises ForeignData, DataInUse, ConfigError and OSError as `data_file.opening_error` says; DataCorrupt (its
        clock, identity or freezes).

        `partitions`: their number as long as the file is of no cluster; afterwards it keeps its own. `wal_bytes_max`:
        beyond it the WAL is truncated, which waits for readers.
        """
        writing = await connect(path, isolation_level=None, cached_statements=128)
        engine = cls(path, writing, SqliteWriter(path, partitions, wal_bytes_max))
        try:
            try:
                await in_thread(writing, engine._writer.open, shard_id)
            except sqlite3.DatabaseError as error:
                raise opening_error(path, error, "a store of kvstore") from error
            engine._point_reader = await _reader(path)
            engine._scan_reader = await _reader(path)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def close(self) -> None:
        """Close the readers, then the writer, which copies the WAL into the file; all, whichever of them fails."""
        async with AsyncExitStack() as closing:
            for connection in dict.fromkeys((self._writing, self._scan_reader, self._point_reader)):
                closing.push_async_callback(connection.close)
            if self._inline is not None:
                self._inline.close()

    @property
    def identity(self) -> Identity:
        return self._writer.identity

    @property
    def applied(self) -> Applied:
        return self._writer.applied

    @property
    def sizes(self) -> Sizes:
        wal = Path(f"{self.path}-wal")
        wal_bytes = wal.stat().st_size if wal.exists() else 0
        return Sizes(self.path.stat().st_size, wal_bytes, self._writer.free_bytes)

    # --- writing ------------------------------------------------------------------------------------------------------

    async def apply(self, application: Application) -> None:
        await in_thread(self._writing, self._writer.apply, application)

    async def checkpoint(self, *, only_if_due: bool = False) -> int:
        if only_if_due and not self._writer.checkpoint_is_due:
            return 0
        return await in_thread(self._writing, self._writer.checkpoint)

    async def clean(self, rows_max: int) -> int:
        return await in_thread(self._writing, self._writer.clean, rows_max)

    # --- reading ------------------------------------------------------------------------------------------------------

    def _drops(self) -> dict[int, int]:
        return self._writer.applied.drops

    async def read(self, keys: list[RowKey]) -> list[Row | DataCorrupt | None]:
        return await in_thread(self._point_reader, sqlite_reads.read_rows, keys, self._drops)

    def read_now(self, key: RowKey) -> Row | None:
        if self._inline is None:
            self._inline = sqlite3.connect(f"file:{uri_path(self.path)}?mode=ro", uri=True, isolation_level=None)
            self._inline.execute("PRAGMA busy_timeout = 2000")
        (found,) = sqlite_reads.read_rows(self._inline, [key], self._drops)
        if isinstance(found, DataCorrupt):
            raise found
        return found

    async def scan(self, query: ScanQuery) -> ScanPage:
        return await in_thread(self._scan_reader, sqlite_reads.scan, query, self._drops)

    async def feed(self, query: FeedQuery) -> FeedPage:
        return await in_thread(self._scan_reader, sqlite_reads.feed, query, self._writer.digests, self._drops)

    async def kept_in_memory(self, partitions: Set[int]) -> list[Row]:
        of_all = len(self._writer.digests.changed)
        return await in_thread(self._scan_reader, sqlite_reads.kept_in_memory, partitions, of_all, self._drops)

    async def due(self, now_ms: int, generations: Sequence[int], count_max: int) -> list[tuple[str, str, int]]:
        return await in_thread(self._scan_reader, sqlite_reads.due, now_ms, generations, count_max, self._drops)

    async def digest(self, partitions: Set[int]) -> tuple[int, Digest]:
        return await in_thread(self._scan_reader, sqlite_reads.digest, partitions, self._writer.digests, self._drops)

    async def occupied(self) -> set[int]:
        return await in_thread(self._scan_reader, sqlite_reads.occupied, self._drops)

    async def old_tombstones(self, sequence: int, count_max: int) -> int:
        return await in_thread(self._scan_reader, sqlite_reads.old_tombstones, sequence, count_max, self._drops)

    async def verify(self, query: VerifyQuery | None) -> Verified:
        if query is None:
            return await in_thread(self._scan_reader, examine)
        return await in_thread(self._scan_reader, sqlite_reads.verified, query, self._drops)


async def in_thread(
    connection: aiosqlite.Connection,
    function: Callable[Concatenate[sqlite3.Connection, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Run `function(sqlite3 connection, …)` in the connection's thread: the one place that knows aiosqlite's inside."""
    result: T = await connection._execute(function, connection._conn, *args, **kwargs)  # type: ignore[no-untyped-call]
    return result


async def connect(database: Path | str, **options: Any) -> aiosqlite.Connection:
    """As `aiosqlite.connect`, but a connection that was left open does not keep the process from ending.

    An error or a cancellation at a bad moment may leave one: then the process is to end, and to be started again.
    """
    connection = aiosqlite.connect(database, **options)
    connection._thread.daemon = True
    return await connection


async def _reader(path: Path) -> aiosqlite.Connection:
    connection = await connect(f"file:{uri_path(path)}?mode=ro", uri=True, isolation_level=None)
    try:
        await connection.execute("PRAGMA cache_size = -4096")
        await connection.execute("PRAGMA busy_timeout = 2000")
    except BaseException:
        await connection.close()
        raise
    return connection
