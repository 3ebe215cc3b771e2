"""What the surroundings of a shard do to it in a chaos run.
A disk that forgets and is slow, messages that come twice.

Owns: `ForgetfulDisk`, below the log of a shard; reads of the file that take long; prepares that arrive again, late.
Promises: what was not synced is in the memory of the process only, so `kill -9` loses it as a power cut would. The disk
is slow while there is the file that `begin` names. Nothing is changed but what a disk or a network may do.
Leaves to others: when the disk is slow (loadtest.chaos.nemeses), when the process dies.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

from kvstore.protocol import Prepare
from kvstore.storage import sqlite_reads
from kvstore.storage.disk import DiskFile, OsDisk
from kvstore.store import copy_place, opening
from kvstore.store.store import Store

_SYNC_S = (0.02, 0.3)
_READ_S = (0.005, 0.06)
_LATE_S = (0.3, 2.0)
_LATE_SHARE = 0.03

_rng = random.Random()


class Slowness:
    """The disk is slow while that file is there."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def wait(self, bounds_s: tuple[float, float]) -> None:
        if os.access(self._marker, os.F_OK):
            time.sleep(_rng.uniform(*bounds_s))


class Unsynced:
    """What was written to one file and not synced, by all that have it open in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.syncing = threading.Lock()
        self.writes: list[tuple[int, bytes]] = []


class ForgetfulFile:
    """A file whose writes stay in this process until `sync`."""

    def __init__(self, file: DiskFile, slowness: Slowness, unsynced: Unsynced) -> None:
        self._file = file
        self._slowness = slowness
        self._lock = unsynced.lock
        self._syncing = unsynced.syncing
        self._unsynced = unsynced.writes

    def size(self) -> int:
        with self._lock:
            return self._size()

    def _size(self) -> int:
        return max(self._file.size(), *(offset + len(data) for offset, data in self._unsynced), 0)

    def pread(self, length: int, offset: int) -> bytes:
        with self._lock:
            found = bytearray(self._file.pread(length, offset))
            if self._unsynced:
                found.extend(b"\0" * (min(length, self._size() - offset) - len(found)))
            for at, data in self._unsynced:
                first, last = max(at, offset), min(at + len(data), offset + length)
                if first < last:
                    found[first - offset : last - offset] = data[first - at : last - at]
            return bytes(found)

    def pwrite(self, data: bytes, offset: int) -> None:
        with self._lock:
            self._unsynced.append((offset, bytes(data)))

    def sync(self) -> None:
        with self._syncing:
            with self._lock:
                writes = list(self._unsynced)
            self._slowness.wait(_SYNC_S)
            for offset, data in writes:
                self._file.pwrite(data, offset)
            self._file.sync()
            with self._lock:
                del self._unsynced[: len(writes)]

    def close(self) -> None:
        self._file.close()


class ForgetfulDisk(OsDisk):
    """The operating system's file systems, but for writes that are not synced."""

    def __init__(self, slowness: Slowness) -> None:
        self._slowness = slowness
        self._unsynced: dict[int, Unsynced] = {}  # by inode

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> Any:
        """As that of an OsDisk."""
        file = super().open(path, create=create, write=write)
        inode = path.stat().st_ino
        if create:  # a number that an earlier file had
            self._unsynced.pop(inode, None)
        return ForgetfulFile(file, self._slowness, self._unsynced.setdefault(inode, Unsynced()))


class _Gone:
    """Takes the answer to a message whose sender is there no more."""

    def __init__(self) -> None:
        self.closed = False

    def send(self, reply: Any, /) -> None:
        self.closed = True


def begin(marker: Path) -> None:
    """From now on the stores of this process have such a disk, and some prepares come twice."""
    slowness = Slowness(marker)
    disk = ForgetfulDisk(slowness)
    for module in (opening, copy_place):
        vars(module)["OsDisk"] = lambda: disk
    read_rows, write = sqlite_reads.read_rows, Store.write

    def read_slowly(*args: Any) -> Any:
        found = read_rows(*args)
        if threading.current_thread() is not threading.main_thread():
            slowness.wait(_READ_S)
        return found

    def write_twice(store: Store, op: Any, sink: Any) -> None:
        write(store, op, sink)
        if isinstance(op, Prepare) and _rng.random() < _LATE_SHARE:
            asyncio.get_running_loop().call_later(_rng.uniform(*_LATE_S), write, store, op, _Gone())

    vars(sqlite_reads)["read_rows"] = read_slowly
    Store.write = write_twice  # type: ignore[method-assign, assignment]
