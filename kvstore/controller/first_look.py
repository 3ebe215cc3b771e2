"""What a controller's process waits for before its first change of a map: to hear which maps the nodes follow.

Owns: which nodes have told it since this process began.
Promises: nothing is changed before each node of the map has told, or `timeout_s` has passed since this process began:
a node that is away keeps none waiting for longer.
Leaves to others: what was told (`document`), what it means that a node follows a newer map (`document.behind`).

A record that was put back from a backup may be one epoch old. A change of it that is made before any node is heard
makes another map of an epoch that nodes have followed. From then on their epochs are no higher than this controller's,
so it could not be told that its record is old, and would undo what was committed.
"""

from __future__ import annotations

import asyncio

from kvstore.environment import Environment
from kvstore.placement.cluster_map import ClusterMap


class FirstLook:
    """Of one process. `timeout_s`: after which the nodes that have not told are waited for no more."""

    def __init__(self, timeout_s: float, environment: Environment) -> None:
        self._environment = environment
        self._until_s = environment.monotonic_s() + timeout_s
        self._told: set[str] = set()
        self._news = asyncio.Event()

    def note(self, node: str) -> None:
        """The node has told which map it follows."""
        if self._environment.monotonic_s() < self._until_s:
            self._told.add(node)
            self._news.set()

    async def wait(self, cluster_map: ClusterMap) -> None:
        """Return once all nodes of that map have told, or the time is over."""
        nodes = {node.id for node in cluster_map.nodes if not node.given_up}
        while not nodes <= self._told and (left_s := self._until_s - self._environment.monotonic_s()) > 0:
            self._news.clear()
            await self._environment.wait_for(self._news.wait(), left_s)
