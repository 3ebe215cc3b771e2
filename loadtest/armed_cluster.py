"""A cluster of real processes of which any one can be told to die at a named point of its code, once.

Owns: starting all processes of a cluster.yaml under a supervisor in this process, arming one of them, and pausing it.
Promises: an armed process starts with KVSTORE_FAILPOINTS once; when it has died there, the one that takes its place is
not armed. All end with this process, also when that is killed (their standard input is a pipe that only it holds).
Leaves to others: which point, and what follows from it (loadtest.txn_rounds).

`kvstore up` gives its environment to every child at every start, so that a point like `decide-before-commit=kill` would
kill all shards, again and again. So the supervisor of `up` runs here, on the very commands that `up` would run, each
behind a line of shell that takes the failpoints from a file, if there is one, and puts the file away first.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

from kvstore.config import load_config
from kvstore.launcher import cluster_children, http_get, url_of
from kvstore.supervisor import Child, Log, Supervisor
from loadtest import processes
from loadtest.cluster import READY_TIMEOUT_S, LocalCluster
from loadtest.processes import Pid

TAKE_AND_RUN = 'mv "$0" "$0.taken" 2>/dev/null && export KVSTORE_FAILPOINTS="$(cat "$0.taken")"; exec "$@"'
_NO_SUCH_PREFIX = "~none/"
_POLL_S = 0.05


class ArmedCluster(LocalCluster):
    """As a LocalCluster; `urls` are its routers. There is no `up`: the supervisor runs in this process."""

    def __init__(self, folder: Path, shards: int = 4, limits: dict[str, Any] | None = None, routers: int = 1) -> None:
        super().__init__(folder, shards, limits, routers)
        self.urls: list[str] = []
        self._armed = self.folder / "armed"
        self._children: dict[str, Child] = {}
        self._supervisor: Supervisor | None = None
        self._log: Log | None = None
        self._paused: set[Pid] = set()

    async def start(self) -> None:
        """Start all processes and wait until every router is ready. Raises RuntimeError."""
        self._armed.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self.config.write_text(self._yaml(), encoding="utf-8")
        config = load_config(self.config)
        self.urls = [url_of(router.listen) for router in config.routers]
        self.url = self.urls[0]
        began = time.monotonic()
        self._log = Log(os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        self._supervisor = Supervisor(config.limits, restart=True, log=self._log)
        for child in cluster_children(config, self.config):
            command = ("/bin/sh", "-c", TAKE_AND_RUN, str(self._armed / child.name), *child.argv)
            self._children[child.name] = child._replace(argv=command)
            self._supervisor.add(self._children[child.name])
        await self.wait_ready(READY_TIMEOUT_S)
        self.ready_s = time.monotonic() - began

    async def stop(self) -> None:
        """End all processes, also those that are paused."""
        for process in self._paused:
            processes.send_signal(process, signal.SIGCONT)
        self._paused.clear()
        if self._supervisor is not None:
            self.family()
            await self._supervisor.stop()
            self._supervisor = None
        if self._log is not None:
            await asyncio.to_thread(self._log.close)
            self._log = None
        await super().stop()

    def family(self) -> list[Pid]:
        """This process and all its descendants that run now."""
        found = processes.tree(os.getpid()) if self._supervisor is not None else []
        self._seen.update(process for process in found if process.pid in self._written_pids())
        return found

    def _written_pids(self) -> set[int]:
        texts = [path.read_text(encoding="utf-8") for path in (self.data_dir / "run").glob("*.pid")]
        return {int(text) for text in texts if text.strip().isdecimal()}

    async def wait_ready(self, timeout_s: float) -> None:
        """Until every process runs and every router reaches all shards. Raises RuntimeError with the log."""
        deadline = time.monotonic() + timeout_s
        while not (self.pids().keys() >= self.members() and await self.is_ready()):
            if time.monotonic() > deadline:
                missing = sorted(self.members() - self.pids().keys())
                raise RuntimeError(
                    f"not ready within {timeout_s:g} s; not running: {missing}\n{processes.tail(self.log, 30)}"
                )
            await asyncio.sleep(_POLL_S)

    async def is_ready(self) -> bool:
        """Whether every router is ready and reaches all shards: it lists over them, keys of which there are none."""
        for url in self.urls:
            for path in ("/readyz", f"/v1/kv?prefix={_NO_SUCH_PREFIX}&count=true"):
                status, _ = await http_get(*_address(url), path)
                if status != 200:
                    return False
        return True

    # --- faults --------------------------------------------------------------------------------------------------

    async def arm(self, name: str, failpoints: str) -> Pid:
        """Start `shard-s1`, `router-0`, … anew with these failpoints, and wait until all is ready."""
        if self._supervisor is None:
            raise RuntimeError("the cluster does not run")
        (self._armed / name).write_text(failpoints, encoding="ascii")
        await self._supervisor.remove(name)
        self._supervisor.add(self._children[name])
        await self.wait_ready(READY_TIMEOUT_S)
        if (self._armed / name).exists():
            raise RuntimeError(f"{name} has started without its failpoints {failpoints}")
        return self.pids()[name]

    def pause(self, name: str) -> None:
        """Let the process stand still (SIGSTOP)."""
        process = self.pids()[name]
        self._paused.add(process)
        processes.send_signal(process, signal.SIGSTOP)

    def wake(self, name: str) -> None:
        """Let it go on."""
        process = self.pids()[name]
        self._paused.discard(process)
        processes.send_signal(process, signal.SIGCONT)

    def kill(self, name: str) -> Pid | None:
        """SIGKILL; None when it is not running. The supervisor starts it again."""
        process = self.pids().get(name)
        if process is not None:
            processes.send_signal(process, signal.SIGKILL)
        return process


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)
