"""The router's front door: find a request's route, answer it, count it.

Owns: which requests are under way and how many may be; counting and timing of requests; the account of answers.
Promises: every answer that is not a value is JSON, every error a problem document. Nothing that a client sends is
silently ignored if it would change the meaning of its request.
Leaves to others: the calls (`routes`), rules (`service`), HTTP's own strictness and limits (`transport.http`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from aiohttp import web

from kvstore.addresses import listen_address
from kvstore.config import ClusterConfig
from kvstore.errors import KvError, TooManyRequests
from kvstore.metrics import RequestStats
from kvstore.router.cluster_views import ClusterViews
from kvstore.router.controller_client import Controller
from kvstore.router.coordinator import Coordinator
from kvstore.router.events import Events
from kvstore.router.large_values import LargeValues
from kvstore.router.routes.batch import BATCH_ROUTES, BatchRoutes
from kvstore.router.routes.changes import CHANGE_ROUTES, ChangeRoutes
from kvstore.router.routes.cluster import CLUSTER_ROUTES, ClusterRoutes
from kvstore.router.routes.events import EVENT_ROUTES
from kvstore.router.routes.keys import KEY_ROUTES, KeyRoutes
from kvstore.router.routes.locks import LOCK_ROUTES, LockRoutes
from kvstore.router.routes.page import PAGE_ROUTES, PageRoutes
from kvstore.router.routes.process import PROCESS_ROUTES, ProcessRoutes
from kvstore.router.routes.txn import TXN_ROUTES, TxnRoutes
from kvstore.router.service import RouterService
from kvstore.transport.answers import SMALL_BYTES, AnswerAccount
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import HostGuard, read_head
from kvstore.transport.http.responses import Response, problem_response
from kvstore.transport.http.routes import Reply, Route, RouteTable, error_lines


class RouterApp:
    """The router's HTTP: its routes, its account of answers, its counts."""

    def __init__(self, router_id: str, service: RouterService, config: ClusterConfig, controller: Controller) -> None:
        self.router_id = router_id
        self._limits = limits = config.limits
        self._guard = HostGuard([*config.allowed_hosts, *(listen_address(r.listen)[0] for r in config.routers)])
        self._bodies = BodyReader(limits)
        self.answers = AnswerAccount(limits, 0.5)
        self._stats = RequestStats()
        self._under_way = 0
        self._locks = LockRoutes(service, limits)
        self.events = Events(router_id, service, controller, self._stats, limits)
        self.table = table = RouteTable(limits, self._bodies)
        pages = AnswerAccount(limits, 0.5)  # while they are made
        large = LargeValues(service)
        table.add(KeyRoutes(service, pages, self.answers, self._admit_answer, large), KEY_ROUTES)
        table.add(self._locks, LOCK_ROUTES)
        table.add(TxnRoutes(Coordinator(service, limits), limits), TXN_ROUTES)
        table.add(BatchRoutes(service, limits, self.answers, large), BATCH_ROUTES)
        views = ClusterViews(service)
        table.add(ClusterRoutes(service, views, controller), CLUSTER_ROUTES)
        table.add(ChangeRoutes(controller), CHANGE_ROUTES)
        table.add(self.events, EVENT_ROUTES)
        table.add(PageRoutes(), PAGE_ROUTES)
        process = ProcessRoutes(router_id, service, views, table, self._stats, limits, lambda: self._under_way)
        table.add(process, PROCESS_ROUTES)

    def add(self, owner: object, routes: Iterable[Route]) -> None:
        """Calls that not every router has; their handlers are methods of `owner`."""
        self.table.add(owner, routes)

    async def handle(self, request: web.BaseRequest) -> Reply:
        """Answer one request. Raises nothing but what aiohttp itself must see (a vanished client)."""
        started = time.perf_counter()
        path = "unknown"
        self._under_way += 1
        reply: Reply
        try:
            head = read_head(request)
            self._guard.check(head.fields)
            entry, argument = self.table.find(head.path)
            path = entry.path
            bound = entry.method(head.method)
            if bound.route.is_work:
                self._admit()
            reply = await self.table.answer(bound, argument, request, head)
        except KvError as error:
            reply = problem_response(error, error_lines(error))
        finally:
            self._under_way -= 1
        if isinstance(reply, Response):
            reply.head_only = request.method == "HEAD"
            if len(reply.body) >= SMALL_BYTES and not reply.reserved:
                reply = await self._admit_answer(reply)
        self._stats.observe(path, request.method, reply.status, time.perf_counter() - started)
        return reply

    def _admit(self) -> None:
        """Called before anything is read or asked for a request for data. Raises TooManyRequests."""
        # Requests that wait for a lock or for their client are bounded by connections and bytes: they cost no work, and
        # must not stand before the lock's holder and before clients that read. Listeners of events do so, too.
        idle = self._locks.waiting + self._bodies.receiving + self.answers.streams_unread + self.events.listeners
        if self._under_way - idle > self._limits.requests_in_flight_max:
            raise TooManyRequests("the router has as many requests under way as it takes.", retry_after_ms=200)

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
