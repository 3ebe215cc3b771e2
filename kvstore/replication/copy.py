"""A copy of a store.
It takes a primary's records into its own log, syncs them, and applies what is committed.

Owns: one copy's log, engine and promise, and the order of what is done to them; the grant that it gave.
Promises: nothing is acknowledged before it is durable in this copy's log; nothing is applied beyond the committed
number; a promise is durable before it is answered. A copy whose file a snapshot is filling acknowledges nothing. Each
page changes the file together with how far the snapshot has come: after a lost connection or a crash it goes on there.
Leaves to others: the rules (`session`, `lease`), the messages and their connections (shard), the primary (`store`).

    records ─> take: append to the log ─> sync ─> Ack           `copy_log` says where the sync runs
                                          └─> committed ─> apply, in bulk ─> checkpoint ─> old segments go

An error of the disk under the log ends the process, as in a store: what is on the disk is not known any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence, Set
from functools import partial
from typing import Any, NamedTuple

from kvstore import failpoints
from kvstore.environment import Environment, to_its_end
from kvstore.errors import DataCorrupt
from kvstore.replication import chain, lease, opening, session
from kvstore.replication.configuration import Configuration
from kvstore.replication.copy_log import CopyLog
from kvstore.replication.places import Place, Times
from kvstore.replication.promise import Identity, room_may_come, write_identity
from kvstore.replication.session import Following, Join, Session
from kvstore.storage.engine import Application, Applied, Digest, Engine, SnapshotProgress, TryLater
from kvstore.storage.log import Log
from kvstore.storage.replay import replay
from kvstore.storage.rows import Row
from kvstore.storage.segments import BEGINNING, Entry, Position

log = logging.getLogger(__name__)

_CLEANED_ROWS_MAX = 500  # in one step
_APPLIED_RECORDS_MAX, _HANDED_BYTES_MAX = 1000, 8 << 20
_RETRY_S = 0.5


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


class StoreCopy:
    """An open copy. `run` applies what is committed, and must run beside all else."""

    def __init__(
        self,
        place: Place,
        identity: Identity,
        log: Log,
        engine: Engine,
        logged: Configuration | None,
        environment: Environment,
        times: Times,
        *,
        was_served: bool = False,
        is_examined: bool = False,
        unapplied: Sequence[Entry] = (),
    ) -> None:
        """`was_served`: by this process until now, so its grants have run out. `unapplied`: what the file lacks."""
        self._place = place
        self._identity = identity
        self._log = CopyLog(log, environment, times.sync_inline_ms_max, times.copy_apply_share)
        self._log.applying.come(sum(len(entry.payload) for entry in unapplied))
        self.engine = engine
        self._environment = environment
        self._times = times
        self._following = Following(identity.store_id, identity.copy_id, identity.promised)
        now = environment.boottime_s()
        given = lease.granted_at_start(logged, identity.copy_id, identity.promised, now, times.lease_s)
        self._given = lease.Granted(now) if was_served else given
        self._heard_at = now
        self._is_promising = False  # for its own opening
        self._applying = asyncio.Lock()  # held by what changes the engine
        self._writing = asyncio.Lock()  # held by what changes the identity; innermost
        self._learned = asyncio.Event()
        self._cleaned_floor = 0  # no tombstone up to that sequence is left in the file
        self._examined = engine if is_examined else None  # that was found to be whole

    # --- what others ask of it

    @property
    def log(self) -> Log:
        """The copy's log."""
        return self._log.log

    @property
    def following(self) -> Following:
        """The copy's side of its session."""
        return self._following

    @property
    def silent_s(self) -> float:
        """For how many seconds the copy has not heard its primary."""
        return self._environment.boottime_s() - self._heard_at

    @property
    def is_filling(self) -> bool:
        """Whether a snapshot is on its way, so that the file is nothing yet."""
        return self._identity.filling

    @property
    def snapshot(self) -> SnapshotProgress | None:
        """How far the snapshot has come that is filling the file; None: nothing in it is of use."""
        known, applied = self.engine.applied.snapshot, self.engine.applied.position.number
        first, last = chain.known(self.log)
        return known if self.is_filling and known is not None and first <= applied <= last else None

    @property
    def _filled_to(self) -> int:
        """Once the snapshot is whole: it is good when the records up to this one are applied; 0 before."""
        snapshot = self.snapshot
        return snapshot.filled_to if snapshot is not None else 0

    @property
    def identity(self) -> Identity:
        """Which copy this is, and what it has promised."""
        return self._identity

    def may_open(self, config: Configuration, node: str) -> opening.MayOpen:
        """Whether that map makes it primary, and when."""
        now = self._environment.boottime_s()
        return opening.may_open(config, node, self.identity.copy_id, self._following.promised, self._given, now)

    async def hand_over(self) -> Identity:
        """Apply all records, whether or not they are known to be committed: the term that begins has them all.

        Nothing else may use the copy from now on. Raises DataCorrupt, LogDamaged, OSError.
        """
        while True:
            try:
                if self.engine.applied.position.number < self.log.last.number:
                    await self.examine()
                async with self._log.turn, self._applying:
                    await self._log.sync()
                    while (applied := self.engine.applied.position.number) < self.log.last.number:
                        read = partial(chain.some_entries, self.log, applied, _HANDED_BYTES_MAX)
                        await replay(self.engine, await self._environment.in_thread(read))
                    return self._identity
            except TryLater as error:
                await self._wait_for_the_file(error)

    async def _wait_for_the_file(self, error: TryLater) -> None:
        """Nothing can be applied now, such as on a full disk."""
        log.warning("applying to a copy's file waits: %s", error.detail)
        await self._environment.sleep(_RETRY_S)

    def may_be_promoted(self) -> bool:
        """Whether what the copy has granted has run out."""
        return lease.may_be_promoted(self._given, self._environment.boottime_s())

    # --- the beginning of a session

    async def hello(self, hello: Session) -> Told | None:
        """Promise the primary's term, and tell where the log ends; None: it is meant for another copy.

        Raises Deposed, TryLater, LogFailed, OSError.
        """
        async with self._log.turn:
            said = session.on_hello(self._following, hello)
            if said == "promise":
                await self._write(promised=hello.term)
                said = "tell"
            if said == "deposed":
                raise Deposed(self._following.promised)
            if said == "foreign":
                return None
            while (position := session.position_to_tell(self.log.last, self.log.synced)) is None:
                await self._log.sync()
            self._heard_at = self._environment.boottime_s()
            applied, known = self.engine.applied.position.number, chain.known(self.log)
            return Told(hello, position, applied, known, self.is_filling, self.snapshot)

    async def promise(self, term: int) -> bool:
        """Promise the term for an opening of this very copy.
        False if one at least as high is promised, or what it has granted has not run out.

        While the promise is written the old primary's session goes on: it is granted nothing more. Raises TryLater,
        OSError.
        """
        async with self._log.turn:
            if term <= self._following.promised or not self.may_be_promoted():
                return False
            self._is_promising = True
            try:
                await self._write(promised=term)
            finally:
                self._is_promising = False
            return True

    async def position(self) -> Position:
        """Where the log ends, synced. Raises LogFailed."""
        async with self._log.turn:
            while self.log.synced != self.log.last:
                await self._log.sync()
            return self.log.last

    async def extend(self, entries: Sequence[Entry]) -> Position:
        """Append what the longest log of an opening has more, and sync it. Raises NotNext, LogFailed, OSError."""
        for entry in entries:
            while not await self._log.has_room(entry):
                await self._environment.sleep(_RETRY_S)  # the disk is full
            self.log.extend(entry)
        return await self.position()

    async def checksums(self, numbers: Sequence[int]) -> dict[int, int]:
        """The checksums of these records, and of the one before the first that is kept; others are left out."""
        return await self._environment.in_thread(lambda: chain.checksums(self.log, numbers))

    async def begin(
        self, named: Session, told: Position, join: Join, resumes: SnapshotProgress | None = None
    ) -> int | None:
        """Cut off what differs, and begin the session; the number to acknowledge, None if nothing is begun.

        `resumes`: the snapshot that goes on with the session. Raises LogFailed, OSError.
        """
        async with self._log.turn, self._applying:
            if not session.begins(self._following, named, told, self.log.last):
                return None
            if join.snapshot and resumes is None:
                await self._write(filling=True)
                await self._log.change(lambda: self.log.restart(BEGINNING))
            elif resumes != self.snapshot or (self.is_filling and not self._goes_on_by(join)):
                return None  # pages have come since, or records are of no use to a file that is not whole
            elif join.common < self.log.last.number:  # also of a file that lost its last pages with the power
                await self._log.change(lambda: self.log.cut(join.common))
            self._following = session.begun(self._following, named)
            return 0 if self.is_filling else self._acknowledged(named)

    def _goes_on_by(self, join: Join) -> bool:
        """Pages follow until the file has all of them, and records afterwards."""
        snapshot = self.snapshot
        return snapshot is not None and join.snapshot == (not snapshot.filled_to)

    # --- records

    async def records(self, named: Session, entries: Sequence[Entry], committed: int) -> int | None:
        """Append what follows the log, and sync it; the number to acknowledge. What does not follow is thrown away.

        Raises LogFailed, OSError.
        """
        for entry in entries:
            if not await self._until_room(named, entry) or not self._append(named, entry):
                break
        self.committed(named, committed)
        while not self._log.is_synced and session.is_current(self._following, named):
            async with self._log.turn:
                await self._log.sync()
        self._learned.set()
        return self._acknowledged(named)

    async def _until_room(self, named: Session, entry: Entry) -> bool:
        """False: the session has ended."""
        while not await self._log.has_room(entry):
            await self._environment.sleep(_RETRY_S)  # the disk is full; the primary does not wait for ever
            if not session.is_current(self._following, named):
                return False
        return True

    def takes_at_once(self, entries: Sequence[Entry]) -> bool:
        """Whether `records_now` may be called."""
        return self._log.takes_at_once(entries)

    def records_now(self, named: Session, entries: Sequence[Entry], committed: int) -> int | None:
        """As `records`, on this thread. Raises LogFailed."""
        for entry in entries:
            if not self._append(named, entry):
                break
        self.committed(named, committed)
        if session.is_current(self._following, named):
            self._log.sync_now()
        self._learned.set()
        return self._acknowledged(named)

    def _append(self, named: Session, entry: Entry) -> bool:
        follows = session.takes(self._following, named, entry.number, entry.previous, self.log.last)
        return follows and self._log.append(entry)

    def committed(self, named: Session, number: int) -> int | None:
        """Learn up to which number records are committed; the number to acknowledge."""
        if session.is_current(self._following, named):
            self._heard_at = self._environment.boottime_s()
            self._log.applying.heard(lacks=number > self.log.last.number)
        self._following = session.learn_committed(self._following, named, number, self.log.last.number)
        self._learned.set()
        return self._acknowledged(named)

    def _acknowledged(self, named: Session) -> int | None:
        if self.is_filling:
            return None if self._filled_to else session.acknowledged(self._following, named, 0)
        return session.acknowledged(self._following, named, self.log.synced.number)

    # --- the lease

    def beacon(self, named: Session) -> bool:
        """Grant the primary its lease; False: the beacon is not answered."""
        now = self._environment.boottime_s()
        if self._is_promising or not lease.grants(
            self._following, named, self._log.sync_since, now, self._times.disk_stall_s
        ):
            return False
        self._heard_at = now
        self._given = lease.granted(self._given, now, self._times.lease_s)
        return True

    def returned(self, named: Session) -> None:
        """The primary of that session has given its lease back."""
        self._given = lease.returned(self._given, self._following, named, self._environment.boottime_s())

    # --- applying

    async def run(self) -> None:
        """Apply what is committed, for ever. Raises DataCorrupt, LogDamaged, OSError."""
        while True:
            await self._learned.wait()
            await self._log.gather(self._times.apply_delay_s)
            self._learned.clear()
            await self._log.keep_spare()
            try:
                while await self.apply_some() or await self.clean_some():
                    await self._log.rest()
            except TryLater as error:
                await self._wait_for_the_file(error)
                self._learned.set()
                continue
            if self.is_filling and self._filled_to:
                await self._environment.sleep(_RETRY_S)  # the file could not be made durable, or records are to come
                self._learned.set()

    @property
    def is_examined(self) -> bool:
        """Whether the file was found to be whole, so that more may be written into it."""
        return self._examined is self.engine

    def note_examined(self) -> None:
        """The file was found to be whole."""
        self._examined = self.engine

    async def examine(self) -> None:
        """Once, before anything is applied, or others are taken out for what this copy has.

        Raises DataCorrupt: what is written into a damaged file damages more.
        """
        engine = self.engine
        if self._examined is engine:
            return
        if wrong := (await engine.verify(None)).faults:
            raise DataCorrupt(f"The file of this copy is damaged ({wrong[0].detail}).")
        self._examined = engine

    async def apply_some(self) -> int:
        """Apply some records that are committed; how many. Raises DataCorrupt, LogDamaged, OSError."""
        if session.may_apply(self._following) > self.engine.applied.position.number:
            await self.examine()
        async with self._applying:
            return await self._apply_up_to(session.may_apply(self._following))

    async def _apply_up_to(self, number: int) -> int:
        applied = self.engine.applied.position.number
        if self.is_filling and not self._filled_to:
            return 0
        last = min(number, self.log.synced.number, applied + _APPLIED_RECORDS_MAX)  # more may be committed elsewhere
        if last <= applied:
            await self._is_filled()
            return 0
        read = partial(chain.some_entries, self.log, applied, self._log.applying.piece_bytes)
        entries = [entry for entry in await self._environment.in_thread(read) if entry.number <= last]
        await replay(self.engine, entries)
        self._log.applying.applied(sum(len(entry.payload) for entry in entries))
        await self._is_filled()
        durable = await self.engine.checkpoint(only_if_due=True)
        if durable:
            await self._environment.in_thread(lambda: self.log.release(durable))
        return len(entries)

    async def digest_at(self, named: Session, number: int, partitions: Set[int]) -> Digest | None:
        """The digest of these partitions as of that record, applied up to there now; None if that cannot be.

        `number`: it is committed. Raises DataCorrupt, LogDamaged, OSError.
        """
        self.committed(named, number)
        await self.examine()
        async with self._applying:
            if self.is_filling or not session.is_current(self._following, named):
                return None
            while self.engine.applied.position.number < number and await self._apply_up_to(number):
                pass
            at, digest = await self.engine.digest(partitions)
            return digest if at == number else None

    async def clean_some(self) -> int:
        """Remove some rows that drops or the tombstones' floor cover, as the primary does in its file; how many."""
        async with self._applying:
            applied = self.engine.applied
            if self.is_filling or not (applied.drops or applied.clock.tombstones_floor > self._cleaned_floor):
                return 0
            removed = await self.engine.clean(_CLEANED_ROWS_MAX)
            if not removed:
                self._cleaned_floor = applied.clock.tombstones_floor
            return removed

    # --- a snapshot

    async def snapshot_begins(self, named: Session, of: Applied) -> bool:
        """Replace log and file by an empty store as of that position; False: it is not taken.
        Pages of rows follow. `of`: what the primary's engine stood for when it began to read. Raises LogFailed,
        OSError.
        """
        async with self._log.turn, self._applying:
            if not self.is_filling or not session.takes_snapshot(self._following, named, of.position, self.log.last):
                return False
            await to_its_end(self._environment, self._replace_all(of))
            return True

    async def _replace_all(self, of: Applied) -> None:
        await self._log.change(lambda: self.log.restart(of.position))
        await self.engine.close()
        self.engine = self._examined = await self._place.renew()
        begun = SnapshotProgress(of.position, of.position)
        application = Application([], of.position, of.clock, of.cluster_map, of.freezes, dict(of.drops), snapshot=begun)
        await self.engine.apply(application)

    async def snapshot_page(
        self, named: Session, at: Position, rows: Sequence[Row], progress: SnapshotProgress | None = None
    ) -> bool:
        """Take rows of the snapshot that began at that position; False: they are of another one. Raises OSError.

        A row may be newer than the position. What the records behind it do to it again gives the same row.
        """
        async with self._applying:
            applied = self.engine.applied
            if not self._is_of_snapshot(named, at):
                if not failpoints.planted("stale-snapshot-page"):
                    return False
                progress = None
            stamped = [row._replace(sequence=applied.clock.sequence) for row in rows]
            await self.engine.apply(Application(stamped, applied.position, applied.clock, snapshot=progress))
            await self.engine.checkpoint(only_if_due=True)  # all that came at once at the end would hold up clients
            return True

    async def snapshot_ends(self, named: Session, at: Position, highest: int) -> bool:
        """The snapshot has all its rows; it is good once the records up to `highest` are applied. Raises OSError."""
        async with self._applying:
            snapshot, applied = self.snapshot, self.engine.applied
            if not self._is_of_snapshot(named, at) or snapshot is None:
                return False
            whole = snapshot._replace(filled_to=max(highest, at.number))
            await self.engine.apply(Application([], applied.position, applied.clock, snapshot=whole))
            await self._is_filled()
        self._learned.set()
        return True

    def _is_of_snapshot(self, named: Session, at: Position) -> bool:
        snapshot = self.snapshot
        is_open = snapshot is not None and not snapshot.filled_to and snapshot.at == at
        return is_open and session.is_current(self._following, named)

    async def _is_filled(self) -> None:
        """Note, durably, that the file is whole, if it is; all that it has is made durable first."""
        if not self.is_filling or not self._filled_to:
            return
        if self.engine.applied.position.number >= self._filled_to <= await self.engine.checkpoint():
            await self._write(filling=False)

    async def _write(self, **changes: Any) -> None:
        """Make them durable, and the promise that is among them true, whatever becomes of the caller."""
        await to_its_end(self._environment, self._write_now(changes))

    async def _write_now(self, changes: dict[str, Any]) -> None:
        async with self._writing:
            place, identity = self._place, self._identity._replace(**changes)
            write = partial(write_identity, place.disk, place.folder, place.store, identity)
            with room_may_come():
                if "filling" in changes or not failpoints.planted("promise-not-durable"):
                    await self._environment.in_thread(write)
            self._identity, self._following = identity, session.promise(self._following, identity.promised)
