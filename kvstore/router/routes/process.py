"""The calls on this process: whether it lives and can serve, its metrics, what there is to call.

Owns: `/healthz`, `/readyz`, `/metrics`, `/openapi.json` and the JSON at `/`.
Promises: the index and the OpenAPI document come from the table that the calls are found in.
Leaves to others: the page at `/` (`page`), what is counted (`metrics`), the form of the document (`openapi`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Struct

from kvstore.config import Limits
from kvstore.errors import Unavailable
from kvstore.metrics import RequestStats, exposition, gauge_family, shard_families
from kvstore.router.cluster_views import ClusterViews
from kvstore.router.openapi import openapi_json
from kvstore.router.routes.page import HTML, index_page, wants_page
from kvstore.router.routes.words import OF_ANYONE, OF_THE_CLUSTER
from kvstore.router.service import RouterService
from kvstore.transport.http.responses import JSON, Response, json_response
from kvstore.transport.http.routes import Call, Content, Route, RouteTable, Success, Touches, example
from kvstore.transport.http.schema import about

METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class ProcessRoutes:
    """`under_way`: how many requests are."""

    def __init__(
        self,
        router_id: str,
        service: RouterService,
        views: ClusterViews,
        table: RouteTable,
        stats: RequestStats,
        limits: Limits,
        under_way: Callable[[], int],
    ) -> None:
        self._router_id = router_id
        self._service = service
        self._views = views
        self._table = table
        self._stats = stats
        self._limits = limits
        self._under_way = under_way
        self._document = b""

    async def healthz(self, call: Call) -> Response:
        return json_response(200, Alive("alive", self._router_id))

    async def readyz(self, call: Call) -> Response:
        reason = self._service.not_ready()
        if reason is not None:
            raise Unavailable(f"{reason}.", retry_after_ms=200)
        return json_response(200, Ready("ready", self._router_id))

    async def metrics(self, call: Call) -> Response:
        stats = await self._views.shard_stats()
        channels = self._service.table.channels
        text = exposition(
            self._stats.families(),
            shard_families(self._views.labelled(stats)),
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
                    "kvstore_requests_under_way", "Requests under way", {self._router_id: self._under_way()}, "router"
                ),
            ],
        )
        return Response(200, text, METRICS_TEXT)

    async def openapi(self, call: Call) -> Response:
        self._document = self._document or openapi_json(self._limits, self._table.routes)
        return Response(200, self._document, JSON)

    async def index(self, call: Call) -> Response:
        if wants_page(call.head):
            return index_page(call.head)
        paths = sorted({route.path for route in self._table.routes} - {"/"})
        return json_response(200, Index("kvstore", paths, "/openapi.json"), "Vary: Accept\r\n")


# --- documents --------------------------------------------------------------------------------------------------------

RouterId = Annotated[str, about("The id of this router.")]


class Alive(Struct):
    """The process lives."""

    status: Annotated[str, about(const="alive")]
    router: RouterId


class Ready(Struct):
    """The router can serve."""

    status: Annotated[str, about(const="ready")]
    router: RouterId


class Index(Struct):
    """What there is to call."""

    name: Annotated[str, about(const="kvstore")]
    routes: list[str]
    documentation: Annotated[str, about(const="/openapi.json")]


# --- the entries ------------------------------------------------------------------------------------------------------

_OPENAPI = Annotated[Any, about(type="object", required=["openapi"])]
_READY = "It has a cluster map, and every shard that the map calls up has answered it."


def _entry(path: str, handler: Any, touches: Touches, name: str, summary: str, answer: Success) -> Route:
    return Route("GET", path, handler, touches, name, "router", summary, (answer,))


PROCESS_ROUTES = (
    _entry(
        "/healthz",
        ProcessRoutes.healthz,
        OF_ANYONE,
        "getHealth",
        "Whether the process is alive",
        Success(200, "It is.", Content(Alive, example({"status": "alive", "router": "0"}))),
    ),
    _entry(
        "/readyz",
        ProcessRoutes.readyz,
        OF_ANYONE,
        "getReadiness",
        "Whether this router can serve",
        Success(200, _READY, Content(Ready, example({"status": "ready", "router": "0"}))),
    ),
    _entry(
        "/metrics",
        ProcessRoutes.metrics,
        OF_THE_CLUSTER,
        "getMetrics",
        "Metrics of all",
        Success(
            200,
            "Prometheus text format.",
            Content(str, example('kvstore_channel_up{shard="s1"} 1.0\n', "a gauge"), METRICS_TEXT),
        ),
    ),
    _entry(
        "/openapi.json",
        ProcessRoutes.openapi,
        OF_ANYONE,
        "getOpenapi",
        "This document",
        Success(200, "OpenAPI 3.1.", Content(_OPENAPI, example({"openapi": "3.1.0"}, "its start"))),
    ),
    _entry(
        "/",
        ProcessRoutes.index,
        OF_ANYONE,
        "getIndex",
        "What there is to call",
        Success(
            200,
            "All routes; the page to a browser, which asks for HTML.",
            Content(Index, example({"name": "kvstore", "routes": ["/v1/kv"], "documentation": "/openapi.json"})),
            ("Vary",),
            HTML,
        ),
    ),
)
