"""What the writing connection of a file does, in its thread.

Owns: what the file stands for; applications, checkpoints, the removal of what drops cover.
Promises: an application is one transaction. A drop is noted before it is committed, and forgotten after its rows are
gone, so that readers know all that hold (see `sqlite_reads.snapshot`).
Leaves to others: threads and readers (`sqlite`), the schema (`schema`).
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstore.errors import DataCorrupt, ForeignData
from kvstore.storage import schema
from kvstore.storage.digests import Digests
from kvstore.storage.disk import may_not_grow
from kvstore.storage.engine import Application, Applied, Identity, NoRoom, SnapshotProgress, TryLater
from kvstore.storage.rows import Clock, Row
from kvstore.storage.schema import SIGNED
from kvstore.storage.segments import Position

log = logging.getLogger(__name__)

_BEGIN_TRIES = 20  # each waits for busy_timeout
_PAGE_BYTES = 4096
_PAGES_PER_REMOVAL = 2  # that the removal of a row dirties: its own, and a share of those of the indexes
_TRUNCATION_S = 10.0  # between two tries to truncate the WAL beside a reader that does not end
_CLEAN = """DELETE FROM rows WHERE rowid IN (SELECT rowid FROM rows INDEXED BY rows_partition
    WHERE partition = ? AND sequence <= ? LIMIT ?)"""
_CLEAN_TOMBSTONES = """DELETE FROM rows WHERE rowid IN (SELECT rowid FROM rows INDEXED BY rows_tombstones
    WHERE body IS NULL AND intent IS NULL AND sequence <= ? ORDER BY sequence LIMIT ?)"""


class SqliteWriter:
    """`applied` and `identity` are as of the last application; `free_bytes`: pages of the file that hold nothing."""

    def __init__(self, path: Path, partitions: int, wal_bytes_max: int) -> None:
        self.applied = Applied()
        self.identity = Identity("", None, "", partitions)
        self.digests = Digests(0, 0)
        self.free_bytes = 0
        self._path = path
        self._wal_bytes_max = wal_bytes_max
        self._unsettled_bytes = 0
        self._next_truncation_s = 0.0

    @property
    def checkpoint_is_due(self) -> bool:
        """About a quarter of what the WAL may hold was written since the last complete checkpoint."""
        return self._unsettled_bytes >= self._wal_bytes_max // 4

    def open(self, connection: sqlite3.Connection, shard_id: str) -> None:
        """Read what the file stands for. Raises ForeignData, DataCorrupt, sqlite3.DatabaseError."""
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "wal_autocheckpoint = 0", "secure_delete = OFF"):
            connection.execute(f"PRAGMA {pragma}")
        for pragma in ("cache_size = -8192", "busy_timeout = 500"):
            connection.execute(f"PRAGMA {pragma}")
        meta, damaged = schema.read_meta(connection)
        missing = {"store_id", "shard_id", "partitions", "freezes", "drops"} - meta.keys()
        if damaged - {"cluster_map", "snapshot"} or missing:  # a damaged name may stand for any of them
            names = ", ".join(sorted(damaged | missing))
            raise DataCorrupt(f"{self._path}: the entries {names} of meta are missing or do not match their checksums.")
        if "cluster_map" in damaged:
            log.error("%s: the stored cluster map is damaged; the controller is asked for it again", self._path)
        if meta.get("shard_id") != shard_id:
            raise ForeignData(f"{self._path} belongs to shard_id {meta.get('shard_id')}, not {shard_id}.")
        if "cluster_id" not in meta and meta["partitions"] != str(self.identity.partitions):
            meta["partitions"] = str(self.identity.partitions)
            schema.set_meta(connection, {"partitions": meta["partitions"]})
        *clock, number, check = schema.read_clock(connection)
        self.identity = Identity(meta["store_id"], meta.get("cluster_id"), shard_id, int(meta["partitions"]))
        cluster_map = meta.get("cluster_map")
        self.applied = Applied(
            Position(number, check + SIGNED),
            Clock(*clock),
            cluster_map.encode() if cluster_map is not None else None,
            {move: frozenset(partitions) for move, partitions in json.loads(meta["freezes"]).items()},
            drops_of(meta),
            _snapshot_of(meta),
        )
        self.digests = Digests(self.identity.partitions, self.applied.clock.sequence)

    def apply(self, connection: sqlite3.Connection, application: Application) -> None:
        """Apply all of it, or nothing. Raises TryLater, DataCorrupt, OSError."""
        rows, traceless, size = self._sorted(application)
        changed = self.digests.changed
        before, after = self.applied, self._after(application)
        self.applied = before._replace(drops=after.drops)  # see sqlite_reads.snapshot
        for partition, sequence in application.drops.items():
            changed[partition] = max(changed[partition], sequence)
        with transaction(connection):
            schema.upsert(connection, rows)
            schema.bury(connection, traceless)
            _set_state(connection, before, after)
        self.free_bytes = connection.execute("PRAGMA freelist_count").fetchone()[0] * _PAGE_BYTES
        self._unsettled_bytes += size
        if after.cluster_map is not None and after.cluster_map != before.cluster_map:
            self.identity = self.identity._replace(cluster_id=_cluster_id(after.cluster_map))
        self.applied = after

    def _sorted(self, application: Application) -> tuple[list[Row], list[Row], int]:
        """Note the sequences; the rows to write, tombstones that replace only what is there, bytes for the WAL."""
        changed, kept, size = self.digests.changed, application.kept, 0
        written: list[Row] = []
        traceless: list[Row] = []
        for row in sorted(application.rows):
            _, key, partition, sequence, _, _, body, intent = row
            if sequence > changed[partition]:
                changed[partition] = sequence
            size += _PAGE_BYTES + len(key) + len(body or b"") + len(intent or b"")
            is_traceless = body is None and intent is None and partition not in kept
            (traceless if is_traceless else written).append(row)
        return written, traceless, size

    def _after(self, application: Application) -> Applied:
        before = self.applied
        return Applied(
            application.position,
            application.clock,
            before.cluster_map if application.cluster_map is None else application.cluster_map,
            before.freezes if application.freezes is None else application.freezes,
            {**before.drops, **application.drops} if application.drops else before.drops,
            application.snapshot or before.snapshot,
        )

    def checkpoint(self, connection: sqlite3.Connection) -> int:
        """The number up to which the file is durable; 0 where a reader stood in the way. Raises TryLater, OSError."""
        number = self.applied.position.number
        with _disk_errors(connection):
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
            log.warning("the WAL of %s grows: another program has been reading the file for long", self._path)

    def clean(self, connection: sqlite3.Connection, rows_max: int) -> int:
        """Remove up to so many rows that drops or the tombstones' floor cover; returns how many.

        At least 1 as long as a drop stood, though it may have covered no row. Raises TryLater, DataCorrupt, OSError.
        """
        applied = self.applied
        if applied.drops:
            left, removed = dict(applied.drops), 0
            with transaction(connection):
                for partition, sequence in applied.drops.items():
                    removed += connection.execute(_CLEAN, (partition, sequence, rows_max - removed)).rowcount
                    if removed >= rows_max:
                        break
                    del left[partition]
                schema.set_meta(connection, {"drops": json.dumps(left)})
            self.applied = applied._replace(drops=left)
            self._count_removals(removed)
            return max(removed, 1)
        with transaction(connection):
            removed = connection.execute(_CLEAN_TOMBSTONES, (applied.clock.tombstones_floor, rows_max)).rowcount
        self._count_removals(removed)
        return removed

    def _count_removals(self, rows: int) -> None:
        self._unsettled_bytes += rows * _PAGES_PER_REMOVAL * _PAGE_BYTES


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
    if after.snapshot is not None and after.snapshot != before.snapshot:
        changed["snapshot"] = json.dumps(after.snapshot)
    schema.set_meta(connection, changed)
    schema.set_clock(connection, (*after.clock, after.position.number, after.position.checksum - SIGNED))


def drops_of(meta: dict[str, str]) -> dict[int, int]:
    """The drops that the entries of `meta` say; none if their entry is missing."""
    return {int(partition): sequence for partition, sequence in json.loads(meta.get("drops", "{}")).items()}


def _snapshot_of(meta: dict[str, str]) -> SnapshotProgress | None:
    if "snapshot" not in meta:
        return None
    at, seen, *counts = json.loads(meta["snapshot"])
    return SnapshotProgress(Position(*at), Position(*seen), *counts)


def _cluster_id(cluster_map: bytes) -> str:
    return str(json.loads(cluster_map)["cluster_id"])


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of the block or none of it. Raises TryLater if nothing changed and may yet; DataCorrupt, OSError."""
    with _disk_errors(connection):
        _begin(connection)
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _begin(connection: sqlite3.Connection) -> None:
    """Begin to write. Another program may be writing, a person's shell for example. Raises TryLater."""
    for _ in range(_BEGIN_TRIES):
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
    raise TryLater("another program is writing to the file; what is committed waits in the log.")


@contextmanager
def _disk_errors(connection: sqlite3.Connection) -> Iterator[None]:
    """SQLite's errors as what they mean to the applier.

    It says that a disk is full, and of a quota or a limit of the system nothing but that writing failed.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        code = error.sqlite_errorcode & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise TryLater(str(error)) from error
        if code == sqlite3.SQLITE_FULL:
            raise NoRoom(str(error)) from error
        path = Path(connection.execute("PRAGMA database_list").fetchone()[2])
        if code == sqlite3.SQLITE_IOERR and (why := may_not_grow([path, Path(f"{path}-wal"), Path(f"{path}-shm")])):
            raise NoRoom(why) from error
        raise OSError(f"SQLite: {error} ({error.sqlite_errorname})") from error
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        raise DataCorrupt(f"The file is damaged: {error}.") from error
