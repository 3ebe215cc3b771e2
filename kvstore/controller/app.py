"""The controller over HTTP, for shards and routers: decode, call, encode.

Owns: the routes of the controller and the form of their answers; the life of its server.
Promises: every refusal of a route is a problem document; a long poll never outlives the stop of the process.
Leaves to others: every rule (`service`), the file (`store`), signals and the pid file (`kvstore.process`).

Routes (internal: clients talk to a router, which passes those of shards and moves on):
    GET    /v1/map?after=EPOCH&cluster=ID&clock=VERSION&session=ID
                                200 + map once its epoch is above EPOCH; 204 if none was within limits.map_poll_s, or
                                at once if this controller is in another session
    POST   /v1/members          a shard announces itself: 200 + map, or 202 {"waiting_for": [ids]}
    GET    /v1/launch?after=REVISION&running=ID,ID
                                a launcher asks what to run: 200 + what, once it has changed; 204 as above
    POST   /v1/shards           {"id","url"?,"weight"?}: add: 202 {"id","state","epoch"}, Location: /v1/changes/{id}
    PATCH  /v1/shards/{id}      {"weight"}: 202, likewise
    DELETE /v1/shards/{id}      remove: 202, likewise; with ?lost=true&confirm={id} give it up with all that it has
    POST   /v1/shards/{id}/accept-old
                                {"confirm": id}: it may start with less than it told: 202 {"id", "told", "version"}
    POST   /v1/told             {"store_id", "number", "version"} of a log: 200, the highest {"number", "version"}
    GET    /v1/moves            {"epoch", "moves": […], "wanted": [ids], "ending": [ids], "last": {…} or null}
    POST   /v1/moves            plan anew: 202 {"epoch"}
    DELETE /v1/moves            cancel what is not committed: 202, likewise
    GET    /v1/changes          {"items": […]}: changes of the cluster, the newest first
    GET    /v1/changes/{id}     one of them
    GET    /v1/recovery         the newest map that the nodes have, when this controller's is lost or old
    POST   /v1/recovery         {"cluster_id","epoch","without":[ids]}: go on with it: 202 {"epoch"}
    GET    /healthz             200 while the process lives
    GET    /metrics             Prometheus text
Each answer says in `Kv-Session` which session this process is (see `transport.sessions`).
With ?plan=true a POST, PATCH or DELETE of shards and a POST of moves change nothing, and say what would move: 200.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from kvstore.addresses import address_text, advertised_host, listen_address
from kvstore.config import ID_PATTERN, ClusterConfig
from kvstore.controller.bodies import Confirmation, NewShard, NewTold, NewWeight, Recover
from kvstore.controller.change_views import ChangeViews
from kvstore.controller.closer import ChangeCloser
from kvstore.controller.document import ClusterDocument
from kvstore.controller.lost import Reopener
from kvstore.controller.membership import Announcement
from kvstore.controller.mover import Mover
from kvstore.controller.service import Asked, ClusterService, Replanned, Waiting
from kvstore.controller.shards import ShardClients
from kvstore.controller.store import Told
from kvstore.controller.store.sqlite import SqliteMapStore, open_sqlite
from kvstore.environment import SYSTEM
from kvstore.errors import (
    BadBody,
    BadParameter,
    BodyTooLarge,
    Foreign,
    KvError,
    MethodNotAllowed,
    NoSuchRoute,
)
from kvstore.metrics import exposition, move_families
from kvstore.placement.cluster_map import ClusterMap
from kvstore.transport.http import warn_if_exposed
from kvstore.transport.sessions import HEADER, PARAMETER, ClusterSession

_BODY_BYTES_MAX = 64 * 1024
_SHUTDOWN_TIMEOUT_S = 2.0
_SESSION_BYTES = 8
_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_Body = TypeVar("_Body", bound=msgspec.Struct)
_Result = TypeVar("_Result")


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
    try:
        async with aiohttp.ClientSession() as session:
            await _serve(store, session, listen, config, stop, f"controller {controller_id}")
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
) -> None:
    document = ClusterDocument(store, config.limits.map_write_tries_max)
    cluster = ClusterSession(SYSTEM.random_hex(_SESSION_BYTES))
    shards = ShardClients(config.limits, session, cluster)
    mover = Mover(document, shards, config.limits)
    service = ClusterService(document, config, shards)
    reopener = Reopener(document, shards, config.limits)
    closer = ChangeCloser(document, mover, service.may_run, config.limits)
    views = ChangeViews(service, mover, lambda: reopener.waits_for)
    service.on_clock = reopener.tell
    await service.report_start()
    runner = web.AppRunner(
        make_app(service, mover, views, config, stop, cluster.id),
        access_log=None,
        handle_signals=False,
        shutdown_timeout=_SHUTDOWN_TIMEOUT_S,
    )
    await runner.setup()
    moving = asyncio.create_task(mover.run())
    stopping = asyncio.create_task(stop.wait())
    watching = asyncio.create_task(service.watch_if_behind())
    reopening = asyncio.create_task(reopener.run())
    closing = asyncio.create_task(closer.run())
    try:
        await web.TCPSite(runner, *listen_address(listen)).start()
        _log.info("%s listens on %s", name, address_text(*runner.addresses[0][:2]))
        warn_if_exposed(listen, "change the cluster")
        await asyncio.wait({moving, stopping, reopening, closing}, return_when=asyncio.FIRST_COMPLETED)
        for working in (moving, reopening, closing):
            if working.done():
                working.result()  # an error of its own: the process ends, and starts anew from the document
    finally:
        stop.set()  # ends the long polls
        for task in (moving, watching, reopening, closing):
            task.cancel()
        stopping.cancel()
        await asyncio.gather(moving, stopping, watching, reopening, closing, return_exceptions=True)
        await runner.cleanup()
        await shards.close()


def make_app(
    service: ClusterService,
    mover: Mover,
    views: ChangeViews,
    config: ClusterConfig,
    stop: asyncio.Event,
    session: str,
) -> web.Application:
    """The routes. Setting `stop` ends the long polls under way. `session`: the id that this process has drawn."""

    async def say_session(request: web.Request, response: web.StreamResponse) -> None:
        response.headers[HEADER] = session

    app = web.Application(middlewares=[_problems, _refuse_foreign(config)], client_max_size=_BODY_BYTES_MAX)
    poll = _Poll(config.limits.map_poll_s, stop)
    app.on_response_prepare.append(say_session)
    members, changes = _MemberRoutes(service, poll, session), _ChangeRoutes(service, mover, views)
    app.router.add_get("/v1/map", members.get_map)
    app.router.add_post("/v1/members", members.post_member)
    app.router.add_post("/v1/told", members.post_told)
    app.router.add_get("/v1/launch", members.get_launch)
    app.router.add_get("/v1/recovery", members.get_recovery)
    app.router.add_post("/v1/recovery", members.post_recovery)
    app.router.add_post("/v1/shards", changes.post_shard)
    app.router.add_patch("/v1/shards/{id}", changes.patch_shard)
    app.router.add_delete("/v1/shards/{id}", changes.delete_shard)
    app.router.add_post("/v1/shards/{id}/accept-old", changes.post_accept_old)
    app.router.add_get("/v1/moves", changes.get_moves)
    app.router.add_post("/v1/moves", changes.post_moves)
    app.router.add_delete("/v1/moves", changes.delete_moves)
    app.router.add_get("/v1/changes", changes.get_changes)
    app.router.add_get("/v1/changes/{id}", changes.get_change)
    app.router.add_get("/healthz", _get_health)
    app.router.add_get("/metrics", changes.get_metrics)
    return app


class _Poll:
    """Waits for what comes some time, but no longer than a long poll may last."""

    def __init__(self, poll_s: float, stop: asyncio.Event) -> None:
        self._poll_s = poll_s
        self._stop = stop

    async def wait_for(self, coming: Awaitable[_Result]) -> _Result | None:
        """None if it has not come in time, or the process stops."""
        waiting = asyncio.ensure_future(coming)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({waiting, stopping}, timeout=self._poll_s, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()
            stopping.cancel()
            await asyncio.gather(waiting, stopping, return_exceptions=True)


class _MemberRoutes:
    """For shards, routers and launchers."""

    def __init__(self, service: ClusterService, poll: _Poll, session: str) -> None:
        self._session = session
        self._service = service
        self._poll = poll

    async def get_map(self, request: web.Request) -> web.Response:
        parameters = _parameters(request, "after", "cluster", "clock", PARAMETER)
        epoch = _whole_number("after", parameters)
        if cluster_id := parameters.get("cluster"):
            self._service.hear(cluster_id, epoch)
            self._service.on_clock(_whole_number("clock", parameters))
        if parameters.get(PARAMETER, self._session) != self._session:
            return web.Response(status=204)  # so that it announces itself here soon
        found = await self._poll.wait_for(self._service.map_after(epoch))
        return _map_response(found) if found is not None else web.Response(status=204)

    async def post_member(self, request: web.Request) -> web.Response:
        _parameters(request)
        answer = await self._service.announce(await _body(request, Announcement))
        if isinstance(answer, Waiting):
            return _json({"waiting_for": answer.waiting_for}, status=202)
        return _map_response(answer)

    async def get_recovery(self, request: web.Request) -> web.Response:
        _parameters(request)
        return _json(await self._service.recovery())

    async def post_recovery(self, request: web.Request) -> web.Response:
        _parameters(request)
        asked = await _body(request, Recover)
        return _moves_response(await self._service.recover(asked.cluster_id, asked.epoch, asked.without))

    async def post_told(self, request: web.Request) -> web.Response:
        _parameters(request)
        told = await _body(request, NewTold)
        kept = await self._service.tell(told.store_id, Told(told.number, told.version))
        return _json(kept._asdict())

    async def get_launch(self, request: web.Request) -> web.Response:
        parameters = _parameters(request, "after", "running")
        running = frozenset(filter(None, parameters.get("running", "").split(",")))
        for shard_id in running:
            if not ID_PATTERN.fullmatch(shard_id):
                raise BadParameter(f"running={shard_id!r}: {shard_id!r} is no shard id.")
        asked = self._service.launch_after(_whole_number("after", parameters, -1), running)
        found = await self._poll.wait_for(asked)
        return _json(found) if found is not None else web.Response(status=204)


class _ChangeRoutes:
    """For people, by way of a router."""

    def __init__(self, service: ClusterService, mover: Mover, views: ChangeViews) -> None:
        self._service = service
        self._mover = mover
        self._views = views

    async def post_shard(self, request: web.Request) -> web.Response:
        only_plan = _only_plan(request)
        new = await _body(request, NewShard)
        if only_plan:
            return _json(await self._service.plan_add(new.id, new.url, new.weight))
        return _asked_response(await self._service.add(new.id, new.url, new.weight))

    async def patch_shard(self, request: web.Request) -> web.Response:
        only_plan, shard_id = _only_plan(request), request.match_info["id"]
        weight = (await _body(request, NewWeight)).weight
        if only_plan:
            return _json(await self._service.plan_reweigh(shard_id, weight))
        return _asked_response(await self._service.reweigh(shard_id, weight))

    async def delete_shard(self, request: web.Request) -> web.Response:
        shard_id = request.match_info["id"]
        parameters = _parameters(request, "plan", "lost", "confirm")
        only_plan, is_lost = _flag(parameters, "plan"), _flag(parameters, "lost")
        if (is_lost and only_plan) or ("confirm" in parameters and not is_lost):
            raise BadParameter("confirm goes with lost=true, and plan with neither.")
        if is_lost:
            return _taken_response(await self._service.give_up(shard_id, parameters.get("confirm")))
        if only_plan:
            return _json(await self._service.plan_remove(shard_id))
        return _asked_response(await self._service.remove(shard_id))

    async def post_accept_old(self, request: web.Request) -> web.Response:
        _parameters(request)
        confirm = (await _body(request, Confirmation)).confirm
        return _taken_response(await self._service.accept_old(request.match_info["id"], confirm))

    async def get_moves(self, request: web.Request) -> web.Response:
        _parameters(request)
        state = await self._service.state()
        moves, epoch = [], 0
        if state.map is not None:
            epoch = state.map.epoch
            await self._mover.caught_up(state.map)
            moves = self._mover.report(state.map)
        wanted = list(state.wanted)
        ending = self._service.ending(state)
        last = self._views.last(state)
        return _json({"epoch": epoch, "moves": moves, "wanted": wanted, "ending": ending, "last": last})

    async def post_moves(self, request: web.Request) -> web.Response:
        if _only_plan(request):
            return _json(await self._service.plan_plan())
        return _moves_response(await self._service.plan_anew())

    async def delete_moves(self, request: web.Request) -> web.Response:
        _parameters(request)
        return _moves_response(await self._service.cancel())

    async def get_changes(self, request: web.Request) -> web.Response:
        _parameters(request)
        return _json({"items": await self._views.all()})

    async def get_change(self, request: web.Request) -> web.Response:
        _parameters(request)
        return _json(await self._views.one(request.match_info["id"]))

    async def get_metrics(self, request: web.Request) -> web.Response:
        _parameters(request)
        state = await self._service.state()
        steps = self._mover.steps(state.map) if state.map is not None else {}
        epoch = state.map.epoch if state.map is not None else 0
        text = exposition(move_families(self._mover.record.stats, steps, epoch))
        return web.Response(body=text, content_type="text/plain", charset="utf-8")


async def _get_health(request: web.Request) -> web.Response:
    _parameters(request)
    return _json({"status": "ok"})


# --- encode ----------------------------------------------------------------------------------------------------------


def _map_response(cluster_map: ClusterMap) -> web.Response:
    return _json(cluster_map)


def _asked_response(asked: Asked) -> web.Response:
    return _taken_response(asked._asdict())


def _moves_response(replanned: Replanned) -> web.Response:
    return _taken_response({"epoch": replanned.map.epoch, "change": replanned.change})


def _taken_response(document: dict[str, Any]) -> web.Response:
    """202, where its change can be followed."""
    response = _json({name: value for name, value in document.items() if name != "change"}, status=202)
    response.headers["Location"] = f"/v1/changes/{document['change']}"
    return response


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(body=_encode(document), status=status, content_type="application/json")


# --- decode ----------------------------------------------------------------------------------------------------------


async def _body(request: web.Request, kind: type[_Body]) -> _Body:
    body = await request.read()
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadBody(f"{error}.") from None


def _parameters(request: web.Request, *known: str) -> dict[str, str]:
    """The query, each parameter at most once. Raises BadParameter."""
    unknown = set(request.query) - set(known)
    if unknown and not known:
        raise BadParameter(f"{request.path} takes no parameters.")
    if unknown or len(set(request.query)) < len(request.query):
        raise BadParameter(f"{request.path} takes only {' and '.join(known)}, each once.")
    return dict(request.query)


def _whole_number(name: str, parameters: dict[str, str], default: int = 0) -> int:
    given = parameters.get(name, str(default))
    if not re.fullmatch("[0-9]{1,16}", given) and given != str(default):
        raise BadParameter(f"{name}={given!r} must be a whole number from 0.")
    return int(given)


def _only_plan(request: web.Request) -> bool:
    return _flag(_parameters(request, "plan"), "plan")


def _flag(parameters: dict[str, str], name: str) -> bool:
    given = parameters.get(name, "false")
    if given not in ("true", "false"):
        raise BadParameter(f"{name}={given!r} must be true or false.")
    return given == "true"


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
