"""What the opening of a term asks of the copy that is to become the primary.

Owns: the promise to itself, the log that is brought up to the longest.
Promises: nothing is promised before all that the copy has granted has run out, and nothing is granted while the promise
is written. What is told of the log is durable.
Leaves to others: the rules and their order (`opening`, `kvstore.shard.term_opening`), what a hello promises
(`copy_greeting`), applying all that the log has in the end (`copy_applier`).
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.environment import Environment
from kvstore.replication import opening
from kvstore.replication.configuration import Configuration
from kvstore.replication.copy_log import ROOM_RETRY_S, CopyLog
from kvstore.replication.copy_notes import CopyNotes
from kvstore.replication.given_lease import GivenLease
from kvstore.storage.segments import Entry, Position


class OwnOpening:
    """The steps that concern this copy's own disk."""

    def __init__(self, notes: CopyNotes, own_log: CopyLog, lease: GivenLease, environment: Environment) -> None:
        self._notes = notes
        self._log = own_log
        self._lease = lease
        self._environment = environment

    def may_open(self, config: Configuration, node: str) -> opening.MayOpen:
        """Whether that map makes it primary, and when."""
        now, copy_id = self._environment.boottime_s(), self._notes.identity.copy_id
        return opening.may_open(config, node, copy_id, self._notes.following.promised, self._lease.given, now)

    async def promise(self, term: int) -> bool:
        """Promise the term for an opening of this very copy.
        False if one at least as high is promised, or what it has granted has not run out.

        While the promise is written the old primary's session goes on: it is granted nothing more. Raises TryLater,
        OSError.
        """
        async with self._log.turn:
            if term <= self._notes.following.promised or not self._lease.may_be_promoted():
                return False
            with self._lease.withheld():
                await self._notes.promise(term)
            return True

    async def position(self) -> Position:
        """Where the log ends, synced. Raises LogFailed."""
        log = self._log.log
        async with self._log.turn:
            while log.synced != log.last:
                await self._log.sync()
            return log.last

    async def extend(self, entries: Sequence[Entry]) -> Position:
        """Append what the longest log of an opening has more, and sync it. Raises NotNext, LogFailed, OSError."""
        for entry in entries:
            while not await self._log.has_room(entry):
                await self._environment.sleep(ROOM_RETRY_S)  # the disk is full
            self._log.log.extend(entry)
        return await self.position()
