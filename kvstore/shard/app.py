"""The process of a node: its HTTP door for the routers' channels, from its start to its end.

Owns: what is HTTP of a node; which port it listens on; how the process ends when a commit fails.
Promises: what is told over HTTP is the node's; nothing listens before all of its stores are open.
Leaves to others: the node itself (`node`), each of its stores (`hosted`), requests (`service`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

import aiohttp
import msgspec
from aiohttp import web

from kvstore.addresses import address_text, advertised, advertised_host, listen_address
from kvstore.config import ClusterConfig, Limits
from kvstore.environment import SYSTEM
from kvstore.errors import NoSuchRoute
from kvstore.metrics import exposition, shard_families
from kvstore.shard import disk_watch
from kvstore.shard.copy_wires import accept, connect
from kvstore.shard.disk_watch import DiskWatch
from kvstore.shard.folder import FileFolder
from kvstore.shard.hellos import SessionFile
from kvstore.shard.hosted import Surroundings
from kvstore.shard.node import Node, OtherPartitions, Refused
from kvstore.transport.channel import Connection
from kvstore.transport.http.server import warn_if_exposed
from kvstore.transport.sessions import PARAMETER, ClusterSession

log = logging.getLogger(__name__)

_EXIT_COMMIT_FAILED = 74  # EX_IOERR of sysexits.h


def _end_process(error: BaseException) -> NoReturn:
    """A commit failed: its outcome is unknown, so nothing may be answered any more. Restarting reads what is true."""
    log.critical("the store cannot go on: the process ends", exc_info=error)
    logging.shutdown()
    os._exit(_EXIT_COMMIT_FAILED)


class ShardApp:
    """HTTP of a node: `/channel` for routers, `/copies` for primaries, `/healthz` and `/metrics` for people."""

    def __init__(self, node: Node, limits: Limits) -> None:
        self._node = node
        self._limits = limits
        self._sockets: set[web.WebSocketResponse] = set()
        self.web = web.Application()
        self.web.router.add_get("/channel", self._channel)
        self.web.router.add_get("/copies", self._copies)
        self.web.router.add_get("/healthz", self._healthz)
        self.web.router.add_get("/map", self._map)
        self.web.router.add_get("/metrics", self._metrics)
        self.web.router.add_route("*", "/{path:.*}", self._no_route)

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        if "Origin" in request.headers:
            raise web.HTTPForbidden(text="a channel is for routers\n")
        asked = request.query
        resident = await self._node.admit(
            asked.get("shard", ""), asked.get("store"), asked.get(PARAMETER, ""), request.remote
        )
        if isinstance(resident, Refused):
            return web.Response(status=resident.status, text=f"{resident.why}\n")
        socket = web.WebSocketResponse(compress=False, max_msg_size=self._limits.frame_read_bytes_max, autoping=True)
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            await Connection(self._limits).serve(socket, resident.handle, self._node.stores.handle_of)
        finally:
            self._sockets.discard(socket)
        return socket

    async def _copies(self, request: web.Request) -> web.StreamResponse:
        """A primary's connection to the copy of its store that lies here."""
        if "Origin" in request.headers:
            raise web.HTTPForbidden(text="a channel is for nodes\n")
        refused = await self._node.admit_process(request.query.get(PARAMETER, ""), request.remote)
        if refused is not None:
            return web.Response(status=refused.status, text=f"{refused.why}\n")
        try:
            socket, wire = await accept(request)
        except ConnectionError:  # it has left in the meantime, as after a pause of this process
            return web.Response(status=503)
        self._sockets.add(socket)
        try:
            await self._node.stores.serve_session(request.query.get("store", ""), wire)
        finally:
            self._sockets.discard(socket)
        return socket

    async def _healthz(self, request: web.Request) -> web.Response:
        asked = request.query
        return web.json_response(await self._node.facts(asked.get(PARAMETER), asked.get("store"), request.remote))

    async def _map(self, request: web.Request) -> web.Response:
        """For a controller that has lost its file."""
        return web.Response(body=msgspec.json.encode(self._node.newest_map()), content_type="application/json")

    async def _metrics(self, request: web.Request) -> web.Response:
        text = exposition(shard_families(self._node.stats()))
        return web.Response(body=text, content_type="text/plain", charset="utf-8")

    async def _no_route(self, request: web.Request) -> web.Response:
        """Who took this for the address of a router is told what it is."""
        problem = NoSuchRoute(
            f"this is shard {self._node.node_id}, which answers routers only",
            next_step="Ask a router: `kvstore up` prints its address.",
        ).problem()
        return web.json_response(problem, status=NoSuchRoute.status, content_type="application/problem+json")

    async def close(self) -> None:
        """End the channels."""
        for socket in list(self._sockets):
            await socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)


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
    except OtherPartitions as theirs:
        partitions = theirs.partitions
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
    """Raises OtherPartitions, with their number, if that is what is wrong with a new file."""
    limits = config.limits
    weight = next((shard.weight for shard in config.shards if shard.id == shard_id), 1)
    async with AsyncExitStack() as at_the_end:
        session = await at_the_end.enter_async_context(aiohttp.ClientSession())
        folder, cluster = FileFolder(data_dir, shard_id, limits), ClusterSession()
        dial = partial(connect, session, cluster)
        around = Surroundings(shard_id, folder, limits, session, cluster, join, _end_process, SYSTEM, dial)
        node = await Node.open(around, config.partitions, SessionFile(data_dir, shard_id), at_the_end)
        watch = DiskWatch(limits.disk_stall_s, node.stores.logs_with_copies, disk_watch.end_process)
        watch.start()
        at_the_end.callback(watch.close)
        app = ShardApp(node, limits)
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
        await node.run(url, weight, may_join, stop)
