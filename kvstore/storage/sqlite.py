"""The file of a store: one SQLite database in WAL mode, one connection that writes, two that read.

Owns: opening and checking the file, the threads, the statements, the checkpoints.
Promises: `commit` is one function in the writing connection's thread, with one fsync (`synchronous=FULL`), whatever
the number of operations. The writing connection does all checkpoints and readers are read-only, which also keeps
clear of SQLite's WAL-reset bug (fixed in 3.51.3). The WAL is bounded under a load that never pauses: past a quarter
of `wal_bytes_max` it is copied into the file without waiting for anybody; should a reader have kept it from starting
over, so that it passes the bound, the writer waits for the readers, which are short.
Leaves to others: which operations make a batch (`store`), what they do (`batch`).

A crash before or in COMMIT means: none of the batch happened, and nobody was answered. A crash after it means: all of
it happened, some were not told. A COMMIT that fails is neither, so the process ends (see `store`).

aiosqlite runs one thread per connection and one hop per call. Its `_execute` is private but is the only way to run a
whole function in that thread; it is used in one place here, and a contract test fails when a release changes it.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import aiosqlite

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.data_file import opening_error, prepare_data_file
from kvstore.errors import DataCorrupt, ForeignData, KvError
from kvstore.protocol import Pull, Rows, row_bytes
from kvstore.storage.batch import Batch, Expire, Locks, Waiter
from kvstore.storage.changes import Before, Context
from kvstore.storage.handover import Handover
from kvstore.storage.rows import (
    FORMAT,
    FROM_FORMAT_1,
    FROM_FORMAT_2,
    SCHEMA,
    VALUE,
    Clock,
    Row,
    checked,
    stored,
    upsert,
)
from kvstore.storage.tallies import Tallies
from kvstore.transactions.intents import Holds, State
from kvstore.transactions.openings import Openings

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Step = Callable[[sqlite3.Connection, Batch], T]

_PAGE_BYTES = 4096
_CONVERSIONS = {"1": FROM_FORMAT_1, "2": FROM_FORMAT_2}
_AMPLE_S = 0.02  # in which nobody fills twice the reserve; asking the kernel takes a tenth of a small batch
_BEGIN_TRIES = 20  # each waits for busy_timeout
_PAGES_PER_ROW = 3  # that one changed row dirties, at the most typical: its own, and shares of the indexes'

_BEFORE = """SELECT version, coalesce(expires_at_ms, 0), coalesce(length(body), 0), body IS NOT NULL
    FROM rows WHERE kind = ? AND key = ?"""
_ROW = """SELECT partition, sequence, version, coalesce(expires_at_ms, 0), body, intent, checksum
    FROM rows WHERE kind = ? AND key = ?"""
_SET_CLOCK = """UPDATE clock
    SET version = ?, sequence = ?, tombstones_floor = ?, keys = ?, bytes = ?, attempts_floor = ?"""
_COPY = """SELECT rowid, kind, key, partition, version, coalesce(expires_at_ms, 0), body, intent, checksum
    FROM rows INDEXED BY rows_partition WHERE partition = ? AND rowid > ?
    AND (body IS NOT NULL OR intent IS NOT NULL) ORDER BY rowid LIMIT ?"""
_CHANGED = """SELECT sequence, kind, rows.key, partition, version, coalesce(expires_at_ms, 0), body, intent, checksum
    FROM json_each(?) AS wanted CROSS JOIN rows INDEXED BY rows_partition ON rows.partition = wanted.value
    WHERE sequence > ? ORDER BY sequence LIMIT ?"""
_COUNT = """SELECT count(*) FROM json_each(?) AS wanted CROSS JOIN rows INDEXED BY rows_partition
    ON rows.partition = wanted.value"""  # tombstones, too: it is for a progress bar, and reads the index only


class Found(NamedTuple):
    """What a reader saw of one key, and as of which sequence of the store it looked."""

    row: Row | None
    as_of: int


class ScanQuery(NamedTuple):
    """Rows of `kind` whose key starts with `prefix` and sorts after `after`, not beyond `until` if it is given;
    `values`: with their bodies."""

    kind: str
    prefix: str
    after: str
    limit: int
    values: bool
    now_ms: int
    arrivals: Sequence[int]
    bytes_max: int
    until: str = ""


class ScanPage(NamedTuple):
    """Live rows in key order, and the partition of each. `more`: there may be further ones after `last`. `due` are keys
    past their deadline; `locked`, keys that carry an intent: whether and how they exist is not decided yet."""

    rows: list[tuple[str, int, bytes | None, int]]
    partitions: list[int]
    due: list[str]
    locked: list[str]
    last: str
    more: bool
    as_of: int


class Identity(NamedTuple):
    """What the file says that it is; `partitions`: of how many."""

    store_id: str
    cluster_id: str | None
    shard_id: str
    partitions: int


class Work(NamedTuple):
    """What a batch is made of, beside the file itself. `known` may spare the look-up of a committed value's row."""

    waiters: list[Waiter]
    now_ms: int
    now_s: float
    arrivals: Sequence[int]
    epoch: int
    locks: Locks
    holds: Holds
    known: Callable[[str], State | None]
    fenced: Set[int] = frozenset()
    openings: Openings = Openings()


class _Committed:
    """The rows as the batch finds them (see `changes.Committed`)."""

    def __init__(self, connection: sqlite3.Connection, known: Callable[[str], State | None]) -> None:
        self._connection = connection
        self._known = known

    def before(self, kind: str, key: str) -> Before | None:
        known = self._known(key) if kind == VALUE else None
        if known is not None:
            return Before(known.version, known.expires_at_ms, len(known.body or b""), known.body is not None)
        found = self._connection.execute(_BEFORE, (kind, key)).fetchone()
        return Before(*found) if found else None

    def state(self, kind: str, key: str) -> State | None:
        known = self._known(key) if kind == VALUE else None
        if known is not None:
            return known
        found = self._connection.execute(_ROW, (kind, key)).fetchone()
        if found is None:
            return None
        row = checked(Row(kind, key, *found[:6]), found[6])
        return State(row.version, row.expires_at_ms, row.body)


class Database:
    """The opened file. Every method that touches it runs in one of its threads and raises sqlite3.Error."""

    def __init__(self, path: Path, limits: Limits, writer: aiosqlite.Connection, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        self.clock = Clock()
        self.tallies = Tallies(identity.partitions, 0)
        self.handover = Handover(identity.shard_id, self.tallies)
        self._limits = limits
        self._writer = writer
        self._point_reader = writer
        self._scan_reader = writer
        self._wal_pages_guess = 0
        self._ample_until_s = 0.0
        self._wal_path = Path(f"{path}-wal")

    @property
    def wal_bytes(self) -> int:
        """The size of the WAL file now."""
        return self._wal_path.stat().st_size if self._wal_path.exists() else 0

    @classmethod
    async def open(cls, path: Path, limits: Limits, shard_id: str, partitions: int) -> Database:
        """Open or create the file. Raises ForeignData if it is of another format or shard.

        Also what `data_file` raises for a place where no file can be opened, or one that another process holds.
        `partitions`: their number as long as the file is of no cluster; afterwards it keeps its own.
        """
        prepare_data_file(path)  # where its connect fails, aiosqlite leaves a thread behind that uses the event loop
        writer = await aiosqlite.connect(path, isolation_level=None, cached_statements=128)
        try:
            identity = await _in_thread(writer, _prepare, path, shard_id, partitions)
        except sqlite3.DatabaseError as error:
            await writer.close()
            raise opening_error(path, error, "a store of kvstore") from error
        except BaseException:
            await writer.close()
            raise
        database = cls(path, limits, writer, identity)
        try:
            database.clock = await _in_thread(writer, _read_clock)
            database.tallies.changed[:] = [database.clock.sequence] * identity.partitions
            database._point_reader = await _reader(path)
            database._scan_reader = await _reader(path)
        except BaseException:
            await database.close()
            raise
        return database

    async def close(self) -> None:
        """Close the readers, then the writer, which copies the WAL into the file."""
        for connection in dict.fromkeys((self._point_reader, self._scan_reader, self._writer)):
            await connection.close()

    @property
    def file_bytes(self) -> int:
        """The size of the database file now, without its WAL."""
        return self.path.stat().st_size

    # --- writing -----------------------------------------------------------------------------------------------------

    async def commit(self, work: Work) -> Batch:
        """Decide and commit one batch; durable when it returns."""
        return await _in_thread(self._writer, self._commit, work)

    async def commit_step(self, work: Work, step: Step[T]) -> tuple[Batch, T]:
        """Do the step, with a batch of its own, and commit it. A KvError that it raises undoes it."""
        return await _in_thread(self._writer, self._commit_step, work, step)

    def _commit(self, connection: sqlite3.Connection, work: Work) -> Batch:
        batch = self._batch(connection, work)
        _begin(connection)
        for op, sink in work.waiters:
            batch.decide(op, sink)
        self._write(connection, batch, "batch", *batch.steps)
        return batch

    def _commit_step(self, connection: sqlite3.Connection, work: Work, step: Step[T]) -> tuple[Batch, T]:
        batch = self._batch(connection, work)
        _begin(connection)
        changes_before = connection.total_changes
        try:
            result = step(connection, batch)
        except KvError:
            connection.execute("ROLLBACK")
            raise
        self._write(connection, batch, *batch.steps)
        self._wal_pages_guess += (connection.total_changes - changes_before) * _PAGES_PER_ROW
        return batch, result

    def _batch(self, connection: sqlite3.Connection, work: Work) -> Batch:
        limits = self._limits
        frees_only = self._disk_is_full(connection)
        kept_ms = round(limits.idempotency_kept_s * 1000)
        read_max = limits.txn_read_bytes_max
        context = Context(
            work.now_ms,
            work.now_s,
            work.arrivals,
            work.epoch,
            frees_only,
            kept_ms,
            read_max,
            work.fenced,
            work.openings,
        )
        return Batch(self.clock, context, work.locks, work.holds, _Committed(connection, work.known))

    def _write(self, connection: sqlite3.Connection, batch: Batch, *names: str) -> None:
        """The changes, and the commit. `names`: of the failpoints around it."""
        rows = batch.changed.values()
        upsert(connection, map(stored, rows))
        changed = self.tallies.changed
        for row in rows:  # not in the order of their sequences, if a key was changed twice
            changed[row.partition] = max(changed[row.partition], row.sequence)
        if batch.clock != self.clock:
            connection.execute(_SET_CLOCK, batch.clock)
        failpoints.hit(*(f"{name}-before-commit" for name in names))
        connection.execute("COMMIT")
        failpoints.hit(*(f"{name}-after-commit" for name in names))
        self.clock = batch.clock
        self._wal_pages_guess += sum(
            _PAGES_PER_ROW + (len(row.body or b"") + len(row.intent or b"")) // _PAGE_BYTES
            for row in batch.changed.values()
        )

    def _disk_is_full(self, connection: sqlite3.Connection) -> bool:
        """Room for the WAL must be free on the disk; what values need may also be free inside the file."""
        now_s = time.monotonic()
        if now_s < self._ample_until_s:
            return False
        disk = os.statvfs(self.path.parent)
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes >= 2 * self._limits.disk_reserve_bytes:
            self._ample_until_s = now_s + _AMPLE_S
        if free_bytes >= self._limits.disk_reserve_bytes:
            return False
        if free_bytes < self._limits.disk_reserve_bytes // 2:
            return True
        free_pages = connection.execute("PRAGMA freelist_count").fetchone()[0]
        return bool(free_bytes + free_pages * _PAGE_BYTES < self._limits.disk_reserve_bytes)

    @property
    def checkpoint_is_due(self) -> bool:
        """The WAL has grown by a quarter of its bound since the last checkpoint, by a guess."""
        return self._wal_pages_guess * _PAGE_BYTES >= self._limits.wal_bytes_max // 4

    async def checkpoint(self) -> None:
        """Copy the WAL into the file. A call of its own, so that answers to what is durable need not wait for it."""
        await _in_thread(self._writer, self._checkpoint)

    def _checkpoint(self, connection: sqlite3.Connection) -> None:
        _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages * _PAGE_BYTES > self._limits.wal_bytes_max:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._wal_pages_guess = 0

    async def trim_tombstones(self, sequence: int, count_max: int) -> int:
        """Delete up to `count_max` tombstones at or below `sequence`, raising the floor first. Returns how many."""
        return await _in_thread(self._writer, self._trim_tombstones, sequence, count_max)

    def _trim_tombstones(self, connection: sqlite3.Connection, sequence: int, count_max: int) -> int:
        query = """SELECT rowid, sequence FROM rows INDEXED BY rows_tombstones
            WHERE body IS NULL AND intent IS NULL AND sequence <= ? ORDER BY sequence LIMIT ?"""
        dead = connection.execute(query, (sequence, count_max)).fetchall()
        if not dead:
            return 0
        clock = self.clock._replace(tombstones_floor=max(self.clock.tombstones_floor, dead[-1][1]))
        _begin(connection)
        connection.executemany("DELETE FROM rows WHERE rowid = ? AND sequence = ?", dead)
        connection.execute(_SET_CLOCK, clock)
        connection.execute("COMMIT")
        self.clock = clock
        self._wal_pages_guess += len(dead) * _PAGES_PER_ROW
        if self.checkpoint_is_due:
            self._checkpoint(connection)
        return len(dead)

    # --- reading -----------------------------------------------------------------------------------------------------

    async def read(self, keys: list[str]) -> list[Found | DataCorrupt]:
        """The committed row of each key, in one hop; a row that does not match its checksum is a DataCorrupt."""
        return await _in_thread(self._point_reader, _read_rows, keys)

    async def scan(self, query: ScanQuery) -> ScanPage:
        """A page of live rows of one kind in key order, of the partitions that have an arrival. Raises DataCorrupt."""
        return await _in_thread(self._scan_reader, _scan, query)

    async def pull(self, pull: Pull, bytes_max: int) -> Rows:
        """A page of the rows of some partitions, for another store (see `protocol.Pull`). Raises DataCorrupt."""
        return await _in_thread(self._scan_reader, _pull, pull, bytes_max, self.tallies)

    async def row(self, kind: str, key: str) -> Row | None:
        """The committed row. Raises DataCorrupt."""

        def read(connection: sqlite3.Connection) -> Row | None:
            found = connection.execute(_ROW, (kind, key)).fetchone()
            return checked(Row(kind, key, *found[:6]), found[6]) if found else None

        return await _in_thread(self._scan_reader, read)

    async def due(self, now_ms: int, arrivals: Sequence[int], count_max: int) -> list[Expire]:
        """The expiries to make now, oldest first: rows of owned partitions whose deadline has passed.

        Not those that carry an intent: expiry waits for it. Raises DataCorrupt.
        """

        def is_ours(key: Any, partition: Any) -> bool:  # damage can put anything into a column
            if not isinstance(key, str) or not isinstance(partition, int):
                return False
            return 0 <= partition < len(arrivals) and arrivals[partition] > 0

        def read(connection: sqlite3.Connection) -> list[Expire]:
            query = """SELECT kind, key, partition FROM rows INDEXED BY rows_expiry
                WHERE expires_at_ms IS NOT NULL AND expires_at_ms <= ? AND intent IS NULL ORDER BY expires_at_ms"""
            try:
                rows = connection.execute(query, (now_ms,))
                ours = (Expire(key, kind, partition) for kind, key, partition in rows if is_ours(key, partition))
                return list(itertools.islice(ours, count_max))
            except sqlite3.DatabaseError as error:
                raise DataCorrupt(f"the rows that are due cannot be read: {error}") from error

        return await _in_thread(self._scan_reader, read)


async def _in_thread(
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


def _prepare(connection: sqlite3.Connection, path: Path, shard_id: str, partitions: int) -> Identity:
    is_new = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if not is_new:
        # before anything is changed: it may be somebody else's
        _identify(connection, path, shard_id, partitions, may_change=False)
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "wal_autocheckpoint = 0",
        "secure_delete = OFF",
    ):
        connection.execute(f"PRAGMA {pragma}")
    for pragma in ("cache_size = -8192", "busy_timeout = 500"):
        connection.execute(f"PRAGMA {pragma}")
    if is_new:
        first = {
            "format": FORMAT,
            "store_id": secrets.token_hex(16),
            "shard_id": shard_id,
            "partitions": partitions,
        }
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA}")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", [(name, str(value)) for name, value in first.items()])
        connection.execute("COMMIT")
    return _identify(connection, path, shard_id, partitions, may_change=True)


def _identify(
    connection: sqlite3.Connection, path: Path, shard_id: str, partitions: int, *, may_change: bool
) -> Identity:
    """Raises ForeignData."""
    meta = dict(connection.execute("SELECT name, value FROM meta"))
    conversion = _CONVERSIONS.get(meta.get("format", ""))
    if conversion is not None and may_change:
        log.info("%s is brought from format %s to %d", path, meta["format"], FORMAT)
        connection.executescript(f"BEGIN IMMEDIATE; {conversion} COMMIT")
        meta["format"] = str(FORMAT)
    if meta.get("format") != str(FORMAT) and (conversion is None or may_change):
        raise ForeignData(f"{path} has format {meta.get('format')}; this program reads format {FORMAT}")
    if meta.get("shard_id") != shard_id:
        raise ForeignData(f"{path} belongs to shard_id {meta.get('shard_id')}, not {shard_id}")
    if not meta.get("partitions", "").isdecimal():
        raise ForeignData(f"{path} does not say of how many partitions it is")
    if "cluster_id" in meta:  # its map counts, whatever cluster.yaml says by now
        partitions = int(meta["partitions"])
    elif may_change and meta["partitions"] != str(partitions):
        connection.execute("UPDATE meta SET value = ? WHERE name = 'partitions'", (str(partitions),))
    return Identity(meta["store_id"], meta.get("cluster_id"), shard_id, partitions)


def _begin(connection: sqlite3.Connection) -> None:
    """Begin to write. Somebody else may: a person with a shell. Nothing has happened yet, so waiting is safe."""
    for _ in range(_BEGIN_TRIES - 1):
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            log.warning("somebody else writes to the file: waiting for them")
    connection.execute("BEGIN IMMEDIATE")


def _read_clock(connection: sqlite3.Connection) -> Clock:
    query = "SELECT version, sequence, tombstones_floor, keys, bytes, attempts_floor FROM clock"
    return Clock(*connection.execute(query).fetchone())


def _read_rows(connection: sqlite3.Connection, keys: list[str]) -> list[Found | DataCorrupt]:
    rows: list[Found | DataCorrupt] = []
    connection.execute("BEGIN")
    try:
        as_of = connection.execute("SELECT sequence FROM clock").fetchone()[0]
        for key in keys:
            try:
                found = connection.execute(_ROW, (VALUE, key)).fetchone()
                row = checked(Row(VALUE, key, *found[:6]), found[6]) if found else None
                rows.append(Found(row, as_of))
            except DataCorrupt as error:
                rows.append(error)
            except sqlite3.DatabaseError as error:  # a damaged page, for example
                rows.append(DataCorrupt(f"the row of key {key!r} cannot be read: {error}"))
    finally:
        connection.execute("ROLLBACK")  # COMMIT would fail again after a damaged page
    return rows


def _scan(connection: sqlite3.Connection, scan: ScanQuery) -> ScanPage:
    kind, prefix, after, limit, values, now_ms, arrivals, bytes_max, until = scan
    body = "body, checksum" if values else "NULL, 0"
    comparison, start = (">", after) if after >= prefix else (">=", prefix)
    bound, ends = (" AND key <= ?", (until,)) if until else ("", ())
    query = f"""SELECT key, partition, version, coalesce(expires_at_ms, 0), intent IS NOT NULL, {body} FROM rows
        WHERE kind = ? AND key {comparison} ?{bound} AND (body IS NOT NULL OR intent IS NOT NULL) ORDER BY key"""
    rows: list[tuple[str, int, bytes | None, int]] = []
    partitions: list[int] = []
    due: list[str] = []
    locked: list[str] = []
    last, size, more = after, 0, False
    connection.execute("BEGIN")
    try:
        as_of = connection.execute("SELECT sequence FROM clock").fetchone()[0]
        cursor: Iterator[Any] = connection.execute(query, (kind, start, *ends))
        for key, partition, version, expires_at_ms, has_intent, value, stored_checksum in cursor:
            if not key.startswith(prefix):
                break
            if len(rows) + len(due) + len(locked) >= limit or size >= bytes_max:
                more = True
                break
            last = key
            if not arrivals[partition]:
                continue
            if has_intent:
                locked.append(key)
                continue
            if values:
                checked(Row(kind, key, partition, 0, version, expires_at_ms, value), stored_checksum)
            if 0 < expires_at_ms <= now_ms:
                due.append(key)
                continue
            rows.append((key, version, value, expires_at_ms - now_ms if expires_at_ms else 0))
            partitions.append(partition)
            size += len(key) + len(value or b"") + 32
    except (sqlite3.DatabaseError, TypeError, IndexError) as error:  # damage can put any type and number into a column
        raise DataCorrupt(f"the rows after key {last!r} cannot be read: {error}") from error
    finally:
        connection.execute("ROLLBACK")
    return ScanPage(rows, partitions, due, locked, last, more, as_of)


def _pull(connection: sqlite3.Connection, pull: Pull, bytes_max: int, tallies: Tallies) -> Rows:
    page = Rows(pull.id, [], False, pull.sequence, pull.after_row, 0, 0, 0, False)
    connection.execute("BEGIN")
    try:
        sequence, page.floor = connection.execute("SELECT sequence, tombstones_floor FROM clock").fetchone()
        if pull.after_row < 0:
            page.sequence = sequence
            _pull_changes(connection, pull, bytes_max, page, tallies)
        else:
            if pull.sequence == 0:
                page.sequence = sequence
                page.total = connection.execute(_COUNT, (json.dumps(pull.partitions),)).fetchone()[0]
            _pull_copy(connection, pull, bytes_max, page)
    except sqlite3.DatabaseError as error:
        raise DataCorrupt(f"the rows of partitions {pull.partitions[:3]}… cannot be read: {error}") from error
    finally:
        connection.execute("ROLLBACK")
    return page


def _pull_copy(connection: sqlite3.Connection, pull: Pull, bytes_max: int, page: Rows) -> None:
    """One partition after the other, each in the order of rowids: a row that changes meanwhile keeps its own."""
    size, after_row = 0, pull.after_row
    for partition in pull.partitions:
        for rowid, *row in connection.execute(_COPY, (partition, after_row, pull.rows_max - len(page.rows))):
            page.rows.append(tuple(row))
            page.after_row = rowid
            size += row_bytes(row)
            if len(page.rows) == pull.rows_max or size >= bytes_max:
                page.more = True
                return
        page.done += 1
        page.after_row = after_row = 0


def _pull_changes(connection: sqlite3.Connection, pull: Pull, bytes_max: int, page: Rows, tallies: Tallies) -> None:
    size = 0
    changed = tallies.changed  # looked at after the transaction has begun: see `tallies`
    wanted = json.dumps([partition for partition in pull.partitions if changed[partition] > pull.sequence])
    for sequence, *row in connection.execute(_CHANGED, (wanted, pull.sequence, pull.rows_max)):
        page.rows.append(tuple(row))
        size += row_bytes(row)
        if len(page.rows) == pull.rows_max or size >= bytes_max:
            page.more, page.sequence = True, sequence
            return
    tallies.total(connection, pull.partitions, page.sequence)  # now, while the partitions are answered for
