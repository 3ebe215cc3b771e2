"""The router's process: its service, its HTTP server, its place in the cluster, from start to stop.

Owns: opening and closing in the right order; what is said of the process at its start.
Promises: at a stop the requests under way are answered, and the streams of events end at once.
Leaves to others: requests (`app`), the map (`transport.map_follower`), signals and pid file (`kvstore.process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import aiohttp
import msgspec

from kvstore.addresses import address_text, advertised_host, is_loopback, listen_address
from kvstore.config import ClusterConfig
from kvstore.errors import ConfigError
from kvstore.router.app import RouterApp
from kvstore.router.controller_client import Controller
from kvstore.router.demo import Demo
from kvstore.router.demo_coordinator import DemoCoordinator
from kvstore.router.demo_failover import DemoFailover
from kvstore.router.memory import return_large_buffers
from kvstore.router.routes.demo import COORDINATE_ROUTES, KILL_ROUTES, TRANSFER_ROUTES
from kvstore.router.service import RouterService
from kvstore.transport.http.server import Server, start_server, warn_if_exposed
from kvstore.transport.map_follower import MapFollower
from kvstore.transport.sessions import ClusterSession
from kvstore.transport.versions import FIELDS

log = logging.getLogger(__name__)


async def serve(
    *,
    router_id: str,
    listen: str,
    join: str,
    config: ClusterConfig,
    stop: asyncio.Event,
    advertise: str | None = None,
    demo_url: str | None = None,
    demo_door: str | None = None,
    is_demo_coordinator: bool = False,
) -> None:
    """Run the router until `stop` is set. Raises OSError when the port is taken, ConfigError.

    `advertise` (HOST:PORT): the name of this host in the requests of clients. `demo_url`: play transfers through,
    coordinated by the router there, and have nodes killed through `demo_door`. `is_demo_coordinator`: be that router.
    Both on loopback only.
    """
    own = [listen_address(listen)[0], *([advertised_host(listen, advertise)] if advertise else [])]
    config = msgspec.structs.replace(config, allowed_hosts=[*config.allowed_hosts, *own])
    if (demo_url is not None or demo_door is not None or is_demo_coordinator) and not is_loopback(listen):
        raise ConfigError(f"a demo is for this machine only: let it listen on 127.0.0.1, not on {listen}.")
    return_large_buffers()
    connector = aiohttp.TCPConnector(limit=0)
    async with contextlib.AsyncExitStack() as at_the_end:
        session = await at_the_end.enter_async_context(aiohttp.ClientSession(connector=connector, headers=FIELDS))
        cluster = ClusterSession()
        service = RouterService(config.limits, session, cluster=cluster)
        controller = Controller(session, join, config.limits)
        app = RouterApp(router_id, service, config, controller)
        if demo_url is not None:
            demo = Demo(demo_url, session, service, app.events.feed, config.limits)
            at_the_end.push_async_callback(demo.close)
            app.add(demo, TRANSFER_ROUTES)
        if demo_door is not None:
            failover = DemoFailover(demo_door, service, controller, app.events.feed, config.limits)
            at_the_end.push_async_callback(failover.close)
            app.add(failover, KILL_ROUTES)
        if is_demo_coordinator:
            app.add(DemoCoordinator(service, config.limits), COORDINATE_ROUTES)
        follower = MapFollower(session, join, config.limits, cluster=cluster)
        await _serve_app(app, service, follower, config, listen, stop)


async def _serve_app(
    app: RouterApp,
    service: RouterService,
    follower: MapFollower,
    config: ClusterConfig,
    listen: str,
    stop: asyncio.Event,
) -> None:
    host, port = listen_address(listen)
    server = Server(app.handle, config.limits, app.answers)
    runner = await start_server(server, host, port)
    _warn_if_few_connections(server.connections_max, config.limits.connections_max)
    if not port:  # else its parent knows
        log.info("router %s listens on %s", app.router_id, address_text(*runner.addresses[0][:2]))
    warn_if_exposed(listen, "read and write every key")
    tasks = [asyncio.create_task(follower.follow(0, service.table.follow)), asyncio.create_task(service.greet())]
    try:
        await stop.wait()
    finally:
        await app.events.close()
        await runner.cleanup()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await service.table.close()


def _warn_if_few_connections(taken: int, connections_max: int) -> None:
    if taken < connections_max:
        log.warning(
            "only %d connections are taken at once, not %d: raise the limit of open files (ulimit -Hn, LimitNOFILE=)",
            taken,
            connections_max,
        )
