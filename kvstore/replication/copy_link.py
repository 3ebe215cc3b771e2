"""A primary's connection to one copy: greeting, comparison, and the stream of records and beacons.

Owns: one connection at a time, and the order of what is sent by it.
Promises: nothing is sent before both chains are compared; what the copy lacks is sent in order. Bytes under way are
bounded. An answer of an earlier connection is never counted, because it belongs to an earlier round.
Leaves to others: what an answer changes (`sender`, by the rules of `shipping`), what is under way (`in_flight`), the
comparison (`kept_records`), the copy's end (`serving`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple, Protocol

from kvstore.environment import Environment
from kvstore.errors import DataCorrupt, LogDamaged
from kvstore.replication import lease, messages, session, shipping
from kvstore.replication.catching_up import ROOM_BYTES_MAX, CatchingUp
from kvstore.replication.digest_question import DigestQuestion
from kvstore.replication.held_lease import HeldLease
from kvstore.replication.in_flight import InFlight
from kvstore.replication.kept_records import KeptRecords
from kvstore.replication.messages import Compared, Differs, Returned, Told
from kvstore.replication.places import Times
from kvstore.replication.session import FellBehind, Forked, Join, Session
from kvstore.replication.shipping import Link, LinkKey, Shipping
from kvstore.replication.snapshot import Snapshot, Source
from kvstore.replication.snapshot_pace import never_busy
from kvstore.replication.stalls import no_syncs
from kvstore.replication.tail import Tail, cost
from kvstore.replication.wire import Connect, Refused, Wire, WireLost, WireRefused, expect, greet
from kvstore.said_once import SaidOnce
from kvstore.storage.engine import Engine, SnapshotProgress
from kvstore.storage.log import Log, Released

log = logging.getLogger(__name__)

_FRAME_BYTES = 1 << 20
_CONNECT_S = 2.0
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.02, 0.5
_DAMAGED_PAUSE_S = 10.0  # a page that cannot be sent is read again


def _ignore(damage: DataCorrupt) -> None:
    """Nobody is told."""


class Surroundings(NamedTuple):
    """What a sender needs of its store and its process.

    `on_committed`: called with the committed number whenever it has risen. `on_news`: a request has come up or has
    gone, or the term has ended; the controller is to hear of it. `is_busy`: whether clients are at work on this node.
    `on_damage`: a row that a copy was to get is damaged. `syncs`: those of all logs on this node that are under way.
    """

    log: Log
    engine: Engine
    environment: Environment
    connect: Connect
    times: Times
    on_committed: Callable[[int], None]
    on_news: Callable[[], None]
    is_busy: Callable[[], bool] = never_busy
    on_damage: Callable[[DataCorrupt], None] = _ignore
    syncs: Callable[[], frozenset[object]] = no_syncs


class Primary(Protocol):
    """The primary's side, as one of its links sees it: `sender.Sender`."""

    shipping: Shipping
    tail: Tail
    lease: HeldLease

    def may_greet(self, key: LinkKey) -> bool:
        """Whether a session with that copy may be begun now."""

    def greet(self, key: LinkKey) -> Link:
        """The link with the next round's session, of a copy that is named."""

    def begin(self, named: Session, number: int) -> None:
        """The session has begun, with the records up to `number` on the copy's disk."""

    def take_ack(self, named: Session, number: int, room_bytes: int) -> None:
        """The copy has all records up to `number` on its disk; `room_bytes` may be under way to it at once."""

    def hear_promise(self, term: int) -> None:
        """Some copy has promised that term."""


class CopyLink:
    """The link to that very copy, under that joining number."""

    def __init__(self, sender: Primary, around: Surroundings, node: str, copy_id: str, joined: int) -> None:
        self.node = node
        self.key = copy_id, joined
        self.keeps: int | None = None  # records behind that number are needed
        self.wake = asyncio.Event()
        self.in_flight = InFlight()
        self.fills = False  # a snapshot is not whole, or not good yet: the copy acknowledges nothing
        self._sender = sender
        self._around = around
        self._records = KeptRecords(around.log, around.environment)
        self._question = DigestQuestion(around.environment)
        self._catching_up: CatchingUp | None = None  # while the copy is not waited for
        self._snapshot: Snapshot | None = None  # until the copy has acknowledged a record behind it
        self._wire: Wire | None = None  # while the stream goes on
        self._has_streamed = False
        self._said = SaidOnce()

    async def run(self) -> None:
        """Stay connected, for ever."""
        pause_s = _PAUSE_MIN_S
        while True:
            await self._until_it_may_greet()
            self._has_streamed = False
            try:
                await self._one_session()
            except Refused as refused:
                if refused.promised:
                    self._sender.hear_promise(refused.promised)
            except WireRefused as refused:
                if self._said.is_news(str(refused)):
                    log.error("the copy of shard %s on node %s: %s", self._shard, self.node, refused)
            except (WireLost, TimeoutError, Released) as lost:
                log.debug("the copy on node %s: %s", self.node, lost)
            except (Forked, FellBehind) as trouble:
                log.warning("the copy of shard %s on node %s: %s", self._shard, self.node, trouble)
            except LogDamaged as damaged:
                self._records.note_damaged(damaged.number)
                log.error("records for the copy on node %s cannot be read back: %s", self.node, damaged.detail)
            except DataCorrupt as damaged:
                self._around.on_damage(damaged)
                if self._said.is_news(damaged.detail):
                    log.error("the copy of shard %s on node %s is not filled: %s", self._shard, self.node, damaged)
                await self._around.environment.sleep(_DAMAGED_PAUSE_S)
            except Exception:  # such as a record that cannot be read back; the copy is out when it has waited for long
                log.exception("shipping to the copy on node %s failed; it is tried again", self.node)
            finally:
                if self._snapshot is None:  # else it goes on, as long as the records from its beginning on are kept
                    self.keeps = None
            pause_s = _PAUSE_MIN_S if self._has_streamed else min(2 * pause_s, _PAUSE_MAX_S)
            await self._around.environment.sleep(pause_s)

    @property
    def _shard(self) -> str:
        return self._sender.shipping.config.shard

    async def _until_it_may_greet(self) -> None:
        while not self._sender.may_greet(self.key):
            self.wake.clear()
            await self._around.environment.wait_for(self.wake.wait(), _PAUSE_MAX_S)

    async def _one_session(self) -> None:
        sender = self._sender
        link = sender.greet(self.key)
        async with asyncio.timeout(_CONNECT_S):
            wire = await self._around.connect(self.node, link.session)
        try:
            async with asyncio.timeout(_CONNECT_S):
                told = await greet(wire, link.session)
                join, resumes = await self._compare(wire, told)
                await wire.send(messages.Begin(told.position, join, resumes))
            self.fills = join.snapshot or resumes is not None
            ack = await expect(wire, messages.Ack)  # a long log takes a while to cut
            if join.snapshot:
                sent = await self._send_snapshot(wire, resumes)
            else:
                sent = self.keeps = join.common
                if resumes is None:
                    self._snapshot = None
            self.in_flight.begin(sent)
            sender.begin(link.session, min(ack.number, sent))
            await self._stream(wire, link.session)
        finally:
            await wire.close()

    async def _send_snapshot(self, wire: Wire, resumes: SnapshotProgress | None) -> int:
        """All rows that it lacks; the number of the record behind which the stream goes on.
        Raises DataCorrupt if one is damaged here, FellBehind, WireLost, Refused."""
        around, is_kept = self._around, self._records.has_all_behind
        environment = around.environment
        source = Source(around.log, around.engine, environment, around.times, is_kept, around.is_busy)
        since_s = self._snapshot.since_s if self._snapshot is not None else environment.monotonic_s()
        self._snapshot = Snapshot(wire, source, since_s, resumes)
        self.keeps = self._snapshot.progress.at.number
        try:
            await self._snapshot.send()
        except WireLost:
            self._snapshot.check_rows()
            raise
        return self.keeps

    async def _compare(self, wire: Wire, told: Told) -> tuple[Join, SnapshotProgress | None]:
        """How the copy gets what it lacks, and the snapshot that goes on. Raises Forked, FellBehind, WireLost,
        Refused."""
        resumes = await self._records.goes_on(told.snapshot, self._around.engine)
        common = None
        if not told.filling or (resumes is not None and resumes.filled_to):
            common = await self._records.common(wire, told)
        link = self._sender.shipping.link(*self.key)
        if link is None:
            raise WireLost("the copy is out")
        if resumes is not None and not resumes.filled_to and not link.waited:
            said = "the snapshot for the copy of shard %s on node %s goes on: %d of %d rows are there"
            log.info(said, self._shard, self.node, resumes.rows, resumes.total)
            return Join(resumes.at.number, snapshot=True), resumes
        join = session.how_to_join(
            common, told.position.number, told.applied, awaited=link.waited > 0, first_kept=self._records.first
        )
        return join, None if join.snapshot else resumes

    # --- the stream

    async def _stream(self, wire: Wire, named: Session) -> None:
        self._wire = wire
        self._has_streamed = True
        streams = self._write(wire, named), self._beat(wire, named), self._read(wire, named)
        works = [self._around.environment.spawn(work) for work in streams]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._wire = None
            self._question.lose()
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
        for work in works:
            if not work.cancelled():
                work.result()

    async def _write(self, wire: Wire, named: Session) -> None:
        """Send what is appended, in the turn of the loop in which this is woken."""
        catching_up = CatchingUp(self._around.times.catch_up_share)
        while (link := shipping.find(self._sender.shipping, named)) is not None:
            self._catching_up = None if link.waited else catching_up
            if self._has_more() and shipping.may_send(self._sender.shipping, link):
                if self._catching_up is not None and (pause_s := catching_up.take_pause()):
                    await self._around.environment.sleep(pause_s)
                    continue
                await self._send_records(wire)
            else:
                self.wake.clear()
                await self.wake.wait()
        raise WireLost("the copy is out")

    async def _beat(self, wire: Wire, named: Session) -> None:
        """Send beacons as long as they may be sent."""
        sender, environment = self._sender, self._around.environment
        lease_s = self._around.times.lease_s
        every_s = lease.beacon_every_s(lease_s)
        while (link := shipping.find(sender.shipping, named)) is not None:
            if shipping.may_send(sender.shipping, link) and sender.lease.may_ask(now := environment.boottime_s()):
                beacon = self.in_flight.beacon(now)
                await wire.send(messages.Beacon(beacon, sender.shipping.committed, lease_s))
            await environment.sleep(every_s)
        raise WireLost("the copy is out")

    def _has_more(self) -> bool:
        """Whether there are records that the copy has room for."""
        has_room = self.in_flight.bytes < self.room_bytes or self.fills
        return self.in_flight.sent < self._sender.shipping.last and has_room

    @property
    def room_bytes(self) -> int:
        """How many bytes may be under way; a copy that lacks no more of them is nearly there."""
        return self._catching_up.room_bytes if self._catching_up is not None else ROOM_BYTES_MAX

    async def _send_records(self, wire: Wire) -> None:
        frame_bytes = self._catching_up.frame_bytes if self._catching_up is not None else _FRAME_BYTES
        sent, tail = self.in_flight.sent, self._sender.tail
        entries = tail.after(sent, frame_bytes) or await self._records.after(sent, frame_bytes)
        if not entries:
            raise WireLost(f"the records behind {sent} cannot be read back")
        size, now = sum(map(cost, entries)), self._around.environment.boottime_s()
        self.in_flight.records(entries[-1].number, size, now)
        if self._catching_up is not None:
            self._catching_up.sent(size, tail.come_bytes, now)
            if self.fills:  # such a copy acknowledges nothing: the pause is for what applying takes
                self._catching_up.acknowledged(now)
        await wire.send(messages.Records(entries, self._sender.shipping.committed))

    async def _read(self, wire: Wire, named: Session) -> None:
        sender, environment = self._sender, self._around.environment
        while True:
            message = await wire.receive()
            match message:
                case messages.Ack():
                    self._note_ack(message.number, environment.boottime_s())
                    sender.take_ack(named, message.number, self.room_bytes)
                    if self._has_more():
                        self.wake.set()
                case messages.Granted():
                    asked_s = self.in_flight.granted(message.number, now := environment.boottime_s())
                    if asked_s is None:
                        raise WireLost("the copy grants what was not asked for")
                    sender.lease.take(named, asked_s, now)
                case messages.Compared():
                    self._question.take(message)
                case messages.Deposed():
                    raise Refused(message.promised)
                case _:
                    raise WireLost(f"{type(message).__name__} came in the stream")

    def _note_ack(self, number: int, now: float) -> None:
        has_all = self.in_flight.acked(number, now)
        if has_all and self._catching_up is not None:
            self._catching_up.acknowledged(now)
        if number:  # a copy that is being filled acknowledges nothing
            self._snapshot, self.fills = None, False

    # --- what others ask of it

    @property
    def is_streaming(self) -> bool:
        """Whether records and beacons reach the copy, as far as is known."""
        return self._wire is not None

    @property
    def needs(self) -> int | None:
        """While the copy joins: records behind that number must be kept for it."""
        link = self._sender.shipping.link(*self.key)
        if link is None or self.keeps is None or (link.waited and link.acked >= link.waited - 1):
            return None
        return max(self.keeps, link.acked)

    @property
    def progress(self) -> tuple[int, int] | None:
        """(rows sent, rows there are) of the snapshot that this primary sends.
        None without one, and once all are sent."""
        if self._snapshot is None or self._snapshot.is_sent:
            return None
        return self._snapshot.progress.rows, self._snapshot.progress.total

    async def compare(self, number: int, partitions: list[int]) -> Compared | None:
        """What the copy answers if it is asked for the digest of these partitions as of that record; None: nothing."""
        return await self._question.ask(self._wire, number, partitions) if self._wire is not None else None

    async def tell(self, message: Returned | Differs) -> None:
        """Send what needs no answer, and may be lost."""
        if self._wire is not None:
            with contextlib.suppress(WireLost):
                await self._wire.send(message)
