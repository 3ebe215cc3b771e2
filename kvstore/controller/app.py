"""The controller's process: its file, its mover, its HTTP server, from start to stop.

Owns: opening and closing in the right order.
Promises: a long poll never outlives the stop of the process; every answer says in `Kv-Session` which session this
process is (see `transport.sessions`).
Leaves to others: its calls (`routes`), every rule (`membership`, `replicas`), the file (`map_store`), signals and the
pid file (`kvstore.process`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from kvstore.addresses import address_text, advertised_host, listen_address
from kvstore.config import ClusterConfig
from kvstore.controller.change_views import ChangeViews
from kvstore.controller.document import ClusterDocument
from kvstore.controller.earlier_sessions import begin_session, sessions_path
from kvstore.controller.launch_place import LaunchPlace
from kvstore.controller.map_store.sqlite import SqliteMapStore, open_sqlite
from kvstore.controller.parts import assemble
from kvstore.controller.routes import make_table
from kvstore.controller.shards import ShardClients
from kvstore.environment import SYSTEM
from kvstore.transport.http.requests import HostGuard
from kvstore.transport.http.routes import RouteTable, answer_call
from kvstore.transport.http.server import Server, start_server, warn_if_exposed
from kvstore.transport.sessions import EARLIER_HEADER, HEADER, ClusterSession
from kvstore.transport.versions import FIELDS

_SHUTDOWN_TIMEOUT_S = 2.0
_SESSION_BYTES = 8
_log = logging.getLogger(__name__)


async def serve(
    *,
    controller_id: str,
    listen: str,
    data_dir: Path,
    config: ClusterConfig,
    stop: asyncio.Event,
    advertise: str | None = None,
) -> None:
    """Serve on `listen` ("HOST:PORT") until `stop` is set, then end in order.

    `advertise` (HOST:PORT): the name of this host in the requests of others.

    Raises ForeignData and ConfigError as `open_sqlite` and `listen_address` do, OSError if it cannot listen.
    """
    own = [advertised_host(listen, advertise)] if advertise else []
    config = msgspec.structs.replace(config, allowed_hosts=[*config.allowed_hosts, *own])
    store = await open_sqlite(data_dir / f"controller-{controller_id}.db")
    cluster = ClusterSession(SYSTEM.random_hex(_SESSION_BYTES))
    earlier = begin_session(sessions_path(data_dir, controller_id), cluster.id)
    try:
        async with aiohttp.ClientSession(headers=FIELDS) as session:
            place = LaunchPlace(data_dir, config.limits)
            await _serve(store, session, listen, config, stop, f"controller {controller_id}", cluster, earlier, place)
    finally:
        await store.close()
    _log.info("controller %s has stopped", controller_id)


async def _serve(
    store: SqliteMapStore,
    session: aiohttp.ClientSession,
    listen: str,
    config: ClusterConfig,
    stop: asyncio.Event,
    name: str,
    cluster: ClusterSession,
    earlier: list[str],
    launch_place: LaunchPlace,
) -> None:
    document = ClusterDocument(store, config.limits.map_write_tries_max)
    shards = ShardClients(config.limits, session, cluster)
    parts = assemble(document, config, shards, cluster.id)
    service, mover = parts.service, parts.mover
    parts.launches.place = launch_place
    views = ChangeViews(document, mover, parts.launches, lambda: parts.reopener.waits_for, parts.keeper.places)
    await service.report_start()
    table = make_table(document, parts, views, config.limits, stop, cluster.id)
    server = Server(_handler(table, config, cluster.id, earlier), config.limits)
    runner = None
    working = [asyncio.create_task(work) for work in parts.works()]
    stopping = asyncio.create_task(stop.wait())
    watching = asyncio.create_task(service.watch_if_behind())
    try:
        runner = await start_server(server, *listen_address(listen), _SHUTDOWN_TIMEOUT_S)
        _log.info("%s listens on %s", name, address_text(*runner.addresses[0][:2]))
        warn_if_exposed(listen, "change the cluster")
        await asyncio.wait({stopping, *working}, return_when=asyncio.FIRST_COMPLETED)
        for work in working:
            if work.done():
                work.result()  # an error of its own: the process ends, and starts again from the document
    finally:
        stop.set()  # ends the long polls
        for work in (*working, watching):
            work.cancel()
        stopping.cancel()
        await asyncio.gather(*working, watching, stopping, return_exceptions=True)
        if runner is not None:
            await runner.cleanup()
        await shards.close()


def _handler(
    table: RouteTable, config: ClusterConfig, session: str, earlier: list[str]
) -> Callable[[web.BaseRequest], Awaitable[Any]]:
    own = [listen_address(controller.listen)[0] for controller in config.controllers]
    guard = HostGuard([*own, *config.allowed_hosts], takes_pages=False)

    async def handle(request: web.BaseRequest) -> Any:
        reply = await answer_call(table, guard, request)
        reply.lines += f"{HEADER}: {session}\r\n"
        if request.path == "/healthz" and earlier:
            reply.lines += f"{EARLIER_HEADER}: {','.join(earlier)}\r\n"
        return reply

    return handle
