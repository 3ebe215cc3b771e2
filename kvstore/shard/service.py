"""What a shard does with each request of a router, and which partitions it answers for.

Owns: the dispatch of requests to the store; which maps the shard follows.
Promises: the shard has the last word on ownership, by its own map: what it does not own it answers with 421,
unexecuted. One that has left the cluster says so until no router asks it any more.
Leaves to others: queues, batches and visibility (`store.store`), the wire (`transport.channel`), fetching the map
(`app`).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, get_args

import msgspec

from kvstore.config import Limits
from kvstore.environment import until_quiet
from kvstore.errors import BadRequest, ForeignData, WrongOwner
from kvstore.placement.cluster_map import ClusterMap, checked_map
from kvstore.placement.map_format import decode_map
from kvstore.protocol import (
    Answer,
    Count,
    Explain,
    Follow,
    Forget,
    ForStore,
    Freeze,
    Get,
    Info,
    Names,
    Pull,
    Receive,
    Reply,
    Request,
    Scan,
    ScanLeases,
    Stats,
)
from kvstore.shard.admission import Admission
from kvstore.shard.receiver import Receiver
from kvstore.shard.told import ToldNumbers
from kvstore.store.refusals import fault
from kvstore.store.store import Store
from kvstore.store.write_set import Sink

log = logging.getLogger(__name__)

_Slow = Scan | ScanLeases | Count | Explain | Stats | Follow | Receive | Pull | Freeze
_SLOW = frozenset(get_args(_Slow))
_IN_BATCHES = frozenset(get_args(Request)) - _SLOW - {Get, Forget, Names, ForStore}  # decided in batches
_OF_ANY_STRIKE = frozenset({Follow, Stats})  # the first brings it, the second is of the process


class ShardService:
    """One store, served. Until a map is followed it owns nothing."""

    def __init__(
        self, shard_id: str, store: Store, receiver: Receiver, limits: Limits, told: ToldNumbers | None = None
    ) -> None:
        self._told = told
        self.shard_id = shard_id
        self.store = store
        self._receiver = receiver
        self._limits = limits
        self._admission = Admission(limits, len(store.served.generations))
        self._slow: set[asyncio.Task[None]] = set()
        self._asked_s = 0.0

    def hear(self, cluster_map: ClusterMap) -> bool:
        """A newer map has come, to be followed when those before it are.
        Whether this store's term goes on in it."""
        identity, shard = self.store.identity, cluster_map.shard(self.shard_id)
        is_ours = identity.cluster_id in (None, cluster_map.cluster_id)
        if is_ours and shard is not None and shard.store_id == identity.store_id:
            return self.store.replicas.hear(cluster_map)
        return True

    async def follow(self, cluster_map: ClusterMap) -> bool:
        """Take over a newer map, durably; False if it is not newer. Raises ForeignData, having changed nothing."""
        identity = self.store.identity
        if identity.cluster_id not in (None, cluster_map.cluster_id):
            raise ForeignData(
                f"{self.store.path} belongs to cluster {identity.cluster_id}, not to {cluster_map.cluster_id}."
            )
        shard = cluster_map.shard(self.shard_id)
        if shard is not None and shard.store_id != identity.store_id:
            raise ForeignData(f"the cluster knows shard {shard.id} with another data file than this one.")
        if not self.hear(cluster_map):
            return False  # the term of this store has ended: it answers nothing more, and adopts nothing
        if shard is not None and shard.primary.copy_id != self.store.copy_id:
            raise ForeignData(
                f"the cluster knows shard {shard.id} with the copy {shard.primary.copy_id}, and this is copy "
                f"{self.store.copy_id}."
            )
        if cluster_map.is_struck(identity.store_id):
            raise ForeignData(f"shard {self.shard_id} was given up with this data file, which is refused for ever.")
        if cluster_map.partitions != len(self.store.served.generations):
            raise ForeignData(
                f"the cluster has {cluster_map.partitions} partitions, this file {len(self.store.served.generations)}."
            )
        present = self.store.cluster_map
        if present is not None and cluster_map.epoch > self.store.served.epoch:
            await self._verify()
        if shard is not None and (present is None or cluster_map.epoch > present.epoch):
            await self.store.promise(shard.term)
        is_newer = await self.store.partitions.adopt(cluster_map)
        if is_newer:
            self._receiver.drop_what_is_over()
            owned = len(cluster_map.owned_by(self.shard_id))
            log.info("epoch %d: owns %d of %d partitions", cluster_map.epoch, owned, cluster_map.partitions)
        return is_newer

    async def _verify(self) -> None:
        """An older copy of the files must not come to own what it never received. Raises StoreBehind, TryLater."""
        if self._told is not None and not self._told.is_verified:
            await self._told.confirm(self.store)

    async def farewell(self) -> None:
        """Before the process ends.
        If the shard leaves the cluster, go on until no router has asked it for a moment.

        A router whose map is a moment behind is sent on with 421. If it lost the connection instead, it could not know
        whether a write was done.
        """
        cluster_map = self.store.cluster_map
        shard = cluster_map.shard(self.shard_id) if cluster_map is not None else None
        if cluster_map is None or (shard is not None and shard.state != "leaving"):
            return
        quiet_s, quiet_s_max = self._limits.farewell_quiet_s, self._limits.farewell_quiet_s_max
        await until_quiet(self.store.tables.environment, lambda: self._asked_s, quiet_s, quiet_s_max)

    def handle(self, request: Request, sink: Sink) -> None:
        """Begin the request; its answer goes to `sink`. Raises nothing: one that fails, fails alone."""
        self._asked_s = self.store.tables.environment.monotonic_s()
        try:
            self._admission.check(request)
            self._begin(request, sink)
        except Exception as error:
            sink.send(fault(request, error))

    def _begin(self, request: Any, sink: Sink) -> None:
        """Raises WrongOwner if one of both has not heard of the last strike."""
        kind, store = type(request), self.store
        if getattr(sink, "strike", 0) != store.tables.openings.last and kind not in _OF_ANY_STRIKE:
            raise WrongOwner(
                "A shard was given up, and this shard or the sender has not heard of it: ask again with the next map.",
                epoch=store.served.epoch,
            )
        if kind is Get:
            store.get(request, sink)
        elif kind in _IN_BATCHES:
            store.write(request, sink)
        elif kind in _SLOW:
            task = asyncio.create_task(self._answer_slowly(request, sink))
            self._slow.add(task)
            task.add_done_callback(self._slow.discard)
        elif kind is Forget:
            store.undecided.acknowledge(request.attempts)
            sink.send(Answer(request.id, 200))

    async def _answer_slowly(self, request: _Slow, sink: Sink) -> None:
        try:
            reply = await self._reply(request)
            if not isinstance(request, Stats):
                self.store.replicas.check()  # behind the look at it, before the answer
            sink.send(reply)
        except Exception as error:
            sink.send(fault(request, error))

    async def _reply(self, request: _Slow) -> Reply:
        """Raises KvError."""
        match request:
            case Scan():
                return await self.store.scans.scan(request)
            case ScanLeases():
                return await self.store.scans.leases(request)
            case Count():
                return await self.store.scans.count(request)
            case Explain():
                facts = await self.store.inspection.explain(request.key)
                return Info(request.id, self.store.served.epoch, facts)  # the epoch as of now, not of the question
            case Stats():
                live = {"live": self.store.inspection.live(request.live_max)} if request.live_max else {}
                return Info(request.id, self.store.served.epoch, self._facts() | live)
            case Follow():
                await self.follow(_decoded_map(request.cluster_map))
                return Answer(request.id, 200, self.store.served.epoch)
            case Receive():
                progress = await self._receiver.receive(request)
                if progress.step == "done" and self._told is not None:
                    await self._told.confirm(self.store)
                return progress
            case Pull():
                return await self.store.migration.pull(request)
            case Freeze():
                return msgspec.structs.replace(await self.store.partitions.freeze(request.move), id=request.id)

    def _facts(self) -> dict[str, Any]:
        stats: dict[str, Any] = msgspec.to_builtins(self.store.inspection.snapshot())
        clock = {"clock": self.store.clock.version, "attempts_floor": self.store.clock.attempts_floor}
        room = {"disk_spare_bytes": self.store.migration.spare_bytes()}
        return stats | clock | room | {"attempts": self.store.inspection.in_doubt()}


def _decoded_map(encoded: bytes) -> ClusterMap:
    """Raises BadRequest for what is no map, or one that contradicts itself; ForeignData for an unknown format."""
    try:
        return checked_map(decode_map(encoded))
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise BadRequest(f"this is no cluster map: {error}.") from None
