"""The cluster that a chaos run plays with: real processes behind a proxy, some with a planted bug.

Owns: its limits, the command by which a process is started so that its connections go through the proxy.
Promises: every process that is ever started, also a shard that is added later, is known to the proxy by its name.
Leaves to others: starting and ending processes (loadtest.cluster.armed), the proxy (loadtest.cluster.proxy), the other
side of the command (child).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstore.supervisor import Child
from loadtest.chaos.child import command
from loadtest.cluster.armed import ArmedCluster
from loadtest.cluster.proxy import Proxy

# Short, so that a phase sees them pass; moves in many small groups, so that faults meet them; a
# cache so small that many reads are of the file.
LIMITS: dict[str, Any] = {
    "request_timeout_s": 1.5,
    "reroute_timeout_s": 2.5,
    "reconnect_wait_s_max": 0.2,
    "txn_timeout_s": 1.5,
    "move_freeze_timeout_s": 1.5,
    "move_group_keys_max": 100,
    "tombstone_kept_s": 3.0,
    "map_poll_s": 1.0,
    "restart_wait_s_max": 0.5,
    "cache_bytes_max": 8192,
    "apply_delay_s": 0.02,
    "body_bytes_max": 2 * 1024 * 1024,
    "log_segment_bytes": 4 * 1024 * 1024,
}
PARTITIONS = 128


class ChaosCluster(ArmedCluster):
    """As an ArmedCluster. `proxy` None: processes and clients connect directly. `bug` is planted in all processes.

    `client_urls`: how clients reach the routers; `urls` go past the proxy.
    """

    def __init__(
        self, folder: Path, shards: int, routers: int, proxy: Proxy | None, bug: str = "", replicas: int = 1
    ) -> None:
        super().__init__(folder, shards, LIMITS, routers, PARTITIONS, replicas)
        self.client_urls: list[str] = []
        self._proxy = proxy
        self._bug = bug

    async def start(self) -> None:
        """As that of an ArmedCluster."""
        await super().start()
        self.client_urls = list(self.urls)
        if self._proxy is not None:
            addresses = [url.removeprefix("http://") for url in self.urls]
            self.client_urls = [await self._proxy.open_for_clients(address) for address in addresses]

    def dressed(self, child: Child) -> Child:
        """Started by loadtest.chaos.child."""
        proxy = ""
        if self._proxy is not None:
            self._proxy.faults.names[child.argv[child.argv.index("--listen") + 1]] = child.name
            proxy = self._proxy.address
        slow = str(self._slow(child.name)) if child.name.startswith("shard-") else ""
        return child._replace(argv=command(child.name, proxy, child.argv, self._bug, slow))

    def slow_down(self, name: str) -> None:
        """The disk of that shard is slow from now on."""
        self._slow(name).touch()

    def speed_up(self, name: str) -> None:
        """The disk of that shard is as quick as this machine's."""
        self._slow(name).unlink(missing_ok=True)

    def _slow(self, name: str) -> Path:
        return self.folder / f"{name}.slow"
