"""Making, converting and recognising the file of a store, before it is served.

Owns: which format a file has; new files; conversions, each in one transaction.
Promises: a file that is no store of this program is left as it is. What these functions change is durable when they
return.
Leaves to others: the order in which file and log are made (`kvstore.store.opening`), the schema (`schema`).
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from kvstore.data_file import opening_error
from kvstore.errors import DataCorrupt, ForeignData
from kvstore.storage import schema
from kvstore.storage.schema import SIGNED
from kvstore.storage.segments import Position
from kvstore.storage.sqlite_writer import transaction


def uri_path(path: Path) -> str:
    """The path as part of a URI of SQLite."""
    return str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def format_of(path: Path, *, write: bool = True) -> int:
    """The format of the file: 0 if there is none, or it is empty.

    Raises ForeignData for one that is no store of a known format, DataInUse, ConfigError, OSError.

    With `write` SQLite may finish what a crash has left, and move the WAL into the file.
    """
    if not path.exists() or path.stat().st_size == 0:
        return 0
    try:
        with closing(_connect(path, write)) as connection:
            found = schema.format_of(connection)
            is_known = found is None or found in map(str, (*schema.OLDER_FORMATS, schema.FORMAT))
            verified = {} if is_known else schema.read_meta(connection)[0]
    except sqlite3.DatabaseError as error:
        raise opening_error(path, error, "a store of kvstore") from error
    if found is None:
        return 0
    if not is_known:
        foreign = ForeignData(
            f"{path} has format {found or 'unknown'}; this program reads formats 1 to {schema.FORMAT}."
        )
        foreign.is_damage = "format" not in verified and "store_id" in verified
        raise foreign
    return int(found)


def position_of(path: Path, *, write: bool = True) -> tuple[Position, str]:
    """Up to where a file of this format has applied the log, and the store's id. Raises DataCorrupt."""
    try:
        with closing(_connect(path, write)) as connection:
            *_, number, check = schema.read_clock(connection)
            meta, damaged = schema.read_meta(connection)
    except sqlite3.DatabaseError as error:
        raise DataCorrupt(f"The clock or the entries of meta in {path} cannot be read: {error}.") from error
    if "store_id" not in meta:
        raise DataCorrupt(f"{path}: the entries {', '.join(sorted(damaged))} do not match their checksums.")
    return Position(number, check + SIGNED), meta["store_id"]


def meta_of(path: Path, *, write: bool = True) -> dict[str, str]:
    """The entries of `meta` of a file of any format, unchecked. Raises sqlite3.Error."""
    with closing(_connect(path, write)) as connection:
        return {str(name): str(value) for name, value in connection.execute("SELECT name, value FROM meta")}


def _connect(path: Path, write: bool) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{uri_path(path)}?mode={'rw' if write else 'ro'}", uri=True)


def create_file(path: Path, meta: dict[str, str]) -> None:
    """Lay out an empty file with this identity, durably. Raises sqlite3.Error."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        with transaction(connection):
            schema.create(connection, meta)


def convert_file(path: Path, older: int, position: Position) -> None:
    """Bring the file to the present format, in one transaction that is durable when it returns.

    Raises DataCorrupt, sqlite3.Error. `position`: where its log begins.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        with transaction(connection):
            if connection.execute("SELECT one FROM clock").fetchone() is None:
                raise DataCorrupt(f"{path} has no clock. Restore the file from a copy.")
            schema.convert(connection, older, position.number, position.checksum - SIGNED)


def set_identity(path: Path, meta: dict[str, str]) -> None:
    """Write these entries of `meta`, in one transaction; all that the file has is durable when it returns.

    Raises sqlite3.Error, and what `sqlite_writer.transaction` raises.
    """
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        with transaction(connection):
            schema.set_meta(connection, meta)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
