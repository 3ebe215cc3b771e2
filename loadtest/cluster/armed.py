"""A cluster of real processes that can be told to die at a named point of their code.
Any one of them, once.

Owns: starting all processes of a cluster.yaml under a supervisor in this process, arming some of them, stopping them
and keeping them from coming back.
Promises: an armed process takes its failpoints once; when it has died there, the one that takes its place is not armed.
Shards are started and ended as the controller wants them, as `kvstore up` does. All end with this process,
also when that is killed (their standard input is a pipe that only it holds).
Leaves to others: which point, and what follows from it (loadtest.chaos).

`kvstore up` gives its environment to every child at every start, so that a point like `decide-before-commit=kill` would
kill all shards, again and again. So the supervisor of `up` runs here, on the very commands that `up` would run, each
behind a line of shell that names a file of its own for its failpoints (see kvstore.failpoints). The same line waits
while the process is not to come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from psutil import Process

from kvstore.config import Limits, load_config
from kvstore.launcher import ShardReconciler, cluster_children, url_of
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from kvstore.readiness import http_get
from kvstore.supervisor import STOP_ORDER, Child, Log, Supervisor
from loadtest.cluster import processes
from loadtest.cluster.local import READY_TIMEOUT_S, LocalCluster

RUN = 'while [ -e "$0.held" ]; do sleep 0.02; done; export KVSTORE_FAILPOINTS="@$0"; exec "$@"'
_NO_SUCH_PREFIX = "~none/"
_POLL_S = 0.05


class _ArmedSupervisor(Supervisor):
    """Starts every child behind the line of shell. `folder`: where the files with failpoints lie. `dress`: what else
    becomes of its command."""

    def __init__(self, folder: Path, limits: Limits, log: Log, dress: Callable[[Child], Child]) -> None:
        super().__init__(limits, restart=True, log=log)
        self._folder = folder
        self._dress = dress

    def add(self, child: Child, again: Callable[[Child], Child] | None = None) -> None:
        """As that of a Supervisor."""
        super().add(self._armed(child), (lambda before: self._armed(again(before))) if again else None)

    def _armed(self, child: Child) -> Child:
        argv = self._dress(child).argv
        return child._replace(argv=("/bin/sh", "-c", RUN, str(self._folder / child.name), *argv))


class Holds:
    """Which processes may not come back, as a file for each, and by how many faults."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._of: Counter[str] = Counter()

    def begin(self, name: str) -> None:
        """One fault more holds it."""
        self._of[name] += 1
        self._file(name).touch()

    def end(self, name: str) -> None:
        """One fault holds it no more."""
        self._of[name] = max(0, self._of[name] - 1)
        if not self._of[name]:
            self._file(name).unlink(missing_ok=True)

    def end_all(self) -> None:
        """Nothing holds any process."""
        for name in self._of:
            self._file(name).unlink(missing_ok=True)
        self._of.clear()

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.held"


class ArmedCluster(LocalCluster):
    """As a LocalCluster; `urls` are its routers. There is no `up`: the supervisor runs in this process."""

    def __init__(
        self,
        folder: Path,
        shards: int = 4,
        limits: dict[str, Any] | None = None,
        routers: int = 1,
        partitions: int | None = None,
        replicas: int = 1,
    ) -> None:
        super().__init__(folder, shards, limits, routers, partitions, replicas)
        self.urls: list[str] = []
        self.controller_url = ""
        self._armed = self.folder / "armed"
        self._supervisor: _ArmedSupervisor | None = None
        self._launching: asyncio.Task[None] | None = None
        self._log: Log | None = None
        self._paused: set[Process] = set()
        self.holds = Holds(self._armed)

    async def start(self) -> None:
        """Start all processes and wait until every router is ready. Raises RuntimeError."""
        self._armed.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self.config.write_text(self._yaml(), encoding="utf-8")
        config = load_config(self.config)
        self.urls = [url_of(router.listen) for router in config.routers]
        self.url = self.urls[0]
        self.controller_url = url_of(config.controllers[0].listen)
        self._log = Log(os.open(self.log, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        self._supervisor = _ArmedSupervisor(self._armed, config.limits, self._log, self.dressed)
        for child in cluster_children(config, self.config):
            self._supervisor.add(child)
        self._launching = asyncio.create_task(
            ShardReconciler(config, self.config, self._supervisor, self._log).follow()
        )
        await self.wait_ready(READY_TIMEOUT_S)

    def dressed(self, child: Child) -> Child:
        """The child as it is to be started: an override may use another command."""
        return child

    async def stop(self) -> None:
        """End all processes, also those that are paused or held."""
        for process in self._paused:
            processes.send_signal(process, signal.SIGCONT)
        self._paused.clear()
        if self._launching is not None:
            self._launching.cancel()
            await asyncio.gather(self._launching, return_exceptions=True)
            self._launching = None
        if self._supervisor is not None:
            self.family()
            await self._supervisor.stop()
            self._supervisor = None
        if self._log is not None:
            await asyncio.to_thread(self._log.close)
            self._log = None
        await super().stop()

    def family(self) -> list[Process]:
        """This process and all its descendants that run now."""
        found = processes.tree(os.getpid()) if self._supervisor is not None else []
        written = self._written_pids()
        self._seen.update(process for process in found if process.pid in written)
        return found

    def _written_pids(self) -> set[int]:
        found = set()
        for path in (self.data_dir / "run").glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):  # it goes with a process that ends in order
                found.add(int(path.read_text(encoding="utf-8")))
        return found

    def members(self) -> set[str]:
        """The names that `pids` has when every process runs, also shards that were added later."""
        if self._supervisor is None:
            return super().members()
        return {f"{role}-{each}" for role in STOP_ORDER for each in self._supervisor.ids(role)}

    async def wait_ready(self, timeout_s: float) -> None:
        """Until every process runs and every router reaches all shards. Raises RuntimeError with the log."""
        deadline = time.monotonic() + timeout_s
        while not (self.pids().keys() >= self.members() and await self.is_ready()):
            if self._launching is not None and self._launching.done():
                self._launching.result()
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

    async def cluster_map(self) -> ClusterMap:
        """The controller's, now."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.controller_url}/v1/map?after=0") as reply:
            return decode_map(await reply.read())

    # --- faults --------------------------------------------------------------------------------------------------

    def arm(self, name: str, failpoints: str) -> Process | None:
        """From its next point on `shard-s1`, `router-0`, … has these; so has one that is still to be started.

        The process that runs now; None if none does. Empty `failpoints`: it is armed no more.
        """
        file = self._armed / name
        file.with_suffix(".new").write_text(failpoints, encoding="ascii")
        file.with_suffix(".new").rename(file)
        return self.pids().get(name)

    def pause(self, name: str) -> None:
        """Let the process stand still (SIGSTOP)."""
        process = self.pids()[name]
        self._paused.add(process)
        processes.send_signal(process, signal.SIGSTOP)

    def wake(self, name: str) -> None:
        """Let it go on, if it still runs."""
        process = self.pids().get(name)
        if process is not None:
            self._paused.discard(process)
            processes.send_signal(process, signal.SIGCONT)

    def stands_still(self, process: Process) -> bool:
        """Whether it was stopped by SIGSTOP, whatever sent that."""
        if processes.status(process) != psutil.STATUS_STOPPED:
            return False
        self._paused.add(process)
        return True

    def kill(self, name: str) -> Process | None:
        """SIGKILL, also to one that is just being started, or does not come to its end.
        None when there is none.

        The supervisor starts it again.
        """
        process = self._child(name)
        if process is not None:
            processes.send_signal(process, signal.SIGKILL)
        return process

    def kill_all(self, names: Collection[str]) -> list[Process]:
        """SIGKILL to these, as at once as it goes; those that ran."""
        running = self.pids()
        victims = [running[name] for name in names if name in running]
        for process in victims:
            processes.send_signal(process, signal.SIGKILL)
        return victims

    def hold(self, name: str) -> Process | None:
        """SIGKILL, and it does not come back before `let_come_back`.

        Held by several faults it does not before each of them has let it, or all holds are ended (`holds`).
        """
        self.holds.begin(name)
        return self.kill(name)

    def _child(self, name: str) -> Process | None:
        """The process as the supervisor knows it: one that starts or ends has no pid file."""
        pid = self._supervisor.pid(name) if self._supervisor is not None else None
        return processes.identify(pid) if pid is not None else None

    def let_come_back(self, name: str) -> None:
        """One fault holds it no more."""
        self.holds.end(name)


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)
