"""The place of a data file, looked at before it is opened.
What a person has to mend is said in a person's words.

Owns: which things in the place of a file, and which errors at its opening, mean what; how a small file is
replaced; room that is kept for those who must write although the disk is full.
Promises: nothing that was there is changed; a file that does not exist yet is created, empty, where that is possible.
Leaves to others: what is in the file (`storage`, `controller.map_store`), the exit codes (`process`).

SQLite says "unable to open database file" for all of this, or opens a file that it may not write as one to read only,
and fails at the first write, when the process has long said that it serves.
"""

from __future__ import annotations

import errno
import os
import pwd
import sqlite3
import stat
from pathlib import Path

from kvstore.errors import ConfigError, DataInUse, ForeignData, KvError

_BESIDE = ("", "-wal", "-shm")  # the file, and what SQLite keeps beside it


def prepare_data_file(path: Path) -> None:
    """Make sure that a file is there which can be read and written; it may be empty.

    Raises ConfigError with the mend; OSError, which names the file, where the system refuses to create one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_data_file(path)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))


def check_data_file(path: Path) -> None:
    """Look whether the file can be opened, or created where it is not there; changes nothing.

    Raises ConfigError with the mend if it cannot.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be opened: {_rights(path.parent)}")
    for part in (Path(f"{path}{suffix}") for suffix in _BESIDE):
        _check(part)


def _check(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            raise ConfigError(
                f"{path} cannot be opened: it is a link to {path.readlink()}, where nothing is ({error.strerror}); "
                "mount the disk that it points to, or put the file back, or remove the link."
            ) from error
        return
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise ConfigError(f"{path} cannot be opened: it is {kind}; move it away, or name another data_dir.")
    if not os.access(path, os.R_OK | os.W_OK):
        raise ConfigError(f"{path} cannot be opened: {_rights(path)}")


def _rights(path: Path) -> str:
    """Why this process may not write it, and the mend."""
    facts = path.stat()
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return f"the file system of {path} is mounted read-only; mount it for writing, or name another data_dir."
    return (
        f"{path} has mode {stat.S_IMODE(facts.st_mode):03o} and owner {_user(facts.st_uid)}, and this process runs as "
        f"{_user(os.geteuid())}; give it the right to read and write (chown, chmod), or name another data_dir."
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def write_durably(path: Path, content: bytes) -> None:
    """Make `path` a file with that content: after a crash it is this one, or what was there before.
    Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in that folder durable. Raises OSError."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_sparse(path: Path) -> None:
    """Replace the file by one with the same bytes, whose zeros at the end take no room. Raises OSError."""
    data = path.read_bytes()
    used = data.rstrip(b"\0")
    if len(used) == len(data):
        return
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(used)
            file.truncate(len(data))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


class Reserve:
    """A file that only takes room, `size_bytes` of it.

    It is given back when something must be written on a full disk.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def fill(self) -> None:
        """Take the room, if it is not taken and there is twice as much. Raises nothing."""
        try:
            if self._path.exists() and self._path.stat().st_size >= self._size_bytes:
                return
            disk = os.statvfs(self._path.parent)
            if disk.f_bavail * disk.f_frsize < 2 * self._size_bytes:
                return
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, self._size_bytes)
            finally:
                os.close(descriptor)
        except OSError:
            self.give()

    def give(self) -> bool:
        """Give the room back; returns whether there was any. Raises nothing."""
        try:
            size_bytes = self._path.stat().st_size
            os.truncate(self._path, 0)
        except OSError:
            return False
        return size_bytes > 0


def is_full(error: OSError) -> bool:
    """Whether the disk, or a quota, is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def opening_error(path: Path, error: sqlite3.Error, what: str) -> KvError | OSError:
    """What an error of SQLite at the opening of the file means; `what` names what the file should be.

    DataInUse and OSError may have passed at the next try; ForeignData and ConfigError do not pass by themselves.
    """
    # The low byte is the primary code:
    # https://www.sqlite.org/rescode.html#primary_result_codes_versus_extended_result_codes
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DataInUse(f"{path} is open in another process: stop that one first.")
    if code == sqlite3.SQLITE_FULL or (code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR) and _is_full(path)):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    if code == sqlite3.SQLITE_IOERR:
        return OSError(errno.EIO, str(error), str(path))
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return ConfigError(f"{path} cannot be opened: {error}; check data_dir, its permissions and the disk.")
    found = ForeignData(f"{path} cannot be opened as {what}: {error}.")
    found.is_damage = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
    return found


def _is_full(path: Path) -> bool:
    """Whether its file system has no block or no inode left; some count no inodes (0 in all)."""
    facts = os.statvfs(path.parent)
    return facts.f_bavail == 0 or (facts.f_files > 0 and facts.f_favail == 0)
