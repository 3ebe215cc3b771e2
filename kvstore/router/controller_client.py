"""The controller, as a router asks it.

Owns: one question and its answer, passed on as it is; what the controller tells of moves and changes.
Promises: a request is sent once. What the controller answers is answered: status, document, `Location`; when it does
not, the error says whether anything may have been done.
Leaves to others: every decision (the controller), the calls of clients (`routes.changes`, `routes.cluster`).
"""

from __future__ import annotations

import re
from typing import Any

import aiohttp
import msgspec

from kvstore.config import Limits
from kvstore.errors import OutcomeUnknown, Unavailable
from kvstore.placement.cluster_map import ClusterMap, Move
from kvstore.transport.http.responses import JSON, PROBLEM_JSON, Response

_ANSWER_BYTES_MAX = 16 * 1024 * 1024
_TOLD_TIMEOUT_S = 1.0
_RETRY_AFTER_MS = 1000
CHANGE_ID = re.compile("[0-9a-f]{1,64}")
_LOCATION = re.compile(f"/v1/changes/{CHANGE_ID.pattern}")
_IS_AWAY = "the controller does not answer"


class Controller:
    """One question at a time, on a connection of its own.
    So none is sent on a connection that is dead by now."""

    def __init__(self, session: aiohttp.ClientSession, url: str, limits: Limits) -> None:
        session._retry_connection = False  # aiohttp would send a DELETE again when the connection breaks
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
            raise Unavailable(f"{_IS_AWAY}.", retry_after_ms=_RETRY_AFTER_MS) from None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            if method == "GET":
                raise Unavailable(f"{_IS_AWAY}.", retry_after_ms=_RETRY_AFTER_MS) from None
            raise OutcomeUnknown(
                f"{_IS_AWAY}: the change may or may not have been asked for.",
                next_step="GET /v1/cluster shows whether it was; then ask again if need be.",
            ) from None

    async def moves(self, *, copies: bool = False) -> dict[str, Any] | None:
        """GET /v1/moves, or None if it does not answer within a second. `copies`: with what it knows of them."""
        return await self._told("/v1/moves?copies=true" if copies else "/v1/moves")

    async def changes(self) -> list[dict[str, Any]] | None:
        """The items of GET /v1/changes, or None if it does not answer within a second."""
        told = await self._told("/v1/changes")
        return told["items"] if told is not None else None

    async def _told(self, path: str) -> dict[str, Any] | None:
        try:
            answer = await self.ask("GET", path, None, _TOLD_TIMEOUT_S)
        except Unavailable:
            return None
        return msgspec.json.decode(bytes(answer.body), type=dict[str, Any]) if answer.status == 200 else None

    async def described(self, cluster_map: ClusterMap | None) -> dict[str, Any]:
        """What the controller has to say in GET /v1/cluster, and as of which `epoch`.

        If it does not answer, the moves of that map.
        """
        told = await self.moves(copies=True)
        if told is not None:
            return {"last_change": told.pop("last"), **told}
        standing, epoch = (cluster_map.moves, cluster_map.epoch) if cluster_map is not None else ([], 0)
        moves = [_unknown(move) for move in standing]
        return {"epoch": epoch, "moves": moves, "wanted": None, "ending": None, "last_change": None}


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
