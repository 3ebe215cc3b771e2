"""The process of a node: its stores, its HTTP door for the routers' channels, its place in the cluster.

Owns: opening and closing in the right order.
Promises: serves only with a map; a restarted shard starts from its own durable map, so it does not need the
controller to serve; a shard whose file belongs to another cluster ends with an error instead of serving.
Leaves to others: each of its stores (`hosted`), requests (`service`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import msgspec
from aiohttp import web

from kvstore.addresses import address_text, advertised, advertised_host, listen_address
from kvstore.config import ClusterConfig
from kvstore.errors import ForeignData, NoSuchRoute
from kvstore.metrics import exposition, shard_families
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.session import Session
from kvstore.replication.wire import Wire, WireLost
from kvstore.shard.beats import Beats
from kvstore.shard.copy_wires import accept
from kvstore.shard.hellos import Hellos, SessionFile
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node_stores import NodeStores
from kvstore.transport.channel import Connection
from kvstore.transport.http.server import warn_if_exposed
from kvstore.transport.map_follower import MapFollower
from kvstore.transport.sessions import IS_STRANGER, PARAMETER, ClusterSession

log = logging.getLogger(__name__)

_EXIT_COMMIT_FAILED = 74  # EX_IOERR of sysexits.h


def _end_process(error: BaseException) -> NoReturn:
    """A commit failed: its outcome is unknown, so nothing may be answered any more. Restarting reads what is true."""
    log.critical("the store cannot go on: the process ends", exc_info=error)
    logging.shutdown()
    os._exit(_EXIT_COMMIT_FAILED)


class ShardApp:
    """HTTP of a node: `/channel` for routers, `/copies` for primaries, `/healthz` and `/metrics` for people."""

    def __init__(self, stores: NodeStores, config: ClusterConfig, hellos: Hellos, cluster: ClusterSession) -> None:
        self._stores = stores
        self._node_id = stores.home.shard_id
        self._hellos = hellos
        self._cluster = cluster
        self._limits = config.limits
        self._sockets: set[web.WebSocketResponse] = set()
        self.web = web.Application()
        self.web.router.add_get("/channel", self._channel)
        self.web.router.add_get("/copies", self._copies)
        self.web.router.add_get("/healthz", self._healthz)
        self.web.router.add_get("/map", self._map)
        self.web.router.add_get("/metrics", self._metrics)
        self.web.router.add_route("*", "/{path:.*}", self._no_route)

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        resident = self._stores.by_shard.get(request.query.get("shard", ""))
        identity = resident.identity if resident is not None else None
        if resident is None or identity is None:
            raise web.HTTPNotFound(text=f"this is shard {self._node_id}\n")
        # An empty or foreign file has a map and partitions of its own, or none: to the router's cluster it is not this
        # shard, also while the controller, which refuses it, is away. Else a key of ours would be "not there".
        if request.query.get("store") not in (None, "", identity.store_id):
            raise web.HTTPConflict(text=f"shard {resident.shard_id} serves another data file\n")
        await self._check_hello(request)
        socket = web.WebSocketResponse(compress=False, max_msg_size=self._limits.frame_read_bytes_max, autoping=True)
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            await Connection(self._limits).serve(socket, resident.handle, self._stores.handle_of)
        finally:
            self._sockets.discard(socket)
        return socket

    async def _copies(self, request: web.Request) -> web.StreamResponse:
        """A primary's connection to the copy of its store that lies here."""
        await self._check_hello(request)
        socket, wire = await accept(request)
        self._sockets.add(socket)
        try:
            await self._stores.serve_session(request.query.get("store", ""), wire)
        finally:
            self._sockets.discard(socket)
        return socket

    async def _check_hello(self, request: web.Request) -> None:
        """Raises HTTPForbidden, or what refuses processes of another session."""
        if "Origin" in request.headers:
            raise web.HTTPForbidden(text="a channel is for routers\n")
        refusal = await self._hellos.refusal(request.query.get(PARAMETER, ""), request.remote)
        if refusal is not None:
            text = f"shard {self._node_id} is in another session\n"
            raise (web.HTTPMisdirectedRequest if refusal == IS_STRANGER else web.HTTPServiceUnavailable)(text=text)

    async def _healthz(self, request: web.Request) -> web.Response:
        home = self._stores.home
        identity = self._stores.identity
        if (named := request.query.get(PARAMETER)) and request.query.get("store") == identity.store_id:
            await self._hellos.refusal(named, request.remote)  # which says so if that is a stranger
        ids = {"store_id": identity.store_id, "copy_id": home.copy_id, "session": self._cluster.id}
        facts = {**ids, "cluster_id": identity.cluster_id, "partitions": identity.partitions}
        if home.hosted is not None and not home.hosted.told.is_verified:
            facts["unverified"] = True  # the controller has not confirmed that this is no older copy
        if home.hosted is not None and (missing := home.hosted.store.partitions.missing):
            facts["missing"] = partition_set.as_text(missing)  # no move has brought them, or not surely all of them
        return web.json_response({"status": "alive", "shard": self._node_id, **facts})

    async def _map(self, request: web.Request) -> web.Response:
        """For a controller that has lost its file."""
        stores = [(each.shard_id, each.identity.store_id) for each in self._stores.by_shard.values() if each.identity]
        home, *beside = stores
        told = {"shard": home[0], "store_id": home[1], "map": self._stores.newest_map, "beside": beside}
        return web.Response(body=msgspec.json.encode(told), content_type="application/json")

    async def _metrics(self, request: web.Request) -> web.Response:
        stats = {each.labels(self._node_id): each.store.inspection.snapshot() for each in self._stores.served}
        return web.Response(body=exposition(shard_families(stats)), content_type="text/plain", charset="utf-8")

    async def _no_route(self, request: web.Request) -> web.Response:
        """Who took this for the address of a router is told what it is."""
        problem = NoSuchRoute(
            f"this is shard {self._node_id}, which answers routers only",
            next_step="Ask a router: `kvstore up` prints its address.",
        ).problem()
        return web.json_response(problem, status=NoSuchRoute.status, content_type="application/problem+json")

    async def close(self) -> None:
        """End the channels."""
        for socket in list(self._sockets):
            await socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)


class _OfOtherPartitions(Exception):
    """The cluster has another number of partitions than cluster.yaml says, and the file is of no cluster yet."""


async def serve(
    *,
    shard_id: str,
    listen: str,
    join: str,
    data_dir: Path,
    config: ClusterConfig,
    stop: asyncio.Event,
    may_join: bool = False,
    advertise: str | None = None,
) -> None:
    """Run the shard until `stop` is set. Raises ForeignData, ConfigError, OSError (the port is taken).

    `advertise` (HOST:PORT): where routers and other shards reach it, if that is not `listen`. `may_join`: if it is no
    member, it asks to become one.
    """
    advertised_host(listen, advertise)  # before anything is opened
    for_good = listen, join, data_dir
    try:
        await _serve(shard_id, *for_good, config, stop, may_join, advertise)
    except _OfOtherPartitions as theirs:
        (partitions,) = theirs.args
        log.warning(
            "the cluster has %d partitions, cluster.yaml %d: the cluster's count", partitions, config.partitions
        )
        config = msgspec.structs.replace(config, partitions=partitions)
        await _serve(shard_id, *for_good, config, stop, may_join, advertise)


async def _serve(
    shard_id: str,
    listen: str,
    join: str,
    data_dir: Path,
    config: ClusterConfig,
    stop: asyncio.Event,
    may_join: bool,
    advertise: str | None,
) -> None:
    """Raises _OfOtherPartitions, with their number, if that is what is wrong with a new file."""
    limits = config.limits
    weight = next((shard.weight for shard in config.shards if shard.id == shard_id), 1)
    async with AsyncExitStack() as at_the_end:
        session = await at_the_end.enter_async_context(aiohttp.ClientSession())
        cluster = ClusterSession()
        hurry: list[Callable[[], None]] = []

        def on_news() -> None:
            for each in hurry:
                each()

        around = Surroundings(shard_id, data_dir, limits, session, cluster, join, _end_process, _nowhere, on_news)
        stores = NodeStores(around)
        at_the_end.push_async_callback(stores.close)
        await stores.begin(config.partitions)
        follower = MapFollower(session, join, limits, cluster=cluster)
        beats = Beats(shard_id, stores, session, join, limits.failover_after_s)
        at_the_end.push_async_callback(beats.close)
        hurry.append(beats.hurry)
        hellos = Hellos(shard_id, cluster, follower.ask_session, SessionFile(data_dir, shard_id))
        app = ShardApp(stores, config, hellos, cluster)
        runner = web.AppRunner(app.web, access_log=None, handler_cancellation=False, shutdown_timeout=1.0)
        at_the_end.push_async_callback(runner.cleanup)
        at_the_end.push_async_callback(app.close)
        await runner.setup()
        await web.TCPSite(runner, *listen_address(listen), backlog=1024).start()
        url = f"http://{advertised(listen, advertise, runner.addresses[0][1])}"
        if url != f"http://{listen}":  # else its parent knows
            bound = address_text(*runner.addresses[0][:2])
            log.info("shard %s listens on %s and is reached at %s", shard_id, bound, url)
        warn_if_exposed(listen, "read and write its keys")
        go_on_with_last_session(hellos, cluster, stores.newest_map, shard_id, url)

        async def join_cluster() -> None:
            identity, newest = stores.identity, stores.newest_map
            epoch = newest.epoch if newest is not None else 0
            ids = identity.store_id, identity.cluster_id
            try:
                await follower.announce(
                    shard_id,
                    url,
                    *ids,
                    weight,
                    join=may_join,
                    partitions=identity.partitions,
                    epoch=epoch,
                    clock=stores.clock,
                    copy_id=stores.home.copy_id,
                )
            except ForeignData as refused:
                wanted = refused.members.get("partitions")
                if identity.cluster_id is None and isinstance(wanted, int) and wanted != config.partitions:
                    raise _OfOtherPartitions(wanted) from None
                raise
            cluster_id = stores.identity.cluster_id
            await follower.follow(max(epoch - 1, 0), stores.hear, cluster_id, lambda: stores.clock)

        async def stopped() -> None:
            await stop.wait()
            await stores.end()

        await _until_one_ends(join_cluster(), stores.run(), beats.run(), stopped())


async def _nowhere(node_id: str, session: Session) -> Wire:
    """Before there are stores."""
    raise WireLost("this node has no map yet")


def go_on_with_last_session(
    hellos: Hellos, cluster: ClusterSession, cluster_map: ClusterMap | None, shard_id: str, url: str
) -> None:
    """Name it to other shards while the controller is away, if this is where their map says that this shard is.

    At another address this may be a copy of the data directory, which must not disturb the original.
    """
    node = cluster_map.node(shard_id) if cluster_map is not None else None
    if node is not None and node.url == url:
        cluster.enter(hellos.last)


async def _until_one_ends(*works: Coroutine[Any, Any, Any]) -> None:
    """Then the others are cancelled. Raises what it raised."""
    tasks = [asyncio.create_task(work) for work in works]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in done:
            task.result()
