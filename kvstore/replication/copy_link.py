"""A primary's connection to one copy: greeting, comparison, and the stream of records and beacons.

Owns: one connection at a time, what was sent by it, how long the copy has owed an answer.
Promises: nothing is sent before both chains are compared; what the copy lacks is sent in order. Bytes under way are
bounded. An answer of an earlier connection is never counted, because it belongs to an earlier round.
Leaves to others: what an answer changes (`sender`, by the rules of `shipping`), the copy's end (`serving`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from kvstore.environment import Environment
from kvstore.errors import LogDamaged
from kvstore.replication import chain, lease, messages, patience, session, shipping
from kvstore.replication.catching_up import ROOM_BYTES_MAX, CatchingUp
from kvstore.replication.messages import Told
from kvstore.replication.places import Times
from kvstore.replication.session import FellBehind, Forked, Join, Session
from kvstore.replication.shipping import Link, Shipping
from kvstore.replication.snapshot import Snapshot
from kvstore.replication.tail import RECORD_BYTES, Tail, cost
from kvstore.replication.wire import Connect, Refused, Wire, WireLost, WireRefused, expect, greet
from kvstore.storage.engine import Digest, Engine, SnapshotProgress
from kvstore.storage.log import Log, Released
from kvstore.storage.segments import Entry

log = logging.getLogger(__name__)

_FRAME_BYTES = 1 << 20
_CONNECT_S = 2.0
_COMPARE_S = 10.0
_PAUSE_MIN_S, _PAUSE_MAX_S = 0.02, 0.5
_PROBES = 16


LinkKey = tuple[str, int]
"""A copy's id and its joining number."""


class Surroundings(NamedTuple):
    """What a sender needs of its store and its process.

    `on_committed`: called with the committed number whenever it has risen. `on_news`: a request has come up or has
    gone, or the term has ended; the controller is to hear of it.
    """

    log: Log
    engine: Engine
    environment: Environment
    connect: Connect
    times: Times
    on_committed: Callable[[int], None]
    on_news: Callable[[], None]


class Primary(Protocol):
    """The primary's side, as one of its links sees it: `sender.Sender`."""

    shipping: Shipping
    tail: Tail

    def link(self, key: LinkKey) -> Link | None: ...

    def may_greet(self, key: LinkKey) -> bool: ...

    def greet(self, key: LinkKey) -> Link: ...

    def may_ask(self) -> bool: ...

    def begin(self, named: Session, number: int) -> None: ...

    def take_ack(self, named: Session, number: int) -> None: ...

    def take_grant(self, named: Session, asked_s: float) -> None: ...

    def hear_promise(self, term: int) -> None: ...


class CopyLink:
    """The link to that very copy, under that joining number."""

    def __init__(self, sender: Primary, around: Surroundings, node: str, copy_id: str, joined: int) -> None:
        self.node = node
        self.key = copy_id, joined
        self.patience = patience.Patience()
        self.keeps: int | None = None  # records behind that number are needed
        self.wake = asyncio.Event()
        self._sender = sender
        self._around = around
        self._sent = 0
        self._under_way: deque[tuple[int, int]] = deque()  # of each frame: its last number, its bytes
        self._bytes_under_way = 0
        self._catching_up: CatchingUp | None = None  # while the copy is not waited for, and is not being filled
        self._fills = False  # a snapshot is not whole, or not good yet: the copy acknowledges nothing
        self._beacons: dict[int, float] = {}
        self._beacon = 0
        self._wire: Wire | None = None  # while the stream goes on
        self._has_streamed = False
        self._compared: asyncio.Future[Digest | None] | None = None  # what the copy will tell
        self._asked = 0
        self._snapshot: Snapshot | None = None  # until the copy has acknowledged a record behind it
        self._said = ""
        self._readable_from = 0  # records before that number cannot be read back

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
                self._say(str(refused))
            except (WireLost, TimeoutError, Released) as lost:
                log.debug("the copy on node %s: %s", self.node, lost)
            except (Forked, FellBehind) as trouble:
                log.warning(
                    "the copy of shard %s on node %s: %s", self._sender.shipping.config.shard, self.node, trouble
                )
            except LogDamaged as damaged:  # what lies behind that record can be sent, and all of it as a snapshot
                self._readable_from = max(self._readable_from, damaged.number + 1)
                log.error("records for the copy on node %s cannot be read back: %s", self.node, damaged.detail)
            except Exception:  # such as a record that cannot be read back; the copy is out when it has waited for long
                log.exception("shipping to the copy on node %s failed; it is tried again", self.node)
            finally:
                if self._snapshot is None:  # else it goes on, as long as the records from its beginning on are kept
                    self.keeps = None
            pause_s = _PAUSE_MIN_S if self._has_streamed else min(2 * pause_s, _PAUSE_MAX_S)
            await self._around.environment.sleep(pause_s)

    def _say(self, why: str) -> None:
        """Once, and not at every try."""
        if why != self._said:
            self._said = why
            log.error("the copy of shard %s on node %s: %s", self._sender.shipping.config.shard, self.node, why)

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
            self._fills = join.snapshot or resumes is not None
            ack = await expect(wire, messages.Ack)  # a long log takes a while to cut
            if join.snapshot:
                self._sent = await self._send_snapshot(wire, resumes)
            else:
                self._sent = self.keeps = join.common
                if resumes is None:
                    self._snapshot = None
            sender.begin(link.session, min(ack.number, self._sent))
            await self._stream(wire, link.session)
        finally:
            await wire.close()

    async def _send_snapshot(self, wire: Wire, resumes: SnapshotProgress | None) -> int:
        """All rows that it lacks; the number of the record behind which the stream goes on."""
        engine, environment = self._around.engine, self._around.environment
        times = self._around.times
        self._snapshot = Snapshot(wire, engine, environment, lambda at: at + 1 >= self._first_kept, times, resumes)
        self.keeps = self._snapshot.progress.at.number
        await self._snapshot.send()
        return self.keeps

    @property
    def progress(self) -> tuple[int, int] | None:
        """Of a snapshot: rows sent, and rows there are."""
        return (self._snapshot.progress.rows, self._snapshot.progress.total) if self._snapshot is not None else None

    async def _compare(self, wire: Wire, told: Told) -> tuple[Join, SnapshotProgress | None]:
        """How the copy gets what it lacks, and the snapshot that goes on. Raises Forked, FellBehind, WireLost,
        Refused."""
        resumes = await self._goes_on(told)
        common = None
        if not told.filling or (resumes is not None and resumes.filled_to):
            common = await self._common(wire, told)
        link = self._sender.link(self.key)
        if link is None:
            raise WireLost("the copy is out")
        if resumes is not None and not resumes.filled_to and not link.waited:
            said = "the snapshot for the copy of shard %s on node %s goes on: %d of %d rows are there"
            log.info(said, self._sender.shipping.config.shard, self.node, resumes.rows, resumes.total)
            return Join(resumes.at.number, snapshot=True), resumes
        join = session.how_to_join(
            common, told.position.number, told.applied, awaited=link.waited > 0, first_kept=self._first_kept
        )
        return join, None if join.snapshot else resumes

    async def _goes_on(self, told: Told) -> SnapshotProgress | None:
        """The snapshot that broke off before, if it goes on."""
        if told.snapshot is None:
            return None
        read = partial(chain.checksums, self._around.log, [told.snapshot.seen.number])
        ours = await self._around.environment.in_thread(read)
        applied = self._around.engine.applied.position.number
        return session.goes_on(told.snapshot, ours, applied, self._first_kept)

    @property
    def _first_kept(self) -> int:
        """The number of the first record from which on all can be sent."""
        return max(self._around.log.first, self._readable_from)

    async def _common(self, wire: Wire, told: Told) -> int | None:
        first, last = chain.known(self._around.log)
        comparison = session.compare((max(first, self._readable_from - 1), last), told.known)
        count = 1  # as a rule the shorter log is the beginning of the longer one, so its last record is enough
        while not comparison.done:
            numbers = session.probes(comparison, count)
            count = _PROBES
            await wire.send(messages.Probe(numbers))
            theirs = await expect(wire, messages.Checksums)
            ours = await self._around.environment.in_thread(partial(chain.checksums, self._around.log, numbers))
            before, comparison = comparison, session.compared(comparison, ours, theirs.of)
            if comparison == before:
                raise WireLost("the logs were released further while they were compared")
        return comparison.agreed

    # --- the stream

    async def _stream(self, wire: Wire, named: Session) -> None:
        self._under_way.clear()
        self._bytes_under_way = 0
        self._beacons.clear()
        self._wire = wire
        self._has_streamed = True
        streams = self._write(wire, named), self._beat(wire, named), self._read(wire, named)
        works = [self._around.environment.spawn(work) for work in streams]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._wire = None
            if self._compared is not None and not self._compared.done():
                self._compared.set_result(None)
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
            self._catching_up = None if link.waited or self._fills else catching_up
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
        every_s = lease.beacon_every_s(self._around.times.lease_s)
        while (link := shipping.find(sender.shipping, named)) is not None:
            if shipping.may_send(sender.shipping, link) and sender.may_ask():
                await self._send_beacon(wire, environment.boottime_s())
            await environment.sleep(every_s)
        raise WireLost("the copy is out")

    def _has_more(self) -> bool:
        """Whether there are records that the copy has room for."""
        has_room = self._bytes_under_way < self.room_bytes or self._fills
        return self._sent < self._sender.shipping.last and has_room

    @property
    def room_bytes(self) -> int:
        """How many bytes may be under way; a copy that lacks no more of them is nearly there."""
        return self._catching_up.room_bytes if self._catching_up is not None else ROOM_BYTES_MAX

    async def _send_records(self, wire: Wire) -> None:
        frame_bytes = self._catching_up.frame_bytes if self._catching_up is not None else _FRAME_BYTES
        entries = self._sender.tail.after(self._sent, frame_bytes) or await self._read_back(frame_bytes)
        if not entries:
            raise WireLost(f"the records behind {self._sent} cannot be read back")
        size = sum(map(cost, entries))
        self._sent = entries[-1].number
        self._under_way.append((self._sent, size))
        self._bytes_under_way += size
        now = self._around.environment.boottime_s()
        if self._catching_up is not None:
            self._catching_up.sent(size, self._sender.tail.come_bytes, now)
        self.patience = patience.owes(self.patience, now)
        await wire.send(messages.Records(entries, self._sender.shipping.committed))

    async def _read_back(self, bytes_max: int) -> list[Entry]:
        read = partial(chain.some_entries, self._around.log, self._sent, bytes_max, RECORD_BYTES)
        return await self._around.environment.in_thread(read)

    async def _send_beacon(self, wire: Wire, now: float) -> None:
        self._beacon += 1
        self._beacons[self._beacon] = now
        self.patience = patience.owes(self.patience, now)
        await wire.send(messages.Beacon(self._beacon, self._sender.shipping.committed))

    async def _read(self, wire: Wire, named: Session) -> None:
        sender = self._sender
        while True:
            message = await wire.receive()
            match message:
                case messages.Ack():
                    self._note_ack(message.number)
                    sender.take_ack(named, message.number)
                    if self._has_more():
                        self.wake.set()
                case messages.Granted():
                    asked_s = self._beacons.pop(message.number, None)
                    if asked_s is None:
                        raise WireLost("the copy grants what was not asked for")
                    self._beacons = {number: at for number, at in self._beacons.items() if number > message.number}
                    if not self._under_way:  # else the lease is granted, and a record is owed all the same
                        self._answered()
                    sender.take_grant(named, asked_s)
                case messages.Compared():
                    is_awaited = self._compared is not None and not self._compared.done()
                    if self._compared is not None and is_awaited and message.asked == self._asked:
                        self._compared.set_result(message.digest)
                case messages.Deposed():
                    raise Refused(message.promised)
                case _:
                    raise WireLost(f"{type(message).__name__} came in the stream")

    def _note_ack(self, number: int) -> None:
        """The copy has records up to that number.
        One that says so again and again owes the others all the same."""
        owed = len(self._under_way)
        while self._under_way and self._under_way[0][0] <= number:
            self._bytes_under_way -= self._under_way.popleft()[1]
            if self._catching_up is not None and not self._under_way:
                self._catching_up.acknowledged(self._around.environment.boottime_s())
        if not owed or len(self._under_way) < owed:
            self._answered()
        if number:  # a copy that is being filled acknowledges nothing
            self._snapshot, self._fills = None, False

    def _answered(self) -> None:
        owes_more = bool(self._under_way or self._beacons)
        self.patience = patience.answered(self.patience, self._around.environment.boottime_s(), owes_more)

    @property
    def is_streaming(self) -> bool:
        """Records and beacons reach the copy, as far as is known."""
        return self._wire is not None

    async def compare(self, number: int, partitions: list[int]) -> Digest | None:
        """The copy's digest of these partitions as of that record; None if it has none to tell."""
        if self._wire is None or self._compared is not None:
            return None
        self._compared = told = asyncio.get_running_loop().create_future()
        self._asked += 1
        try:
            await self._wire.send(messages.Compare(self._asked, number, partitions))
            return told.result() if await self._around.environment.wait_for(told, _COMPARE_S) else None
        except WireLost:
            return None
        finally:
            self._compared = None

    async def tell_it_differs(self, number: int, partition: int) -> None:
        """The copy is not to be used any more. If that is lost, it is found another time."""
        if self._wire is not None:
            with contextlib.suppress(WireLost):
                await self._wire.send(messages.Differs(number, partition))

    async def tell_returned(self) -> None:
        """Tell the copy that the lease is given back.
        If that is lost, the copy waits until it has run out."""
        if self._wire is not None:
            with contextlib.suppress(WireLost):
                await self._wire.send(messages.Returned())
