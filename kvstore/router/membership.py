"""Changes of the cluster, passed through to the controller: its members, its moves.

Owns: the routes /v1/shards, /v1/shards/{id}, /v1/shards/{id}/accept-old, /v1/moves, /v1/changes and /v1/changes/{id} as
clients see them; what the controller tells of moves, as a part of GET /v1/cluster.
Promises: what the controller answers is answered: status, document, `Location`; a request is sent to it once. GET
/v1/cluster waits for the controller for a second at most, and says so when it did not answer.
Leaves to others: every decision (the controller), the path of a request (`app`).
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlencode

import aiohttp
import msgspec
from aiohttp import web

from kvstore.config import ID_PATTERN, Limits
from kvstore.errors import BadBody, BadParameter, BodyTooLarge, NotFound, OutcomeUnknown, Unavailable
from kvstore.placement.cluster_map import ClusterMap, Move
from kvstore.router.decode import decode_flag, refuse_headers
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http import JSON, PROBLEM_JSON, Head, Response, decode_query

PLAN = frozenset({"plan"})
LOST = frozenset({"lost", "confirm"})

_NONE: frozenset[str] = frozenset()
_BODY_BYTES_MAX = 4096
_ANSWER_BYTES_MAX = 16 * 1024 * 1024
_MOVES_TIMEOUT_S = 1.0
_RETRY_AFTER_MS = 1000
_IS_AWAY = "the controller does not answer"
_CHANGES = "/v1/changes"
_CHANGE_ID = re.compile("[0-9a-f]{1,64}")
_LOCATION = re.compile(f"{_CHANGES}/{_CHANGE_ID.pattern}")


class Controller:
    """One question at a time on a connection of its own, so that none is sent on one that is dead by now."""

    def __init__(self, session: aiohttp.ClientSession, url: str, limits: Limits) -> None:
        session._retry_connection = False  # aiohttp would send a DELETE anew when the connection breaks
        self._session = session
        self._url = url.rstrip("/")
        self._timeout_s = limits.request_timeout_s

    async def ask(self, method: str, path: str, body: bytes | None, timeout_s: float | None = None) -> Response:
        """Its answer. Raises Unavailable when nothing was done, OutcomeUnknown when that cannot be told."""
        timeout = aiohttp.ClientTimeout(total=timeout_s or self._timeout_s)
        headers = {"Content-Type": JSON, "Connection": "close"}
        address = f"{self._url}{path}"
        try:
            async with self._session.request(
                method, address, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                location = answer.headers.get("Location", "")
                return _passed_on(answer.status, answer.content_type, await _read(answer), location)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise Unavailable(_IS_AWAY, retry_after_ms=_RETRY_AFTER_MS) from None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            if method == "GET":
                raise Unavailable(_IS_AWAY, retry_after_ms=_RETRY_AFTER_MS) from None
            raise OutcomeUnknown(
                f"{_IS_AWAY}: the change may or may not have been asked for",
                next_step="GET /v1/cluster shows whether it was; then ask again if need be.",
            ) from None

    async def moves(self) -> dict[str, Any] | None:
        """GET /v1/moves, or None if it does not answer within a second."""
        try:
            answer = await self.ask("GET", "/v1/moves", None, _MOVES_TIMEOUT_S)
        except Unavailable:
            return None
        return msgspec.json.decode(answer.body, type=dict[str, Any]) if answer.status == 200 else None


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > _ANSWER_BYTES_MAX:
            raise ValueError("the answer is too large")
    return bytes(body)


def _passed_on(status: int, content_type: str, body: bytes, location: str) -> Response:
    """Raises ValueError if that was no answer of a controller (msgspec.DecodeError is one)."""
    document = msgspec.json.decode(body, type=dict[str, Any])
    if content_type not in (JSON, PROBLEM_JSON):
        raise ValueError(f"a controller does not answer with {content_type}")
    lines = f"Location: {location}\r\n" if _LOCATION.fullmatch(location) else ""
    if content_type == PROBLEM_JSON:
        if status == Unavailable.status:
            document.setdefault("retry_after_ms", _RETRY_AFTER_MS)
        if "retry_after_ms" in document:
            lines += f"Retry-After: {max(1, -(-int(document['retry_after_ms']) // 1000))}\r\n"
    return Response(status, msgspec.json.encode(document) + b"\n", content_type, lines)


class MembershipRoutes:
    def __init__(self, controller: Controller, bodies: BodyReader) -> None:
        self._controller = controller
        self._bodies = bodies

    async def add_shard(self, request: web.BaseRequest, head: Head) -> Response:
        return await self._change(request, head, "/v1/shards", takes_body=True)

    async def weigh_shard(self, shard_id: str, request: web.BaseRequest, head: Head) -> Response:
        return await self._change(request, head, f"/v1/shards/{_checked(shard_id)}", takes_body=True)

    async def remove_shard(self, shard_id: str, request: web.BaseRequest, head: Head) -> Response:
        takes = PLAN | LOST
        return await self._change(request, head, f"/v1/shards/{_checked(shard_id)}", takes_body=False, takes=takes)

    async def accept_old(self, shard_id: str, request: web.BaseRequest, head: Head) -> Response:
        path = f"/v1/shards/{_checked(shard_id)}/accept-old"
        return await self._change(request, head, path, takes_body=True, takes=_NONE)

    async def rebalance(self, request: web.BaseRequest, head: Head) -> Response:
        return await self._change(request, head, "/v1/moves", takes_body=False)

    async def cancel(self, request: web.BaseRequest, head: Head) -> Response:
        return await self._change(request, head, "/v1/moves", takes_body=False, takes=_NONE)

    async def moves(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        return await self._controller.ask("GET", "/v1/moves", None)

    async def changes(self, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        return await self._controller.ask("GET", _CHANGES, None)

    async def change(self, change_id: str, request: web.BaseRequest, head: Head) -> Response:
        decode_query(head.query, _NONE)
        if not _CHANGE_ID.fullmatch(change_id):
            raise NotFound(
                f"{change_id[:100]!a} is no id of a change.",
                title="There is no such change",
                next_step="GET /v1/changes lists those that are known.",
            )
        return await self._controller.ask("GET", f"{_CHANGES}/{change_id}", None)

    async def _change(
        self, request: web.BaseRequest, head: Head, path: str, *, takes_body: bool, takes: frozenset[str] = PLAN
    ) -> Response:
        refuse_headers(head, "if-match", "if-none-match", "lock-token", "idempotency-key")
        parameters = decode_query(head.query, takes)
        given = {name: "true" for name in ("plan", "lost") if decode_flag(parameters, name)}
        if "confirm" in parameters:
            given["confirm"] = parameters["confirm"]
        body = await self._bodies.read(request, head, _BODY_BYTES_MAX, BodyTooLarge)
        if body.strip() and not takes_body:
            raise BadBody(f"{head.method} {path} takes no body; its parameters are in the address")
        query = f"?{urlencode(given)}" if given else ""
        return await self._controller.ask(head.method, f"{path}{query}", body if takes_body else None)

    async def described(self, cluster_map: ClusterMap | None) -> dict[str, Any]:
        """What the controller has to say in GET /v1/cluster, and as of which `epoch`.

        If it does not answer, the moves of that map.
        """
        told = await self._controller.moves()
        if told is not None:
            return {"last_change": told.pop("last"), **told}
        standing, epoch = (cluster_map.moves, cluster_map.epoch) if cluster_map is not None else ([], 0)
        moves = [_unknown(move) for move in standing]
        return {"epoch": epoch, "moves": moves, "wanted": None, "ending": None, "last_change": None}


def _unknown(move: Move) -> dict[str, Any]:
    return {
        "from": move.source,
        "to": move.to,
        "partitions": len(move.partitions),
        "step": "unknown",
        "keys_done": 0,
        "keys_total": 0,
        "bytes_done": 0,
        "write_pause_ms": 0,
        "detail": _IS_AWAY,
    }


def _checked(shard_id: str) -> str:
    """Raises BadParameter: nothing that means something else in a path is passed on."""
    if not ID_PATTERN.fullmatch(shard_id):
        raise BadParameter(f"{shard_id[:100]!a} is no id of a shard: it must match {ID_PATTERN.pattern}")
    return shard_id
