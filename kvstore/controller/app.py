"""The controller over HTTP, for shards and routers: decode, call, encode.

Owns: the routes of the controller and the form of their answers; the life of its server.
Promises: every refusal of a route is a problem document; a long poll never outlives the stop of the process.
Leaves to others: every rule (`service`), the file (`store`), signals and the pid file (`kvstore.process`).

Routes (internal: clients talk to a router):
    GET  /v1/map?after=EPOCH   200 + map once its epoch is above EPOCH; 204 if none was within
    limits.map_poll_s POST /v1/members           a shard announces itself: 200 + map, or 202 {"waiting_for":
    [ids]} GET  /healthz              200 while the process lives
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from kvstore.config import ClusterConfig, listen_address
from kvstore.controller.service import Announcement, ClusterService, Waiting
from kvstore.controller.store.sqlite import open_sqlite
from kvstore.errors import (
    BadBody,
    BadParameter,
    BodyTooLarge,
    Foreign,
    KvError,
    MethodNotAllowed,
    NoSuchRoute,
)
from kvstore.placement.cluster_map import ClusterMap
from kvstore.transport.http import warn_if_exposed

_BODY_BYTES_MAX = 64 * 1024
_SHUTDOWN_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_decode_announcement = msgspec.json.Decoder(Announcement).decode


async def serve(*, controller_id: str, listen: str, data_dir: Path, config: ClusterConfig, stop: asyncio.Event) -> None:
    """Serve on `listen` ("HOST:PORT") until `stop` is set, then end in order.

    Raises ForeignData and ConfigError as `open_sqlite` and `listen_address` do, OSError if it cannot listen.
    """
    host, port = listen_address(listen)
    store = await open_sqlite(data_dir / f"controller-{controller_id}.db")
    try:
        service = ClusterService(store, config)
        await service.report_start()
        runner = web.AppRunner(
            make_app(service, config, stop),
            access_log=None,
            handle_signals=False,
            shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            _log.info("controller %s listens on %s", controller_id, listen)
            warn_if_exposed(listen, "change the cluster")
            await stop.wait()
        finally:
            await runner.cleanup()
    finally:
        await store.close()
    _log.info("controller %s has stopped", controller_id)


def make_app(service: ClusterService, config: ClusterConfig, stop: asyncio.Event) -> web.Application:
    """The routes. Setting `stop` ends the long polls under way."""
    app = web.Application(middlewares=[_problems, _refuse_foreign(config)], client_max_size=_BODY_BYTES_MAX)
    routes = _Routes(service, config.limits.map_poll_s, stop)
    app.router.add_get("/v1/map", routes.get_map)
    app.router.add_post("/v1/members", routes.post_member)
    app.router.add_get("/healthz", routes.get_health)
    return app


class _Routes:
    def __init__(self, service: ClusterService, map_poll_s: float, stop: asyncio.Event) -> None:
        self._service = service
        self._map_poll_s = map_poll_s
        self._stop = stop

    async def get_map(self, request: web.Request) -> web.Response:
        epoch = _epoch(request)
        changed = asyncio.create_task(self._service.map_after(epoch))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({changed, stopping}, timeout=self._map_poll_s, return_when=asyncio.FIRST_COMPLETED)
            return _map_response(changed.result()) if changed.done() else web.Response(status=204)
        finally:
            changed.cancel()
            stopping.cancel()
            await asyncio.gather(changed, stopping, return_exceptions=True)

    async def post_member(self, request: web.Request) -> web.Response:
        _no_parameters(request)
        body = await request.read()
        try:
            announcement = _decode_announcement(body)
        except msgspec.DecodeError as error:
            raise BadBody(f"{error}.") from None
        answer = await self._service.announce(announcement)
        if isinstance(answer, Waiting):
            return _json({"waiting_for": answer.waiting_for}, status=202)
        return _map_response(answer)

    async def get_health(self, request: web.Request) -> web.Response:
        _no_parameters(request)
        return _json({"status": "ok"})


def _map_response(cluster_map: ClusterMap) -> web.Response:
    return _json(cluster_map)


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(body=_encode(document), status=status, content_type="application/json")


def _epoch(request: web.Request) -> int:
    given = request.query.getall("after", ["0"])
    if set(request.query) - {"after"} or len(given) > 1:
        raise BadParameter("the only parameter is after=EPOCH, once.")
    if not re.fullmatch("[0-9]{1,16}", given[0]):
        raise BadParameter(f"after={given[0]!r} is no epoch: a whole number from 0.")
    return int(given[0])


def _no_parameters(request: web.Request) -> None:
    if request.query:
        raise BadParameter(f"{request.path} takes no parameters.")


# --- for every route ---------------------------------------------------------------------------------------


@web.middleware
async def _problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error becomes an RFC 9457 problem document, those of aiohttp included."""
    headers = {}
    try:
        return await handler(request)
    except web.HTTPMethodNotAllowed as refused:
        headers["Allow"] = refused.headers["Allow"]
        error: KvError = MethodNotAllowed(f"{request.path!r} does not take {request.method}.")
    except web.HTTPRequestEntityTooLarge:
        error = BodyTooLarge(f"a body here has at most {_BODY_BYTES_MAX} bytes.", limit=_BODY_BYTES_MAX)
    except web.HTTPNotFound:
        error = NoSuchRoute(f"the controller has no route {request.path!r}.")
    except KvError as known:
        error = known
    except Exception:
        _log.exception("%s %s failed", request.method, request.path)
        error = KvError("the controller met an error of its own.")
    return web.Response(
        body=_encode(error.problem()),
        status=error.status,
        headers=headers,
        content_type="application/problem+json",
    )


def _refuse_foreign(config: ClusterConfig) -> Middleware:
    """Keep web pages out: a browser sends Origin, and by DNS rebinding a Host that is not ours."""
    own = [listen_address(controller.listen)[0] for controller in config.controllers]
    allowed = frozenset(host.lower() for host in ("localhost", *own, *config.allowed_hosts))

    @web.middleware
    async def refuse_foreign(request: web.Request, handler: Handler) -> web.StreamResponse:
        if "Origin" in request.headers:
            raise Foreign("the controller takes no requests from web pages (Origin).")
        # A request without Host (HTTP/1.0) cannot come from a browser.
        for host in request.headers.getall("Host", ()):
            if not _is_own_host(host, allowed):
                raise Foreign(f"the host {host!r} is neither an IP address, nor localhost, nor in allowed_hosts.")
        return await handler(request)

    return refuse_foreign


def _is_own_host(host: str, allowed: frozenset[str]) -> bool:
    """`host` is a Host header: NAME, NAME:PORT, ADDRESS, [ADDRESS]:PORT."""
    name, _, _ = host[1:].partition("]") if host.startswith("[") else host.partition(":")
    name = name.lower().removesuffix(".")
    return name in allowed or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
