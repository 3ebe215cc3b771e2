"""Setting the files of a store, or of a copy of one, aside.
They get other names, so that nothing opens them again.

Owns: the names of what is kept, `<file>.removed` with log and id beside it; the order of the renaming.
Promises: nothing that was set aside before is lost: the older `….removed` becomes `….removed.1`, `.2`, and so on, the
newest last. Setting aside may be repeated after a crash at any line, or a power cut: id, log and file are gone from the
disk in that order. What a crash leaves without an id is never opened as a copy.
Leaves to others: when (`roster`, `store.copy_place`); no process may have the files open at the end.

The second name is given to the file first, while a process may still have it (a link, nothing is renamed under SQLite),
and the first one taken away at the end: a file with both names was on its way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from kvstore.data_file import make_sparse, sync_folder

REMOVED = ".removed"
_BESIDE = ("-wal", "-shm")  # what SQLite keeps beside a file, after kill -9


def begin(path: Path) -> None:
    """Write down that this file is to be set aside, while its process may still run. Raises OSError."""
    if path.exists() and not has_begun(path):
        _make_room(_removed(path))
        with suppress(OSError):  # not every file system has links; then only a start at this moment would not know
            _removed(path).hardlink_to(path)


def has_begun(path: Path) -> bool:
    """Whether the file has both names."""
    try:
        return path.samefile(_removed(path))
    except FileNotFoundError:
        return False


def finish(path: Path) -> Path | None:
    """Set the file aside, which no process has open; what it is called then, None without a file. Raises OSError."""
    if not path.exists():
        return None
    begin(path)
    removed = _removed(path)
    for beside in (_id_of, _log_of):
        for each in beside(path.parent, path.stem):
            set_aside = each.rename(path.with_name(removed.name + each.name.removeprefix(path.stem)))
            with suppress(OSError):  # the room that was made for records to come
                make_sparse(set_aside)
        sync_folder(path.parent)  # a log without its file would be taken for damage
    for suffix in _BESIDE:
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(removed.with_name(removed.name + suffix))
    if has_begun(path):
        path.unlink()
    else:
        path.rename(removed)
    return removed


def names_for(first: str) -> Iterator[str]:
    """The names for what is set aside, one after the other.
    The first, then the same with `.1`, `.2`, and so on."""
    yield first
    for number in itertools.count(1):
        yield f"{first}.{number}"


def _make_room(removed: Path) -> None:
    """What has that name gets the next number that is free."""
    free = next(path for name in names_for(removed.name) if not (path := removed.with_name(name)).exists())
    if free == removed:
        return
    for beside in (*_id_of(removed.parent, removed.name), *_log_of(removed.parent, removed.name)):
        beside.rename(removed.with_name(free.name + beside.name.removeprefix(removed.name)))
    for suffix in (*_BESIDE, ""):
        with suppress(FileNotFoundError):
            removed.with_name(removed.name + suffix).rename(free.with_name(free.name + suffix))


def _id_of(folder: Path, name: str) -> Iterator[Path]:
    """The id of what has that name, without which nothing is opened as a copy."""
    yield from folder.glob(f"{name}.id")


def _log_of(folder: Path, name: str) -> Iterator[Path]:
    yield from sorted(folder.glob(f"{name}.log.*"))


def _removed(path: Path) -> Path:
    return path.with_name(path.name + REMOVED)
