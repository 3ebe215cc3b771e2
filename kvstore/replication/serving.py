"""The copy's end of a connection: one session, from its hello to the loss of the connection.

Owns: the order in which a copy's messages are answered.
Promises: records are appended in the order in which they came. Where they can be synced on this thread they are
acknowledged before the next message is looked at: no task, no queue. Else one sync covers all that came during the one
before, and a beacon is answered at once beside it. With the loss of the connection nothing more is taken from it.
Leaves to others: what a message does (the parts of `copy`), sockets (shard).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile
from typing import Any

from kvstore import failpoints
from kvstore.environment import Environment
from kvstore.errors import DataCorrupt, KvError
from kvstore.replication import copy_greeting, messages
from kvstore.replication.chain import some_entries
from kvstore.replication.copy import StoreCopy
from kvstore.replication.session import Session
from kvstore.replication.snapshot import row_of
from kvstore.replication.snapshot_pace import never_busy
from kvstore.replication.wire import Wire, WireLost
from kvstore.storage.engine import Applied, CopiedRow
from kvstore.storage.log import Released
from kvstore.storage.rows import Row
from kvstore.storage.segments import Entry

CopyOf = Callable[[Session], StoreCopy | None]
"""The open copy that a session is meant for, if it lies here and is no primary."""

_QUEUED_MAX = 4096  # messages; a primary sends no more than it is allowed to have under way


async def serve_copy(
    wire: Wire, copy_of: CopyOf, environment: Environment, is_busy: Callable[[], bool] = never_busy
) -> None:
    """Serve one session until the connection is lost. Raises what a failed disk raises: then the process must end.

    `is_busy`: whether clients are at work on this node.
    """
    try:
        hello = await wire.receive()
        if not isinstance(hello, messages.Hello):
            raise WireLost("a session begins with a hello")
        copy = await _greeted(wire, hello.session, copy_of)
        if copy is not None:
            await _Serving(wire, copy, hello.session, environment, is_busy).run()
    except WireLost:
        pass
    finally:
        await wire.close()


async def _greeted(wire: Wire, session: Session, copy_of: CopyOf) -> StoreCopy | None:
    copy = copy_of(session)
    try:
        told = await copy.greeting.hello(session) if copy is not None else None
    except copy_greeting.Deposed as deposed:
        await wire.send(messages.Deposed(deposed.promised))
        return None
    if told is None:
        await wire.send(messages.Foreign())
        return None
    await wire.send(messages.Told(told.position, told.applied, told.known, told.filling, told.snapshot))
    return copy


class _Serving:
    """A greeted copy. What takes long is done by a task of its own, in order; beacons pass it by."""

    def __init__(
        self, wire: Wire, copy: StoreCopy, session: Session, environment: Environment, is_busy: Callable[[], bool]
    ) -> None:
        self._wire = wire
        self._copy = copy
        self._session = session
        self._environment = environment
        self._is_busy = is_busy
        self._queue: deque[Any] = deque()
        self._came = asyncio.Event()
        self._is_working = False
        self._acknowledged = -1  # the highest number
        self._comparing: asyncio.Task[None] | None = None

    async def run(self) -> None:
        work = self._environment.spawn(self._work())
        listening = self._environment.spawn(self._listen())
        try:
            await asyncio.wait((work, listening), return_when=asyncio.FIRST_COMPLETED)
        finally:
            works = [task for task in (work, listening, self._comparing) if task is not None]
            for task in works:
                task.cancel()
            await asyncio.gather(*works, return_exceptions=True)
        for task in (work, listening):
            if not task.cancelled():
                task.result()

    async def _listen(self) -> None:
        while True:
            message = await self._wire.receive()
            if isinstance(message, messages.Records) and self._takes_at_once(message.entries):
                taken = self._copy.records.take_now(self._session, message.entries, message.committed)
                await self._acknowledge(taken)
            elif isinstance(message, messages.Beacon):
                number = self._copy.records.committed(self._session, message.committed)
                is_deposed = number is None and not failpoints.planted("grant-after-promise")
                if is_deposed or (number or 0) > self._acknowledged:  # deposed, or a snapshot became good
                    await self._acknowledge(number)
                if self._copy.lease.beacon(self._session, message.lease_s):
                    await self._wire.send(messages.Granted(message.number))
            elif isinstance(message, messages.Returned):
                self._copy.lease.returned(self._session)
            elif len(self._queue) >= _QUEUED_MAX:
                raise WireLost("too many messages at once")
            else:
                self._queue.append(message)
                self._came.set()

    def _takes_at_once(self, entries: list[Entry]) -> bool:
        """Nothing that came before is still to be done, and the log takes these on this thread."""
        return not self._queue and not self._is_working and self._copy.own_log.takes_at_once(entries)

    async def _work(self) -> None:
        while True:
            self._is_working = False
            await self._came.wait()
            self._came.clear()
            self._is_working = True
            while self._queue:
                if isinstance(self._queue[0], messages.Records):
                    await self._records()
                else:
                    await self._other(self._queue.popleft())

    async def _records(self) -> None:
        """All that has come, with one sync."""
        came = list(takewhile(lambda each: isinstance(each, messages.Records), self._queue))
        for _ in came:
            self._queue.popleft()
        entries = [entry for each in came for entry in each.entries]
        await self._acknowledge(await self._copy.records.take(self._session, entries, came[-1].committed))

    async def _acknowledge(self, number: int | None, *, ends: bool = False) -> None:
        """None: the session has ended, or a snapshot is not good yet. Raises WireLost if it has, or if `ends`."""
        if number is not None:
            self._acknowledged = number
            await self._wire.send(messages.Ack(number))
        elif (promised := self._copy.following.promised) > self._session.term:
            await self._wire.send(messages.Deposed(promised))
            raise WireLost("the copy follows a higher term")
        elif ends:
            raise WireLost("the session does not begin: the log has changed")

    async def _other(self, message: Any) -> None:
        copy, session = self._copy, self._session
        match message:
            case messages.Probe():
                await self._wire.send(messages.Checksums(await copy.greeting.checksums(message.numbers)))
            case messages.Begin():
                begun = await copy.greeting.begin(session, message.told, message.join, message.resumes)
                await self._acknowledge(begun, ends=True)
            case messages.SnapshotBegins():
                of = Applied(message.at, message.clock, message.cluster_map, message.freezes, message.drops)
                await self._taken(await copy.filling.begins(session, of))
            case messages.SnapshotPage():
                rows = [_row(copied) for copied in message.rows]
                await self._taken(await copy.filling.page(session, message.at, rows, message.progress))
            case messages.SnapshotEnds():
                await self._taken(await copy.filling.ends(session, message.at, message.highest))
            case messages.Compare():
                self._comparing = self._environment.spawn(self._compare(message))  # records do not wait for it
            case messages.Differs() if copy.notes.is_current(session):
                raise DataCorrupt(_why_it_is_rebuilt(message))
            case messages.Fetch():
                await self._wire.send(messages.Fetched(await self._fetched(message)))
            case _:
                raise WireLost(f"a primary does not send {type(message).__name__}")

    async def _taken(self, is_taken: bool) -> None:
        await self._wire.send(messages.Taken(is_taken, self._is_busy()))

    async def _compare(self, asked: messages.Compare) -> None:
        """What goes wrong is met again, and told of, by those who apply to the file and verify it."""
        digest, failed = None, True
        with suppress(KvError, OSError):
            digest = await self._copy.applier.digest_at(self._session, asked.number, frozenset(asked.partitions))
            failed = False
        with suppress(WireLost):
            await self._wire.send(messages.Compared(asked.asked, digest, failed))

    async def _fetched(self, asked: messages.Fetch) -> list[Entry]:
        """Raises WireLost if those records are kept no more."""
        try:
            return await self._environment.in_thread(lambda: some_entries(self._copy.log, asked.after, asked.bytes_max))
        except Released as released:
            raise WireLost(str(released)) from None


def _why_it_is_rebuilt(differs: messages.Differs) -> str:
    if differs.untold:
        return f"For several rounds the primary was not told which rows of partition {differs.partition} are here."
    return (
        f"Partition {differs.partition} was not what it is at the primary, as of record {differs.number}, though both "
        "verify."
    )


def _row(copied: CopiedRow) -> Row:
    """Raises WireLost: what came is not what was once written. The primary looks whether it has that."""
    try:
        return row_of(copied)
    except DataCorrupt as error:
        raise WireLost(error.detail) from None
