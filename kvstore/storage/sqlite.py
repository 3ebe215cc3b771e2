"""The engine of files: one SQLite database in WAL mode, one connection that writes, three that read.

Owns: opening and checking the file, its threads, the application of records, checkpoints.
Promises: those of `engine`. The writing connection does all checkpoints and readers are read-only, which also keeps
clear of SQLite's WAL-reset bug (fixed in 3.51.3). Applying makes nothing durable (`synchronous=NORMAL`): the log is the
commit, and a checkpoint bounds how much of it must be kept.
Leaves to others: what is applied and when (`kvstore.store.applier`), the log (`log`), queries (`sqlite_reads`).

A crash before or in COMMIT means: the file stands where it stood, and the log has the rest. A power loss takes away any
number of the newest applications, together with the positions that they stand for.

aiosqlite runs one thread per connection and one hop per call. Its `_execute` is private but is the only way to run a
whole function in that thread; it is used in one place here, and a contract test fails when a release changes it.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import aiosqlite

from kvstore.errors import DataCorrupt, ForeignData
from kvstore.storage import schema, sqlite_reads
from kvstore.storage.digests import Digests
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
    TryLater,
)
from kvstore.storage.rows import Clock, Row
from kvstore.storage.segments import Position

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_BEGIN_TRIES = 20  # each waits for busy_timeout
_SIGNED = 1 << 63
_PAGE_BYTES = 4096
_TRUNCATION_S = 10.0  # between two tries to truncate the WAL beside a reader that does not end
_CLEAN = """DELETE FROM rows WHERE rowid IN (SELECT rowid FROM rows INDEXED BY rows_partition
    WHERE partition = ? AND sequence <= ? LIMIT ?)"""
_CLEAN_TOMBSTONES = """DELETE FROM rows WHERE rowid IN (SELECT rowid FROM rows INDEXED BY rows_tombstones
    WHERE body IS NULL AND intent IS NULL AND sequence <= ? ORDER BY sequence LIMIT ?)"""


class SqliteEngine:
    """The opened file. See `engine.Engine` for its methods."""

    def __init__(self, path: Path, writer: aiosqlite.Connection, partitions: int, wal_bytes_max: int) -> None:
        self.path = path
        self.identity = Identity("", None, "")
        self._applied = Applied()
        self._digests = Digests(partitions, 0)
        self._partitions = partitions
        self._writer = writer
        self._point_reader = writer
        self._scan_reader = writer
        self._inline: sqlite3.Connection | None = None
        self._wal_path = Path(f"{path}-wal")
        self._wal_bytes_max = wal_bytes_max
        self._unsettled_bytes = 0
        self._free_bytes = 0
        self._next_truncation_s = 0.0

    @classmethod
    async def open(cls, path: Path, shard_id: str, partitions: int, wal_bytes_max: int) -> SqliteEngine:
        """Open a file of the present format. Raises ForeignData, DataCorrupt (its clock, identity or freezes)."""
        writer = await aiosqlite.connect(path, isolation_level=None, cached_statements=128)
        engine = cls(path, writer, partitions, wal_bytes_max)
        try:
            try:
                await in_thread(writer, engine._read_state, shard_id)
            except sqlite3.DatabaseError as error:
                raise ForeignData(f"{path} cannot be opened as a store of kvstore: {error}.") from error
            engine._digests.changed[:] = [engine._applied.clock.sequence] * partitions
            engine._point_reader = await _reader(path)
            engine._scan_reader = await _reader(path)
        except BaseException:
            await engine.close()
            raise
        return engine

    def _read_state(self, connection: sqlite3.Connection, shard_id: str) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "wal_autocheckpoint = 0", "secure_delete = OFF"):
            connection.execute(f"PRAGMA {pragma}")
        for pragma in ("cache_size = -8192", "busy_timeout = 500"):
            connection.execute(f"PRAGMA {pragma}")
        meta, damaged = schema.read_meta(connection)
        if damaged & {"store_id", "shard_id", "partitions", "cluster_id", "freezes", "drops"}:
            raise DataCorrupt(f"{self.path}: the entries {', '.join(sorted(damaged))} do not match their checksums.")
        if "cluster_map" in damaged:
            log.error("%s: the stored cluster map is damaged; the controller is asked for it again", self.path)
        for name, expected in (("shard_id", shard_id), ("partitions", str(self._partitions))):
            if meta.get(name) != expected:
                raise ForeignData(f"{self.path} belongs to {name} {meta.get(name)}, not {expected}.")
        *clock, number, check = schema.read_clock(connection)
        self.identity = Identity(meta["store_id"], meta.get("cluster_id"), shard_id)
        cluster_map = meta.get("cluster_map")
        self._applied = Applied(
            Position(number, check + _SIGNED),
            Clock(*clock),
            cluster_map.encode() if cluster_map is not None else None,
            {move: frozenset(partitions) for move, partitions in json.loads(meta["freezes"]).items()},
            {int(partition): sequence for partition, sequence in json.loads(meta["drops"]).items()},
        )

    async def close(self) -> None:
        """Close the readers, then the writer, which copies the WAL into the file."""
        if self._inline is not None:
            self._inline.close()
        for connection in dict.fromkeys((self._point_reader, self._scan_reader, self._writer)):
            await connection.close()

    @property
    def applied(self) -> Applied:
        return self._applied

    @property
    def file_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def wal_bytes(self) -> int:
        return self._wal_path.stat().st_size if self._wal_path.exists() else 0

    @property
    def free_bytes(self) -> int:
        return self._free_bytes

    @property
    def checkpoint_is_due(self) -> bool:
        return self._unsettled_bytes >= self._wal_bytes_max // 4

    # --- writing ------------------------------------------------------------------------------------------------------

    async def apply(self, application: Application) -> None:
        await in_thread(self._writer, self._apply, application)

    def _apply(self, connection: sqlite3.Connection, application: Application) -> None:
        rows = sorted(application.rows)
        changed = self._digests.changed
        for row in rows:
            if row.sequence > changed[row.partition]:
                changed[row.partition] = row.sequence
        before, after = self._applied, self._after(application)
        self._applied = before._replace(drops=after.drops)  # see sqlite_reads.snapshot
        for partition, sequence in application.drops.items():
            changed[partition] = max(changed[partition], sequence)
        kept = application.kept
        traceless = [row for row in rows if row.is_tombstone and row.partition not in kept]
        with _transaction(connection):
            schema.upsert(connection, (row for row in rows if not row.is_tombstone or row.partition in kept))
            schema.bury(connection, traceless)
            _set_state(connection, before, after)
        self._free_bytes = connection.execute("PRAGMA freelist_count").fetchone()[0] * _PAGE_BYTES
        self._unsettled_bytes += sum(_PAGE_BYTES + row.payload_bytes + len(row.intent or b"") for row in rows)
        if after.cluster_map is not None and after.cluster_map != before.cluster_map:
            self.identity = self.identity._replace(cluster_id=_cluster_id(after.cluster_map))
        self._applied = after

    def _after(self, application: Application) -> Applied:
        before = self._applied
        return Applied(
            application.position,
            application.clock,
            before.cluster_map if application.cluster_map is None else application.cluster_map,
            before.freezes if application.freezes is None else application.freezes,
            {**before.drops, **application.drops} if application.drops else before.drops,
        )

    async def checkpoint(self) -> int:
        return await in_thread(self._writer, self._checkpoint)

    def _checkpoint(self, connection: sqlite3.Connection) -> int:
        """A checkpoint that copied less than all proves nothing: a reader stood in its way."""
        number = self._applied.position.number
        with _disk_errors():
            busy, frames, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if frames * _PAGE_BYTES > self._wal_bytes_max and time.monotonic() >= self._next_truncation_s:
                self._truncate_wal(connection)
        if busy or frames != copied:
            return 0
        self._unsettled_bytes = 0
        return number

    def _truncate_wal(self, connection: sqlite3.Connection) -> None:
        """Wait for the readers, which are short unless another program reads, and let the WAL start over."""
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            self._next_truncation_s = time.monotonic() + _TRUNCATION_S
            log.warning("%s grows: another program has been reading the file for long", self._wal_path)

    async def truncate_wal(self) -> None:
        """Wait for the readers, which are short, and let the WAL start over."""
        await in_thread(
            self._writer, lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        )

    async def clean(self, rows_max: int) -> int:
        return await in_thread(self._writer, self._clean, rows_max)

    def _clean(self, connection: sqlite3.Connection, rows_max: int) -> int:
        applied = self._applied
        if applied.drops:
            left, removed = dict(applied.drops), 0
            with _transaction(connection):
                for partition, sequence in applied.drops.items():
                    removed += connection.execute(_CLEAN, (partition, sequence, rows_max - removed)).rowcount
                    if removed >= rows_max:
                        break
                    del left[partition]
                schema.set_meta(connection, {"drops": json.dumps(left)})
            self._applied = applied._replace(drops=left)
            return max(removed, 1)
        with _transaction(connection):
            return connection.execute(_CLEAN_TOMBSTONES, (applied.clock.tombstones_floor, rows_max)).rowcount

    # --- reading ------------------------------------------------------------------------------------------------------

    def _drops(self) -> dict[int, int]:
        return self._applied.drops

    async def read(self, keys: list[RowKey]) -> list[Row | DataCorrupt | None]:
        return await in_thread(self._point_reader, sqlite_reads.read_rows, keys, self._drops)

    def read_now(self, key: RowKey) -> Row | None:
        if self._inline is None:
            self._inline = sqlite3.connect(f"file:{_uri_path(self.path)}?mode=ro", uri=True, isolation_level=None)
            self._inline.execute("PRAGMA busy_timeout = 2000")
        (found,) = sqlite_reads.read_rows(self._inline, [key], self._drops)
        if isinstance(found, DataCorrupt):
            raise found
        return found

    async def scan(self, query: ScanQuery) -> ScanPage:
        return await in_thread(self._scan_reader, sqlite_reads.scan, query, self._drops)

    async def feed(self, query: FeedQuery) -> FeedPage:
        return await in_thread(self._scan_reader, sqlite_reads.feed, query, self._digests, self._drops)

    async def kept_in_memory(self, partitions: Set[int]) -> list[Row]:
        return await in_thread(
            self._scan_reader, sqlite_reads.kept_in_memory, partitions, self._partitions, self._drops
        )

    async def due(self, now_ms: int, generations: Sequence[int], count_max: int) -> list[tuple[str, str, int]]:
        return await in_thread(self._scan_reader, sqlite_reads.due, now_ms, generations, count_max, self._drops)

    async def digest(self, partitions: Set[int]) -> Digest:
        return await in_thread(self._scan_reader, sqlite_reads.digest, partitions, self._digests, self._drops)

    async def occupied(self) -> set[int]:
        return await in_thread(self._scan_reader, sqlite_reads.occupied, self._drops)

    async def old_tombstones(self, sequence: int, count_max: int) -> int:
        return await in_thread(self._scan_reader, sqlite_reads.old_tombstones, sequence, count_max, self._drops)


# --- making a file --------------------------------------------------------------------------------------------------


def format_of(path: Path) -> int:
    """The format of the file: 0 if there is none, or it is empty. Raises ForeignData."""
    if not path.exists() or path.stat().st_size == 0:
        return 0
    try:
        with closing(sqlite3.connect(f"file:{_uri_path(path)}?mode=rw", uri=True)) as connection:
            found = schema.format_of(connection)
    except sqlite3.DatabaseError as error:
        raise ForeignData(f"{path} cannot be opened as a store of kvstore: {error}.") from error
    if found is None:
        return 0
    if found not in map(str, (*schema.OLDER_FORMATS, schema.FORMAT)):
        raise ForeignData(f"{path} has format {found or 'unknown'}; this program reads formats 1 to {schema.FORMAT}.")
    return int(found)


def position_of(path: Path) -> tuple[Position, str]:
    """Up to where a file of this format has applied the log, and the store's id. Raises DataCorrupt."""
    with closing(sqlite3.connect(f"file:{_uri_path(path)}?mode=rw", uri=True)) as connection:
        *_, number, check = schema.read_clock(connection)
        meta, damaged = schema.read_meta(connection)
    if "store_id" not in meta:
        raise DataCorrupt(f"{path}: the entries {', '.join(sorted(damaged))} do not match their checksums.")
    return Position(number, check + _SIGNED), meta["store_id"]


def meta_of(path: Path) -> dict[str, str]:
    """The entries of `meta` of a file of an older format. Raises sqlite3.Error."""
    with closing(sqlite3.connect(f"file:{_uri_path(path)}?mode=rw", uri=True)) as connection:
        return {str(name): str(value) for name, value in connection.execute("SELECT name, value FROM meta")}


def create_file(path: Path, meta: dict[str, str]) -> None:
    """Lay out an empty file with this identity, durably. Raises sqlite3.Error."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        with _transaction(connection):
            schema.create(connection, meta)


def convert_file(path: Path, older: int, position: Position) -> None:
    """Bring the file to the present format, in one transaction that is durable when it returns. Raises sqlite3.Error.

    `position`: where its log begins.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        with _transaction(connection):
            schema.convert(connection, older, position.number, position.checksum - _SIGNED)


# --- parts ----------------------------------------------------------------------------------------------------------


def _set_state(connection: sqlite3.Connection, before: Applied, after: Applied) -> None:
    """All that is no row, as far as it changed."""
    changed: dict[str, str] = {}
    if after.cluster_map is not None and after.cluster_map != before.cluster_map:
        changed["cluster_map"] = after.cluster_map.decode()
        changed["cluster_id"] = _cluster_id(after.cluster_map)
    if after.freezes != before.freezes:
        changed["freezes"] = json.dumps({move: sorted(partitions) for move, partitions in after.freezes.items()})
    if after.drops != before.drops:
        changed["drops"] = json.dumps(after.drops)
    schema.set_meta(connection, changed)
    schema.set_clock(connection, (*after.clock, after.position.number, after.position.checksum - _SIGNED))


def _cluster_id(cluster_map: bytes) -> str:
    return str(json.loads(cluster_map)["cluster_id"])


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of the block or none of it. Raises TryLater if nothing changed and may yet; OSError."""
    with _disk_errors():
        _begin(connection)
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _begin(connection: sqlite3.Connection) -> None:
    """Begin to write. Another program may be writing, a person's shell for example."""
    for _ in range(_BEGIN_TRIES - 1):
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            log.warning("another program is writing to the file; what is committed waits in the log")
    connection.execute("BEGIN IMMEDIATE")


@contextmanager
def _disk_errors() -> Iterator[None]:
    """SQLite's errors as what they mean to the applier."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = error.sqlite_errorcode & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL):
            raise TryLater(str(error)) from error
        raise OSError(f"SQLite: {error} ({error.sqlite_errorname})") from error


async def in_thread(
    connection: aiosqlite.Connection,
    function: Callable[Concatenate[sqlite3.Connection, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Run `function(sqlite3 connection, …)` in the connection's thread: the one place that knows aiosqlite's inside."""
    result: T = await connection._execute(function, connection._conn, *args, **kwargs)  # type: ignore[no-untyped-call]
    return result


async def _reader(path: Path) -> aiosqlite.Connection:
    connection = await aiosqlite.connect(f"file:{_uri_path(path)}?mode=ro", uri=True, isolation_level=None)
    await connection.execute("PRAGMA cache_size = -4096")
    await connection.execute("PRAGMA busy_timeout = 2000")
    return connection


def _uri_path(path: Path) -> str:
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
