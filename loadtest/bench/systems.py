"""The systems that are compared: what each needs, how it is started, how it is ended.

Owns: the processes of each system, their folder and ports.
Promises: each is durable at every acknowledgement (but `bare`, which stores nothing); everything is on 127.0.0.1, in
the given folder, and is ended by `stop`, whatever happened before.
Leaves to others: requests (dialects.py), measuring (drive.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from loadtest.bench import dialects
from loadtest.bench.data import SHARDS
from loadtest.bench.dialects import Dialect
from loadtest.bench.http1 import Request, ask
from loadtest.cluster import processes
from loadtest.cluster.local import READY_TIMEOUT_S, REPOSITORY, LocalCluster

_READY_POLL_S = 0.01


class Shape(NamedTuple):
    """How many shards and routers a cluster has."""

    shards: int = SHARDS
    routers: int = 1

    @property
    def name(self) -> str:
        return f"kvstore-{self.shards}s-{self.routers}r"


class Batches(NamedTuple):
    """Since the start of a cluster: how many batches its shards have committed, and of how many operations."""

    committed: float
    operations: float


class System(ABC):
    """One system in a folder of its own.
    After `start`: `urls` (where it is asked; `url` is the first), `roots` (pids of its top processes).
    `shape` is None for what is no cluster of ours."""

    dialect: Dialect
    programs: tuple[tuple[str, str], ...] = ()  # what must be installed: program and Debian package

    shape: Shape | None = None

    def __init__(self, name: str = "") -> None:
        self.name = name or self.dialect.name
        self.urls: list[str] = []
        self._running: list[asyncio.subprocess.Process] = []

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def roots(self) -> list[int]:
        return [process.pid for process in self._running]

    def missing(self) -> str | None:
        """The command that installs what is missing, None when all is there."""
        return missing(self.programs)

    @abstractmethod
    def version(self) -> str: ...

    @abstractmethod
    async def start(self, folder: Path) -> None:
        """Start it and wait until it answers. Raises RuntimeError with the end of its log when it does not."""

    async def batches(self) -> Batches | None:
        """None: it does not tell."""
        return None

    async def stop(self) -> None:
        for process in reversed(self._running):
            await processes.end(process)
        self._running.clear()

    async def _wait_for(self, probe: Request, log: Path, process: asyncio.subprocess.Process) -> None:
        """Until the probe is answered with 200 wherever the system is asked, or the process has ended."""
        deadline, waiting = time.monotonic() + READY_TIMEOUT_S, list(self.urls)
        while time.monotonic() < deadline and process.returncode is None:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                while waiting and (await ask(waiting[0], probe)).status == 200:
                    waiting.pop(0)
                if not waiting:
                    return
            await asyncio.sleep(_READY_POLL_S)
        raise RuntimeError(f"{self.name} did not get ready\n{processes.tail(log)}")


class KvstoreSystem(System):
    dialect = dialects.Kvstore()

    def __init__(self, shape: Shape, name: str = "", replicas: int = 1) -> None:
        super().__init__(name)
        self.shape: Shape = shape
        self._replicas = replicas
        self._cluster: LocalCluster | None = None

    @property
    def roots(self) -> list[int]:
        return [self._cluster.up.pid] if self._cluster is not None and self._cluster.up is not None else []

    def version(self) -> str:
        return kvstore_version(self._replicas)

    async def start(self, folder: Path) -> None:
        shards, routers = self.shape
        self._cluster = LocalCluster(folder, shards, routers=routers, replicas=self._replicas)
        await self._cluster.start()
        assert self._cluster.up is not None
        self.urls = self._cluster.urls
        await self._wait_for(Request("GET", "/readyz"), self._cluster.log, self._cluster.up)

    async def batches(self) -> Batches:
        return read_batches((await ask(self.url, Request("GET", "/metrics"))).body.decode())

    async def stop(self) -> None:
        if self._cluster is not None:
            await self._cluster.stop()


def read_batches(metrics: str) -> Batches:
    """The sums over all shards, from the router's /metrics. Raises RuntimeError when these do not tell."""
    samples = [sample for family in text_string_to_metric_families(metrics) for sample in family.samples]
    count, operations = (
        [sample.value for sample in samples if sample.name == f"kvstore_shard_batch_ops_{part}"]
        for part in ("count", "sum")
    )
    if not count or not operations:
        raise RuntimeError("the router's metrics do not tell of batches")
    return Batches(sum(count), sum(operations))


class EtcdSystem(System):
    """One that runs on several nodes is asked where its leader is.
    The quickest way to it, as no node passes on."""

    dialect = dialects.Etcd()
    programs = (("etcd", "etcd-server"),)

    def __init__(self, name: str = "", nodes: int = 1) -> None:
        super().__init__(name)
        self._nodes = nodes

    def version(self) -> str:
        lines = output("etcd", "--version").splitlines()
        nodes = f" on {self._nodes} nodes" if self._nodes > 1 else ""
        return f"etcd {lines[0].rpartition(' ')[2]}{nodes}" if lines else "etcd"

    async def start(self, folder: Path) -> None:
        ports = processes.free_ports(2 * self._nodes)
        clients, peers = ([f"http://127.0.0.1:{port}" for port in half] for half in (ports[::2], ports[1::2]))
        self.urls = clients
        for number in range(self._nodes):
            command = etcd_command(folder, number, clients[number], peers)
            self._running.append(await processes.start(command, folder / f"etcd-{number}.log"))
        await self._wait_for(Request("GET", "/health"), folder / "etcd-0.log", self._running[0])
        if self._nodes > 1:
            self.urls = [await self._leader()]

    async def _leader(self) -> str:
        """Raises RuntimeError."""
        for url in self.urls:
            answer = await ask(url, Request("POST", "/v3/maintenance/status", b"{}"))
            if answer.status == 200 and is_leader(answer.body):
                return url
        raise RuntimeError("no node of etcd says that it is the leader")


def etcd_command(folder: Path, number: int, client: str, peers: Sequence[str]) -> list[str]:
    """What starts the node of that number. `peers`: the addresses at which the nodes talk, by number."""
    members = ",".join(f"node-{each}={peer}" for each, peer in enumerate(peers))
    return [
        *("etcd", "--name", f"node-{number}", "--data-dir", str(folder / f"data-{number}")),
        *("--logger", "zap", "--log-level", "warn"),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peers[number], "--initial-advertise-peer-urls", peers[number]),
        *("--initial-cluster", members),
        *("--quota-backend-bytes", str(8 << 30)),  # it keeps every version: a long run would pass the 2 GiB
    ]


def is_leader(status: bytes) -> bool:
    """Whether the node of etcd that answered so is the leader."""
    told = json.loads(status)
    return "leader" in told and told["leader"] == told["header"]["member_id"]


class RedisSystem(System):
    """Redis with `appendfsync always`, behind webdis, which speaks HTTP to clients and Redis's protocol to Redis."""

    dialect = dialects.Webdis()
    programs = (("redis-server", "redis-server"), ("webdis", "webdis"))

    def version(self) -> str:
        webdis = output("dpkg-query", "-W", "-f=${Version}", "webdis")
        return f"Redis {redis_version()} + webdis {webdis}".rstrip()

    async def start(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        redis_port, web_port = processes.free_ports(2)
        self.urls, log = [f"http://127.0.0.1:{web_port}"], folder / "redis.log"
        settings = {"redis_host": "127.0.0.1", "redis_port": redis_port, "http_host": "127.0.0.1"}
        more = {"http_port": web_port, "threads": 2, "daemonize": False, "logfile": str(folder / "webdis.log")}
        config = folder / "webdis.json"
        config.write_text(json.dumps({**settings, **more, "verbosity": 0}), encoding="utf-8")
        command = [
            *("redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--dir", str(folder)),
            *("--appendonly", "yes", "--appendfsync", "always", "--save", "", "--daemonize", "no"),
        ]
        self._running.append(await processes.start(command, log))
        await _wait_for_port(redis_port)
        self._running.append(await processes.start(["webdis", str(config)], folder / "webdis.out", cwd=folder))
        await self._wait_for(Request("GET", "/PING"), log, self._running[-1])


class BareSystem(System):
    dialect = dialects.Bare()

    def version(self) -> str:
        return f"bare aiohttp {metadata.version('aiohttp')} web.Server"

    async def start(self, folder: Path) -> None:
        log, (port,) = folder / "bare.log", processes.free_ports(1)
        command = [sys.executable, "-m", "loadtest.bench.bare", str(port)]
        self._running.append(await processes.start(command, log, cwd=REPOSITORY))
        self.urls = [f"http://127.0.0.1:{port}"]
        await self._wait_for(Request("GET", "/"), log, self._running[-1])


async def _wait_for_port(port: int) -> None:
    """Until a client listens there. Raises RuntimeError."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(_READY_POLL_S)
    raise RuntimeError(f"no client listens on port {port}")


def kvstore_version(replicas: int = 1) -> str:
    commit = output("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty")
    return f"kvstore ({commit or 'no commit'}{f', replicas: {replicas}' if replicas > 1 else ''})"


def redis_version() -> str:
    words = (word for word in output("redis-server", "--version").split() if word.startswith("v="))
    return next(words, "")[2:]


def missing(programs: Iterable[tuple[str, str]]) -> str | None:
    """The command that installs those of the programs, given with their packages, that are missing; None: none is."""
    packages = [package for program, package in programs if shutil.which(program) is None]
    return f"apt-get install {' '.join(packages)}" if packages else None


def output(*command: str) -> str:
    """What a command prints, empty when it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
