"""Checking the file of a store that is not open, without changing it.

Owns: `check_file`.
Promises: writes nothing into the file or its WAL. Every row is looked at by table and by index, every entry that is no
row by its checksum; digests of partitions by table are compared with those by index; SQLite's own check goes over the
structure. What is wrong is listed, the first of each kind first, and hides nothing that comes behind it.
Leaves to others: the log (`log_check`), what is shown (the command line).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kvstore.errors import DataCorrupt
from kvstore.storage import schema
from kvstore.storage.schema import SIGNED
from kvstore.storage.segments import Position
from kvstore.storage.sqlite_file import uri_path
from kvstore.storage.sqlite_writer import drops_of
from kvstore.storage.verification import HomeOf, VerifyQuery, verify

_ROWS_MAX = 1000
_FINDINGS_MAX = 8  # of each check
_DIGESTS = """SELECT partition, count(*), sum(checksum & 4294967295), sum(checksum >> 32) FROM rows {}
    GROUP BY partition ORDER BY partition"""
Progress = Callable[[int, int], object]


class FileReport(NamedTuple):
    """`applied` None: the clock is damaged. `findings`: what is wrong, the first of each kind; `damaged`: how many."""

    meta: dict[str, str]
    applied: Position | None
    rows: int
    damaged: int
    findings: list[str]


def check_file(path: Path, home_of: Callable[[int], HomeOf], progress: Progress) -> FileReport:
    """Check the file at `path`, which no process has open for writing.

    `home_of` is called with the number of partitions; `progress` with rows done and about how many in all. Raises
    sqlite3.Error where nothing at all can be read.
    """
    with closing(sqlite3.connect(f"file:{uri_path(path)}?mode=ro", uri=True, isolation_level=None)) as connection:
        return _Check(connection, home_of, progress).report()


def _anywhere(kind: str, key: str) -> int:
    return -1


class _Check:
    def __init__(self, connection: sqlite3.Connection, home_of: Callable[[int], HomeOf], progress: Progress) -> None:
        self._connection = connection
        self._home_of = home_of
        self._progress = progress
        self._rows = 0
        self._damaged = 0
        self._findings: list[str] = []
        self._seen: set[str] = set()
        self._shown_max = _FINDINGS_MAX

    def _found(self, detail: str) -> None:
        if detail in self._seen:
            return  # of every page of the table, for example
        self._damaged += 1
        self._seen.add(detail)
        if len(self._findings) < self._shown_max:
            self._findings.append(detail)

    def report(self) -> FileReport:
        self._connection.execute("BEGIN")
        meta, applied = self._state()
        checks: list[tuple[str, Callable[[], None]]] = [
            ("The rows cannot be read to their end", partial(self._all_rows, meta)),
            ("The digests of partitions by table and by index cannot be compared", self._digests),
            ("SQLite's own check cannot be done", self._structure),
        ]
        for failed, check in checks:
            self._shown_max = len(self._findings) + _FINDINGS_MAX
            try:
                check()
            except (sqlite3.DatabaseError, TypeError, ValueError, OverflowError) as error:
                self._found(f"{failed}: {error}.")
        return FileReport(meta, applied, self._rows, self._damaged, self._findings)

    def _state(self) -> tuple[dict[str, str], Position | None]:
        meta: dict[str, str] = {}
        applied = None
        try:
            meta, damaged = schema.read_meta(self._connection)
            for name in sorted(damaged):
                self._found(f"The entry {name} of the table meta does not match its checksum.")
        except sqlite3.DatabaseError as error:
            self._found(f"The table meta cannot be read: {error}.")
        try:
            *_, number, check = schema.read_clock(self._connection)
            applied = Position(number, check + SIGNED)
        except (DataCorrupt, sqlite3.DatabaseError) as error:
            self._found(str(error.detail if isinstance(error, DataCorrupt) else f"The clock cannot be read: {error}."))
        return meta, applied

    def _all_rows(self, meta: dict[str, str]) -> None:
        (total,) = self._connection.execute("SELECT coalesce(max(rowid), 0) FROM rows").fetchone()
        drops = drops_of(meta)
        home_of = self._home_of(int(meta["partitions"])) if "partitions" in meta else _anywhere
        after, more = 0, True
        while more:
            page = verify(self._connection, VerifyQuery(-1, after, _ROWS_MAX, home_of), drops)
            for fault in page.faults:
                self._found(f"{fault.detail[:1].upper()}{fault.detail[1:]}.")
            self._rows += page.rows
            after, more = page.after, page.more
            self._progress(after, max(total, after))

    def _digests(self) -> None:
        by_table = self._digests_by("NOT INDEXED")
        by_index = self._digests_by("INDEXED BY rows_partition")
        for partition in sorted(by_table.keys() | by_index.keys()):
            ours, theirs = by_table.get(partition), by_index.get(partition)
            if ours != theirs:
                counts = [digest[0] if digest else 0 for digest in (ours, theirs)]
                self._found(
                    f"Partition {partition} has {counts[0]} rows by the table and {counts[1]} by its index, "
                    "or other checksums."
                )

    def _digests_by(self, how: str) -> dict[int, tuple[int, ...]]:
        return {row[0]: tuple(row[1:]) for row in self._connection.execute(_DIGESTS.format(how))}

    def _structure(self) -> None:
        for line in self._structure_lines():
            self._found(f"SQLite's own check: {line}.")

    def _structure_lines(self) -> Iterator[str]:
        for (line,) in self._connection.execute(f"PRAGMA integrity_check({_FINDINGS_MAX})"):
            if line != "ok":
                yield str(line).replace("\n", "; ")
