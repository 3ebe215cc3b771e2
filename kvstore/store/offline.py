"""What can be done with a store that is not open: check it, read its log, cut its log.

Owns: taking the store's lock for that long; checking file and log together; the exit where a log is lost.
Promises: refused while a process has the store. `check` and `records` change nothing. `cut` loses nothing that the
file has applied, and says before what it does lose.
Leaves to others: the checks themselves (`storage.log_check`, `storage.file_check`), what is shown (the command line).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kvstore.errors import BadRequest, ForeignData, LogDamaged, NotFound
from kvstore.storage import recovery, sqlite_file
from kvstore.storage.disk import OsDisk
from kvstore.storage.file_check import FileReport, check_file
from kvstore.storage.log import Log
from kvstore.storage.log_check import Logged, LogReport, check_log, read_log
from kvstore.storage.record import decode_record
from kvstore.storage.schema import FORMAT
from kvstore.storage.segments import Place, Position, indices_of, segment_path
from kvstore.store.opening import lock
from kvstore.store.verification import home_in

_LOST = "lost"

Progress = Callable[[str, int, int], object]


class StoreReport(NamedTuple):
    """`damaged`: how many things are wrong; the `findings` name them, the log's first, up to a number of them."""

    file: FileReport
    log: LogReport
    damaged: int
    findings: list[str]


class Loss(NamedTuple):
    """What a cut takes away: records `first` to `last`, as far as anything says that they were there.

    `is_whole`: the log cannot be opened at all; its files are moved aside, and a new one begins.
    """

    shard_id: str
    first: int
    last: int
    is_whole: bool


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the store whose file is `path`.

    Raises NotFound if there is none, DataInUse while a process has it, ForeignData if it is no store of the present
    format.
    """
    if not path.is_file():
        raise NotFound(f"There is no file {path}.", next_step="Name the .db file of a store.")
    fd = lock(path)
    try:
        found = sqlite_file.format_of(path, write=False)
        if found != FORMAT:
            raise ForeignData(
                f"{path} has format {found}, which has no log.",
                next_step="The next start of the shard converts it; check it after that.",
            )
        yield
    finally:
        os.close(fd)


def check(path: Path, progress: Progress = lambda label, done, total: None) -> StoreReport:
    """Check file and log; the lock is held. Raises ForeignData, OSError, sqlite3.Error (not even a header is there)."""
    file = check_file(path, home_in, partial(progress, "file"))
    found = check_log(OsDisk(), path.parent, path.stem, file.applied, 0, partial(progress, "log"))
    findings = []
    if found.damage is not None:
        findings.append(found.damage.detail)
    else:
        findings += _undecodable(path)
        if (wanted := file.meta.get("store_id")) is not None and wanted != found.store_id:
            findings.append(f"The file is of store {wanted}, and the log beside it of store {found.store_id}.")
    return StoreReport(file, found, file.damaged + len(findings), [*findings, *file.findings])


def _undecodable(path: Path) -> Iterator[str]:
    """Records that verify and cannot be decoded: a program has written them so."""
    for logged in read_log(OsDisk(), path.parent, path.stem):
        try:
            decode_record(logged.entry.payload)
        except Exception as error:
            yield f"Record {logged.entry.number} in {logged.file} (byte {logged.offset}): {error}"
            return


def records(path: Path, after: int) -> Iterator[Logged]:
    """The records of the log behind that number. Raises LogDamaged where one is damaged; ForeignData, OSError."""
    return read_log(OsDisk(), path.parent, path.stem, after)


def loss_of_cut(path: Path, after: int) -> Loss:
    """What `cut` would take away.

    Raises BadRequest if the log cannot end there; DataCorrupt, ForeignData, OSError.
    """
    applied, store_id = sqlite_file.position_of(path, write=False)
    shard_id = sqlite_file.meta_of(path, write=False).get("shard_id", "")
    if after < applied.number:
        raise BadRequest(
            f"The file has applied up to record {applied.number}, so the log cannot end before it.",
            next_step=f"Cut after {applied.number} or later.",
        )
    found = check_log(OsDisk(), path.parent, path.stem, applied)
    last = max(found.proven, found.last.number, after)
    is_whole = not _is_there(Place(path.parent, path.stem, store_id), applied, after)
    if is_whole and after != applied.number:
        raise BadRequest(
            f"The log does not hold all records up to {after}; the file has applied up to {applied.number}.",
            next_step=f"Cut after {applied.number}.",
        )
    return Loss(shard_id, after + 1, last, is_whole)


def _is_there(place: Place, applied: Position, number: int) -> bool:
    """Whether the log can be opened and holds record `number`."""
    try:
        notes, segments = recovery.open_all(OsDisk(), place, write=False)
    except (LogDamaged, ForeignData):
        return False
    try:
        recovery.find_end(segments, place, applied, number)
    except LogDamaged:
        return False
    finally:
        recovery.close_all(segments, notes)
    return True


def cut(path: Path, loss: Loss, segment_bytes: int) -> list[Path]:
    """Take that away; returns the files that were moved aside. Raises DataCorrupt, LogDamaged, OSError."""
    applied, store_id = sqlite_file.position_of(path, write=False)
    place = Place(path.parent, path.stem, store_id)
    if not loss.is_whole:
        recovery.cut_offline(OsDisk(), place, applied, loss.first - 1)
        return []
    disk, aside = OsDisk(), []
    indices = indices_of(disk, path.parent, path.stem)
    for old in (*(segment_path(path.parent, path.stem, index) for index in indices), place.note):
        if old.exists():
            new = old.with_name(f"{old.name}.{_LOST}")
            disk.rename(old, new)
            aside.append(new)
    disk.sync_folder(path.parent)
    Log.create(disk, path.parent, path.stem, store_id, applied, segment_bytes).close()
    return aside


def damage_of(path: Path, error: sqlite3.Error) -> ForeignData:
    """What it means that SQLite cannot even begin to read the file."""
    return ForeignData(f"{path} cannot be opened as a store of kvstore: {error}.")
