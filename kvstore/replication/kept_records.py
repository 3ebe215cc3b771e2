"""The records of a primary's log that can be read back for one copy.

Owns: from which number on all of them can be, and the search for the last one that the copy has, too.
Promises: reading runs in a thread. Records before one that was found damaged are not asked for again.
Leaves to others: the files (`storage.log`), the rules of the comparison (`session`), what is sent (`copy_link`).
"""

from __future__ import annotations

from functools import partial

from kvstore.environment import Environment
from kvstore.replication import chain, messages, session
from kvstore.replication.messages import Told
from kvstore.replication.tail import RECORD_BYTES
from kvstore.replication.wire import Wire, WireLost, expect
from kvstore.storage.engine import Engine, SnapshotProgress
from kvstore.storage.log import Log
from kvstore.storage.segments import Entry

_PROBES = 16


class KeptRecords:
    """What the log can give back to one copy."""

    def __init__(self, log: Log, environment: Environment) -> None:
        self._log = log
        self._environment = environment
        self._readable_from = 0

    @property
    def first(self) -> int:
        """The number of the first record from which on all can be sent."""
        return max(self._log.first, self._readable_from)

    def has_all_behind(self, number: int) -> bool:
        """Whether every record behind that number can be sent."""
        return number + 1 >= self.first

    def note_damaged(self, number: int) -> None:
        """That record cannot be read back: what lies behind it can be sent, and all of it as a snapshot."""
        self._readable_from = max(self._readable_from, number + 1)

    async def after(self, number: int, bytes_max: int) -> list[Entry]:
        """Some records behind that number, about `bytes_max` bytes of them, one at least.

        Raises LogDamaged, Released, OSError.
        """
        return await self._environment.in_thread(
            partial(chain.some_entries, self._log, number, bytes_max, RECORD_BYTES)
        )

    async def common(self, wire: Wire, told: Told) -> int | None:
        """The number of the last record that both logs have; None if there is none.

        Raises WireLost, Refused, LogDamaged.
        """
        first, last = chain.known(self._log)
        comparison = session.compare((max(first, self._readable_from - 1), last), told.known)
        count = 1  # as a rule the shorter log is the beginning of the longer one, so its last record is enough
        while not comparison.done:
            numbers = session.probes(comparison, count)
            count = _PROBES
            await wire.send(messages.Probe(numbers))
            theirs = await expect(wire, messages.Checksums)
            ours = await self._environment.in_thread(partial(chain.checksums, self._log, numbers))
            before, comparison = comparison, session.compared(comparison, ours, theirs.of)
            if comparison == before:
                raise WireLost("the logs were released further while they were compared")
        return comparison.agreed

    async def goes_on(self, broke_off: SnapshotProgress | None, engine: Engine) -> SnapshotProgress | None:
        """That snapshot, if it can go on from the primary's file, which is `engine`."""
        if broke_off is None:
            return None
        ours = await self._environment.in_thread(partial(chain.checksums, self._log, [broke_off.seen.number]))
        return session.goes_on(broke_off, ours, engine.applied.position.number, self.first)
