"""The calls of a node: connections of routers and of primaries, and what it tells a controller and people.

Owns: the entries of its route table, the sockets that are open, the form of its answers.
Promises: a socket is opened only for a process that the node admits, and never for a web page.
Leaves to others: whom it admits and what it tells (`node`), requests of a channel (`service`), decoding
(`transport.http.routes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import NoSuchRoute, OtherProtocol
from kvstore.metrics import exposition, shard_families
from kvstore.shard.copy_wires import accept
from kvstore.shard.node import Node, Refused
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.responses import TEXT, Response, json_response
from kvstore.transport.http.routes import (
    Call,
    Content,
    Keys,
    Parameter,
    Right,
    Route,
    RouteTable,
    Success,
    Touches,
    text,
)
from kvstore.transport.http.server import accept_socket
from kvstore.transport.sessions import PARAMETER

_UNAVAILABLE = 503


class NodeRoutes:
    """What the calls of a node do."""

    def __init__(self, node: Node, limits: Limits) -> None:
        self._node = node
        self._limits = limits
        self._sockets: dict[web.WebSocketResponse, None] = {}

    async def get_channel(self, call: Call) -> Any:
        """Serve a router's channel until it ends."""
        asked, request = call.parameters, call.request
        resident = await self._node.admit(
            asked.get("shard", ""), asked.get("store"), asked.get(PARAMETER, ""), request.remote
        )
        if isinstance(resident, Refused):
            return _refusal(resident)
        try:
            socket = await accept_socket(request, self._limits.frame_read_bytes_max)
        except ConnectionError:  # it has left in the meantime, as after a pause of this process
            return Response(_UNAVAILABLE)
        with self._open(socket):
            await self._node.connections.serve(socket, resident.handle, self._node.stores.handle_of)
        return socket

    async def get_copies(self, call: Call) -> Any:
        """Serve a primary's connection to the copy of its store that lies here, until it ends."""
        asked, request = call.parameters, call.request
        refused = await self._node.admit_process(asked.get(PARAMETER, ""), request.remote)
        if refused is not None:
            return _refusal(refused)
        try:
            socket, wire = await accept(request)
        except ConnectionError:  # as above
            return Response(_UNAVAILABLE)
        with self._open(socket):
            await self._node.stores.serve_session(asked.get("store", ""), wire)
        return socket

    @contextmanager
    def _open(self, socket: web.WebSocketResponse) -> Iterator[None]:
        self._sockets[socket] = None
        try:
            yield
        finally:
            del self._sockets[socket]

    async def get_health(self, call: Call) -> Response:
        asked = call.parameters
        facts = await self._node.facts(asked.get(PARAMETER), asked.get("store"), call.request.remote)
        return json_response(200, facts)

    async def get_map(self, call: Call) -> Response:
        """For a controller that has lost its file."""
        return json_response(200, self._node.newest_map())

    async def get_metrics(self, call: Call) -> Response:
        return Response(200, exposition(shard_families(self._node.stats())), TEXT)

    async def close(self) -> None:
        """End the channels, then what else is open."""
        await self._node.connections.close()
        for socket in list(self._sockets):
            await socket.close(code=aiohttp.WSCloseCode.GOING_AWAY)


def _refusal(refused: Refused) -> Response:
    return Response(refused.status, f"{refused.why}\n".encode(), TEXT)


# --- the entries ------------------------------------------------------------------------------------------------------

_STORE = text("store", str, "5f0c6a1e", "The id of the data file that it must be.")
_SESSION = text(PARAMETER, str, "0f3b2a917c5d4e68", "The session of the process that asks.")
_DOCUMENT = Content(dict[str, Any], {})


def _entry(
    path: str,
    handler: Any,
    right: Right,
    summary: str,
    answer: Success,
    parameters: tuple[Parameter, ...] = (),
    *,
    is_hello: bool = False,
) -> Route:
    keys = Keys.ALL if right is Right.PEER else Keys.NONE
    name = handler.__name__.replace("_", "-")
    touches, errors = Touches(right, keys), (OtherProtocol,) if is_hello else ()
    return Route(
        "GET", path, handler, touches, name, "node", summary, (answer,), "", parameters, None, errors, is_hello=is_hello
    )


ROUTES = (
    _entry(
        "/channel", NodeRoutes.get_channel, Right.PEER, "A channel for the requests of a router",
        Success(101, "It is open, as a WebSocket."), (text("shard", str, "s1", "The shard."), _STORE, _SESSION),
        is_hello=True,
    ),
    _entry(
        "/copies", NodeRoutes.get_copies, Right.PEER, "A primary's connection to the copy of its store",
        Success(101, "It is open, as a WebSocket."), (_STORE, _SESSION), is_hello=True,
    ),
    _entry(
        "/healthz", NodeRoutes.get_health, Right.NONE, "Whether the process is alive, and what it serves",
        Success(200, "It is.", _DOCUMENT), (_STORE, _SESSION),
    ),
    _entry("/map", NodeRoutes.get_map, Right.PEER, "The newest map of its stores", Success(200, "It.", _DOCUMENT)),
    _entry(
        "/metrics", NodeRoutes.get_metrics, Right.READ, "Metrics",
        Success(200, "Prometheus text format.", Content(str, {}, TEXT)),
    ),
)  # fmt: skip


def make_table(routes: NodeRoutes, node_id: str, limits: Limits) -> RouteTable:
    """All calls of a node."""

    def missing(path: str) -> NoSuchRoute:
        """What took this for the address of a router is told what it is."""
        return NoSuchRoute(
            f"this is shard {node_id}, which answers routers only.",
            next_step="Ask a router: `kvstore up` prints its address.",
        )

    table = RouteTable(limits, BodyReader(limits), missing)
    table.add(routes, ROUTES)
    return table
