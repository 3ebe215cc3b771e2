"""The device below the log: the few calls it needs of a file system, as an interface.

Owns: `Disk` and `DiskFile`, and `OsDisk`, which is the operating system.
Promises: `pwrite` writes all or raises; `sync` returns only when all that was written to the file is on the disk.
Leaves to others: what a failed call means (`log`), and the disk that loses, tears and flips writes
(`loadtest.simulate.disk`), which is why this interface is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # room may come: worth another try later


_PROBE_BYTES = 65_536


def may_not_grow(paths: Sequence[Path]) -> str:
    """Why files of one folder, of which one could not be written, may not grow; empty if they may."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if limit != resource.RLIM_INFINITY and path.stat().st_size + _PROBE_BYTES > limit:
                return (
                    f"{path} has reached the largest size of a file, {limit} bytes: raise it (ulimit -f, LimitFSIZE=)"
                )
    try:
        with tempfile.TemporaryFile(dir=paths[0].parent, buffering=0) as probe:
            probe.write(bytes(_PROBE_BYTES))
            os.fsync(probe.fileno())
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            return f"{paths[0].parent}: {error.strerror}: make room, or raise the quota"
    return ""


class DiskFile(Protocol):
    """One open file. All calls raise OSError; offsets and sizes are in bytes."""

    def size(self) -> int:
        """The size in bytes, including what is not synced yet."""

    def pread(self, length: int, offset: int) -> bytes:
        """Fewer than `length` bytes only where the file ends."""

    def pwrite(self, data: bytes, offset: int) -> None:
        """Write all of `data`; it is in no way durable before `sync`."""

    def sync(self) -> None:
        """Make everything written so far durable, the file's size included. Not to be called again once it failed."""

    def close(self) -> None:
        """Close the file; no-op if it is closed."""


class Disk(Protocol):
    """The folders and files of one machine. All calls raise OSError."""

    def names(self, folder: Path) -> list[str]:
        """The names in the folder, in no order."""

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> DiskFile:
        """Open the file; with `create` it must not be there yet."""

    def rename(self, old: Path, new: Path) -> None:
        """Durable only after `sync_folder`."""

    def unlink(self, path: Path) -> None:
        """Durable only after `sync_folder`."""

    def sync_folder(self, folder: Path) -> None:
        """Make the names in the folder durable."""


class OsFile:
    """A file descriptor, as a `DiskFile`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        while 0 < len(data) < length and (more := os.pread(self._fd, length - len(data), offset + len(data))):
            data += more
        return data

    def pwrite(self, data: bytes, offset: int) -> None:
        written = os.pwrite(self._fd, data, offset)
        while written < len(data):
            more = os.pwrite(self._fd, data[written:], offset + written)
            if not more:
                raise OSError(errno.EIO, "the file takes no more bytes")
            written += more

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1  # a number that is used again must never be written to
            os.close(fd)


class OsDisk:
    """The operating system's file systems, as a `Disk`."""

    def names(self, folder: Path) -> list[str]:
        return [path.name for path in folder.iterdir()]

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> OsFile:
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC
        return OsFile(os.open(path, flags | (os.O_CREAT | os.O_EXCL if create else 0), 0o644))

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove_if_there(disk: Disk, path: Path) -> None:
    """Unlink the file; no-op if there is none. Raises OSError for all other reasons."""
    with contextlib.suppress(FileNotFoundError):
        disk.unlink(path)
