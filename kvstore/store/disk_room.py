"""Whether the disk has room for more than what frees room.

Owns: the reserve of free space below which only deletes, expiries, decisions, finishes and aborts are done.
Promises: asking costs a call of the kernel at most every 20 ms while there is plenty.
Leaves to others: refusing (`write_set`), the log's own reserve (`storage.log`).
"""

from __future__ import annotations

from kvstore.store.tables import Tables

_AMPLE_S = 0.02  # in which no client fills twice the reserve


def free_of(tables: Tables) -> int:
    """Free bytes on the file system that the store lies on."""
    return tables.environment.free_bytes(tables.engine.path.parent)


def spare_of(tables: Tables) -> int:
    """How many bytes there are beside the reserve, pages that are free inside the file included."""
    return max(0, free_of(tables) + tables.engine.sizes.free - tables.limits.disk_reserve_bytes)


class DiskRoom:
    """The room on the file system that the store lies on."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._ample_until_s = 0.0

    @property
    def frees_only(self) -> bool:
        """Whether only what frees room may be done.

        Pages that are free inside the file count, down to half the reserve.
        """
        tables = self._tables
        now_s = tables.environment.monotonic_s()
        is_full = tables.log.full or tables.file_full
        if now_s < self._ample_until_s:
            return is_full
        free_bytes = free_of(tables)
        reserve_bytes = tables.limits.disk_reserve_bytes
        if free_bytes >= 2 * reserve_bytes:
            self._ample_until_s = now_s + _AMPLE_S
        if free_bytes >= reserve_bytes:
            return is_full
        return free_bytes < reserve_bytes // 2 or free_bytes + tables.engine.sizes.free < reserve_bytes
