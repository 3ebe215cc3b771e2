"""The copies of a store, as the store itself sees them.
When its records are shipped, and when it may answer.

Owns: how its sender comes to be, and what of a cluster map reaches it; giving the lease back.
Promises: nothing is sent to a copy before the map that names it is durable here. A copy that is out is waited for no
more as soon as that map is heard of, also while the store's own record of it, or of an older map, waits for that very
copy: a copy that is out by the controller's map can be promoted no more. A map of another term ends this one at once.
Leaves to others: shipping (`replication.sender`), waiting for copies before anything is answered (`pipeline`), the
opening of a term and what becomes of a store whose term has ended (shard).

A store without copies has no sender, and pays for none of this but a look at one attribute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication import shipping
from kvstore.replication.configuration import Configuration, configuration_of
from kvstore.replication.copy_link import Surroundings
from kvstore.replication.places import Times
from kvstore.replication.sender import Sender
from kvstore.replication.shipping import Shipping
from kvstore.replication.snapshot_pace import never_busy
from kvstore.replication.stalls import no_syncs
from kvstore.replication.wire import Connect
from kvstore.store.applier import Applier
from kvstore.store.comparison import Comparison
from kvstore.store.pipeline import Pipeline
from kvstore.store.refusals import no_lease, refusal
from kvstore.store.tables import Tables

_LOOK_S = 0.002


class Replicating(NamedTuple):
    """What a store needs to have copies.
    `node`: where it is served; `start`: a random id of this opening of it.

    `on_news`: a request to the controller has come up or has gone, or the term has ended. `is_busy`: whether clients
    are at work on the node; `syncs`: those of all its logs that are under way.
    """

    node: str
    start: str
    connect: Connect
    times: Times
    on_news: Callable[[], None]
    is_busy: Callable[[], bool] = never_busy
    syncs: Callable[[], frozenset[object]] = no_syncs


class Replicas:
    """`replicating` None: the store has no copies, and follows no map that names some."""

    def __init__(
        self, shard_id: str, tables: Tables, pipeline: Pipeline, applier: Applier, replicating: Replicating | None
    ) -> None:
        self._shard_id = shard_id
        self._tables = tables
        self._pipeline = pipeline
        self._replicating = replicating
        self._is_there = asyncio.Event()
        self.comparison = Comparison(tables, applier)

    async def run(self) -> None:
        """Ship what is appended, once there are copies, for ever."""
        await self._is_there.wait()
        sender = self._tables.sender
        assert sender is not None
        try:
            await sender.run()
        finally:
            await sender.close()

    # --- maps

    def hear(self, cluster_map: ClusterMap) -> bool:
        """A newer map has come, and may be adopted later: whether this store's term goes on in it."""
        sender, config = self._tables.sender, configuration_of(cluster_map, self._shard_id)
        if sender is not None and config is not None:
            sender.hear(config)
        return sender is None or not sender.shipping.deposed

    def prepare(self, cluster_map: ClusterMap, *, opens: bool) -> None:
        """Follow that map, which the next record carries. Raises ValueError if it names copies that cannot be reached.

        `opens`: the record opens the term, so it has to be on every copy in sync.
        """
        config = configuration_of(cluster_map, self._shard_id)
        if config is None or not config.replicas or self._tables.sender is not None:
            return
        if self._replicating is None:
            raise ValueError(f"shard {self._shard_id} cannot reach the copies that map {cluster_map.epoch} names")
        self._tables.sender = self._new_sender(self._opened(config) if opens else self._alone(config))
        self._is_there.set()

    def carried(self, cluster_map: ClusterMap, number: int) -> None:
        """The record of that number carries the map."""
        sender, config = self._tables.sender, configuration_of(cluster_map, self._shard_id)
        if sender is not None and config is not None:
            sender.follow(config, number)

    def _opened(self, config: Configuration) -> Shipping:
        log, replicating = self._tables.log, self._replicating
        assert replicating is not None
        return shipping.opened(config, replicating.node, replicating.start, log.last.number + 1, log.durable)

    def _alone(self, config: Configuration) -> Shipping:
        """The state of a store that has served without copies in this term, before it follows that map."""
        log, replicating = self._tables.log, self._replicating
        assert replicating is not None
        before = config._replace(epoch=config.epoch - 1, replicas=())
        state = shipping.opened(before, replicating.node, replicating.start, log.durable, log.durable)
        return shipping.appended(state, log.last.number)

    def _new_sender(self, state: Shipping) -> Sender:
        tables, replicating = self._tables, self._replicating
        assert replicating is not None
        _, _, connect, times, on_news, is_busy, syncs = replicating
        log, engine, environment, settle = tables.log, tables.engine, tables.environment, self._pipeline.settle_up_to
        on_damage = tables.verification.found
        around = Surroundings(log, engine, environment, connect, times, settle, on_news, is_busy, on_damage, syncs)
        return Sender(state, around)

    # --- the lease

    def check(self) -> None:
        """Refuse to answer what no record carries, without the lease; to be asked behind the look at it.

        Raises Unavailable (`no_lease`).
        """
        if not self._tables.may_answer():
            raise no_lease()

    async def give_back(self, copy_id: str, timeout_s: float) -> bool:
        """Give the lease back once that copy has all records.
        False, and go on, if it has not in that time.

        Operations that come during it are refused, unexecuted. Afterwards nothing is answered in this term.
        """
        tables, environment = self._tables, self._tables.environment
        sender = tables.sender
        if sender is None or not sender.serves:
            return False
        tables.is_sealed = True
        ends_s = environment.monotonic_s() + timeout_s
        while not (self._pipeline.is_idle and sender.shipping.behind.get(copy_id) == 0):
            if environment.monotonic_s() > ends_s or not sender.serves:
                tables.is_sealed = False
                return False
            await environment.sleep(_LOOK_S)
        sender.give_back()
        self._refuse_waiting()
        return True

    def _refuse_waiting(self) -> None:
        """What waits for a lock here was not executed, and never will be in this term.
        It may be asked again."""
        locks = self._tables.locks
        waiting = [(queued.op, queued.sink) for _, queued in locks.all_waiting()]
        waiting += [each for lease in locks.leases() for each in locks.waiting_for_lease(lease.name)]
        for op, sink in waiting:
            sink.send(refusal(op.id, no_lease()))
