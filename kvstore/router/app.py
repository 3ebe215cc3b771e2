"""The router's HTTP: decode, call the service, encode.

Owns: routes, parameters, header fields and statuses of the public API; counting and timing of requests.
Promises: every answer that is not a value is JSON, every error a problem document. Nothing that a client sends is
silently ignored if it would change the meaning of its request.
Leaves to others: rules (`service`), HTTP's own strictness and limits (`transport.http`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from kvstore.addresses import listen_address
from kvstore.config import ClusterConfig
from kvstore.errors import (
    BadParameter,
    BodyTooLarge,
    KvError,
    MethodNotAllowed,
    NoSuchRoute,
    NotFound,
    PreconditionFailed,
    TooManyRequests,
    Unavailable,
    ValueTooLarge,
    from_problem,
)
from kvstore.metrics import RequestStats, exposition, gauge_family, shard_families
from kvstore.protocol import Delete, Get, Put
from kvstore.router.advice import advice
from kvstore.router.batch import parse_batch, run_batch
from kvstore.router.coordinator import Coordinator
from kvstore.router.decode import (
    decode_cursor,
    decode_flag,
    decode_guard,
    decode_integer,
    decode_once,
    decode_tags,
    decode_ttl,
    encode_cursor,
    refuse_headers,
)
from kvstore.router.events import Events
from kvstore.router.locks import LockRoutes
from kvstore.router.membership import Controller, MembershipRoutes
from kvstore.router.openapi import openapi_json
from kvstore.router.page import PAGE_PREFIX, PAGE_ROUTE, index_page, page_file, wants_page
from kvstore.router.page_json import encode_page, missing_members
from kvstore.router.service import Routed, RouterService
from kvstore.router.transactions import TxnRoutes
from kvstore.transport.answers import SMALL_BYTES, AnswerAccount, Room
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http import (
    BINARY,
    JSON,
    Head,
    HostGuard,
    Response,
    StreamedResponse,
    decode_key,
    decode_query,
    json_response,
    problem_response,
    read_head,
)

LOCK_PREFIX = "/v1/locks/"
LOCK_ROUTE = "/v1/locks/{name}"
KEY_PREFIX = "/v1/kv/"
KEY_ROUTE = "/v1/kv/{key}"
EXPLAIN_PREFIX = "/v1/explain/"
EXPLAIN_ROUTE = "/v1/explain/{key}"
TXN_PREFIX = "/v1/txn/"
TXN_ROUTE = "/v1/txn/{id}"
SHARD_PREFIX = "/v1/shards/"
SHARD_ROUTE = "/v1/shards/{id}"
ACCEPT_OLD_ROUTE = "/v1/shards/{id}/accept-old"
_ACCEPT_OLD = "/accept-old"
CHANGE_PREFIX = "/v1/changes/"
CHANGE_ROUTE = "/v1/changes/{id}"

_NONE: frozenset[str] = frozenset()
_NOT_ASKED: list[int] | None = []
_TTL = frozenset({"ttl"})
_LIST = frozenset({"prefix", "limit", "after", "values", "count", "partial"})
_LIST_LOCKS = frozenset({"prefix", "limit", "after", "partial"})
_STREAM_BYTES = 256 * 1024

Reply = Response | StreamedResponse
Route = Callable[[web.BaseRequest, Head], Awaitable[Reply]]
NamedHandler = Callable[[str, web.BaseRequest, Head], Awaitable[Response]]


class RouterApp:
    def __init__(self, router_id: str, service: RouterService, config: ClusterConfig, controller: Controller) -> None:
        self.router_id = router_id
        self._service = service
        self._limits = config.limits
        self._guard = HostGuard([*config.allowed_hosts, *(listen_address(r.listen)[0] for r in config.routers)])
        self._bodies = BodyReader(config.limits)
        self.answers = AnswerAccount(config.limits, 0.5)
        self._pages = AnswerAccount(config.limits, 0.5)  # while they are made
        self._stats = RequestStats()
        self._under_way = 0
        self._demo_routes: tuple[str, ...] = ()
        self._key_methods = {"GET": self._get, "HEAD": self._get, "PUT": self._put, "DELETE": self._delete}
        self._locks = locks = LockRoutes(service, config.limits, self._bodies)
        self._lock_methods: dict[str, Route] = {
            "GET": self._on_name(locks.inspect),
            "POST": self._on_name(locks.acquire),
            "PUT": self._on_name(locks.renew),
            "DELETE": self._on_name(locks.release),
        }
        self._txns = TxnRoutes(Coordinator(service, config.limits), config.limits, self._bodies)
        self._txn_methods: dict[str, Route] = {"GET": self._look}
        self._explain_methods: dict[str, Route] = {"GET": self._explain}
        self._page_methods: dict[str, Route] = {"GET": self._page_file}
        self._membership = membership = MembershipRoutes(controller, self._bodies)
        self.events = Events(router_id, service, controller, self._stats, config.limits)
        self._shard_methods: dict[str, Route] = {
            "PATCH": self._on_shard(membership.weigh_shard),
            "DELETE": self._on_shard(membership.remove_shard),
        }
        self._accept_old_methods: dict[str, Route] = {"POST": self._on_shard(membership.accept_old, _ACCEPT_OLD)}
        self._change_methods: dict[str, Route] = {"GET": self._look_at_change}
        self.routes = self._fixed_routes(membership)

    def _fixed_routes(self, membership: MembershipRoutes) -> dict[str, dict[str, Route]]:
        """Those that are no prefix of anything."""
        return {
            "/v1/kv": {"GET": self._list},
            "/v1/locks": {"GET": self._list_locks},
            "/v1/batch": {"POST": self._batch},
            "/v1/txn": {"POST": self._transact},
            "/v1/cluster": {"GET": self._cluster},
            "/v1/shards": {"POST": membership.add_shard},
            "/v1/moves": {"GET": membership.moves, "POST": membership.rebalance, "DELETE": membership.cancel},
            "/v1/changes": {"GET": membership.changes},
            "/v1/events": {"GET": self._events},
            "/healthz": {"GET": self._healthz},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._metrics},
            "/openapi.json": {"GET": self._openapi},
            "/": {"GET": self._index},
        }

    def add_demo(self, route: str, handler: Route) -> None:
        """A call that exists with `kvstore up --demo` only."""
        self.routes[route] = {"POST": handler}
        self._demo_routes = (*self._demo_routes, route)

    # --- dispatch -----------------------------------------------------------------------------------------------------

    async def handle(self, request: web.BaseRequest) -> Reply:
        """Answer one request. Raises nothing but what aiohttp itself must see (a vanished client)."""
        started = time.perf_counter()
        route = "unknown"
        self._under_way += 1
        reply: Reply
        try:
            head = read_head(request)
            self._guard.check(head.fields)
            if head.path.startswith(KEY_PREFIX):
                route = KEY_ROUTE
                reply = await self._on_key(request, head)
            else:
                route, handler = self._find(head)
                reply = await handler(request, head)
        except KvError as error:
            reply = problem_response(error, _error_lines(error))
        finally:
            self._under_way -= 1
        if isinstance(reply, Response):
            reply.head_only = request.method == "HEAD"
            if len(reply.body) >= SMALL_BYTES and not reply.reserved:
                reply = await self._admit_answer(reply)
        self._stats.observe(route, request.method, reply.status, time.perf_counter() - started)
        return reply

    async def _admit_answer(self, response: Response) -> Response:
        """The response, on the account until it is written; or 429 in its place, unless it `has_to_go`."""
        size = 0 if response.head_only else len(response.body)
        if response.has_to_go:
            self.answers.charge(size)
        elif not self.answers.try_reserve(size):
            try:
                await self.answers.reserve(size)
            except TooManyRequests as error:
                return problem_response(error)
        response.reserved = size
        return response

    def _find(self, head: Head) -> tuple[str, Route]:
        if head.path.startswith(EXPLAIN_PREFIX):
            route, methods = EXPLAIN_ROUTE, self._explain_methods
        elif head.path.startswith(LOCK_PREFIX):
            route, methods = LOCK_ROUTE, self._lock_methods
        elif head.path.startswith(TXN_PREFIX):
            route, methods = TXN_ROUTE, self._txn_methods
        elif head.path.startswith(SHARD_PREFIX) and head.path.endswith(_ACCEPT_OLD):
            route, methods = ACCEPT_OLD_ROUTE, self._accept_old_methods
        elif head.path.startswith(SHARD_PREFIX):
            route, methods = SHARD_ROUTE, self._shard_methods
        elif head.path.startswith(CHANGE_PREFIX):
            route, methods = CHANGE_ROUTE, self._change_methods
        elif head.path.startswith(PAGE_PREFIX):
            route, methods = PAGE_ROUTE, self._page_methods
        else:
            route, methods = head.path, self.routes.get(head.path, {})
        if not methods:
            raise NoSuchRoute(f"there is nothing at {head.path[:200]!a}")
        handler = methods.get("GET" if head.method == "HEAD" else head.method)
        if handler is None:
            raise _method_not_allowed(head.method, [*methods, *(["HEAD"] if "GET" in methods else [])])
        return route, handler

    async def _on_key(self, request: web.BaseRequest, head: Head) -> Response:
        method = self._key_methods.get(head.method)
        if method is None:
            raise _method_not_allowed(head.method, list(self._key_methods))
        self._admit()
        return await method(self._key(head.path[len(KEY_PREFIX) :]), request, head)

    def _admit(self) -> None:
        """Called before anything is read or asked for a request for data. Raises TooManyRequests."""
        # Requests that wait for a lock or for their client are bounded by connections and bytes: they cost no work, and
        # must not stand before the lock's holder and before clients that read. Listeners of events do so, too.
        idle = self._locks.waiting + self._bodies.receiving + self.answers.streams_unread + self.events.listeners
        if self._under_way - idle > self._limits.requests_in_flight_max:
            raise TooManyRequests("the router has as many requests under way as it takes", retry_after_ms=200)

    def _on_name(self, handler: NamedHandler) -> Route:
        async def with_name(request: web.BaseRequest, head: Head) -> Response:
            self._admit()
            return await handler(self._key(head.path[len(LOCK_PREFIX) :]), request, head)

        return with_name

    def _on_shard(self, handler: NamedHandler, suffix: str = "") -> Route:
        async def with_id(request: web.BaseRequest, head: Head) -> Response:
            return await handler(head.path[len(SHARD_PREFIX) :].removesuffix(suffix), request, head)

        return with_id

    async def _look_at_change(self, request: web.BaseRequest, head: Head) -> Response:
        return await self._membership.change(head.path[len(CHANGE_PREFIX) :], request, head)

    def _key(self, raw: str) -> str:
        return decode_key(raw, self._limits.key_bytes_max)

    # --- one key ------------------------------------------------------------------------------------------------------

    async def _get(self, key: str, request: web.BaseRequest, head: Head) -> Response:
        if head.query:
            decode_query(head.query, _NONE)
        match = none_match = _NOT_ASKED
        if "if-match" in head.fields:
            match = decode_tags(head.fields["if-match"], weak=False)
        if "if-none-match" in head.fields:
            none_match = decode_tags(head.fields["if-none-match"], weak=True)
        routed = await self._service.ask(Get(0, key))
        answer, shard_id, partition = routed
        if answer.problem is not None:
            raise from_problem(answer.problem)
        lines = f"Kv-Shard: {shard_id}\r\nKv-Partition: {partition}\r\n"
        if answer.status == 404:
            if match is not _NOT_ASKED:
                raise PreconditionFailed(f"there is no key {key!r}")
            return problem_response(NotFound(f"there is no key {key!r}"), lines)
        lines = f'ETag: "{answer.version}"\r\n{lines}Cache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n'
        if answer.ttl_left_ms:
            lines += f"Kv-Ttl: {answer.ttl_left_ms / 1000:.3f}\r\n"
        if match is not _NOT_ASKED and match is not None and answer.version not in match:
            raise PreconditionFailed(f"key {key!r} has version {answer.version}", version=answer.version)
        if none_match is not _NOT_ASKED and (none_match is None or answer.version in none_match):
            return Response(304, lines=lines)
        return Response(200, answer.value or b"", BINARY, lines)

    async def _put(self, key: str, request: web.BaseRequest, head: Head) -> Response:
        ttl_ms = 0
        if head.query:
            ttl_ms = decode_ttl(decode_query(head.query, _TTL).get("ttl"), self._limits)
        guard = decode_guard(head)
        value = await self._bodies.read(request, head, self._limits.value_bytes_max, ValueTooLarge)
        routed = await self._service.ask(Put(0, key, value, ttl_ms, guard, decode_once(head, value)))
        return _written(routed, key, f'ETag: "{routed.answer.version}"\r\n')

    async def _delete(self, key: str, request: web.BaseRequest, head: Head) -> Response:
        if head.query:
            decode_query(head.query, _NONE)
        return _written(await self._service.ask(Delete(0, key, decode_guard(head), decode_once(head, b""))), key, "")

    # --- many keys ----------------------------------------------------------------------------------------------------

    async def _list(self, request: web.BaseRequest, head: Head) -> Response:
        self._admit()
        parameters = decode_query(head.query, _LIST)
        prefix = parameters.get("prefix", "")
        partial = decode_flag(parameters, "partial")
        if decode_flag(parameters, "count"):
            if len(parameters.keys() - {"count", "prefix", "partial"}):
                raise BadParameter("count goes with prefix and partial only")
            counted = await self._service.count(prefix, partial=partial)
            return json_response(200, {"count": counted.keys, **missing_members(counted.missing, partial)})
        limit = decode_integer(
            parameters, "limit", min(1000, self._limits.list_keys_max), 1, self._limits.list_keys_max
        )
        values = decode_flag(parameters, "values")
        after = decode_cursor(parameters.get("after"))
        async with Room(self._pages) as room:
            await room.add(self._service.page_bytes(limit, values))
            listing = await self._service.page(prefix, after, limit, values, partial=partial)
            body = await encode_page(listing, values, partial, self.answers.turns)
            del listing
            return await self._admit_answer(Response(200, body, JSON, head_only=head.method == "HEAD"))

    async def _list_locks(self, request: web.BaseRequest, head: Head) -> Response:
        self._admit()
        parameters = decode_query(head.query, _LIST_LOCKS)
        limit = decode_integer(
            parameters, "limit", min(1000, self._limits.list_keys_max), 1, self._limits.list_keys_max
        )
        after = decode_cursor(parameters.get("after"))
        partial = decode_flag(parameters, "partial")
        listing = await self._service.leases(parameters.get("prefix", ""), after, limit, partial=partial)
        items = [
            {"name": name, "token": token, "owner": (owner or b"").decode(), "ttl_left": left_ms / 1000}
            for name, token, owner, left_ms in listing.items
        ]
        missing = missing_members(listing.missing, partial)
        return json_response(200, {"items": items, "next": encode_cursor(listing.last), **missing})

    async def _batch(self, request: web.BaseRequest, head: Head) -> Reply:
        self._admit()
        refuse_headers(head, "if-match", "if-none-match", "lock-token", "idempotency-key")
        decode_query(head.query, _NONE)
        body = await self._bodies.read(request, head, self._limits.body_bytes_max, BodyTooLarge)
        steps = parse_batch(body, self._limits)
        async with Room(self.answers) as room:
            return await _stream_results(request, run_batch(self._service, steps, self._limits, room), room)

    async def _transact(self, request: web.BaseRequest, head: Head) -> Response:
        self._admit()
        return await self._txns.run(request, head)

    async def _look(self, request: web.BaseRequest, head: Head) -> Response:
        self._admit()
        return await self._txns.look(head.path[len(TXN_PREFIX) :], request, head)

    # --- the cluster --------------------------------------------------------------------------------------------------

    async def _cluster(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        changes = await self._membership.described(self._service.cluster_map)
        document = await self._service.cluster(changes.pop("epoch")) | changes
        return json_response(200, document | {"advice": advice(document)["sentence"]})

    async def _events(self, request: web.BaseRequest, head: Head) -> Reply:
        return await self.events.stream(request, head)

    async def _explain(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        return json_response(200, await self._service.explain(self._key(head.path[len(EXPLAIN_PREFIX) :])))

    async def _healthz(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        return json_response(200, {"status": "alive", "router": self.router_id})

    async def _readyz(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        reason = self._service.not_ready()
        if reason is not None:
            raise Unavailable(reason, retry_after_ms=200)
        return json_response(200, {"status": "ready", "router": self.router_id})

    async def _metrics(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        stats = await self._service.shard_stats()
        channels = self._service.channels
        text = exposition(
            self._stats.families(),
            shard_families({shard_id: shard for shard_id, shard in stats.items() if shard is not None}),
            [
                gauge_family(
                    "kvstore_channel_ops",
                    "Operations under way to the shard",
                    {shard_id: channel.ops_under_way for shard_id, channel in channels.items()},
                    "shard",
                ),
                gauge_family(
                    "kvstore_channel_up",
                    "1 while the shard is connected",
                    {shard_id: float(channel.connected) for shard_id, channel in channels.items()},
                    "shard",
                ),
                gauge_family(
                    "kvstore_requests_under_way", "Requests under way", {self.router_id: self._under_way}, "router"
                ),
            ],
        )
        return Response(200, text, "text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        return Response(200, openapi_json(self._limits, self._demo_routes), JSON)

    async def _index(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        if wants_page(head):
            return index_page(head)
        routes = [KEY_ROUTE, EXPLAIN_ROUTE, LOCK_ROUTE, TXN_ROUTE, SHARD_ROUTE, ACCEPT_OLD_ROUTE, CHANGE_ROUTE]
        routes.append(PAGE_ROUTE)
        routes += [route for route in self.routes if route != "/"]
        index = {"name": "kvstore", "routes": sorted(routes), "documentation": "/openapi.json"}
        return json_response(200, index, "Vary: Accept\r\n")

    async def _page_file(self, request: web.BaseRequest, head: Head) -> Response:
        return page_file(head)


# --- decoding and encoding --------------------------------------------------------------------------------------------


def _written(routed: Routed, key: str, lines: str) -> Response:
    answer, shard_id, partition = routed
    if answer.problem is not None:
        raise from_problem(answer.problem)
    place = f"Kv-Shard: {shard_id}\r\nKv-Partition: {partition}\r\n"
    if answer.status == 404:
        return problem_response(NotFound(f"there is no key {key!r}"), place)
    return Response(answer.status, lines=lines + place)


def _error_lines(error: KvError) -> str:
    """What an error says in header fields, too."""
    if isinstance(error, MethodNotAllowed):
        return f"Allow: {', '.join(error.members['allow'])}\r\n"
    if isinstance(error, PreconditionFailed) and "version" in error.members:
        return f'ETag: "{error.members["version"]}"\r\n'
    return ""


def _method_not_allowed(method: str, allowed: list[str]) -> MethodNotAllowed:
    return MethodNotAllowed(f"{method!a} is not among {', '.join(allowed)}", allow=allowed)


async def _stream_results(request: web.BaseRequest, results: AsyncIterator[bytes], room: Room) -> Reply:
    """`{"results":[…]}`, sent as it comes once it is large. What is written and taken leaves `room`."""
    stream: StreamedResponse | None = None
    parts: list[bytes] = [b'{"results":[']
    size, separator = 0, b""
    async for result in results:
        parts += (separator, result)
        separator = b",\n"
        size += len(result)
        if size >= _STREAM_BYTES:
            if stream is None:
                stream = StreamedResponse(request, JSON)
            del result  # or it stays in memory until the client has read
            taking, taken, parts, size = stream.write(parts), size, [], 0
            await taking
            room.change(-taken)
    parts.append(b"]}\n")
    if stream is None:
        response = Response(200, b"".join(parts), JSON)
        response.reserved = len(response.body)
        room.take(response.reserved)
        return response
    await stream.write(parts)
    await stream.end()
    return stream
