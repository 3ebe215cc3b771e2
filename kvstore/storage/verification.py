"""Proof that what the file holds is what was written, and that its indexes lead to it.

Owns: the verification of some rows, by partition or by table, in one short read transaction.
Promises: every row is looked at by its checksum, by the unique index (does its key lead to it?), by the index of
partitions and by that of intents. Damage is a `Fault`, never an exception; one unreadable page hides no other row.
Leaves to others: when and how fast (`kvstore.store.verification`), the whole file offline (`file_check`).

A row whose body is damaged guards itself: its reader is told. A row that an index has lost does not: its key
looks as if it were not there. So a fault names the partitions in which a key that is not found may be one that is lost.
Damage to the table and to an index that hits the same row twice is not told apart from a row that never was.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, NamedTuple

from kvstore.errors import DataCorrupt
from kvstore.storage.rows import Row, checked

HomeOf = Callable[[str, str], int]
"""The partition to which a row of that kind and key belongs; -1 where the key does not say."""

_LOOKED_AT = """SELECT r.rowid, r.kind, r.key, r.partition, r.sequence, r.version, coalesce(r.expires_at_ms, 0), r.body,
        r.intent, r.checksum,
        (SELECT u.rowid FROM rows AS u INDEXED BY sqlite_autoindex_rows_1 WHERE u.kind = r.kind AND u.key = r.key),
        EXISTS (SELECT 1 FROM rows AS v INDEXED BY rows_partition
            WHERE v.partition = r.partition AND v.rowid = r.rowid),
        r.intent IS NULL OR EXISTS (SELECT 1 FROM rows AS w INDEXED BY rows_intents
            WHERE w.intent IS NOT NULL AND w.partition = r.partition AND w.rowid = r.rowid)
    FROM rows AS r"""
_OF_PARTITION = f"{_LOOKED_AT} INDEXED BY rows_partition WHERE r.partition = ? AND r.rowid > ? ORDER BY r.rowid LIMIT ?"
_OF_TABLE = f"{_LOOKED_AT} NOT INDEXED WHERE r.rowid > ? ORDER BY r.rowid LIMIT ?"
_ALONE = """SELECT rowid, kind, key, partition, sequence, version, coalesce(expires_at_ms, 0), body, intent, checksum
    FROM rows NOT INDEXED WHERE rowid > ? ORDER BY rowid LIMIT ?"""
_ONE = f"{_LOOKED_AT} NOT INDEXED WHERE r.rowid = ?"
_PLACES_OF_PARTITION = """SELECT rowid, partition FROM rows INDEXED BY rows_partition
    WHERE partition = ? AND rowid > ? ORDER BY rowid LIMIT ?"""
_PLACES = "SELECT rowid, partition FROM rows INDEXED BY rows_partition WHERE rowid > ? ORDER BY rowid LIMIT ?"
_DAMAGE = (sqlite3.DatabaseError, TypeError, ValueError, OverflowError)


_LOST_BY_INDEX = """SELECT r.kind, r.key FROM rows AS r NOT INDEXED WHERE r.rowid IS NOT (SELECT u.rowid
    FROM rows AS u INDEXED BY sqlite_autoindex_rows_1 WHERE u.kind = r.kind AND u.key = r.key) LIMIT 1"""
_COUNTS = """SELECT (SELECT count(*) FROM rows NOT INDEXED),
    (SELECT count(*) FROM rows INDEXED BY sqlite_autoindex_rows_1),
    (SELECT count(*) FROM rows INDEXED BY rows_partition)"""


class VerifyQuery(NamedTuple):
    """Rows behind rowid `after`: those of `partition` by the index of partitions, or of all (-1) by the table."""

    partition: int
    after: int
    rows_max: int
    home_of: HomeOf


class Fault(NamedTuple):
    """`partitions`: in these a key that is not found may be a lost one; None: in all.
    Empty: the row guards itself."""

    detail: str
    partitions: frozenset[int] | None


class Verified(NamedTuple):
    """What a look at some rows has found.
    How many rows were looked at, up to which rowid, whether there may be more, and what is wrong with them."""

    rows: int
    after: int
    more: bool
    faults: list[Fault]


def examine(connection: sqlite3.Connection) -> Verified:
    """What makes it dangerous to write into the file, as a fault.

    A write into a damaged tree can add a second row of a key, or give a page away that is in use: what one reader is
    told about then becomes another value for all. So every page and list is looked at, and whether each row is where
    its key leads to. SQLite does it all in one go, at about a million rows in two seconds.
    """
    wrong = _what_is_wrong(connection)
    return Verified(0, 0, False, [Fault(wrong, None)] if wrong else [])


def _what_is_wrong(connection: sqlite3.Connection) -> str:
    try:
        (structure,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if structure != "ok":
            return str(structure).replace("\n", "; ")
        if (lost := connection.execute(_LOST_BY_INDEX).fetchone()) is not None:
            return f"the unique index does not lead to the {lost[0]} row of key {lost[1]!r}"
        counts = connection.execute(_COUNTS).fetchone()
    except sqlite3.DatabaseError as error:
        return str(error)
    return "" if len(set(counts)) == 1 else "the table has {} rows, and its indexes {} and {}".format(*counts)


def verify(connection: sqlite3.Connection, query: VerifyQuery, drops: dict[int, int]) -> Verified:
    """Look at up to `rows_max` rows, in a transaction that the caller has begun."""
    try:
        if query.partition >= 0:
            rows = connection.execute(_OF_PARTITION, (query.partition, query.after, query.rows_max)).fetchall()
        else:
            rows = connection.execute(_OF_TABLE, (query.after, query.rows_max)).fetchall()
    except _DAMAGE as error:
        return _one_by_one(connection, query, drops, str(error))
    faults = [fault for row in rows if (fault := _fault_of(row, query.home_of, drops))]
    after, more = max((row[0] for row in rows), default=query.after), len(rows) == query.rows_max
    if rows and after <= query.after:  # the order of the rows is damaged: going on would never end
        whose = None if query.partition < 0 else frozenset({query.partition})
        return Verified(
            len(rows), after, False, [*faults, Fault(f"the rows behind row {after} are out of order", whose)]
        )
    return Verified(len(rows), after, more, faults)


def _one_by_one(connection: sqlite3.Connection, query: VerifyQuery, drops: dict[int, int], why: str) -> Verified:
    """Something among these rows is unreadable: look at each place that the index of partitions names."""
    of_table = query.partition < 0
    everywhere = None if of_table else frozenset({query.partition})
    try:
        wanted = (query.after, query.rows_max) if of_table else (query.partition, query.after, query.rows_max)
        places = connection.execute(_PLACES if of_table else _PLACES_OF_PARTITION, wanted).fetchall()
    except _DAMAGE as error:
        fault = Fault(f"the index of partitions cannot be read: {error}", everywhere)
        return _by_table_alone(connection, query, fault) if of_table else Verified(0, query.after, False, [fault])
    faults = []
    for rowid, partition in places:
        found: Fault | None
        try:
            row = connection.execute(_ONE, (rowid,)).fetchone()
            if row is None:
                raise ValueError("the table has no such row")
            found = _fault_of(row, query.home_of, drops)
        except _DAMAGE as error:
            found = Fault(f"row {rowid} of partition {partition} cannot be read: {error}", frozenset({partition}))
        faults += [found] if found else []
    if not faults:
        faults.append(Fault(f"the rows behind row {query.after} cannot be read: {why}", everywhere))
    after = max((rowid for rowid, _ in places), default=query.after)
    return Verified(len(places), after, len(places) == query.rows_max and after > query.after, faults)


def _by_table_alone(connection: sqlite3.Connection, query: VerifyQuery, fault: Fault) -> Verified:
    """No index leads through the table: what its rows themselves say."""
    faults = [fault]
    try:
        rows = connection.execute(_ALONE, (query.after, query.rows_max)).fetchall()
    except _DAMAGE as error:
        faults.append(Fault(f"the rows behind row {query.after} cannot be read: {error}", None))
        return Verified(0, query.after, False, faults)
    for rowid, *row, check in rows:
        try:
            checked(Row(*row), check)
        except (DataCorrupt, *_DAMAGE):
            faults.append(Fault(f"the {row[0]} row of key {row[1]!r} (row {rowid}) does not match its checksum", None))
    after = max((row[0] for row in rows), default=query.after)
    return Verified(len(rows), after, len(rows) == query.rows_max and after > query.after, faults)


def _fault_of(found: tuple[Any, ...], home_of: HomeOf, drops: dict[int, int]) -> Fault | None:
    rowid, kind, key, partition, sequence, version, expires_at_ms, body, intent, check = found[:10]
    by_key, by_partition, by_intent = found[10:]
    if not isinstance(partition, int) or not isinstance(kind, str) or not isinstance(key, str):
        whose = frozenset({partition}) if isinstance(partition, int) else None
        return Fault(f"row {rowid} has a value of a wrong type in its columns", whose)
    if isinstance(sequence, int) and sequence <= drops.get(partition, 0):
        return None
    name, wrong, touched = f"the {kind} row of key {key!r} (row {rowid})", [], {partition}
    try:
        checked(Row(kind, key, partition, sequence, version, expires_at_ms, body, intent), check)
    except (DataCorrupt, TypeError, ValueError):
        wrong.append("does not match its checksum")
    else:  # so the key is right
        home = home_of(kind, key)
        if home >= 0:
            touched.add(home)
        if home not in (-1, partition):
            wrong.append(f"names partition {partition}, not {home}")
    if by_key != rowid:
        wrong.append("is not where the unique index leads")
    if not by_partition:
        wrong.append("is not in the index of partitions")
    if not by_intent:
        wrong.append("is not in the index of intents")
    if not wrong:
        return None
    guards_itself = wrong == ["does not match its checksum"]
    return Fault(f"{name} {' and '.join(wrong)}", frozenset() if guards_itself else frozenset(touched))
