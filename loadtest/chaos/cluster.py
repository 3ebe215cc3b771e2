"""The cluster that a chaos run plays with: real processes behind links that can be cut, some with a planted bug.

Owns: its limits, the command by which a process is started so that its connections go through the links.
Promises: every process that is ever started, also a shard that is added later, is known to the links by its name.
Leaves to others: starting and ending processes (loadtest.armed_cluster), the links (links), the other side of the
command (child).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstore.supervisor import Child
from loadtest.armed_cluster import ArmedCluster
from loadtest.chaos.child import command
from loadtest.chaos.links import Links

# Short, so that a chapter sees them pass; moves in many small groups, so that faults meet them.
LIMITS: dict[str, Any] = {
    "request_timeout_s": 1.5,
    "reroute_timeout_s": 2.5,
    "reconnect_wait_s_max": 0.2,
    "txn_timeout_s": 1.5,
    "move_fence_timeout_s": 1.5,
    "move_group_keys_max": 100,
    "tombstone_kept_s": 3.0,
    "map_poll_s": 1.0,
    "restart_wait_s_max": 0.5,
}
PARTITIONS = 128


class ChaosCluster(ArmedCluster):
    """As an ArmedCluster. `links` None: processes and clients connect directly. `bug` is planted in all processes
    (that needs links).

    `client_urls`: how clients reach the routers; `urls` go past the links.
    """

    def __init__(self, folder: Path, shards: int, routers: int, links: Links | None, bug: str = "") -> None:
        super().__init__(folder, shards, LIMITS, routers, PARTITIONS)
        self.client_urls: list[str] = []
        self._links = links
        self._bug = bug

    async def start(self) -> None:
        """As that of an ArmedCluster."""
        await super().start()
        self.client_urls = list(self.urls)
        if self._links is not None:
            addresses = [url.removeprefix("http://") for url in self.urls]
            self.client_urls = [await self._links.open_for_clients(address) for address in addresses]

    def dressed(self, child: Child) -> Child:
        """Started by loadtest.chaos.child, if there are links."""
        if self._links is None:
            return child
        self._links.names[child.argv[child.argv.index("--listen") + 1]] = child.name
        return child._replace(argv=command(child.name, self._links.address, child.argv, self._bug))
