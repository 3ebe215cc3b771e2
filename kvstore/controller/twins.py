"""A shard that announces itself from another address: is the one at the address before gone?

Owns: the question to the last address, and what its answers mean.
Promises: of two processes with copies of one file in this session the first stays the member, as long as it answers.
One that answers in another session belongs to another cluster with the same ids, and hears by the question that this
one is there.
Leaves to others: what an announcement changes (`membership`), asking (`shards`).
"""

from __future__ import annotations

import asyncio
import logging

from kvstore.controller.membership import Announcement, ClusterState
from kvstore.controller.shards import ShardClients
from kvstore.errors import Conflict
from kvstore.transport.sessions import ADOPT

_ANSWER_TIMEOUT_S = 1.0
_log = logging.getLogger(__name__)


class Twins:
    """Asks the process at a shard's last address."""

    def __init__(self, shards: ShardClients) -> None:
        self._shards = shards
        self._told: set[str] = set()

    async def check(self, state: ClusterState, announcement: Announcement) -> None:
        """Refuse an announcement while the member with that file goes on answering at its own address.

        Raises Conflict. Takes a second at most.
        """
        shard = state.map.shard(announcement.id) if state.map is not None else None
        node = state.map.node(announcement.id) if state.map is not None else None
        if node is None or shard is None or shard.store_id != announcement.store_id or node.url == announcement.url:
            return
        url = node.url
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                found = await self._shards.served_at(url, shard.store_id)
        except TimeoutError:
            return
        if found is None or found.store_id != shard.store_id:
            return
        if found.session == self._shards.cluster.id:
            raise Conflict(
                f"shard {shard.id} is served at {url} by another process, and the file of the one at "
                f"{announcement.url} is a copy: end one of the two.",
                retry_after_ms=1000,
            )
        self._tell(url, shard.id)

    def _tell(self, url: str, shard_id: str) -> None:
        if url not in self._told:
            self._told.add(url)
            _log.error(
                "shard %s is also served at %s, by another cluster with the same ids: one of the two runs on a copy of "
                "a data directory. Both go on apart; %s",
                shard_id,
                url,
                ADOPT,
            )
