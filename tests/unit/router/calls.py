"""Calls without a connection: decoded by the route table, answered by the handlers of one family."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from kvstore.config import Limits
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import Head
from kvstore.transport.http.routes import Route, RouteTable, decode_body


class SentBody(BodyReader):
    """The body that was sent."""

    def __init__(self, body: bytes, limits: Limits) -> None:
        super().__init__(limits)
        self._body = body

    async def read(self, *_: Any) -> bytes:
        return self._body


async def answer(
    owner: object, routes: Iterable[Route], head: Head, body: bytes = b"", *, limits: Limits, request: Any = None
) -> Any:
    """What the handler answers. Raises KvError."""
    table = RouteTable(limits, SentBody(body, limits))
    table.add(owner, routes)
    entry, argument = table.find(head.path)
    return await table.answer(entry.method(head.method), argument, request, head)


def decoded(kind: Any, body: bytes) -> Any:
    """A body of that type. Raises BadBody."""
    return decode_body(msgspec.json.Decoder(kind), body)
