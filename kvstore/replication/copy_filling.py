"""A snapshot that comes to a copy: its pages fill the file, which is nothing before it is whole.

Owns: how far the snapshot has come, which the file keeps.
Promises: each page changes the file together with how far the snapshot has come: after a lost connection or a crash it
goes on there. The file is noted as whole once it is durable with all records that the snapshot needs. Pages of another
snapshot or session are thrown away.
Leaves to others: whether a session goes on with a snapshot (`session`), the records behind it (`copy_records`,
`copy_applier`), the primary's side (`snapshot`).

    Begin, nothing to go on with -> noted: filling; the log is emptied
      -> begins: log and file as of the position -> pages -> ends: filled_to -> records up to there are applied
      -> the file is made durable -> noted: whole
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore import failpoints
from kvstore.environment import Environment, to_its_end
from kvstore.replication import chain, session
from kvstore.replication.copy_engine import CopyEngine
from kvstore.replication.copy_log import CopyLog
from kvstore.replication.copy_notes import CopyNotes
from kvstore.replication.session import Join, Session
from kvstore.storage.engine import Application, Applied, SnapshotProgress
from kvstore.storage.rows import Row
from kvstore.storage.segments import Position


class CopyFilling:
    """The filling of one copy. Whether there is one says the note (`CopyNotes.is_filling`)."""

    def __init__(
        self,
        notes: CopyNotes,
        own_log: CopyLog,
        own_engine: CopyEngine,
        learned: asyncio.Event,
        environment: Environment,
    ) -> None:
        """`learned`: set when there may be more to apply."""
        self._notes = notes
        self._log = own_log
        self._engine = own_engine
        self._learned = learned
        self._environment = environment

    @property
    def snapshot(self) -> SnapshotProgress | None:
        """How far the snapshot has come that is filling the file; None: nothing in it is of use."""
        known, applied = self._engine.applied.snapshot, self._engine.applied.position.number
        first, last = chain.known(self._log.log)
        return known if self._notes.is_filling and known is not None and first <= applied <= last else None

    @property
    def filled_to(self) -> int:
        """Once the snapshot is whole: it is good when the records up to this one are applied; 0 before."""
        snapshot = self.snapshot
        return snapshot.filled_to if snapshot is not None else 0

    def goes_on_by(self, join: Join) -> bool:
        """Pages follow until the file has all of them, and records afterwards."""
        snapshot = self.snapshot
        return snapshot is not None and join.snapshot == (not snapshot.filled_to)

    async def begins(self, named: Session, of: Applied) -> bool:
        """Replace log and file by an empty store as of that position; False: it is not taken.
        Pages of rows follow. `of`: what the primary's engine stood for when it began to read. Raises LogFailed,
        OSError.
        """
        async with self._log.turn, self._engine.turn:
            last = self._log.log.last
            if not self._notes.is_filling or not session.takes_snapshot(
                self._notes.following, named, of.position, last
            ):
                return False
            await to_its_end(self._environment, self._replace_all(of))
            return True

    async def _replace_all(self, of: Applied) -> None:
        await self._log.change(lambda: self._log.log.restart(of.position))
        await self._engine.renew()
        begun = SnapshotProgress(of.position, of.position)
        application = Application([], of.position, of.clock, of.cluster_map, of.freezes, dict(of.drops), snapshot=begun)
        await self._engine.engine.apply(application)

    async def page(
        self, named: Session, at: Position, rows: Sequence[Row], progress: SnapshotProgress | None = None
    ) -> bool:
        """Take rows of the snapshot that began at that position; False: they are of another one. Raises OSError.

        A row may be newer than the position. What the records behind it do to it again gives the same row. `progress`
        is kept with the rows.
        """
        async with self._engine.turn:
            applied = self._engine.applied
            if not self._is_of_snapshot(named, at):
                if not failpoints.planted("stale-snapshot-page"):
                    return False
                progress = None
            stamped = [row._replace(sequence=applied.clock.sequence) for row in rows]
            await self._engine.engine.apply(Application(stamped, applied.position, applied.clock, snapshot=progress))
            await self._engine.engine.checkpoint(only_if_due=True)  # all at once at the end would hold up clients
            return True

    async def ends(self, named: Session, at: Position, highest: int) -> bool:
        """The snapshot has all its rows; it is good once the records up to `highest` are applied. Raises OSError."""
        async with self._engine.turn:
            snapshot, applied = self.snapshot, self._engine.applied
            if not self._is_of_snapshot(named, at) or snapshot is None:
                return False
            is_early = failpoints.planted("whole-too-early")
            whole = snapshot._replace(filled_to=at.number if is_early else max(highest, at.number))
            await self._engine.engine.apply(Application([], applied.position, applied.clock, snapshot=whole))
            await self.note_whole()
        self._learned.set()
        return True

    def _is_of_snapshot(self, named: Session, at: Position) -> bool:
        snapshot = self.snapshot
        is_open = snapshot is not None and not snapshot.filled_to and snapshot.at == at
        return is_open and self._notes.is_current(named)

    async def note_whole(self) -> None:
        """Note, durably, that the file is whole, if it is; only with the engine's turn.
        All that it has is made durable first. Raises TryLater, OSError."""
        if not self._notes.is_filling or not self.filled_to:
            return
        if self._engine.applied.position.number >= self.filled_to <= await self._engine.engine.checkpoint():
            await self._notes.note_filling(False)
