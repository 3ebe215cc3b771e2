"""Records that come to a copy: appended, synced, acknowledged.

Owns: the order of that, and what is learned with the records: which of them are committed.
Promises: nothing is acknowledged before it is durable in this copy's log; while a snapshot fills the file, nothing is.
What does not follow the log, or is of another session, is thrown away.
Leaves to others: what follows (`session`), where the sync runs (`copy_log`), applying (`copy_applier`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore import failpoints
from kvstore.environment import Environment
from kvstore.replication import session
from kvstore.replication.copy_filling import CopyFilling
from kvstore.replication.copy_log import ROOM_RETRY_S, CopyLog
from kvstore.replication.copy_notes import CopyNotes
from kvstore.replication.given_lease import GivenLease
from kvstore.replication.session import Session
from kvstore.storage.segments import Entry


class CopyRecords:
    """Takes the records of the session that has begun."""

    def __init__(
        self,
        notes: CopyNotes,
        own_log: CopyLog,
        lease: GivenLease,
        filling: CopyFilling,
        learned: asyncio.Event,
        environment: Environment,
    ) -> None:
        """`learned`: set when there may be more to apply."""
        self._notes = notes
        self._log = own_log
        self._lease = lease
        self._filling = filling
        self._learned = learned
        self._environment = environment

    async def take(self, named: Session, entries: Sequence[Entry], committed: int) -> int | None:
        """Append what follows the log, and sync it; the number to acknowledge. What does not follow is thrown away.

        Raises LogFailed, OSError.
        """
        for entry in entries:
            if not await self._until_room(named, entry) or not self._append(named, entry):
                break
        self.committed(named, committed)
        while not self._log.is_synced and self._notes.is_current(named) and not _acknowledges_early():
            async with self._log.turn:
                await self._log.sync()
        self._learned.set()
        return self.acknowledged(named)

    async def _until_room(self, named: Session, entry: Entry) -> bool:
        """False: the session has ended."""
        while not await self._log.has_room(entry):
            await self._environment.sleep(ROOM_RETRY_S)  # the disk is full; the primary does not wait for ever
            if not self._notes.is_current(named):
                return False
        return True

    def take_now(self, named: Session, entries: Sequence[Entry], committed: int) -> int | None:
        """As `take`, on this thread; only where the log takes them at once. Raises LogFailed."""
        for entry in entries:
            if not self._append(named, entry):
                break
        self.committed(named, committed)
        if self._notes.is_current(named) and not _acknowledges_early():
            self._log.sync_now()
        self._learned.set()
        return self.acknowledged(named)

    def _append(self, named: Session, entry: Entry) -> bool:
        last = self._log.log.last
        follows = session.takes(self._notes.following, named, entry.number, entry.previous, last)
        return follows and self._log.append(entry)

    def committed(self, named: Session, number: int) -> int | None:
        """Learn up to which number records are committed; the number to acknowledge."""
        last = self._log.log.last.number
        if self._notes.is_current(named):
            self._lease.hear()
            self._log.applying.heard(lacks=number > last)
        self._notes.learn_committed(named, number, last)
        self._learned.set()
        return self.acknowledged(named)

    def acknowledged(self, named: Session) -> int | None:
        """The number that is acknowledged now in that session; None: nothing may be."""
        following = self._notes.following
        if self._notes.is_filling:
            return None if self._filling.filled_to else session.acknowledged(following, named, 0)
        log = self._log.log
        told = log.last if _acknowledges_early() else log.synced
        return session.acknowledged(following, named, told.number)


def _acknowledges_early() -> bool:
    return failpoints.planted("acknowledge-before-sync")
