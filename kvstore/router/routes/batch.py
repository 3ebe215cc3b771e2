"""The call for many independent operations, POST /v1/batch: its body, its stream of results.

Owns: the form of body and answer; what of a batch is answered at once and what is sent as it comes.
Promises: what is written and taken by the client leaves the room that the batch has among the answers.
Leaves to others: what refuses a batch, and its operations (`router.batch`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from aiohttp import web
from msgspec import UNSET, Struct, UnsetType

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadTtl,
    BodyTooLarge,
    Conflict,
    DataCorrupt,
    DiskFull,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    KvError,
    Locked,
    NotFound,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    ValueTooLarge,
)
from kvstore.router.batch import BatchBody, parse_batch, run_batch
from kvstore.router.large_values import LargeValues
from kvstore.router.routes.words import BODY, Key, ProblemMembers, TtlLeft, ValueBase64, ValueText, Version
from kvstore.router.service import RouterService
from kvstore.transport.answers import AnswerAccount, Room
from kvstore.transport.http.responses import JSON, Response, StreamedResponse
from kvstore.transport.http.routes import Body, Call, Content, Keys, Reply, Right, Route, Success, Touches, example
from kvstore.transport.http.schema import about, having, one_of, refined

_STREAM_BYTES = 256 * 1024

OPERATION_ERRORS: tuple[type[KvError], ...] = (
    KeyEmpty, KeyNotUtf8, KeyTooLong, BadTtl, NotFound, Conflict, ValueTooLarge, Locked, TooManyRequests, KvError,
    DataCorrupt, Unavailable, OutcomeUnknown, DiskFull,
)  # fmt: skip


class BatchRoutes:
    """The call for many independent operations."""

    def __init__(self, service: RouterService, limits: Limits, answers: AnswerAccount, large: LargeValues) -> None:
        self._service = service
        self._limits = limits
        self._answers = answers
        self._large = large

    async def run(self, call: Call) -> Reply:
        steps = parse_batch(call.body, self._limits)
        call.raw, call.body = b"", None  # or they stay in memory until the last result is sent
        async with Room(self._answers, is_parts=True) as room:
            results = run_batch(self._service, steps, self._limits, room, self._large)
            return await _stream_results(call.request, results, room)


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


# --- documents --------------------------------------------------------------------------------------------------------


class WrittenResult(Struct):
    """201: a put created the key; 204: a put replaced it, or a delete removed it."""

    status: Annotated[int, about(enum=[201, 204])]
    key: Key
    version: Version


@refined(oneOf=[having("value"), having("value_base64")])
class ReadResult(Struct):
    """What a get read."""

    status: Annotated[int, about(const=200)]
    key: Key
    version: Version
    value: ValueText | UnsetType = UNSET
    value_base64: ValueBase64 | UnsetType = UNSET
    ttl: TtlLeft | UnsetType = UNSET


class FailedResult(ProblemMembers, kw_only=True):
    """An operation that was not done, with the members that its code has in a Problem; the others are done."""

    status: Annotated[int, about(enum=sorted({error.status for error in OPERATION_ERRORS}))]
    key: str
    code: Annotated[str, about(enum=sorted(error.code for error in OPERATION_ERRORS))]
    detail: str


class BatchResults(Struct):
    """One result per operation, in their order."""

    results: list[Annotated[Any, one_of(WrittenResult, ReadResult, FailedResult)]]


# --- the entry --------------------------------------------------------------------------------------------------------

_EXAMPLE_BATCH = {
    "ops": [
        {"op": "put", "key": "users/1", "value": "Ada", "ttl": 60},
        {"op": "put", "key": "bytes", "value_base64": "/wA="},
        {"op": "get", "key": "users/1"},
        {"op": "delete", "key": "absent"},
    ]
}
_EXAMPLE_RESULTS = {
    "results": [
        {"status": 201, "key": "users/1", "version": 41},
        {"status": 204, "key": "bytes", "version": 42},
        {"status": 200, "key": "users/1", "version": 41, "value": "Ada", "ttl": 59.998},
        {"status": 404, "key": "absent", "code": "not-found", "detail": "there is no key 'absent'"},
    ]
}

BATCH_ROUTES = (
    Route(
        "POST",
        "/v1/batch",
        BatchRoutes.run,
        Touches(Right.WRITE, Keys.BODY),
        id="doBatch",
        tag="many keys",
        summary="Do many independent operations",
        description="Not atomic: an operation that cannot be done fails alone, within the answer 200. A body that is "
        "not well formed is refused whole, and nothing is done. At most {body_bytes_max:,} bytes. Headers that "
        "speak of one key (If-Match, If-None-Match, Lock-Token, Idempotency-Key) are refused (400): a key whose lock "
        "is held cannot be written by a batch.",
        body=Body(Content(BatchBody, example(_EXAMPLE_BATCH, "each kind")), "body_bytes_max"),
        answers=(
            Success(
                200,
                "A result per operation, in their order.",
                Content(BatchResults, example(_EXAMPLE_RESULTS, "of the request")),
            ),
        ),
        errors=(BadBody, BodyTooLarge, *BODY),
        is_work=True,
    ),
)
