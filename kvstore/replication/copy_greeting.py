"""How a session with a copy begins: the hello, the comparison of the chains, the cut.

Owns: the order of these steps at the copy.
Promises: the term of a hello is promised, durably, and the log is synced, before the hello is answered. A session
begins only with a log that is still the one that was told of.
Leaves to others: the rules (`session`), the comparison (the primary: `kept_records`), the messages (`serving`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.environment import Environment
from kvstore.replication import chain, session
from kvstore.replication.copy_engine import CopyEngine
from kvstore.replication.copy_filling import CopyFilling
from kvstore.replication.copy_log import CopyLog
from kvstore.replication.copy_notes import CopyNotes
from kvstore.replication.copy_records import CopyRecords
from kvstore.replication.given_lease import GivenLease
from kvstore.replication.session import Join, Session
from kvstore.storage.engine import SnapshotProgress
from kvstore.storage.segments import BEGINNING, Position


class Told(NamedTuple):
    """A copy's answer to a hello: where its log ends, and up to where its file is applied.
    `known`: the first and the last number whose checksum it can tell, for the comparison of the chains. `filling`:
    whatever lies there is not whole, so the two logs have no number in common; `snapshot`: unless that one goes on."""

    session: Session
    position: Position
    applied: int
    known: tuple[int, int]
    filling: bool = False
    snapshot: SnapshotProgress | None = None


class Deposed(Exception):
    """The copy has promised a higher term than the sender's, which must follow the next map."""

    def __init__(self, promised: int) -> None:
        super().__init__(f"this copy has promised term {promised}")
        self.promised = promised


class CopyGreeting:
    """Answers the primaries that begin a session."""

    def __init__(
        self,
        notes: CopyNotes,
        own_log: CopyLog,
        own_engine: CopyEngine,
        lease: GivenLease,
        filling: CopyFilling,
        records: CopyRecords,
        environment: Environment,
    ) -> None:
        self._notes = notes
        self._log = own_log
        self._engine = own_engine
        self._lease = lease
        self._filling = filling
        self._records = records
        self._environment = environment

    async def hello(self, hello: Session) -> Told | None:
        """Promise the primary's term, and tell where the log ends; None: it is meant for another copy.

        Raises Deposed, TryLater, LogFailed, OSError.
        """
        notes, log = self._notes, self._log.log
        async with self._log.turn:
            said = session.on_hello(notes.following, hello)
            if said == "promise":
                await notes.promise(hello.term)
                said = "tell"
            if said == "deposed":
                raise Deposed(notes.following.promised)
            if said == "foreign":
                return None
            while (position := session.position_to_tell(log.last, log.synced)) is None:
                await self._log.sync()
            self._lease.hear()
            applied, known = self._engine.applied.position.number, chain.known(log)
            return Told(hello, position, applied, known, notes.is_filling, self._filling.snapshot)

    async def checksums(self, numbers: Sequence[int]) -> dict[int, int]:
        """The checksums of these records, and of the one before the first that is kept; others are left out."""
        return await self._environment.in_thread(lambda: chain.checksums(self._log.log, numbers))

    async def begin(
        self, named: Session, told: Position, join: Join, resumes: SnapshotProgress | None = None
    ) -> int | None:
        """Cut off what differs, and begin the session; the number to acknowledge, None if nothing is begun.

        `resumes`: the snapshot that goes on with the session. Raises LogFailed, OSError.
        """
        notes, log, filling = self._notes, self._log.log, self._filling
        async with self._log.turn, self._engine.turn:
            if not session.begins(notes.following, named, told, log.last):
                return None
            if join.snapshot and resumes is None:
                await notes.note_filling(True)
                await self._log.change(lambda: log.restart(BEGINNING))
            elif resumes != filling.snapshot or (notes.is_filling and not filling.goes_on_by(join)):
                return None  # pages have come since, or records are of no use to a file that is not whole
            elif join.common < log.last.number:  # also of a file that lost its last pages with the power
                await self._log.change(lambda: log.cut(join.common))
            notes.begin(named)
            return 0 if notes.is_filling else self._records.acknowledged(named)
