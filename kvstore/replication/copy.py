"""A copy of a store: its parts, and what they have in common.

Owns: one copy's log, engine and notes, which its parts are given.
Promises: nothing is acknowledged before it is durable in this copy's log; nothing is applied beyond the committed
number; a promise is durable before it is answered. A copy whose file a snapshot is filling acknowledges nothing. Each
part says which of that it keeps.
Leaves to others: the rules (`session`, `lease`, `opening`), the messages (`serving`) and their connections (shard), the
primary (`kvstore.store`).

One record, in order:

    serving ─> CopyRecords.take: CopyLog.append ─> CopyLog.sync ─> acknowledged ─> serving: Ack
                 └─> committed: CopyNotes.learn_committed, `learned`
                       └─> CopyApplier.run: gather ─> apply_some ─> engine ─> checkpoint ─> old segments go

Before its first record a session begins (`CopyGreeting`), with a snapshot where records are not enough (`CopyFilling`).
`GivenLease` answers beacons beside all that. `OwnOpening` is for the day on which this copy becomes the primary.

What takes several of the turns takes them in this order: the log's, the engine's, the notes' own. What is shared is
looked at again behind each await, since a session may end, and a snapshot begin with another engine, during it.

An error of the disk under the log ends the process, as in a store: what is on the disk is not known any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvstore.environment import Environment
from kvstore.replication.configuration import Configuration
from kvstore.replication.copy_applier import CopyApplier
from kvstore.replication.copy_engine import CopyEngine
from kvstore.replication.copy_filling import CopyFilling
from kvstore.replication.copy_greeting import CopyGreeting
from kvstore.replication.copy_log import CopyLog
from kvstore.replication.copy_notes import CopyNotes
from kvstore.replication.copy_records import CopyRecords
from kvstore.replication.given_lease import GivenLease
from kvstore.replication.own_opening import OwnOpening
from kvstore.replication.places import Place, Times
from kvstore.replication.promise import Identity
from kvstore.replication.session import Following
from kvstore.storage.engine import Engine
from kvstore.storage.log import Log
from kvstore.storage.segments import Entry


class StoreCopy:
    """An open copy. `applier` applies what is committed: its `run` must run beside all else."""

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
        learned = asyncio.Event()
        self.notes = notes = CopyNotes(place, identity, environment)
        self.own_log = own_log = CopyLog(log, environment, times.sync_inline_ms_max, times.copy_apply_share)
        own_log.applying.come(sum(len(entry.payload) for entry in unapplied))
        self.own_engine = own_engine = CopyEngine(engine, place.renew, is_examined=is_examined)
        self.lease = lease = GivenLease(notes, own_log, logged, environment, times, was_served=was_served)
        self.filling = filling = CopyFilling(notes, own_log, own_engine, learned, environment)
        self.records = records = CopyRecords(notes, own_log, lease, filling, learned, environment)
        self.applier = CopyApplier(notes, own_log, own_engine, filling, records, learned, environment, times)
        self.greeting = CopyGreeting(notes, own_log, own_engine, lease, filling, records, environment)
        self.opening = OwnOpening(notes, own_log, lease, environment)

    @property
    def log(self) -> Log:
        """The copy's log."""
        return self.own_log.log

    @property
    def engine(self) -> Engine:
        """The engine of the copy's file; a snapshot begins with another one."""
        return self.own_engine.engine

    @property
    def identity(self) -> Identity:
        """Which copy this is, and what it has promised."""
        return self.notes.identity

    @property
    def following(self) -> Following:
        """The copy's side of its session."""
        return self.notes.following

    @property
    def is_filling(self) -> bool:
        """Whether a snapshot is on its way, so that the file is nothing yet."""
        return self.notes.is_filling
