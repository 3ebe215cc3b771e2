"""A node that was given up.
The keys of its own shard move to the other shards, and the shard leaves the map.

Owns: when the shard of such a node is to leave.
Promises: it leaves as by `kvstore shard remove`, a change that a person can cancel; it is asked for once, each time a
node is given up. A shard that its own node serves, and the last shard, stay.
Leaves to others: giving a node up (`replicas`), what moves where (`operator_changes`, `mover`), its copies
(`copy_places`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from kvstore.controller.document import ClusterDocument
from kvstore.errors import ChangeRefused, ForeignData, KvError
from kvstore.placement.cluster_map import ClusterMap

_RETRY_S = 1.0
_log = logging.getLogger(__name__)


class Retirer:
    """`run` it in a task of its own. `remove`: asks for a shard to leave."""

    def __init__(self, document: ClusterDocument, remove: Callable[[str], Awaitable[Any]]) -> None:
        self._document = document
        self._remove = remove
        self._asked: set[str] = set()

    async def run(self) -> None:
        """For ever."""
        revision = -1
        while True:
            try:
                revision, state = await self._document.after(revision)
                if state.map is not None:
                    await self._retire(state.map)
            except KvError as error:
                _log.warning("the shard of a node that was given up cannot leave yet: %s", error)
                await asyncio.sleep(_RETRY_S)
                revision = -1

    async def _retire(self, cluster_map: ClusterMap) -> None:
        due = retiring(cluster_map)
        self._asked &= {node.id for node in cluster_map.nodes if node.given_up}
        for shard_id in due:
            if shard_id in self._asked:
                continue
            try:
                await self._remove(shard_id)
            except (ChangeRefused, ForeignData) as error:
                _log.warning("node %s is given up, and its shard stays where it is: %s", shard_id, error.sentences)
            self._asked.add(shard_id)


def retiring(cluster_map: ClusterMap) -> list[str]:
    """The shards whose home is given up, and which another node serves."""
    given_up = {node.id for node in cluster_map.nodes if node.given_up}
    return [
        shard.id
        for shard in cluster_map.shards
        if shard.id in given_up and shard.primary.node != shard.id and shard.state != "leaving"
    ]
