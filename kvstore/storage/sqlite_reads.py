"""What is asked of the file, as functions of a reading connection.

Owns: the queries of point reads, listings, the feed of moves, digests and expiry.
Promises: each runs in one read transaction and shows one state of the file; rows that a drop covers are left out.
Leaves to others: threads (`sqlite`), the schema (`schema`).
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

from kvstore.errors import DataCorrupt
from kvstore.storage.digests import Digests
from kvstore.storage.engine import Digest, FeedPage, FeedQuery, RowKey, ScanPage, ScanQuery
from kvstore.storage.rows import Row, checked
from kvstore.storage.schema import COLUMNS, SIGNED
from kvstore.storage.segments import Position
from kvstore.storage.verification import Fault, Verified, VerifyQuery, verify

Drops = Callable[[], dict[int, int]]

_ROW = """SELECT partition, sequence, version, coalesce(expires_at_ms, 0), body, intent, checksum
    FROM rows WHERE kind = ? AND key = ?"""
_COPY = """SELECT rowid, sequence, kind, key, partition, version, coalesce(expires_at_ms, 0), body, intent, checksum
    FROM rows INDEXED BY rows_partition WHERE partition = ? AND rowid > ?
    AND (body IS NOT NULL OR intent IS NOT NULL) AND sequence > ? ORDER BY rowid LIMIT ?"""
_CHANGED = """SELECT sequence, kind, rows.key, partition, version, coalesce(expires_at_ms, 0), body, intent, checksum
    FROM json_each(?) AS wanted CROSS JOIN rows INDEXED BY rows_partition ON rows.partition = wanted.value
    WHERE sequence > ? ORDER BY sequence"""
_COUNT = """SELECT count(*) FROM json_each(?) AS wanted CROSS JOIN rows INDEXED BY rows_partition
    ON rows.partition = wanted.value"""  # tombstones, too: it is for a progress bar, and reads the index only
_STATE = "SELECT sequence, tombstones_floor, log_number, log_checksum FROM clock"
_DUE = """SELECT kind, key, partition, sequence FROM rows INDEXED BY rows_expiry
    WHERE expires_at_ms IS NOT NULL AND expires_at_ms <= ? AND intent IS NULL ORDER BY expires_at_ms"""
_TOMBSTONES = """SELECT sequence FROM rows INDEXED BY rows_tombstones
    WHERE body IS NULL AND intent IS NULL AND sequence <= ? AND sequence > ? ORDER BY sequence LIMIT ?"""
_IN_MEMORY = "intent IS NOT NULL OR (body IS NOT NULL AND kind IN ('lease', 'decision'))"
_IN_MEMORY_OF = f"""{COLUMNS} FROM json_each(?) AS wanted CROSS JOIN rows INDEXED BY rows_partition
    ON rows.partition = wanted.value WHERE {_IN_MEMORY}"""
_IN_MEMORY_ALL = (
    f"{COLUMNS} FROM rows WHERE kind IN ('lease', 'decision') AND body IS NOT NULL",
    f"{COLUMNS} FROM rows INDEXED BY rows_intents WHERE intent IS NOT NULL AND kind = 'value'",
)


@contextmanager
def snapshot(connection: sqlite3.Connection, what: str, drops: Drops) -> Iterator[dict[int, int]]:
    """One state of the file to read; yields the drops that hold in it. Raises DataCorrupt for a damaged page.

    A drop is noted before it is committed and forgotten after its rows are gone, so those known before or after the
    transaction's beginning are all that hold in it.
    """
    before = drops()
    connection.execute("BEGIN")
    try:
        connection.execute("SELECT one FROM clock").fetchone()  # a deferred transaction begins with its first read
        after = drops()
        yield before if before is after else before | after
    except (sqlite3.DatabaseError, TypeError, IndexError) as error:  # damage can put any type into a column
        raise DataCorrupt(f"The {what} cannot be read: {error}.") from error
    finally:
        connection.execute("ROLLBACK")  # COMMIT would fail again after a damaged page


def read_row(connection: sqlite3.Connection, row_key: RowKey, drops: dict[int, int]) -> Row | None:
    """The row that no drop covers, or None. Raises DataCorrupt, sqlite3.DatabaseError."""
    kind, key = row_key
    found = connection.execute(_ROW, row_key).fetchone()
    if found is None or (drops and found[1] <= drops.get(found[0], 0)):
        return None
    return checked(Row(kind, key, *found[:6]), found[6])


def read_rows(connection: sqlite3.Connection, keys: list[RowKey], drops: Drops) -> list[Row | DataCorrupt | None]:
    """The row of each key; one that is damaged is a DataCorrupt. Raises DataCorrupt where no snapshot can be read."""
    rows: list[Row | DataCorrupt | None] = []
    with snapshot(connection, "rows of some keys", drops) as dropped:
        for kind, key in keys:
            try:
                rows.append(read_row(connection, (kind, key), dropped))
            except DataCorrupt as error:
                rows.append(error)
            except (sqlite3.DatabaseError, TypeError) as error:  # a damaged page, for example
                rows.append(DataCorrupt(f"The {kind} row of key {key!r} cannot be read: {error}."))
    return rows


def scan(connection: sqlite3.Connection, query: ScanQuery, drops: Drops) -> ScanPage:
    """A page of live rows in key order: see `engine.Engine.scan`. Raises DataCorrupt."""
    kind, prefix, after, limit, values, now_ms, generations, bytes_max, until, value_bytes_max = query
    body = "iif(length(body) <= ?, body, NULL), checksum, length(body)" if values else "NULL, 0, 0"
    largest = (value_bytes_max or SIGNED - 1,) if values else ()
    comparison, start = (">", after) if after >= prefix else (">=", prefix)
    bound, ends = (" AND key <= ?", (until,)) if until else ("", ())
    statement = f"""SELECT key, partition, sequence, version, coalesce(expires_at_ms, 0), intent IS NOT NULL, {body}
        FROM rows WHERE kind = ? AND key {comparison} ?{bound} AND (body IS NOT NULL OR intent IS NOT NULL)
        ORDER BY key"""
    page = ScanPage([], [], [], [], {}, after, False)
    last, size, more = after, 0, False
    with snapshot(connection, f"rows after key {after!r}", drops) as dropped:
        for key, partition, sequence, version, expires_at_ms, has_intent, value, check, length in connection.execute(
            statement, (*largest, kind, start, *ends)
        ):
            if not key.startswith(prefix):
                break
            if len(page.rows) + len(page.due) + len(page.locked) >= limit or size >= bytes_max:
                more = True
                break
            last = key
            if not generations[partition] or (dropped and sequence <= dropped.get(partition, 0)):
                continue
            if has_intent:
                page.locked.append(key)
                continue
            is_left_out = values and value is None
            if values and not is_left_out:
                checked(Row(kind, key, partition, 0, version, expires_at_ms, value), check)
            if 0 < expires_at_ms <= now_ms:
                page.due.append(key)
                continue
            page.rows.append((key, version, value, expires_at_ms - now_ms if expires_at_ms else 0))
            page.partitions.append(partition)
            if is_left_out:
                page.left_out[key] = length
            size += len(key) + (value_bytes_max if is_left_out else len(value or b"")) + 32
    return page._replace(last=last, more=more)


# --- the feed of moves ------------------------------------------------------------------------------------------------


def feed(connection: sqlite3.Connection, query: FeedQuery, digests: Digests, drops: Drops) -> FeedPage:
    """A page of rows for another store: see `engine.Engine.feed`. Raises DataCorrupt."""
    with snapshot(connection, f"rows of partitions {list(query.partitions[:3])}…", drops) as dropped:
        sequence, floor, number, check = connection.execute(_STATE).fetchone()
        position = Position(number, check + SIGNED)
        if query.after_row < 0:
            return _changes(connection, query, digests, sequence, floor, dropped)._replace(position=position)
        total = 0
        if query.sequence == 0:
            total = connection.execute(_COUNT, _array(query.partitions)).fetchone()[0]
        begun = sequence if query.sequence == 0 else query.sequence
        return _copy(connection, query, dropped)._replace(sequence=begun, floor=floor, total=total, position=position)


def _copy(connection: sqlite3.Connection, query: FeedQuery, dropped: dict[int, int]) -> FeedPage:
    """One partition after the other, each in the order of rowids: a row that changes during it keeps its own."""
    rows: list[Any] = []
    size, after_row, done = 0, query.after_row, 0
    for partition in query.partitions:
        wanted = (partition, after_row, dropped.get(partition, 0), query.rows_max - len(rows))
        for rowid, _, *row in connection.execute(_COPY, wanted):
            rows.append(tuple(row))
            after_row = rowid
            size += _bytes(row)
            if len(rows) == query.rows_max or size >= query.bytes_max:
                return FeedPage(rows, True, 0, after_row, done, 0, 0)
        done += 1
        after_row = 0
    return FeedPage(rows, False, 0, after_row, done, 0, 0)


def _changes(
    connection: sqlite3.Connection,
    query: FeedQuery,
    digests: Digests,
    sequence: int,
    floor: int,
    dropped: dict[int, int],
) -> FeedPage:
    rows: list[Any] = []
    size = 0
    changed = digests.changed  # looked at after the transaction has begun: see `digests`
    wanted = [partition for partition in query.partitions if changed[partition] > query.sequence]
    for at, *row in connection.execute(_CHANGED, (*_array(wanted), query.sequence)):
        if dropped and at <= dropped.get(row[2], 0):
            continue
        rows.append(tuple(row))
        size += _bytes(row)
        if len(rows) == query.rows_max or size >= query.bytes_max:
            return FeedPage(rows, True, at, -1, 0, floor, 0)
    digests.of(connection, query.partitions, sequence, dropped)  # now, while the partitions are still served
    return FeedPage(rows, False, sequence, -1, 0, floor, 0)


def _bytes(row: Sequence[Any]) -> int:
    return len(row[5] or b"") + len(row[6] or b"") + 64


# --- the rest ---------------------------------------------------------------------------------------------------------


def digest(connection: sqlite3.Connection, partitions: Set[int], digests: Digests, drops: Drops) -> tuple[int, Digest]:
    """The number applied, and the digest of these partitions: see `engine.Engine.digest`. Raises DataCorrupt."""
    with snapshot(connection, "rows of some partitions", drops) as dropped:
        sequence, number = connection.execute("SELECT sequence, log_number FROM clock").fetchone()
        return number, digests.of(connection, sorted(partitions), sequence, dropped)


def kept_in_memory(connection: sqlite3.Connection, partitions: Set[int], of_all: int, drops: Drops) -> list[Row]:
    """Leases, decisions and rows with an intent of these partitions, of `of_all` that there are. Raises DataCorrupt."""
    with snapshot(connection, "leases, decisions and intents", drops) as dropped:
        if len(partitions) * 4 < of_all:
            found = connection.execute(_IN_MEMORY_OF, _array(sorted(partitions))).fetchall()
        else:
            found = [row for query in _IN_MEMORY_ALL for row in connection.execute(query)]
        return [
            checked(Row(*row[:8]), row[8]) for row in found if row[2] in partitions and row[3] > dropped.get(row[2], 0)
        ]


def due(
    connection: sqlite3.Connection, now_ms: int, generations: Sequence[int], count_max: int, drops: Drops
) -> list[tuple[str, str, int]]:
    """Rows past their deadline: see `engine.Engine.due`. Raises DataCorrupt."""

    def is_ours(key: Any, partition: Any, sequence: int, dropped: dict[int, int]) -> bool:
        if not isinstance(key, str) or not isinstance(partition, int):  # damage can put anything into a column
            return False
        is_owned = 0 <= partition < len(generations) and generations[partition] > 0
        return is_owned and sequence > dropped.get(partition, 0)

    with snapshot(connection, "rows that are due", drops) as dropped:
        rows = connection.execute(_DUE, (now_ms,))
        ours = ((kind, key, at) for kind, key, at, sequence in rows if is_ours(key, at, sequence, dropped))
        return list(itertools.islice(ours, count_max))


def occupied(connection: sqlite3.Connection, drops: Drops) -> set[int]:
    """The partitions of which there are rows that no drop covers. Raises DataCorrupt."""
    with snapshot(connection, "partitions", drops) as dropped:
        found = {partition for (partition,) in connection.execute("SELECT DISTINCT partition FROM rows")}
        for partition in dropped.keys() & found:
            row = connection.execute(
                "SELECT 1 FROM rows INDEXED BY rows_partition WHERE partition = ? AND sequence > ? LIMIT 1",
                (partition, dropped[partition]),
            ).fetchone()
            if row is None:
                found.discard(partition)
        return found


def old_tombstones(connection: sqlite3.Connection, sequence: int, count_max: int, drops: Drops) -> int:
    """The sequence of the last of the oldest tombstones: see `engine.Engine.old_tombstones`. Raises DataCorrupt."""
    with snapshot(connection, "tombstones", drops):
        (floor,) = connection.execute("SELECT tombstones_floor FROM clock").fetchone()
        found = connection.execute(_TOMBSTONES, (sequence, floor, count_max)).fetchall()
        return int(found[-1][0]) if found else 0


def verified(connection: sqlite3.Connection, query: VerifyQuery, drops: Drops) -> Verified:
    """Look at some rows in a snapshot: see `verification.verify`. Damage is a fault, no error."""
    try:
        with snapshot(connection, "file", drops) as dropped:
            return verify(connection, query, dropped)
    except DataCorrupt as error:
        everywhere = None if query.partition < 0 else frozenset({query.partition})
        return Verified(0, query.after, False, [Fault(error.detail, everywhere)])


def _array(values: Iterable[object]) -> tuple[str]:
    """A parameter for json_each."""
    return (json.dumps(list(values)),)
