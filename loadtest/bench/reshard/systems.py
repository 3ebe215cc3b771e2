"""The two clusters that grow: this one, and Redis Cluster.

Owns: starting each with three members in a folder of its own, storing the keys, adding the fourth, and what that took.
Promises: both are asked for the same: the time runs from when the newcomer, already started, belongs to the cluster to
when its last partition (or slot) is its own. After the growth all keys are there. `stop` ends every process.
Leaves to others: the foreground load's pace (foreground.py), medians (figures.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from kvstore.client import Client, Put
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from loadtest.bench.data import Data
from loadtest.bench.http1 import Request, send
from loadtest.bench.reshard.figures import Growth, least_to_move, moved, peak_to_mean
from loadtest.bench.reshard.foreground import Caller
from loadtest.bench.systems import kvstore_version, missing, redis_version
from loadtest.cluster import processes
from loadtest.cluster.local import READY_TIMEOUT_S, LocalCluster
from loadtest.drivers.aio import session

MEMBERS = 3
_HOST = "127.0.0.1"
_SLOTS = 16_384
_GROW_TIMEOUT_S = 600.0
_POLL_S = 0.02
_CLEAR_TIMEOUT_S = 60.0
_CLEAR_POLL_S = 0.5
_BATCH_OPS = 1000
_BATCHES_AT_ONCE = 4


class Growing(ABC):
    """A cluster of three members in a folder of its own, which is to become one of four."""

    name = ""

    @abstractmethod
    async def start(self, folder: Path) -> None:
        """Raises RuntimeError with the end of a log."""

    @abstractmethod
    async def store(self, data: Data) -> None:
        """All keys with their first values."""

    @abstractmethod
    async def grow(self) -> Growth:
        """Add the fourth member. Raises RuntimeError if that fails or takes too long."""

    @abstractmethod
    async def check(self, data: Data) -> None:
        """All keys are there. Raises RuntimeError."""

    @abstractmethod
    async def callers(self, count: int) -> list[Caller]:
        """So many connections for the foreground load."""

    @abstractmethod
    async def stop(self) -> None: ...

    @abstractmethod
    def version(self) -> str: ...


# --- kvstore ----------------------------------------------------------------------------------------------------------


class KvstoreGrowing(Growing):
    name = "kvstore"

    def __init__(self) -> None:
        self._cluster: LocalCluster | None = None
        self._controller = ""

    @property
    def url(self) -> str:
        return self._cluster.url if self._cluster is not None else ""

    def version(self) -> str:
        return kvstore_version()

    async def start(self, folder: Path) -> None:
        self._cluster = LocalCluster(folder, shards=MEMBERS)
        await self._cluster.start()
        document = yaml.safe_load(self._cluster.config.read_text(encoding="utf-8"))
        self._controller = f"http://{document['controllers'][0]['listen']}"

    async def store(self, data: Data) -> None:
        batches = iter(range(0, len(data.keys), _BATCH_OPS))

        async def one(client: Client) -> None:
            for start in batches:
                end = start + _BATCH_OPS
                puts = [Put(*pair) for pair in zip(data.keys[start:end], data.stored[start:end], strict=True)]
                if failed := [result for result in await client.batch(puts) if result.error is not None]:
                    raise RuntimeError(f"a key could not be stored: {failed[0].error}")

        async with Client(self.url) as client, asyncio.TaskGroup() as group:
            for _ in range(_BATCHES_AT_ONCE):
                group.create_task(one(client))

    async def grow(self) -> Growth:
        newcomer = f"s{MEMBERS + 1}"
        async with Client(self.url) as client, aiohttp.ClientSession() as session:
            before = await self._map_after(session, 0)
            added = await client.add_shard(newcomer)
            began_s, after = await self._follow(session, before.epoch, newcomer)
            ended_s = time.monotonic()
            document = await _cleared(client)
            change = await _ended(client, added["change"])
        keys = {shard["id"]: shard["keys"] for shard in document["shards"]}
        return Growth(
            began_s=began_s,
            ended_s=ended_s,
            keys_moved=keys[newcomer],
            partitions_moved=moved(before, after),
            partitions_minimum=least_to_move(before, after),
            peak_to_mean=peak_to_mean(list(keys.values())),
            write_pause_ms_max=change["write_pause_ms_max"],
            write_pause_ms_p99=change["write_pause_ms_p99"],
            groups=change["groups_done"],
        )

    async def _follow(self, session: aiohttp.ClientSession, epoch: int, newcomer: str) -> tuple[float, ClusterMap]:
        """When it was seen to be a member, and the map as of its last commit."""
        began_s = None
        async with asyncio.timeout(_GROW_TIMEOUT_S):
            while True:
                cluster_map = await self._map_after(session, epoch)
                epoch = cluster_map.epoch
                member = cluster_map.shard(newcomer)
                if member is None:
                    continue
                began_s = began_s or time.monotonic()
                if member.state == "up" and not cluster_map.moves:
                    return began_s, cluster_map

    async def _map_after(self, session: aiohttp.ClientSession, epoch: int) -> ClusterMap:
        while True:
            async with session.get(f"{self._controller}/v1/map", params={"after": str(epoch)}) as answer:
                if answer.status == 200:
                    return decode_map(await answer.read())

    async def check(self, data: Data) -> None:
        async with Client(self.url) as client:
            count = await client.count()
        if count != len(data.keys):
            raise RuntimeError(f"{count:,} of {len(data.keys):,} keys are left")

    async def callers(self, count: int) -> list[Caller]:
        return [_HttpCaller(self.url) for _ in range(count)]

    async def stop(self) -> None:
        if self._cluster is not None:
            await self._cluster.stop()


async def _ended(client: Client, change_id: str) -> dict[str, Any]:
    """The change, when it is done. Raises RuntimeError if it ends otherwise, TimeoutError."""
    async with asyncio.timeout(_GROW_TIMEOUT_S):
        while (change := await client.change(change_id))["state"] == "running":  # noqa: ASYNC110
            await asyncio.sleep(_CLEAR_POLL_S)
    if change["state"] != "done":
        raise RuntimeError(f"the shard is not added: {change['detail']}")
    return change


async def _cleared(client: Client) -> dict[str, Any]:
    """GET /v1/cluster, once the former owners have removed what is left of the partitions that went."""
    deadline = time.monotonic() + _CLEAR_TIMEOUT_S
    while True:
        count, document = await client.count(), await client.cluster()
        if sum(shard["keys"] for shard in document["shards"]) == count:
            return document
        if time.monotonic() > deadline:
            raise RuntimeError("the former owners keep what has moved")
        await asyncio.sleep(_CLEAR_POLL_S)


class _HttpCaller:
    """One kept connection to a router; reopened after whatever went wrong."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = session()

    async def get(self, key: str) -> bool:
        return (await send(self._http, self._url, Request("GET", f"/v1/kv/{key}"))).status == 200

    async def put(self, key: str, value: bytes) -> bool:
        return (await send(self._http, self._url, Request("PUT", f"/v1/kv/{key}", value))).status in (201, 204)

    async def close(self) -> None:
        await self._http.close()


# --- Redis Cluster ----------------------------------------------------------------------------------------------------


class RedisGrowing(Growing):
    """Three servers without replicas, and `redis-cli --cluster rebalance` as its manual says. `fsync`: appendfsync."""

    name = "redis"

    def __init__(self, fsync: str) -> None:
        self._fsync = fsync
        self._folder = Path()
        self._ports: list[int] = []
        self._running: list[asyncio.subprocess.Process] = []

    def version(self) -> str:
        return f"Redis Cluster {redis_version()} (appendfsync {self._fsync})"

    @staticmethod
    def missing() -> str | None:
        """The command that installs what is missing."""
        return missing((("redis-server", "redis-server"), ("redis-cli", "redis-tools")))

    async def start(self, folder: Path) -> None:
        self._folder = folder
        for number in range(MEMBERS):
            await self._start_server(number)
        addresses = [f"127.0.0.1:{port}" for port in self._ports]
        await self._cli("create", *addresses, "--cluster-replicas", "0", "--cluster-yes")
        await self._until_all_agree()

    async def _start_server(self, number: int) -> int:
        port, bus = processes.free_ports(2)
        folder = self._folder / f"redis-{number}"
        folder.mkdir(parents=True)
        command = [
            *("redis-server", "--port", str(port), "--cluster-port", str(bus), "--bind", "127.0.0.1"),
            *("--cluster-enabled", "yes", "--dir", str(folder), "--daemonize", "no", "--save", ""),
            *("--appendonly", "yes", "--appendfsync", self._fsync),
        ]
        self._running.append(await processes.start(command, folder / "redis.log"))
        self._ports.append(port)
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(RedisError):
                await _ask_one(port, "PING")
                return port
            await asyncio.sleep(_POLL_S)
        raise RuntimeError(f"redis-server did not get ready\n{processes.tail(folder / 'redis.log')}")

    async def _cli(self, *words: str) -> str:
        """`redis-cli --cluster …`. Raises RuntimeError with what it printed."""
        cli = await asyncio.create_subprocess_exec(
            *("redis-cli", "--cluster", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_GROW_TIMEOUT_S):
                printed = (await cli.communicate())[0].decode(errors="replace")
        finally:
            if cli.returncode is None:
                cli.kill()
                await cli.wait()
        if cli.returncode:
            raise RuntimeError(f"redis-cli --cluster {words[0]} failed:\n{printed[-2000:]}")
        return printed

    async def _until_all_agree(self) -> None:
        """Every server knows all others and says that the cluster is whole."""
        wanted = {"cluster_state": "ok", "cluster_known_nodes": str(len(self._ports))}
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            infos = [await _ask_one(port, "CLUSTER INFO") for port in self._ports]
            if all(wanted.items() <= info.items() for info in infos):
                return
            await asyncio.sleep(_POLL_S)
        raise RuntimeError("the servers of Redis Cluster do not agree")

    async def store(self, data: Data) -> None:
        async with RedisCluster(host=_HOST, port=self._ports[0]) as redis:
            for start in range(0, len(data.keys), _BATCH_OPS):
                some = slice(start, start + _BATCH_OPS)
                await redis.mset_nonatomic(dict(zip(data.keys[some], data.stored[some], strict=True)))

    async def _slots(self) -> list[int]:
        """The port of the owner of each slot, as the first server sees it."""
        slots = [0] * _SLOTS
        for first, last, (_, port, *_), *_ in await _ask_one(self._ports[0], "CLUSTER SLOTS"):
            slots[first : last + 1] = [port] * (last + 1 - first)
        return slots

    async def grow(self) -> Growth:
        first = f"127.0.0.1:{self._ports[0]}"
        port = await self._start_server(MEMBERS)
        await self._cli("add-node", f"127.0.0.1:{port}", first)
        await self._until_all_agree()
        before = await self._slots()
        began_s = time.monotonic()
        await self._cli("rebalance", first, "--cluster-use-empty-masters")
        ended_s = time.monotonic()
        after = await self._slots()
        sizes = [await _ask_one(port, "DBSIZE") for port in self._ports]
        return Growth(
            began_s=began_s,
            ended_s=ended_s,
            keys_moved=sizes[-1],
            partitions_moved=sum(then != now for then, now in zip(before, after, strict=True)),
            partitions_minimum=_SLOTS // len(self._ports),
            peak_to_mean=peak_to_mean(sizes),
        )

    async def check(self, data: Data) -> None:
        count = sum([await _ask_one(port, "DBSIZE") for port in self._ports])
        if count != len(data.keys):
            raise RuntimeError(f"{count:,} of {len(data.keys):,} keys are left")

    async def callers(self, count: int) -> list[Caller]:
        return [_RedisCaller(self._ports[0]) for _ in range(count)]

    async def stop(self) -> None:
        for process in reversed(self._running):
            await processes.end(process)
        self._running.clear()


class _RedisCaller:
    def __init__(self, port: int) -> None:
        self._redis = RedisCluster(host=_HOST, port=port)

    async def get(self, key: str) -> bool:
        return await self._redis.get(key) is not None

    async def put(self, key: str, value: bytes) -> bool:
        return bool(await self._redis.set(key, value))

    async def close(self) -> None:
        await self._redis.aclose()


async def _ask_one(port: int, command: str) -> Any:
    """What one server answers. Raises RedisError."""
    async with Redis(host=_HOST, port=port) as redis:
        return await redis.execute_command(command)  # type: ignore[no-untyped-call]
