"""The shard's process: its store, its HTTP door for the routers' channels, its place in the cluster.

Owns: opening and closing in the right order; the durable copy of the cluster map in the store's file.
Promises: serves only with a map; a restarted shard starts from its own durable map, so it does not need the
controller to serve; a shard whose file belongs to another cluster ends with an error instead of serving.
Leaves to others: requests (`service`), the store (`storage`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import NoReturn

import aiohttp
import msgspec
from aiohttp import web

from kvstore.config import ClusterConfig, listen_address
from kvstore.errors import ForeignData
from kvstore.metrics import exposition, shard_families
from kvstore.placement.cluster_map import ClusterMap
from kvstore.shard.recovery import Recovery
from kvstore.shard.service import ShardService
from kvstore.storage.store import Store
from kvstore.transport.channel import Connection
from kvstore.transport.http import warn_if_exposed
from kvstore.transport.map_follower import MapFollower

log = logging.getLogger(__name__)

_EXIT_COMMIT_FAILED = 74  # EX_IOERR of sysexits.h


def _end_process(error: BaseException) -> NoReturn:
    """A commit failed: its outcome is unknown, so nothing may be answered any more. Restarting reads what is true."""
    log.critical("the store cannot go on: the process ends", exc_info=error)
    logging.shutdown()
    os._exit(_EXIT_COMMIT_FAILED)


class ShardApp:
    """HTTP of a shard: `/channel` for routers, `/healthz` and `/metrics` for people."""

    def __init__(self, service: ShardService, config: ClusterConfig) -> None:
        self._service = service
        self._limits = config.limits
        self._sockets: set[web.WebSocketResponse] = set()
        self.web = web.Application()
        self.web.router.add_get("/channel", self._channel)
        self.web.router.add_get("/healthz", self._healthz)
        self.web.router.add_get("/metrics", self._metrics)

    async def _channel(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("shard") != self._service.shard_id:
            raise web.HTTPNotFound(text=f"this is shard {self._service.shard_id}\n")
        # An empty or foreign file has a map and partitions of its own, or none: to the router's cluster it is not this
        # shard, also while the controller, which refuses it, is away. Else a key of ours would be "not there".
        if request.query.get("store") not in (None, "", self._service.store.database.identity.store_id):
            raise web.HTTPConflict(text=f"shard {self._service.shard_id} serves another data file\n")
        if "Origin" in request.headers:
            raise web.HTTPForbidden(text="a channel is for routers\n")
        socket = web.WebSocketResponse(compress=False, max_msg_size=0, autoping=True)
        await socket.prepare(request)
        self._sockets.add(socket)
        try:
            await Connection(self._limits).serve(socket, self._service.handle)
        finally:
            self._sockets.discard(socket)
        return socket

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive", "shard": self._service.shard_id})

    async def _metrics(self, request: web.Request) -> web.Response:
        text = exposition(shard_families({self._service.shard_id: self._service.store.snapshot()}))
        return web.Response(body=text, content_type="text/plain", charset="utf-8")

    async def close(self) -> None:
        """End the channels."""
        for socket in list(self._sockets):
            await socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)


class _Membership:
    """Keeps the map in the store's file, so that the next start needs nobody."""

    def __init__(self, service: ShardService) -> None:
        self._service = service
        self._newest: asyncio.Queue[ClusterMap] = asyncio.Queue(maxsize=1)

    async def restore(self) -> None:
        """Serve with the durable map, if there is one."""
        stored = await self._service.store.database.read_meta("cluster_map")
        if stored is not None:
            self._service.follow(msgspec.json.decode(stored, type=ClusterMap))

    def on_map(self, cluster_map: ClusterMap) -> None:
        while not self._newest.empty():
            self._newest.get_nowait()
        self._newest.put_nowait(cluster_map)

    async def keep(self) -> None:
        """Make each newer map durable, then follow it."""
        while True:
            cluster_map = await self._newest.get()
            database = self._service.store.database
            self._check(cluster_map)
            if database.identity.cluster_id is None:
                await database.write_meta("cluster_id", cluster_map.cluster_id)
            await database.write_meta("cluster_map", msgspec.json.encode(cluster_map).decode())
            if self._service.follow(cluster_map):
                owned = len(cluster_map.owned_by(self._service.shard_id))
                log.info("epoch %d: owns %d of %d partitions", cluster_map.epoch, owned, cluster_map.partitions)

    def _check(self, cluster_map: ClusterMap) -> None:
        identity = self._service.store.database.identity
        if identity.cluster_id not in (None, cluster_map.cluster_id):
            raise ForeignData(
                f"{self._service.store.database.path} belongs to cluster {identity.cluster_id}, "
                f"not to {cluster_map.cluster_id}"
            )
        member = cluster_map.member(self._service.shard_id)
        if member is not None and member.store_id != identity.store_id:
            raise ForeignData(f"the cluster knows shard {member.id} with another data file than this one")


async def serve(
    *, shard_id: str, listen: str, join: str, data_dir: Path, config: ClusterConfig, stop: asyncio.Event
) -> None:
    """Run the shard until `stop` is set. Raises ForeignData, OSError (the port is taken)."""
    host, port = listen_address(listen)
    weight = next((shard.weight for shard in config.shards if shard.id == shard_id), 1)
    store = await Store.open(
        data_dir / f"shard-{shard_id}.db", config.limits, shard_id, config.partitions, _end_process
    )
    service = ShardService(shard_id, store)
    app = ShardApp(service, config)
    runner = web.AppRunner(app.web, access_log=None, handler_cancellation=False, shutdown_timeout=1.0)
    membership = _Membership(service)
    tasks: list[asyncio.Task[None]] = []
    try:
        await membership.restore()
        await runner.setup()
        await web.TCPSite(runner, host, port, backlog=1024).start()
        warn_if_exposed(listen, "read and write its keys")
        async with aiohttp.ClientSession() as session:
            follower = MapFollower(session, join, config.limits)
            identity = store.database.identity
            url = f"http://{listen}"
            epoch = service.cluster_map.epoch if service.cluster_map else 0

            async def join_cluster() -> None:
                await follower.announce(shard_id, url, identity.store_id, identity.cluster_id, weight)
                await follower.follow(epoch, membership.on_map)

            recovery = Recovery(service, config.limits, session)
            tasks = [
                asyncio.create_task(join_cluster()),
                asyncio.create_task(recovery.run()),
                asyncio.create_task(membership.keep()),
                asyncio.create_task(_until(stop)),
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await recovery.close()
            for task in done:
                task.result()
    finally:
        await app.close()
        await runner.cleanup()
        await store.close()


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()
