"""One store that lies on this node, and what the node is to it: primary, or copy of the primary.

Owns: the change from the one to the other and back, by the map that is followed; the order of it.
Promises: a store that has copies is served only in a term that begins here, by a map that names this very copy. One
whose term has ended answers nothing more, and becomes a copy again, under the same id. Its files never change hands
without their lock. Damaged or lost files are told of, and a copy is rebuilt under another id when the map allows it.
Leaves to others: the steps of an opening (`term_opening`), what a served store is made of (`hosted`), the other stores
of this node (`node_stores`), telling the controller (`beats`).

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
from kvstore.replication.beats import Asked, CopyReport, Drop, GiveBack, Make
from kvstore.replication.configuration import Configuration, configuration_of
from kvstore.replication.copy import StoreCopy
from kvstore.replication.promise import Identity as CopyIdentity
from kvstore.replication.session import Session
from kvstore.shard.copy_sessions import CopySessions
from kvstore.shard.damaged import DamagedCopy, fate, until_damaged
from kvstore.shard.early import EarlyRequests
from kvstore.shard.hosted import HostedStore, Surroundings, host
from kvstore.shard.reports import report_of_copy, report_of_store
from kvstore.shard.term_opening import TermOpening
from kvstore.shard.told import ToldNumbers
from kvstore.storage.disk import FULL_ERRNOS
from kvstore.storage.engine import Identity, TryLater
from kvstore.storage.log import Log
from kvstore.store.copy_place import CopyFiles
from kvstore.store.damaged_files import Salvaged, salvaged_by
from kvstore.store.opening import Opened
from kvstore.store.store import Store
from kvstore.transport.channel import Connection

log = logging.getLogger(__name__)

_LOOK_S = 0.05
_GIVE_BACK_S = 1.0
_FULL_RETRY_S = 0.5


class Resident:
    """The store of that shard on this node. `run` changes what it is, for ever."""

    def __init__(self, shard_id: str, around: Surroundings) -> None:
        self.shard_id = shard_id
        self.hosted: HostedStore | None = None
        self.stops = False  # the node's process is about to end
        self.early = EarlyRequests(shard_id, around.limits, around.environment)
        self._around = around
        self._files: CopyFiles | None = None
        self._damaged: DamagedCopy | None = None
        self._harm: KvError | None = None  # damage that a session with the copy has found
        self._opening: TermOpening | None = None
        self._at_the_end = AsyncExitStack()  # of what is served
        self._map: ClusterMap | None = None
        self._changed = asyncio.Event()
        self.sessions = CopySessions(shard_id, around, self._copy_for, self._note_harm)
        self._store_id = ""
        self._given_back = 0
        self._is_dropped = False
        self._hands_over = False

    # --- beginning and end

    async def begin(self, partitions: int, known: ClusterMap | None = None) -> None:
        """Open what lies here, or make a store. Raises what `Store.open` raises, but for damage to one of several
        copies. `known`: a map that was found in other files."""
        around = self._around
        told = ToldNumbers(around.session, around.controller_url, around.limits)
        try:
            opened = await around.folder.open(self.shard_id, partitions, told.at_opening)
            if isinstance(opened, CopyFiles):
                self._files = opened
            else:
                await self._serve_opened(opened, told)
        except KvError as error:
            salvaged = await around.folder.salvage(self.shard_id, known) if is_damage(error) else None
            if salvaged is None:
                raise
            self._note_damaged(error, salvaged)

    async def make(self, order: Make) -> None:
        """Make an empty copy. Raises DataInUse, ForeignData, ConfigError, OSError."""
        self._files = await self._around.folder.make_copy(self.shard_id, order.store_id, order.partitions)
        log.info("a copy of shard %s is made", self.shard_id)

    async def close(self) -> None:
        """Close what is open, as it is."""
        self._hands_over = True  # first: a session that comes now would have a log that is closed
        self.sessions.begin()
        await self.sessions.end()
        await self._at_the_end.aclose()
        self.hosted = None
        if self._files is not None:
            files, self._files = self._files, None
            await files.close()

    # --- what it is

    @property
    def copy(self) -> StoreCopy | None:
        """As long as it is no primary, nor about to be: a session must not change such a store."""
        return self._files.copy if self._files is not None and not self._hands_over else None

    @property
    def log_with_copies(self) -> Log | None:
        """The log, if the store lies on other nodes, too."""
        files = self._files  # another thread may ask
        if (hosted := self.hosted) is None:
            return files.copy.log if files is not None else None
        sender = hosted.store.tables.sender
        return hosted.store.tables.log if sender is not None and sender.shipping.links else None

    @property
    def store(self) -> Store | None:
        """As long as it is served, or about to be."""
        return self.hosted.store if self.hosted is not None else None

    @property
    def identity(self) -> Identity | None:
        """Of the store whose rows are here; None while the files change hands."""
        if self.hosted is not None:
            return self.hosted.store.identity
        if self._damaged is not None:
            return self._damaged.identity
        return self._files.copy.engine.identity if self._files is not None else None

    @property
    def store_id(self) -> str:
        """Of the store that lies here, also while its files change hands between primary and copy."""
        identity = self.identity
        return identity.store_id if identity is not None else self._store_id

    @property
    def damage(self) -> str:
        """What is wrong with the files here; empty if nothing is known to be."""
        return self._damaged.error.detail if self._damaged is not None else ""

    @property
    def copy_id(self) -> str:
        """Empty while the files change hands, and where it is lost."""
        if self.hosted is not None:
            return self.hosted.store.copy_id
        if self._damaged is not None:
            return self._damaged.salvaged.copy_id
        return self._files.copy.identity.copy_id if self._files is not None else ""

    @property
    def logged_map(self) -> ClusterMap | None:
        """The newest in its files."""
        if self.hosted is not None:
            return self.hosted.store.cluster_map
        if self._damaged is not None:
            return self._damaged.salvaged.newest_map
        return self._files.newest_map if self._files is not None else None

    @property
    def clock(self) -> int:
        """The highest version that the store has given or seen, as far as its file says."""
        if self.hosted is not None:
            return self.hosted.store.clock.version
        return self._files.copy.engine.applied.clock.version if self._files is not None else 0

    def handle(self, request: Request, connection: Connection) -> None:
        """Begin the request, if this is the primary, or about to be."""
        if self.hosted is not None and self.hosted.is_open:
            self.hosted.service.handle(request, connection)
        else:
            self.early.take(request, connection)

    def _copy_for(self, session: Session) -> StoreCopy | None:
        """None also for one that joins when the node stops: no primary is to begin to wait for it."""
        here = self._config.copy_on(self._around.node_id) if self._config is not None else None
        is_synced = here is not None and (here.state, here.joined) == ("in-sync", session.joined)
        return None if self.stops and not is_synced else self.copy

    # --- maps and orders

    def hear(self, cluster_map: ClusterMap) -> None:
        """A newer map is followed."""
        self._map = cluster_map
        if self._opening is not None:
            self._opening.hear(configuration_of(cluster_map, self.shard_id))
        if self.hosted is not None and not self._has_left and not self._is_lost:
            self.hosted.maps.put(cluster_map)
        self._changed.set()

    def drop(self, order: Drop) -> None:
        """Set the copy aside if it is still that one, no primary, and not in the map followed here.

        An answer that comes late may be of a time before the map named it.
        """
        config = self._config
        named = {config.primary.copy_id, *(each.copy_id for each in config.replicas)} if config is not None else set()
        is_copy = self.copy is not None or self._damaged is not None
        if is_copy and order.copy_id == self.copy_id and order.copy_id not in named:
            self._is_dropped = True
            self._changed.set()

    async def give_back(self, order: GiveBack) -> None:
        """Give back the lease of that term, once the copy that is to take over has all."""
        sender = store.tables.sender if (store := self.store) is not None else None
        if store is None or sender is None or sender.shipping.config.term != order.term:
            return
        if await store.replicas.give_back(order.copy_id, _GIVE_BACK_S):
            self._given_back = order.term
            self._around.on_news()

    def report(self) -> CopyReport | None:
        """What the controller is told; None while the files change hands."""
        if self.hosted is not None:
            return report_of_store(self.shard_id, self.hosted, self._given_back)
        if self._damaged is not None:
            return self._damaged.report()
        if self._files is None:
            return None
        is_opening = self._opening is not None
        return report_of_copy(self.shard_id, self._files.copy, self._config, self._around.node_id, is_opening)

    def requests(self) -> list[Asked]:
        """What the controller is asked for now."""
        asked = list(self._opening.requests()) if self._opening is not None else []
        if self.hosted is not None:
            asked += self.hosted.requests()
        return [Asked(**each._asdict()) for each in asked]

    def controller_heard(self) -> None:
        """It has answered a beat."""
        if (store := self.store) is not None and store.tables.sender is not None:
            store.tables.sender.controller_heard()

    @property
    def _config(self) -> Configuration | None:
        """Of the newest map."""
        return configuration_of(self._map, self.shard_id) if self._map is not None else None

    @property
    def _has_left(self) -> bool:
        """Whether the newest map has no more the shard served here for another home, or this store.

        A home that has left answers until no router asks any more, and its process ends.
        """
        if self._map is None or self.hosted is None or self.shard_id == self._around.node_id:
            return False
        shard = self._map.shard(self.shard_id)
        return shard is None or shard.store_id != self.hosted.store.identity.store_id

    @property
    def _term(self) -> int:
        """Of the newest map."""
        config = self._config
        return config.term if config is not None else 0

    # --- changing

    def wake(self) -> None:
        """Something has changed in the store: its term may have ended."""
        self._changed.set()

    async def run(self) -> None:
        """Be what the map says. Returns once the copy is dropped. Raises what ends the process."""
        while not self._is_dropped:
            salvaged = self._salvaged()  # before the files change hands
            try:
                await self._be()
            except KvError as error:
                if self._damaged is not None or salvaged is None or not is_damage(error):
                    raise
                await self._close_damaged(error, salvaged)
        await self.close()
        await self._around.folder.set_aside(self.shard_id)
        log.info("the copy of shard %s is set aside", self.shard_id)

    async def _be(self) -> None:
        """What it is now, until it is to be something else."""
        if self._damaged is not None:
            await self._rebuild(self._damaged)
        elif self.hosted is not None:
            await until_one_ends(*self.hosted.works(), self._until_term_ends())
            if self._is_lost:
                await self._become_lost()
            elif damage := self.hosted.store.tables.verification.damage:
                raise DataCorrupt(damage)
            else:
                await self._become_copy()
        elif self._files is not None:
            work = asyncio.ensure_future(self._files.copy.run())
            try:
                verifying = until_damaged(self._files.copy, self._around.environment, self._around.limits)
                await until_one_ends(self._until_named(), _forward(work), verifying)
                self.early.opens = True
                if not self._is_dropped:
                    await self._open_term(work)
            finally:
                self.early.opens = False
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def _until_term_ends(self) -> None:
        while True:
            hosted = self.hosted
            if hosted is None or self._has_left or self._is_lost:
                return
            if not hosted.is_open and self._map is not None:
                hosted.service.hear(self._map)  # the opening may wait for a copy that is out by now
            sender = hosted.store.tables.sender
            if sender is not None and sender.shipping.deposed:
                return
            self._changed.clear()
            await self._around.environment.wait_for(self._changed.wait(), 1.0 if hosted.is_open else _LOOK_S)

    async def _until_named(self) -> None:
        """Until the map names this copy primary in a term that it may open, or it is dropped."""
        was_stale = False
        while not self._is_dropped:
            if self._harm is not None:
                harm, self._harm = self._harm, None
                raise harm
            copy, config = self.copy, self._config
            assert copy is not None
            may_open = copy.may_open(config, self._around.node_id) if config is not None else "no"
            if may_open == "yes":
                return
            if (may_open == "stale") != was_stale:
                was_stale = may_open == "stale"
                self._around.on_news()
            self._changed.clear()
            await self._around.environment.wait_for(self._changed.wait(), _LOOK_S if may_open == "wait" else 1.0)

    async def _open_term(self, work: asyncio.Task[None]) -> None:
        """Open the term that the newest map gives; the copy stays one if that fails. `work`: of the copy."""
        files, config, around = self._files, self._config, self._around
        assert files is not None
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
            self._hands_over = True
            await self.sessions.end()
            identity = await files.copy.hand_over()
            if identity.promised != config.term or self._opening.config is None:
                return
            assert self._map is not None
            opens, floor = self._map, self._opening.clock_floor
            work.cancel()
            self._files = None
        finally:
            self._opening = None
            self._hands_over = False
        told = ToldNumbers(around.session, around.controller_url, around.limits)
        await self._serve_opened(files.as_opened(identity, floor), told, opens, start)

    async def _serve_opened(
        self, opened: Opened, told: ToldNumbers, opens: ClusterMap | None = None, start: str = ""
    ) -> None:
        """Serve these files; `opens`: in the term that this map begins."""
        self._given_back = 0
        around = self._around._replace(on_news=self._on_news)
        start = start or around.environment.random_hex(8)
        self.hosted = await host(opened, self.shard_id, around, told, self._at_the_end, start)
        self.sessions.keep()
        try:
            await until_one_ends(self.hosted.open(opens), self._until_term_ends())
        except BaseException:
            await self._at_the_end.aclose()
            self.hosted = None
            raise
        if opens is not None and self.hosted.is_open:
            self.early.begin(self.hosted.service.handle)
            log.info("shard %s is served here, in term %d", self.shard_id, self._term)
            around.on_news()

    def _on_news(self) -> None:
        self.wake()
        self._around.on_news()

    async def _become_copy(self) -> None:
        """The term has ended: end the store, whose open files are a copy's from now on.

        If the process ends meanwhile, they are closed only once the store's work is done.
        """
        log.warning("shard %s is served elsewhere: this node's copy follows from now on", self.shard_id)
        await to_its_end(self._around.environment, self._end_as_copy())

    async def _end_as_copy(self) -> None:
        assert self.hosted is not None
        hosted, self.hosted = self.hosted, None
        self._store_id = hosted.store.identity.store_id
        self._files = await hosted.as_copy(self._at_the_end, self._around.folder, self._config)
        self.sessions.begin()
        self._around.on_news()

    # --- damage

    def _note_harm(self, error: KvError) -> None:
        self._harm = error
        self._changed.set()

    @property
    def _is_lost(self) -> bool:
        """Whether the store that is served here was made because there were no files, and the cluster knows of some."""
        hosted, config = self.hosted, self._config
        if hosted is None or config is None or hosted.store.identity.cluster_id is not None:
            return False
        return hosted.store.identity.store_id != config.store_id and fate(config, self._around.node_id) != "refuse"

    def _salvaged(self) -> Salvaged | None:
        """What would be known if the files were found to be damaged.
        None if there is no other copy by the newest map here, or the files change hands."""
        identity = self.identity
        if identity is None:
            return None
        maps = [each for each in (self._map, self.logged_map) if each is not None]
        newest = max(maps, key=lambda each: each.epoch, default=None)
        promised = self._files.copy.identity.promised if self._files is not None else self._term
        here = CopyIdentity(identity.store_id, self.copy_id, promised)
        return salvaged_by(newest, self.shard_id, self._around.node_id, here)

    def _note_damaged(self, error: KvError, salvaged: Salvaged) -> None:
        self._damaged = DamagedCopy(self.shard_id, error, salvaged)
        log.error("the copy of shard %s here is damaged, and is not used any more: %s", self.shard_id, error.detail)
        self._around.on_news()

    async def _close_damaged(self, error: KvError, salvaged: Salvaged) -> None:
        self._note_damaged(error, salvaged)
        self._harm = None
        await self.close()
        self._hands_over = False

    async def _become_lost(self) -> None:
        """The files that were here are lost: what was made in their place was never the cluster's."""
        salvaged = salvaged_by(self._map, self.shard_id, self._around.node_id, None) if self._map is not None else None
        assert salvaged is not None
        detail = f"The files of shard {self.shard_id} that lay on node {self._around.node_id} are lost."
        await self._close_damaged(DataCorrupt(detail), salvaged)

    async def _rebuild(self, damaged: DamagedCopy) -> None:
        """Have an empty copy instead when the map allows it. Raises the damage of a home that no copy replaces."""
        environment = self._around.environment
        while (found := fate(self._config, self._around.node_id)) != "rebuild":
            if self._is_dropped:
                return
            if found == "refuse" and self.shard_id == self._around.node_id:
                raise damaged.error
            self._changed.clear()
            await environment.wait_for(self._changed.wait(), 1.0)
        try:
            files = await self._around.folder.rebuild(self.shard_id, damaged.salvaged, damaged.identity.partitions)
        except OSError as error:
            if error.errno not in FULL_ERRNOS:
                raise
            log.warning("the copy of shard %s cannot be rebuilt yet: %s", self.shard_id, error)
            await environment.sleep(_FULL_RETRY_S)
            return
        self._files, self._damaged = files, None
        log.warning("the copy of shard %s is rebuilt, and will be filled by its primary", self.shard_id)
        self._around.on_news()


async def _forward(work: asyncio.Task[None]) -> None:
    await asyncio.shield(work)
