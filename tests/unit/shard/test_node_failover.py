"""Three nodes, a controller and a router on loopback and real files, in this process: a primary goes and comes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from kvstore.config import ClusterConfig, ControllerConfig, Limits, RouterConfig, ShardConfig
from kvstore.controller import app as controller_app
from kvstore.environment import StopAsked
from kvstore.placement.cluster_map import ClusterMap, Shard
from kvstore.placement.map_format import decode_map
from kvstore.router import serve as router_process
from kvstore.shard import app as shard_app
from loadtest.cluster.processes import free_ports

PATIENCE_S = 90.0
LIMITS = Limits(
    body_bytes_max=1 << 20, log_segment_bytes=1 << 20, failover_after_s=1.0, lease_s=0.7, reroute_timeout_s=60.0,
    told_every_s=3600.0,
)  # fmt: skip


class Cluster:
    """`url`: of the router."""

    def __init__(self, folder: Path, http: aiohttp.ClientSession, replicas: int, limits: Limits) -> None:
        router, controller, *nodes = free_ports(5)
        self.config = ClusterConfig(
            data_dir=str(folder), partitions=64, replicas=replicas, limits=limits,
            routers=[RouterConfig("0", f"127.0.0.1:{router}")],
            controllers=[ControllerConfig("0", f"127.0.0.1:{controller}")],
            shards=[ShardConfig(f"s{number}", f"127.0.0.1:{port}") for number, port in enumerate(nodes, 1)],
        )  # fmt: skip
        self.url, self._join = f"http://127.0.0.1:{router}", f"http://127.0.0.1:{controller}"
        self.folder = folder
        self._http = http
        self._running: dict[str, tuple[asyncio.Task[None], StopAsked]] = {}

    def start(self) -> None:
        listen = self.config.controllers[0].listen
        kept: dict[str, Any] = {"data_dir": self.folder, "config": self.config}
        self._begin("controller", partial(controller_app.serve, controller_id="0", listen=listen, **kept))
        for shard in self.config.shards:
            self.start_node(shard.id)
        listen = self.config.routers[0].listen
        router = partial(router_process.serve, router_id="0", listen=listen, join=self._join, config=self.config)
        self._begin("router", router)

    def start_node(self, node: str) -> None:
        listen = next(shard.listen for shard in self.config.shards if shard.id == node)
        kept: dict[str, Any] = {"data_dir": self.folder / node, "config": self.config, "join": self._join}
        self._begin(node, partial(shard_app.serve, shard_id=node, listen=listen, **kept))

    def _begin(self, name: str, serve: Callable[..., Coroutine[Any, Any, None]]) -> None:
        stop = StopAsked()
        self._running[name] = asyncio.create_task(serve(stop=stop)), stop

    async def end(self, name: str, *, at_once: bool = True) -> None:
        """Raises what the process part raised. `at_once`: without having others take over first."""
        task, stop = self._running.pop(name)
        if at_once:
            stop.ask_at_once()
        else:
            stop.ask()
        await task

    async def kill(self, name: str) -> None:
        """It does nothing more, and tells nothing."""
        task, _ = self._running.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def end_all(self) -> None:
        for name in ("router", *(each for each in list(self._running) if each != "router")):
            await self.end(name)

    async def shard(self, shard_id: str) -> Shard:
        async with self._http.get(f"{self._join}/v1/map") as answer:
            cluster_map: ClusterMap = decode_map(await answer.read())
        shard = cluster_map.shard(shard_id)
        assert shard is not None
        return shard

    async def until(self, shard_id: str, condition: Callable[[Shard], bool]) -> Shard:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    if condition(shard := await self.shard(shard_id)):
                        return shard
                except (aiohttp.ClientError, msgspec.DecodeError):
                    pass
                for name, (task, _) in list(self._running.items()):
                    if task.done():
                        del self._running[name]
                        task.result()
                await asyncio.sleep(0.05)

    async def until_replicated(self) -> None:
        for shard_id in ("s1", "s2", "s3"):
            await self.until(shard_id, replicated)


@asynccontextmanager
async def cluster_in(folder: Path, replicas: int = 2, **changed: float) -> AsyncIterator[Cluster]:
    """`changed`: of LIMITS."""
    limits = msgspec.structs.replace(LIMITS, **changed)
    async with AsyncExitStack() as at_the_end:
        cluster = Cluster(folder, await at_the_end.enter_async_context(aiohttp.ClientSession()), replicas, limits)
        cluster.start()
        at_the_end.push_async_callback(cluster.end_all)
        yield cluster


async def until_answered(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                async with http.get(url):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


def replicated(shard: Shard) -> bool:
    return [copy.state for copy in shard.replicas] == ["in-sync"]


async def test_a_node_goes_and_its_shard_is_served_elsewhere_with_all_that_was_acknowledged(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        before = await cluster.shard("s1")
        for number in range(60):
            await http.put(f"{cluster.url}/v1/kv/k{number}", data=f"v{number}")
        await cluster.end("s1")
        for number in range(60):
            async with http.get(f"{cluster.url}/v1/kv/k{number}") as answer:
                assert await answer.text() == f"v{number}"
        after = await cluster.shard("s1")
        assert after.primary.node == before.replicas[0].node
        assert after.primary.copy_id == before.replicas[0].copy_id
        assert after.term > before.term
        await http.put(f"{cluster.url}/v1/kv/k0", data="newer")
        cluster.start_node("s1")
        again = await cluster.until("s1", replicated)
        assert before.primary.copy_id in (again.replicas[0].copy_id, again.primary.copy_id), "the files it had"
        async with http.get(f"{cluster.url}/v1/kv/k0") as answer:
            assert await answer.text() == "newer"


async def test_a_node_that_is_to_stop_has_handed_on_what_it_serves_when_it_ends(tmp_path: Path) -> None:
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        names = ["a", "b", "c", "d", "e", "f"]  # of locks, some of them of each shard
        held = [await _acquired(http, cluster, name) for name in names]
        waiting = [asyncio.create_task(_acquired(http, cluster, name, wait=30)) for name in names]
        async with asyncio.timeout(PATIENCE_S):
            while not all([await _waiting(http, cluster, name) for name in names]):
                await asyncio.sleep(0.02)
        async with asyncio.timeout(PATIENCE_S):
            await cluster.end("s1", at_once=False)
        for each in ("s1", "s2", "s3"):
            shard = await cluster.shard(each)
            assert shard.primary.node != "s1"
            assert ("s1", "in-sync") not in [(copy.node, copy.state) for copy in shard.replicas]
        async with http.get(f"{cluster.url}/v1/changes") as answer:
            assert {change["kind"] for change in (await answer.json())["items"]} == {"promote"}
        for name, token in zip(names, held, strict=True):
            url = f"{cluster.url}/v1/locks/{name}"
            async with http.delete(url, headers={"Lock-Token": str(token)}):
                pass
        assert all(later > token for later, token in zip(await asyncio.gather(*waiting), held, strict=True))


async def test_a_node_that_has_no_time_to_hand_on_leaves_no_client_in_doubt(tmp_path: Path) -> None:
    """It ends as the primary, with operations under way: each of them is answered, or asked again of the next one."""
    async with (
        cluster_in(tmp_path, hand_on_timeout_s=0.0, hand_on_quiet_s=0.0) as cluster,
        aiohttp.ClientSession() as http,
    ):
        await cluster.until_replicated()
        async with _writing(http, cluster) as statuses:
            for node in ("s1", "s2", "s3"):
                await cluster.end(node, at_once=False)
                cluster.start_node(node)
                await cluster.until_replicated()
        assert statuses.keys() <= {201, 204}, statuses


async def test_a_node_without_copies_answers_all_that_it_has_begun_before_it_ends(tmp_path: Path) -> None:
    async with cluster_in(tmp_path, replicas=1) as cluster, aiohttp.ClientSession() as http:
        await until_answered(http, f"{cluster.url}/readyz")
        async with _writing(http, cluster) as statuses:
            for node in ("s1", "s2", "s3"):
                await cluster.end(node, at_once=False)
                cluster.start_node(node)
                await asyncio.sleep(0.5)
        assert statuses.keys() <= {201, 204, 503}, statuses


@asynccontextmanager
async def _writing(http: aiohttp.ClientSession, cluster: Cluster) -> AsyncIterator[Counter[int]]:
    """Clients write meanwhile, each one key again and again: how often they were answered by which status."""
    statuses, ends = Counter[int](), asyncio.Event()

    async def write(name: str) -> None:
        while not ends.is_set():
            async with http.put(f"{cluster.url}/v1/kv/{name}", data="value") as answer:
                statuses[answer.status] += 1

    async with asyncio.TaskGroup() as clients:
        for number in range(24):
            clients.create_task(write(f"k{number}"))
        yield statuses
        ends.set()


async def _acquired(http: aiohttp.ClientSession, cluster: Cluster, name: str, wait: int = 0) -> int:
    async with http.post(f"{cluster.url}/v1/locks/{name}", json={"ttl": 600, "wait": wait}) as answer:
        return int((await answer.json())["token"])


async def _waiting(http: aiohttp.ClientSession, cluster: Cluster, name: str) -> int:
    async with http.get(f"{cluster.url}/v1/locks/{name}") as answer:
        return int((await answer.json())["waiting"])


async def test_copies_are_set_aside_when_the_number_of_replicas_is_lowered(tmp_path: Path) -> None:
    """The last map names no copy: the nodes go on beating until nothing lies there that is not served."""
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        await cluster.until_replicated()
        await http.patch(f"{cluster.url}/v1/cluster", json={"replicas": 1})
        for each in ("s1", "s2", "s3"):
            await cluster.until(each, lambda shard: not shard.replicas)
        async with asyncio.timeout(PATIENCE_S):
            while list(tmp_path.glob("*/shard-*.copy-*.db")):
                await asyncio.sleep(0.05)
        assert len(list(tmp_path.glob("*/shard-*.copy-*.db.removed"))) == 3
        await http.put(f"{cluster.url}/v1/kv/key", data="value")


async def test_after_all_nodes_have_stopped_each_store_opens_in_a_new_term_and_has_all(tmp_path: Path) -> None:
    """The controller stops, too; no store that has copies is served before there is one again."""
    async with cluster_in(tmp_path) as cluster, aiohttp.ClientSession(raise_for_status=True) as http:
        before = [await cluster.until(each, replicated) for each in ("s1", "s2", "s3")]
        for number in range(30):
            await http.put(f"{cluster.url}/v1/kv/k{number}", data=f"v{number}")
        await cluster.end_all()
        for node in ("s1", "s2", "s3"):
            cluster.start_node(node)
        await until_answered(http, f"http://{cluster.config.shards[0].listen}/healthz")
        await asyncio.sleep(0.5)
        async with http.get(f"http://{cluster.config.shards[0].listen}/metrics") as answer:
            assert 'role="primary"' not in await answer.text()
        await cluster.end("s2")
        await cluster.end("s3")
        await cluster.end("s1")
        cluster.start()
        await until_answered(http, f"{cluster.url}/readyz")
        for number in range(30):
            async with http.get(f"{cluster.url}/v1/kv/k{number}") as answer:
                assert await answer.text() == f"v{number}"
        for shard in before:
            assert (await cluster.until(shard.id, replicated)).term > shard.term
