"""Rows for operations that wait for them, many keys a hop.

Owns: the operations whose rows are not in memory; the pins of the rows that were fetched, until they are decided.
Promises: an operation goes on when all its rows are known; what became visible while they were fetched is newer and
stays. None overtakes another that names one of its keys. A row that is not there is believed to be so only in a
partition that is verified; one that is damaged is known to be, and the operation that looks at it fails.
Leaves to others: which rows an operation needs (`lookup`), the layers of rows (`memtable`), deciding (`pipeline`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

from kvstore.errors import DataCorrupt
from kvstore.storage.engine import RowKey
from kvstore.storage.rows import Row
from kvstore.store.lookup import home_of
from kvstore.store.ops import WriteOp, named_keys
from kvstore.store.tables import Tables
from kvstore.store.write_set import Sink

log = logging.getLogger(__name__)

_KEYS_MAX = 256


class _Waiting(NamedTuple):
    op: WriteOp
    sink: Sink
    keys: list[RowKey]


class Fetcher:
    """Reads rows for operations that wait.

    `go_on` is called with each operation whose rows are known, in the order in which they came. `waiting` counts those
    that wait, those included whose rows are being read now.
    """

    def __init__(self, tables: Tables, go_on: Callable[[WriteOp, Sink, list[RowKey]], None]) -> None:
        self._tables = tables
        self._go_on = go_on
        self._queue: deque[_Waiting] = deque()
        self._queued = asyncio.Event()
        self.waiting = 0
        self._names: Counter[str] = Counter()

    def add(self, op: WriteOp, sink: Sink, keys: list[RowKey]) -> None:
        """The operation needs these rows, which are not in memory; or none, and must not overtake (`has_before`)."""
        self._names.update(_names(op))
        self._queue.append(_Waiting(op, sink, keys))
        self.waiting += 1
        self._queued.set()

    def has_before(self, op: WriteOp) -> bool:
        """Whether an operation that waits here names one of its keys, so that it must wait, too."""
        names = self._names
        return any(name in names for name in _names(op))

    def unpin(self, keys: list[RowKey]) -> None:
        """The operation that needed them is decided, or refused."""
        for key in keys:
            self._tables.memtable.unpin(key)

    async def run(self) -> None:
        """Fetch for ever. Raises DataCorrupt where the file cannot be read at all."""
        while True:
            await self._queued.wait()
            self._queued.clear()
            while self._queue:
                await self._fetch_some()

    async def _fetch_some(self) -> None:
        memtable = self._tables.memtable
        waiting: list[_Waiting] = []
        wanted: dict[RowKey, None] = {}
        while self._queue and len(wanted) < _KEYS_MAX:
            waiting.append(self._queue.popleft())
            wanted |= dict.fromkeys(key for key in waiting[-1].keys if memtable.pin(key))
        found = await self._read(waiting, list(wanted))
        self.waiting -= len(waiting)
        for key, row in found.items():
            if isinstance(row, DataCorrupt):
                log.error("%s", row.detail)
            memtable.arrived(key, row)
        for op, sink, keys in waiting:
            self._forget_names(op)
            self._go_on(op, sink, keys)

    def _forget_names(self, op: WriteOp) -> None:
        for name in _names(op):
            self._names[name] -= 1
            if not self._names[name]:
                del self._names[name]

    async def _read(self, waiting: list[_Waiting], keys: list[RowKey]) -> dict[RowKey, Row | DataCorrupt | None]:
        """The rows of these keys; a row that is not there is none only in a verified partition."""
        verification, partitions = self._tables.verification, len(self._tables.served.generations)
        if not keys:
            return {}
        found = dict(zip(keys, await self._tables.engine.read(keys), strict=True))
        missed = {key for key, row in found.items() if row is None}
        homes = {key: home_of(op, key, partitions) for op, _, needed in waiting for key in needed if key in missed}
        is_home = range(partitions).__contains__  # an operation of another partition is refused by the batch
        doubtful = {key: home for key, home in homes.items() if is_home(home) and not verification.is_verified(home)}
        if doubtful:
            await verification.settle(doubtful.values())
            found |= {key: verification.miss_in(home) for key, home in doubtful.items()}
        return found


def _names(op: WriteOp) -> list[str]:
    """The keys, and names of locks, whose operations keep their order."""
    key = getattr(op, "key", None)
    return named_keys(op) if key is None else [key, *named_keys(op)]
