"""One kvstore cluster of real processes in a folder of its own, as `kvstore up` starts it.

Owns: its cluster.yaml, the `up` process, and which of its processes has which pid.
Promises: `pids` names only processes that descend from the `up` started here; `stop` leaves none of them running,
also those that outlived a killed `up`.
Leaves to others: what is done with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import Any, Self

import yaml
from psutil import Process

from loadtest.cluster import processes

REPOSITORY = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S = 60.0
_ORPHANS_TIMEOUT_S = 12.0


class LocalCluster:
    """`shards` storage shards, `routers` routers and one controller below `folder` (made if missing).

    async with LocalCluster(folder, shards=4) as cluster: requests to cluster.url (the first router);
    `cluster.urls` are all of them
    """

    def __init__(
        self,
        folder: Path,
        shards: int = 4,
        limits: dict[str, Any] | None = None,
        routers: int = 1,
        partitions: int | None = None,
        replicas: int = 1,
    ) -> None:
        self.folder = folder.resolve()
        self.data_dir = self.folder / "data"
        self.log = self.folder / "up.log"
        self.config = self.folder / "cluster.yaml"
        self.shards = shards
        self.routers = routers
        self.partitions = partitions
        self.replicas = replicas
        self.limits = limits or {}
        self.url = ""
        self.urls: list[str] = []
        self.up: asyncio.subprocess.Process | None = None
        self._drain: asyncio.Task[None] | None = None
        self._seen: set[Process] = set()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start `kvstore up` and wait for its `ready:` line, which tells of the first router; sets `url` and `urls`.
        Raises RuntimeError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self.config.write_text(self._yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "kvstore", "up", "--config", str(self.config)]
        self.up = await processes.start(command, self.log, cwd=REPOSITORY, pipe=True)
        try:
            self.url = await processes.read_line(self.up, "ready:", READY_TIMEOUT_S)
        except RuntimeError as error:
            raise RuntimeError(f"kvstore up: {error}\n{processes.tail(self.log)}") from None
        routers = yaml.safe_load(self.config.read_text(encoding="utf-8"))["routers"]
        self.urls = [f"http://{router['listen']}" for router in routers]
        self._drain = asyncio.create_task(self._read_on(self.up))

    async def stop(self) -> None:
        """End `up` and everything that it started."""
        if self.up is not None:
            await processes.end(self.up)
            self.up = None
        for process in await processes.wait_gone(list(self._seen), _ORPHANS_TIMEOUT_S):
            processes.send_signal(process, signal.SIGKILL)
        self._seen.clear()
        if self._drain is not None:
            self._drain.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._drain
            self._drain = None

    def pids(self) -> dict[str, Process]:
        """The running processes by name (`router-0`, `controller-0`, `shard-s1`, …), from `<data_dir>/run/*.pid`."""
        family = {process.pid: process for process in self.family()}
        found: dict[str, Process] = {}
        for file in sorted((self.data_dir / "run").glob("*.pid")):
            with contextlib.suppress(OSError, ValueError):
                pid = int(file.read_text(encoding="utf-8"))
                if pid in family:
                    found[file.stem] = family[pid]
        return found

    def family(self) -> list[Process]:
        """`up` and all its descendants that run now, `up` first."""
        found = processes.tree(self.up.pid) if self.up is not None else []
        self._seen.update(found)
        return found

    def members(self) -> set[str]:
        """The names that `pids` has when every process runs."""
        routers = {f"router-{number}" for number in range(self.routers)}
        return {*routers, "controller-0", *(f"shard-s{number + 1}" for number in range(self.shards))}

    def _yaml(self) -> str:
        ports = processes.free_ports(self.routers + 1 + self.shards)
        controller, *others = (f"127.0.0.1:{port}" for port in ports)
        routers, shards = others[: self.routers], others[self.routers :]
        document: dict[str, Any] = {
            "data_dir": "./data",
            "replicas": self.replicas,
            "routers": [{"id": str(number), "listen": listen} for number, listen in enumerate(routers)],
            "controllers": [{"id": "0", "listen": controller}],
            "shards": [{"id": f"s{number}", "listen": listen} for number, listen in enumerate(shards, start=1)],
        }
        if self.partitions:
            document["partitions"] = self.partitions
        if self.limits:
            document["limits"] = self.limits
        return yaml.safe_dump(document, sort_keys=False)

    @staticmethod
    async def _read_on(up: asyncio.subprocess.Process) -> None:
        """Take in whatever else `up` prints: a full pipe would stop it."""
        while up.stdout is not None and await up.stdout.read(65_536):
            pass
