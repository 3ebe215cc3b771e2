"""The folder in which `kvstore up` starts shards, looked at before one is promised to start there.

Owns: what refuses a new shard by its disk: rights, a file that is not for it, no room beside the reserve.
Promises: nothing is changed by looking.
Leaves to others: whether what would move there has room (`sizes`), starting shards (`kvstore.launcher`), what a shard
says of its file when it starts (`store.opening`).
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from kvstore.config import Limits
from kvstore.data_file import check_data_file
from kvstore.errors import ChangeRefused, ConfigError

_FILES_MIN = 16  # that a shard creates, about
_IS_NONE = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)


class LaunchPlace:
    """A controller that a launcher has started has its file in the same folder as the shards."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._reserve_bytes = limits.disk_reserve_bytes

    def spare_bytes(self, shard_id: str, cluster_id: str) -> int:
        """What is free beside the reserve. Raises ChangeRefused if the shard could not start there."""
        path = self._folder / f"shard-{shard_id}.db"
        try:
            check_data_file(path)
            disk = os.statvfs(self._folder)
        except ConfigError as error:
            raise ChangeRefused(f"shard {shard_id} cannot be started: {error.detail}") from None
        except OSError as error:
            raise ChangeRefused(
                f"shard {shard_id} cannot be started: {self._folder} cannot be looked at ({error.strerror}); mend that."
            ) from None
        _check_file(path, shard_id, cluster_id)
        if disk.f_files > 0 and disk.f_favail < _FILES_MIN:
            raise ChangeRefused(
                f"shard {shard_id} cannot be started: the file system of {self._folder} has room for {disk.f_favail} "
                "more files only; delete some, or move some to another disk."
            )
        free = disk.f_bavail * disk.f_frsize
        if free <= self._reserve_bytes:
            raise ChangeRefused(
                f"shard {shard_id} would have no room: {free:,} bytes are free in {self._folder}, and "
                f"{self._reserve_bytes:,} are kept (disk_reserve_bytes). Make room there and ask again.",
                bytes_free={shard_id: 0},
            )
        return free - self._reserve_bytes


def _check_file(path: Path, shard_id: str, cluster_id: str) -> None:
    """One of a former member of this cluster is set aside as the shard starts.
    One that never joined is used."""
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT value FROM meta WHERE name = 'cluster_id'").fetchone()
    except sqlite3.Error as error:
        if error.sqlite_errorcode & 0xFF not in _IS_NONE:
            return  # the process that has it is just ending
        whose = "is no data file of a shard"
    else:
        if found is None or not found[0] or found[0] == cluster_id:
            return
        whose = f"belongs to cluster {found[0]}"
    raise ChangeRefused(
        f"shard {shard_id} cannot be started: {path} is there already and {whose}; move it away, or choose another id."
    )
