"""One store that lies on this node, and what the node is to it: primary, or copy of the primary.

Owns: the change from the one to the other and back, by the map that is followed; the order of it.
Promises: a store that has copies is served only in a term that begins here, by a map that names this very copy. One
whose term has ended answers nothing more, and becomes a copy again, under the same id. Its files never change hands
without their lock. Damaged or lost files are told of, and a copy is rebuilt under another id when the map allows it.
Leaves to others: what lies here (`local_store`), what the map says of it (`followed_map`), the steps of an opening
(`term_opening`), what a served store is made of (`hosted`), damaged files (`damaged`), the other stores of this node
(`node_stores`), telling the controller (`beats`).

    files ──── their map names no copy ────────────────────────────> served
      └─ copies are named ─> copy ── primary in a new term ─> opening ──┘ │
                              ^  ^── the term is over before it begins ──┘ │
                              ├────────── the term has ended ──────────────┘
      any ── damage is found ─> damaged ── out, and another is the primary ──> empty copy, to be filled
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

from kvstore.environment import to_its_end, until_one_ends
from kvstore.errors import DataCorrupt, KvError, is_damage
from kvstore.placement.cluster_map import ClusterMap
from kvstore.protocol import Request
from kvstore.replication.beats import Asked, CopyReport, Drop, Make
from kvstore.replication.copy import StoreCopy
from kvstore.replication.session import Session
from kvstore.shard.copy_sessions import CopySessions
from kvstore.shard.damaged import DamagedCopy, lost, rebuild, until_damaged
from kvstore.shard.early import EarlyRequests
from kvstore.shard.followed_map import FollowedMap
from kvstore.shard.hosted import HostedStore, Surroundings, host
from kvstore.shard.local_store import LocalStore
from kvstore.shard.reports import report_of
from kvstore.shard.term_opening import TermOpening
from kvstore.shard.told import ToldNumbers
from kvstore.storage.engine import TryLater
from kvstore.store.copy_place import CopyFiles
from kvstore.store.opening import Opened
from kvstore.transport.channel import Connection

log = logging.getLogger(__name__)

_LOOK_S = 0.05
_FULL_RETRY_S = 0.5


class Resident:
    """The store of that shard on this node. `run` changes what it is, for ever.

    `local`: what lies here of it.
    """

    def __init__(self, shard_id: str, around: Surroundings) -> None:
        self.shard_id = shard_id
        self.local = LocalStore(shard_id)
        self.stops = False  # the node's process is about to end
        self.early = EarlyRequests(shard_id, around.limits, around.environment)
        self._around = around
        self._followed = FollowedMap(shard_id, around.node_id, around.environment)
        self._opening: TermOpening | None = None
        self._at_the_end = AsyncExitStack()  # of what is served
        self.sessions = CopySessions(shard_id, around, self._copy_for, self._followed.wake)

    # --- beginning and end

    async def begin(self, partitions: int, known: ClusterMap | None = None) -> None:
        """Open what lies here, or make a store. Raises what `Store.open` raises, but for damage to one of several
        copies, or to one that is not at home. `known`: a map that was found in other files."""
        around = self._around
        told = ToldNumbers(around.session, around.controller_url, around.limits)
        try:
            opened = await around.folder.open(self.shard_id, partitions, told.at_opening)
            if isinstance(opened, CopyFiles):
                self.local.files = opened
            else:
                await self._serve_opened(opened, told)
        except KvError as error:
            salvaged = await around.folder.salvage(self.shard_id, known) if is_damage(error) else None
            if salvaged is None:
                raise
            self.local.note_damaged(DamagedCopy(self.shard_id, error, salvaged))
            around.on_news()

    async def make(self, order: Make) -> None:
        """Make an empty copy. Raises DataInUse, ForeignData, ConfigError, OSError."""
        self.local.files = await self._around.folder.make_copy(self.shard_id, order.store_id, order.partitions)
        log.info("a copy of shard %s is made", self.shard_id)

    async def close(self) -> None:
        """Close what is open, as it is."""
        self.local.hands_over = True  # first: a session that comes now would have a log that is closed
        self.sessions.begin()
        await self.sessions.end()
        await self._at_the_end.aclose()
        self.local.hosted = None
        if self.local.files is not None:
            files, self.local.files = self.local.files, None
            await files.close()

    # --- what comes

    def handle(self, request: Request, connection: Connection) -> None:
        """Begin the request, if this is the primary, or about to be."""
        hosted = self.local.hosted
        if hosted is not None and hosted.is_open:
            hosted.service.handle(request, connection)
        else:
            self.early.take(request, connection)

    def _copy_for(self, session: Session) -> StoreCopy | None:
        """None also for one that joins when the node stops: no primary is to begin to wait for it."""
        return self.local.copy if not self.stops or self._followed.is_in_sync(session.joined) else None

    # --- maps and orders

    def hear(self, cluster_map: ClusterMap) -> None:
        """A newer map is followed."""
        self._followed.hear(cluster_map)
        if self._opening is not None:
            self._opening.hear(self._followed.config)
        hosted = self.local.hosted
        if hosted is not None and not self._followed.ends(hosted.store.identity, has_copies=hosted.has_copies):
            hosted.maps.put(cluster_map)
        self._followed.wake()

    def drop(self, order: Drop) -> None:
        """Set the copy aside if it is still that one, no primary, and not in the map followed here."""
        is_copy = self.local.copy is not None or self.local.damaged is not None
        if is_copy and order.copy_id == self.local.copy_id:
            self._followed.drop(order.copy_id)

    def report(self) -> CopyReport | None:
        """What the controller is told; None while the files change hands."""
        return report_of(self.local, self._followed, is_opening=self._opening is not None)

    def requests(self) -> list[Asked]:
        """What the controller is asked for now."""
        asked = list(self._opening.requests()) if self._opening is not None else []
        if self.local.hosted is not None:
            asked += self.local.hosted.requests()
        return [Asked(**each._asdict()) for each in asked]

    # --- changing

    async def run(self) -> None:
        """Be what the map says. Returns once the copy is dropped. Raises what ends the process."""
        while not self._followed.is_dropped:
            before = self.local.salvaged(self._followed)  # the files may change hands
            try:
                await self._be()
            except KvError as error:
                salvaged = self.local.salvaged(self._followed) or before  # copies may have been named since
                if self.local.damaged is not None or salvaged is None or not is_damage(error):
                    raise
                await self._close_damaged(DamagedCopy(self.shard_id, error, salvaged))
        await self.close()
        await self._around.folder.set_aside(self.shard_id)
        log.info("the copy of shard %s is set aside", self.shard_id)

    async def _be(self) -> None:
        """What it is now, until it is to be something else."""
        local = self.local
        if local.damaged is not None:
            files = await rebuild(local.damaged, self._followed, self._around)
            if files is not None:
                local.note_rebuilt(files)
                self._around.on_news()
        elif local.hosted is not None:
            await self._be_served(local.hosted)
        elif local.files is not None:
            await self._be_copy(local.files)

    async def _be_served(self, hosted: HostedStore) -> None:
        await until_one_ends(*hosted.works(), self._until_term_ends())
        if self._followed.has_lost(hosted.store.identity):
            await self._close_damaged(lost(self._followed))
        elif damage := hosted.store.tables.verification.damage:
            raise DataCorrupt(damage)
        else:
            log.warning("shard %s is served elsewhere: this node's copy follows from now on", self.shard_id)
            await to_its_end(self._around.environment, self._become_copy())

    async def _be_copy(self, files: CopyFiles) -> None:
        work = asyncio.ensure_future(files.copy.applier.run())
        try:
            verifying = until_damaged(files.copy, self._followed, self._around.environment, self._around.limits)
            await until_one_ends(self._until_named(files.copy), _forward(work), verifying)
            self.early.opens = True
            if not self._followed.is_dropped:
                await self._open_term(files, work)
        finally:
            self.early.opens = False
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _until_term_ends(self) -> None:
        while True:
            hosted, newest = self.local.hosted, self._followed.newest
            if hosted is None or self._followed.ends(hosted.store.identity, has_copies=hosted.has_copies):
                return
            if not hosted.is_open and newest is not None:
                hosted.service.hear(newest)  # the opening may wait for a copy that is out by now
            sender = hosted.store.tables.sender
            if sender is not None and sender.shipping.deposed:
                return
            await self._followed.wait_for_change(1.0 if hosted.is_open else _LOOK_S)

    async def _until_named(self, copy: StoreCopy) -> None:
        """Until the map names this copy primary in a term that it may open, or it is dropped."""
        was_stale = False
        while not self._followed.is_dropped:
            if (harm := self.sessions.take_harm()) is not None:
                raise harm
            config = self._followed.config
            may_open = copy.opening.may_open(config, self._around.node_id) if config is not None else "no"
            if may_open == "yes":
                return
            if (may_open == "stale") != was_stale:
                was_stale = may_open == "stale"
                self._around.on_news()
            await self._followed.wait_for_change(_LOOK_S if may_open == "wait" else 1.0)

    async def _open_term(self, files: CopyFiles, work: asyncio.Task[None]) -> None:
        """Open the term that the newest map gives; the copy stays one if that fails. `work`: of the copy."""
        config, around = self._followed.config, self._around
        assert config is not None
        self._opening = TermOpening(files.copy, config, start := around.environment.random_hex(8), around)
        around.on_news()
        try:
            try:
                if not await self._opening.run():
                    return
            except TryLater as error:
                log.warning("shard %s is not opened yet: %s", self.shard_id, error.detail)
                await around.environment.sleep(_FULL_RETRY_S)
                return
            self.local.hands_over = True
            await self.sessions.end()
            identity = await files.copy.applier.hand_over()
            if identity.promised != config.term or self._opening.config is None:
                return
            opens, floor = self._followed.newest, self._opening.clock_floor
            assert opens is not None
            work.cancel()
            self.local.files = None
        finally:
            self._opening = None
            self.local.hands_over = False
        told = ToldNumbers(around.session, around.controller_url, around.limits)
        await self._serve_opened(files.as_opened(identity, floor), told, opens, start)

    async def _serve_opened(
        self, opened: Opened, told: ToldNumbers, opens: ClusterMap | None = None, start: str = ""
    ) -> None:
        """Serve these files; `opens`: in the term that this map begins."""

        def on_news() -> None:
            self._followed.wake()
            self._around.on_news()

        around = self._around._replace(on_news=on_news)
        start = start or around.environment.random_hex(8)
        hosted = await host(opened, self.shard_id, around, told, self._at_the_end, start)
        self.local.hosted = hosted
        self.sessions.keep()
        try:
            await until_one_ends(hosted.open(opens), self._until_term_ends())
        except BaseException:
            await self._at_the_end.aclose()
            self.local.hosted = None
            raise
        if opens is not None and hosted.is_open:
            self.early.begin(hosted.service.handle)
            log.info("shard %s is served here, in term %d", self.shard_id, self._followed.term)
            around.on_news()

    async def _become_copy(self) -> None:
        """The term has ended: end the store, whose open files are a copy's from now on.

        If the process ends meanwhile, they are closed only once the store's work is done.
        """
        hosted = self.local.take_hosted()
        self.local.files = await hosted.as_copy(self._at_the_end, self._around.folder, self._followed.config)
        self.sessions.begin()
        self._around.on_news()

    async def _close_damaged(self, damaged: DamagedCopy) -> None:
        self.local.note_damaged(damaged)
        self._around.on_news()
        self.sessions.take_harm()
        await self.close()
        self.local.hands_over = False


async def _forward(work: asyncio.Task[None]) -> None:
    await asyncio.shield(work)
