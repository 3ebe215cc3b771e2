"""A disk in memory that forgets, tears, fails, stalls, flips bits and runs full, to order.

Owns: `SimulatedDisk`, which stands in for `kvstore.storage.disk.OsDisk`.
Promises: after a power cut each sector holds any of the contents it had since the file was last synced, or one of them
half written; each name that was made, changed or removed since its folder was last synced is there or not; all that was
synced before is there. Reads see what was written, durable or not, as those of a kernel do.
Leaves to others: when the power is cut and which call fails (`power_cut_at`, `hook`), and what survives (`Fate`).
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Fate = Callable[[int], int]  # given n, which of the versions 0 (durable) to n (newest) survives a power cut


def lose_all(_: int) -> int:
    """What was not synced is lost."""
    return 0


def keep_all(newest: int) -> int:
    """What was written is there, synced or not."""
    return newest


def any_fate(rng: random.Random) -> Fate:
    """One of those two, or any of the contents of each sector, or all or nothing of each."""

    def keep_any(newest: int) -> int:
        return rng.randint(0, newest)

    def keep_some(newest: int) -> int:
        return newest if rng.random() < 0.5 else 0

    return rng.choice((lose_all, keep_all, keep_any, keep_some))


class PowerCut(BaseException):
    """The machine is off; no handler of errors may take this for one."""


class _Content:
    """A file apart from its names. `versions`: of each sector written since the last sync, its contents in turn."""

    def __init__(self) -> None:
        self.cached = bytearray()
        self.durable = bytearray()
        self.versions: dict[int, list[bytes]] = {}

    def write(self, data: bytes, offset: int, sector_bytes: int) -> None:
        end = offset + len(data)
        if len(self.cached) < end:
            self.cached.extend(bytes(end - len(self.cached)))
        for sector in range(offset // sector_bytes, -(-end // sector_bytes)):
            begin = max(offset, sector * sector_bytes)
            stop = min(end, (sector + 1) * sector_bytes)
            middle = (begin + stop) // 2
            for start, until in ((begin, middle), (middle, stop)):
                self.cached[start:until] = data[start - offset : until - offset]
                now = bytes(self.cached[sector * sector_bytes : (sector + 1) * sector_bytes])
                self.versions.setdefault(sector, []).append(now)

    def sync(self, sector_bytes: int) -> None:
        self.settle(keep_all, sector_bytes)

    def cut(self, fate: Fate, sector_bytes: int) -> None:
        self.settle(fate, sector_bytes)
        self.cached = bytearray(self.durable)

    def settle(self, fate: Fate, sector_bytes: int) -> None:
        for sector, versions in sorted(self.versions.items()):
            if kept := fate(len(versions)):
                begin, data = sector * sector_bytes, versions[kept - 1]
                self.durable.extend(bytes(max(0, begin + len(data) - len(self.durable))))
                self.durable[begin : begin + len(data)] = data
        self.versions.clear()


class _Change(NamedTuple):
    """Of names: `old` goes, `new` comes; either may be missing."""

    old: Path | None
    new: Path | None
    content: _Content


class SimulatedDisk:
    """`calls` counts the calls that change something; at number `power_cut_at` the power is cut, in the middle of it.

    `hook(call, path)` comes before each call and may raise OSError, or wait. `capacity`: bytes of all files.
    """

    def __init__(self, sector_bytes: int = 512) -> None:
        self.sector_bytes = sector_bytes
        self.calls = 0
        self.power_cut_at = 0
        self.capacity: int | None = None
        self.hook: Callable[[str, Path], None] = lambda _call, _path: None
        self._files: dict[Path, _Content] = {}
        self._durable_files: dict[Path, _Content] = {}
        self._changes: list[_Change] = []
        self._starts = 0
        self._off = False

    # --- what the program calls

    def names(self, folder: Path) -> list[str]:
        self._before("names", folder, changes=False)
        return [path.name for path in self._files if path.parent == folder]

    def open(self, path: Path, *, create: bool = False, write: bool = True) -> SimulatedFile:
        self._before("create" if create else "open", path, changes=create)
        if create and path in self._files:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        if create:
            self._change(_Change(None, path, _Content()))
        return SimulatedFile(self, path, self._content(path), self._starts)

    def rename(self, old: Path, new: Path) -> None:
        self._before("rename", old)
        self._change(_Change(old, new, self._content(old)))

    def unlink(self, path: Path) -> None:
        self._before("unlink", path)
        self._change(_Change(path, None, self._content(path)))

    def sync_folder(self, folder: Path) -> None:
        self._before("sync_folder", folder)
        self._durable_files = dict(self._files)
        self._changes.clear()

    # --- what a test does to it

    def restart(self, fate: Fate = lose_all) -> None:
        """Cut the power, if it is not, and switch the machine on again: files that were open are no more."""
        for change in self._changes:
            if fate(1):
                _apply(change, self._durable_files)
        self._changes.clear()
        self._files = dict(self._durable_files)
        for content in dict.fromkeys(self._files.values()):  # in an order that is the same in every run
            content.cut(fate, self.sector_bytes)
        self._starts += 1
        self._off = False
        self.calls = self.power_cut_at = 0

    def forget_dirty(self, path: Path) -> None:
        """What was not synced looks written, but no later sync brings it to the disk.
        So a failed sync leaves it."""
        self._content(path).versions.clear()

    @property
    def used_bytes(self) -> int:
        """Of all files."""
        return sum(len(each.cached) for each in dict.fromkeys(self._files.values()))

    @property
    def files(self) -> list[Path]:
        """All that are there."""
        return list(self._files)

    def content(self, path: Path) -> bytes:
        return bytes(self._content(path).cached)

    def replace(self, path: Path, data: bytes, offset: int = 0) -> None:
        """Damage the file: these bytes lie there, durably."""
        for stored in (self._content(path).cached, self._content(path).durable):
            stored[offset : offset + len(data)] = data

    def flip(self, path: Path, bit: int) -> None:
        """Damage the file: this bit of it is the other one."""
        self.replace(path, bytes([self._content(path).cached[bit // 8] ^ 1 << bit % 8]), bit // 8)

    def wipe(self) -> None:
        """The disk is lost, and an empty one is in its place."""
        self._files.clear()
        self._durable_files.clear()
        self._changes.clear()

    def remove(self, path: Path) -> None:
        """Damage the folder: the file is gone."""
        del self._files[path]
        self._durable_files.pop(path, None)

    # --- inside

    def _content(self, path: Path) -> _Content:
        if path not in self._files:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        return self._files[path]

    def _change(self, change: _Change) -> None:
        _apply(change, self._files)
        self._changes.append(change)

    def _before(self, call: str, path: Path, *, changes: bool = True, cut_now: bool = True) -> None:
        """Count the call; raises PowerCut if the power is off, or goes off with this one."""
        self.hook(call, path)
        self.calls += changes
        self._off |= cut_now and changes and self.calls == self.power_cut_at
        if self._off:
            raise PowerCut

    def _write(self, path: Path, content: _Content, data: bytes, offset: int) -> None:
        self._before("pwrite", path, cut_now=False)
        grown = max(0, offset + len(data) - len(content.cached))
        if self.capacity is not None and grown and self.used_bytes + grown > self.capacity:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        content.write(data, offset, self.sector_bytes)
        if self.calls == self.power_cut_at:  # in the middle of it: any part of it may survive
            self._off = True
            raise PowerCut


def _apply(change: _Change, files: dict[Path, _Content]) -> None:
    if change.old is not None and files.pop(change.old, None) is None and change.new is not None:
        return  # the file was never there under its old name, so it does not come under the new one
    if change.new is not None:
        files[change.new] = change.content


def put_back(disk: SimulatedDisk, path: Path, data: bytes) -> None:
    """A file with these bytes lies there, durably, in place of what did."""
    disk._files[path] = disk._durable_files[path] = content = _Content()
    content.cached, content.durable = bytearray(data), bytearray(data)


class SimulatedFile:
    """An open file of a simulated disk."""

    def __init__(self, disk: SimulatedDisk, path: Path, content: _Content, start: int) -> None:
        self._disk = disk
        self._opened_as = path
        self._content = content
        self._start = start
        self._closed = False

    def size(self) -> int:
        return len(self._content.cached)

    def pread(self, length: int, offset: int) -> bytes:
        self._usable()
        self._disk._before("pread", self._path, changes=False)
        return bytes(self._content.cached[offset : offset + length])

    def pwrite(self, data: bytes, offset: int) -> None:
        self._usable()
        self._disk._write(self._path, self._content, data, offset)

    def sync(self) -> None:
        self._usable()
        self._disk._before("sync", self._path)
        self._content.sync(self._disk.sector_bytes)

    def close(self) -> None:
        self._closed = True

    @property
    def _path(self) -> Path:
        """Its name now, which may have been changed since it was opened."""
        named = self._disk._files.items()
        return next((path for path, content in named if content is self._content), self._opened_as)

    def _usable(self) -> None:
        if self._closed or self._start != self._disk._starts:
            raise OSError(errno.EBADF, "Bad file descriptor", str(self._path))
