"""Kinds of damage to the files of a store. `stem`: the path of its files, without a suffix."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x55]))


def in_header_of_file(stem: Path) -> None:
    flip(stem.with_name(f"{stem.name}.db"), 3)


def gone(stem: Path) -> None:
    stem.with_name(f"{stem.name}.db").unlink()


def in_id(stem: Path) -> None:
    flip(stem.with_name(f"{stem.name}.id"), 30)


def in_header_of_segment(stem: Path) -> None:
    flip(min(stem.parent.glob(f"{stem.name}.log.0*")), 5)


def in_first_record(stem: Path) -> None:
    flip(min(stem.parent.glob(f"{stem.name}.log.0*")), 4096 + 100)


def in_clock(stem: Path) -> None:
    """Another number, and the checksum as it was."""
    with closing(sqlite3.connect(stem.with_name(f"{stem.name}.db"))) as connection:
        connection.execute("UPDATE clock SET version = version + 1")
        connection.commit()


def in_format(stem: Path) -> None:
    with closing(sqlite3.connect(stem.with_name(f"{stem.name}.db"))) as connection:
        connection.execute("UPDATE meta SET value = '5' WHERE name = 'format'")
        connection.commit()


def without_id(stem: Path) -> None:
    stem.with_name(f"{stem.name}.id").unlink()


def in_note(stem: Path) -> None:
    for offset in (0, 4096):
        flip(stem.with_name(f"{stem.name}.log.note"), offset)


def _of_another_store(stem: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in stem.parent.glob(f"{stem.name}.{pattern}"):
            path.unlink()
        for path in (stem.parent / "another").glob(f"{stem.name}.{pattern}"):
            shutil.copy(path, stem.parent)


def with_the_log_of_another_store(stem: Path) -> None:
    _of_another_store(stem, "log.*")


def with_the_file_of_another_store(stem: Path) -> None:
    _of_another_store(stem, "db", "db-wal", "db-shm")


def with_the_id_of_another_store(stem: Path) -> None:
    _of_another_store(stem, "id")


DAMAGES: list[Callable[[Path], None]] = [
    in_header_of_file, gone, in_clock, in_format, in_id, without_id, in_header_of_segment, in_first_record, in_note,
    with_the_log_of_another_store, with_the_file_of_another_store, with_the_id_of_another_store,
]  # fmt: skip
