"""The opening of a term, up to the record that opens it: the steps of `replication.opening`, with disk and connections.

Owns: asking all copies in sync, fetching what the longest log has more, asking the controller to take out the silent.
Promises: the term is promised on this disk before anything else is done in it. Nothing that a copy in sync has is cut
off. It ends, and nothing was served, as soon as a map of another term is heard of, or a higher term promised.
None that does not answer is taken out before the own file was found to be whole: it may be the only good one.
The longest log is opened only once the controller has said that the store has told of no more: else it is an older
copy, and so are all that have answered. Every copy in sync has all that was told, so this keeps none waiting that is
whole. An older one waits for newer files, on this node or on that of a copy in sync, or for a person. A log that ends
where the longest one does not begin yet is an older copy, too, and so is one that ends with records which the longest
one has not; it counts as damaged, so that the other takes over.
Leaves to others: the rules (`replication.opening`), the record that opens the term (`store.partitions`).

While the controller is away nothing is opened. It has given the term a moment before, by a map; asking it once more
waits longer only if it has gone in between. It is asked after a promotion, too, though it has compared that log: the
process may have been started again since, in an older folder, and the map of a term does not say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from kvstore.errors import DataCorrupt
from kvstore.replication import opening
from kvstore.replication.configuration import Configuration, Replica, Request
from kvstore.replication.copy import StoreCopy
from kvstore.replication.opening import Opening, Truth
from kvstore.replication.wire import Refused, Wire, WireLost, fetch, greet
from kvstore.shard.hosted import Surroundings
from kvstore.shard.told import ToldNumbers, ToldOfTerm
from kvstore.store.copy_place import times_of

log = logging.getLogger(__name__)

_RETRY_S = 0.02


class TermOpening:
    """`start`: a random id of this opening."""

    def __init__(self, copy: StoreCopy, config: Configuration, start: str, around: Surroundings) -> None:
        self._copy = copy
        self._environment = around.environment
        self._connect = around.connect
        self._times = times_of(around.limits)
        self._on_news = around.on_news
        numbers = ToldNumbers(around.session, around.controller_url, around.limits)
        self._told = ToldOfTerm(numbers, config.shard, around.limits, around.environment)
        self._opening: Opening | None = Opening(config, start, copy.log.last)
        self._late: dict[str, Replica] = {}  # by copy id, those that have not answered for too long
        self._wires: dict[str, Wire] = {}
        self._known: dict[str, int] = {}  # by copy id, the first number that its log still knows
        self._asked_s = 0.0  # since when the copies are asked
        self._changed = asyncio.Event()
        self._examining: asyncio.Task[None] | None = None

    @property
    def config(self) -> Configuration | None:
        """Of the newest map that was heard of; None once the opening is over."""
        return self._opening.config if self._opening is not None else None

    @property
    def clock_floor(self) -> int:
        """Above that version the store goes on: a person has accepted an older copy of it."""
        return self._told.clock_floor

    def hear(self, config: Configuration | None) -> None:
        """A newer map has come. None: it has no such shard."""
        if self._opening is not None:
            self._opening = opening.follow(self._opening, config) if config is not None else None
            self._changed.set()

    def requests(self) -> list[Request]:
        """What the controller is asked for now."""
        now = self._opening
        if now is None or not self._copy.own_engine.is_examined:
            return []
        return [opening.request_out(now, copy) for copy in opening.asked(now) if copy.copy_id in self._late]

    async def run(self) -> bool:
        """Bring the own log up to the longest; False if the opening is over.

        Raises TryLater if the disk is full, DataCorrupt, NotNext, LogFailed, OSError.
        """
        assert self._opening is not None
        term, self._asked_s = self._opening.config.term, self._environment.boottime_s()
        if not await self._copy.opening.promise(term):
            return False
        if self._opening is None:
            return False
        self._opening = self._opening._replace(own=await self._copy.opening.position())
        asking: dict[str, asyncio.Task[None]] = {}
        try:
            while (now := self._opening) is not None and self._copy.following.promised == term:
                self._check_examined()
                for copy in opening.asked(now):
                    if copy.copy_id not in asking or asking[copy.copy_id].done():
                        asking[copy.copy_id] = self._environment.spawn(self._ask(copy))
                if opening.truth(now) is not None:
                    if not opening.may_begin_term(now):
                        await self._fetch(now)
                    elif self._told.is_confirmed:
                        return True
                    elif await self._told.is_below(now.config.store_id, self._copy.log.last.number):
                        await self._ask_again()
                    continue
                self._note_late(now)
                self._changed.clear()
                await self._environment.wait_for(self._changed.wait(), self._times.replica_timeout_s / 8)
            return False
        finally:
            await self._end([*asking.values(), *([self._examining] if self._examining is not None else [])])

    async def _end(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for wire in self._wires.values():
            await wire.close()
        self._on_news()

    async def _examine(self) -> None:
        try:
            await self._copy.own_engine.examine()
        finally:
            self._changed.set()
            self._on_news()

    def _check_examined(self) -> None:
        """Raises what the examination has raised."""
        if self._examining is not None and self._examining.done():
            self._examining.result()

    def _note_late(self, now: Opening) -> None:
        if self._environment.boottime_s() - self._asked_s < self._times.replica_timeout_s:
            return
        late = {copy.copy_id: copy for copy in opening.asked(now)}
        if late.keys() != self._late.keys():
            self._late = late
            self._on_news()

    async def _ask(self, copy: Replica) -> None:
        """Have the copy promise the term, and hear where its log ends; again until it answers, or is out."""
        while (now := self._opening) is not None and copy in opening.asked(now):
            hello = opening.hello_to(now, copy)
            wire: Wire | None = None
            try:
                async with asyncio.timeout(self._times.replica_timeout_s):
                    wire = await self._connect(copy.node, hello)
                    told = await greet(wire, hello)
            except (Refused, WireLost, TimeoutError) as error:
                log.debug("the copy on node %s: %s", copy.node, error)
                if wire is not None:
                    await wire.close()
                if self._examining is None:
                    self._examining = self._environment.spawn(self._examine())
                await self._environment.sleep(_RETRY_S)
                continue
            except asyncio.CancelledError:
                if wire is not None:
                    await wire.close()
                raise
            self._wires[copy.copy_id], self._known[copy.copy_id] = wire, told.known[0]
            if self._opening is not None:
                self._opening = opening.answered(self._opening, hello, told.position)
            self._changed.set()
            return

    async def _ask_again(self) -> None:
        """All copies in sync: newer files may have been put back on their nodes."""
        while self._wires:
            await self._wires.popitem()[1].close()
        self._late, self._asked_s = {}, self._environment.boottime_s()
        if self._opening is not None:
            self._opening = self._opening._replace(told=())

    async def _fetch(self, now: Opening) -> None:
        """Some of what the longest log has more.
        A copy that is lost by then has to tell again, or to be out. Raises DataCorrupt if the two do not meet."""
        found = opening.truth(now)
        assert found is not None
        assert found.copy_id is not None
        last = self._copy.log.last
        if last.number < self._known[found.copy_id]:
            raise _older(now, found, "has let go of what follows here, since every copy in sync had it")
        wire, is_forked = self._wires[found.copy_id], last.number >= found.position.number  # which is of a later term
        try:
            async with asyncio.timeout(self._times.replica_timeout_s + self._times.disk_stall_s):
                entries = [] if is_forked else await fetch(wire, last.number)
        except (Refused, WireLost, TimeoutError):
            entries = []
        if is_forked or (entries and entries[0].previous != last.checksum):
            raise _older(now, found, "has not what this one ends with, which was never committed")
        if entries:
            position = await self._copy.opening.extend(entries)
            if self._opening is not None:
                self._opening = opening.fetched(self._opening, position)
            return
        with contextlib.suppress(KeyError):
            await self._wires.pop(found.copy_id).close()
        if self._opening is not None:
            told = tuple(each for each in self._opening.told if each[0] != found.copy_id)
            self._opening = self._opening._replace(told=told)
        await self._environment.sleep(_RETRY_S)


def _older(now: Opening, found: Truth, why: str) -> DataCorrupt:
    return DataCorrupt(
        f"The log of shard {now.config.shard} here ends with record {now.own.number}. A copy in sync has all up to "
        f"record {found.position.number}, and {why}: this is an older copy of the files."
    )
