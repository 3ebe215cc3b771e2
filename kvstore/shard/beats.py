"""The node's beats: telling the controller of all copies here, and carrying out what it orders.

Owns: when a beat is sent, its echo, what of the answer is done; how long a node that stops waits for others to take
over.
Promises: without copies nothing is sent. Requests are those that stand when the beat leaves. Nothing is done by an
answer but making and setting aside copies that no map names, and giving back a lease; roles follow the map alone.
Leaves to others: the form of beats (`replication.beats`), the copies (`node_stores`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import aiohttp
import msgspec

from kvstore.environment import Environment
from kvstore.errors import OtherProtocol
from kvstore.replication.beats import Beat, BeatAnswer, Echo, beat_every_s, beats
from kvstore.said_once import SaidOnce
from kvstore.shard.node_stores import NodeStores
from kvstore.transport.versions import refused_by

log = logging.getLogger(__name__)

_STOPPING_EVERY_S = 0.02

_decode = msgspec.json.Decoder(BeatAnswer).decode


class Beats:
    """Of one node's process."""

    def __init__(
        self,
        node_id: str,
        stores: NodeStores,
        session: aiohttp.ClientSession,
        controller_url: str,
        failover_after_s: float,
        environment: Environment,
    ) -> None:
        self._node_id = node_id
        self._environment = environment
        self._start = environment.random_hex(8)
        self._stores = stores
        self._session = session
        self._controller_url = controller_url.rstrip("/")
        self._url = f"{self._controller_url}/v1/nodes/{node_id}/beat"
        self._refused = SaidOnce()  # why it takes none
        self._timeout = aiohttp.ClientTimeout(total=failover_after_s / 2)
        self._every_s = beat_every_s(failover_after_s)
        self._echo = Echo()
        self._news = asyncio.Event()
        self._stops = False
        self._may_stop = asyncio.Event()
        self._orders: dict[asyncio.Task[None], None] = {}

    def hurry(self) -> None:
        """Something is to be told soon."""
        self._news.set()

    async def run(self) -> None:
        """Beat, for ever."""
        while True:
            if self.has_to_tell:
                await self._beat()
            self._news.clear()
            every_s = _STOPPING_EVERY_S if self._stops else self._every_s
            await self._environment.wait_for(self._news.wait(), every_s)

    @property
    def has_to_tell(self) -> bool:
        """Whether there are copies, by the newest map or in the files here."""
        cluster_map = self._stores.cluster_map
        return cluster_map is not None and beats(cluster_map, self._stores.by_shard.keeps_copies)

    async def hand_on(self, timeout_s: float) -> bool:
        """Tell that this node stops, until others have taken over all that they can.
        False if they have not in time."""
        cluster_map = self._stores.cluster_map
        if cluster_map is None or cluster_map.node(self._node_id) is None:
            return True
        self._stops = True
        self._news.set()
        return await self._environment.wait_for(self._may_stop.wait(), timeout_s)

    async def close(self) -> None:
        """End what was ordered."""
        for task in self._orders:
            task.cancel()
        await asyncio.gather(*self._orders, return_exceptions=True)

    async def _beat(self) -> None:
        cluster_map = self._stores.cluster_map
        assert cluster_map is not None
        residents = list(self._stores.by_shard.values())
        reports = [each.report() for each in residents]
        told = Beat(
            node=self._node_id,
            start=self._start,
            cluster_id=cluster_map.cluster_id,
            epoch=cluster_map.epoch,
            clock=self._stores.by_shard.clock,
            stops=self._stops,
            echo=self._echo,
            copies=[report for report in reports if report is not None],
            requests=[request for each in residents for request in each.requests()],
        )
        try:
            body = msgspec.json.encode(told)
            async with self._session.post(self._url, data=body, timeout=self._timeout) as answer:
                if answer.status != 200:
                    self._say_refused(refused_by(self._controller_url, answer.headers))
                    return
                ordered = _decode(await answer.read())
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
            return
        self._echo = Echo(start=ordered.start, beat=ordered.beat)
        for each, report in zip(residents, reports, strict=True):
            each.local.controller_heard(report, decides=not ordered.behind)
        if ordered.may_stop:
            self._may_stop.set()
        for drop in ordered.drop:
            self._stores.drop(drop)
        for make in ordered.make:
            self._order(self._stores.make(make))
        for give_back in ordered.give_back:
            self._order(self._stores.give_back(give_back))

    def _say_refused(self, refused: OtherProtocol | None) -> None:
        why = refused.sentences if refused is not None else ""
        if self._refused.is_news(why):
            log.error("the controller takes no beats of this node: %s", why)

    def _order(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._orders[task] = None
        task.add_done_callback(self._orders.pop)
