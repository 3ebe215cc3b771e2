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
