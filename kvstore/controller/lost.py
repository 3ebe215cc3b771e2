"""Giving up a shard whose disk is lost.
What happens between the map that strikes it and the map that opens its partitions again.

Owns: when the second map may be stored, and the clock that it names; the highest version clock that any store told.
Promises: partitions are opened only when every other member follows the strike, durably. The clock is above every
version that the lost shard can have given: each store tells its own every few seconds, and what was told is written
down before it is `_TOLD_STEP` above what is.
Leaves to others: both maps (`placement.moves`), who may ask (`membership`), asking shards (`shards`).
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial

import msgspec

from kvstore.config import Limits
from kvstore.controller.document import CLOCK_MAX, CLOCK_STEP, ClusterDocument
from kvstore.controller.membership import ClusterState
from kvstore.controller.shards import ShardClients
from kvstore.errors import KvError, Unavailable
from kvstore.placement import moves
from kvstore.placement.cluster_map import ClusterMap

_TOLD_STEP = 1 << 30
_RETRY_S = 0.1
_log = logging.getLogger(__name__)


class Reopener:
    """`run` it in a task of its own."""

    def __init__(self, document: ClusterDocument, shards: ShardClients, limits: Limits) -> None:
        self._document = document
        self._shards = shards
        self._retry_s = min(_RETRY_S, limits.reconnect_wait_s_max)
        self._told = 0
        self._news = asyncio.Event()
        self.waits_for = ""  # why partitions of a lost shard are not opened yet

    def tell(self, clock: int) -> None:
        """A store has given or seen versions up to that one."""
        if self._told < clock <= CLOCK_MAX:
            self._told = clock
            self._news.set()

    async def run(self) -> None:
        """Open what is struck, for ever; and keep what was told."""
        keeping = asyncio.create_task(self._keep())
        try:
            revision = -1
            while True:
                try:
                    revision, state = await self._document.after(revision)
                    while state.map is not None and (why := await self._open(state.map)):
                        if why != self.waits_for:
                            self.waits_for = why
                            _log.warning("partitions of a lost shard wait to be opened: %s", why)
                        await asyncio.sleep(self._retry_s)
                        state = await self._document.read()
                    self.waits_for = ""
                except Unavailable as error:
                    _log.warning("the map cannot be read or changed: %s", error)
                    await asyncio.sleep(1.0)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _open(self, cluster_map: ClusterMap) -> str:
        """Open what is struck in that map; why that cannot be done yet, empty if nothing is left to do."""
        if all(strike.opened for strike in cluster_map.strikes):
            return ""
        self._shards.follow(cluster_map)
        stay = [s.id for s in cluster_map.shards if not cluster_map.is_struck(s.store_id)]
        followed = await asyncio.gather(
            *(self._shards.bring(shard_id, cluster_map.epoch) for shard_id in stay), return_exceptions=True
        )
        for outcome in followed:
            if isinstance(outcome, KvError):
                return outcome.detail
            if isinstance(outcome, BaseException):
                raise outcome
        sizes = await self._shards.measure(cluster_map)
        if unheard := [shard_id for shard_id in stay if shard_id not in sizes]:
            return f"shard {unheard[0]} does not say how far its clock is"
        told = max([self._told, *(sizes[shard_id].clock for shard_id in stay)])

        def decide(state: ClusterState) -> ClusterState:
            if state.map is None or state.map.last_strike != cluster_map.last_strike:
                return state  # another one was struck by then: all must follow that, too
            clock = max(told, state.clock) + CLOCK_STEP
            return msgspec.structs.replace(state, map=moves.opened(state.map, clock), clock=clock)

        _, after = await self._document.change(decide)
        if after.map is not None and all(strike.opened for strike in after.map.strikes):
            _log.warning("epoch %d: the partitions of lost shards are open, empty", after.map.epoch)
            return ""
        return "another shard was given up by then"

    async def _keep(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                told = self._told
                state = await self._document.read()
                if state.map is not None and told > state.clock + _TOLD_STEP:
                    await self._document.change(partial(_with_clock, told))
            except Unavailable as error:
                _log.debug("the clocks are kept later: %s", error)
            await asyncio.sleep(self._retry_s)


def _with_clock(clock: int, state: ClusterState) -> ClusterState:
    return msgspec.structs.replace(state, clock=max(clock, state.clock))
