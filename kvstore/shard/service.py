"""What a shard does with each request of a router, and which partitions it answers for.

Owns: the dispatch of requests to the store; the map that the shard follows; arrivals.
Promises: the shard has the last word on ownership, by its own map: what it does not own it answers with 421,
unexecuted.
Leaves to others: queues, batches and visibility (`storage.store`), the wire (`transport.channel`), fetching the map
(`app`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import msgspec

from kvstore.errors import KvError
from kvstore.placement.cluster_map import ClusterMap
from kvstore.protocol import Answer, Count, Explain, Facts, Forget, Get, Request, Scan, ScanLeases, Stats
from kvstore.storage.changes import Sink
from kvstore.storage.leases import refusal
from kvstore.storage.store import Store

log = logging.getLogger(__name__)


class ShardService:
    """One store, served. Until a map is followed it owns nothing."""

    def __init__(self, shard_id: str, store: Store) -> None:
        self.shard_id = shard_id
        self.store = store
        self.cluster_map: ClusterMap | None = None
        self._arrival = itertools.count(1)
        self._slow: set[asyncio.Task[None]] = set()

    def follow(self, cluster_map: ClusterMap) -> bool:
        """Take over a newer map; False if it is not newer. A partition that stays keeps its arrival."""
        if self.cluster_map is not None and cluster_map.epoch <= self.cluster_map.epoch:
            return False
        arrivals = [0] * cluster_map.partitions
        for partition in cluster_map.owned_by(self.shard_id):
            arrivals[partition] = self.store.arrivals[partition] or next(self._arrival)
        self.store.own(arrivals, cluster_map.epoch)
        self.cluster_map = cluster_map
        return True

    def handle(self, request: Request, sink: Sink) -> None:
        """Begin the request; its answer goes to `sink`."""
        if isinstance(request, Get):
            self.store.get(request, sink)
        elif isinstance(request, Scan | ScanLeases | Count | Explain | Stats):
            task = asyncio.create_task(self._answer_slowly(request, sink))
            self._slow.add(task)
            task.add_done_callback(self._slow.discard)
        elif isinstance(request, Forget):
            self.store.acknowledge(request.attempts)
            sink.send(Answer(request.id, 200))
        else:
            self.store.write(request, sink)

    async def _answer_slowly(self, request: Scan | ScanLeases | Count | Explain | Stats, sink: Sink) -> None:
        try:
            if isinstance(request, Scan):
                sink.send(await self.store.scan(request))
            elif isinstance(request, ScanLeases):
                sink.send(await self.store.leases(request))
            elif isinstance(request, Count):
                sink.send(await self.store.count(request))
            else:
                facts = await self._facts(request)
                sink.send(Facts(request.id, self.store.epoch, facts))  # the epoch as of now, not of the question
        except KvError as error:
            sink.send(refusal(request.id, error))
        except Exception:
            log.exception("a request failed: %s", type(request).__name__)
            sink.send(refusal(request.id, KvError("the shard failed to answer; its log says why")))

    async def _facts(self, request: Explain | Stats) -> dict[str, Any]:
        if isinstance(request, Explain):
            return await self.store.explain(request.key)
        stats: dict[str, Any] = msgspec.to_builtins(self.store.snapshot())
        floor = self.store.database.clock.attempts_floor
        return stats | {"attempts": self.store.in_doubt(), "attempts_floor": floor}
