"""The calls on keys: read, store and remove one, list and count many.

Owns: the statuses and header fields of `/v1/kv`, the documents of listings.
Promises: the value of a key leaves as it came, byte for byte. A listing, or a large value, is made and sent within the
account of answers: what it may bring is reserved before it is asked for, and little of it is asked for at once, so that
small requests find their way between.
Leaves to others: the syntax of conditions (`decode`), a page's JSON (`page_json`), everything else (`service`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from msgspec import UNSET, Struct, UnsetType

from kvstore.errors import (
    BadCondition,
    BadCursor,
    BadParameter,
    BadTtl,
    DataCorrupt,
    DiskFull,
    Locked,
    NotFound,
    PreconditionFailed,
    TooManyRequests,
    Unavailable,
    ValueTooLarge,
    from_problem,
)
from kvstore.protocol import Delete, Get, Put
from kvstore.router.decode import decode_guard, decode_once, decode_tags, decode_ttl
from kvstore.router.large_values import LargeValues
from kvstore.router.listing import Item as ListedItem
from kvstore.router.page_json import encode_page, missing_members
from kvstore.router.routes.words import (
    BODY,
    EXAMPLE_CURSOR,
    IDEMPOTENCY_KEY,
    KEY,
    KEY_IN_PATH,
    READS_KEY,
    READS_PREFIX,
    WRITE,
    WRITES_KEY,
    Key,
    Missing,
    Next,
    TtlLeft,
    ValueBase64,
    ValueText,
    Version,
    condition,
    lock_token,
    page_parameters,
)
from kvstore.router.service import Routed, RouterService
from kvstore.transport.answers import LARGE_BYTES, AnswerAccount, Room
from kvstore.transport.change_documents import Count
from kvstore.transport.http.responses import BINARY, JSON, Response, json_response, problem_response
from kvstore.transport.http.routes import Body, Call, Content, Errors, Parameter, Route, Success, example, flag
from kvstore.transport.http.schema import about, having, one_of, refined

_NOT_ASKED: list[int] | None = []


class KeyRoutes:
    """`pages`: the account of pages while they are made; `admit_answer` puts a whole answer on that of answers."""

    def __init__(
        self,
        service: RouterService,
        pages: AnswerAccount,
        answers: AnswerAccount,
        admit_answer: Callable[[Response], Awaitable[Response]],
        large: LargeValues,
    ) -> None:
        self._service = service
        self._pages = pages
        self._answers = answers
        self._admit_answer = admit_answer
        self._large = large

    async def get(self, call: Call) -> Response:
        key, fields = call.argument, call.head.fields
        match = decode_tags(fields["if-match"], weak=False) if "if-match" in fields else _NOT_ASKED
        none_match = decode_tags(fields["if-none-match"], weak=True) if "if-none-match" in fields else _NOT_ASKED
        routed = await self._service.ask(Get(0, key, LARGE_BYTES))
        if not routed.answer.left_out_bytes:
            return _shown(routed, key, match, none_match)
        async with Room(self._answers) as room:
            routed = await self._large.get(key, routed.answer.left_out_bytes, routed.shard_id, room)
            response = _shown(routed, key, match, none_match)
            response.reserved = len(response.body)
            room.take(response.reserved)
            return response

    async def put(self, call: Call) -> Response:
        key, head, value = call.argument, call.head, call.raw
        request = Put(0, key, value, call.parameters.get("ttl", 0), decode_guard(head), decode_once(head, value))
        routed = await self._service.ask(request)
        return _written(routed, key, f'ETag: "{routed.answer.version}"\r\n')

    async def delete(self, call: Call) -> Response:
        key, head = call.argument, call.head
        return _written(await self._service.ask(Delete(0, key, decode_guard(head), decode_once(head, b""))), key, "")

    async def list_keys(self, call: Call) -> Response:
        prefix, partial = call.get("prefix"), call.get("partial")
        if call.get("count"):
            if call.parameters.keys() - {"count", "prefix", "partial"}:
                raise BadParameter("count goes with prefix and partial only.")
            counted = await self._service.all_shards.count(prefix, partial=partial)
            return json_response(200, {"count": counted.keys, **missing_members(counted.missing, partial)})
        limit, values = call.get("limit"), call.get("values")
        async with Room(self._pages) as room:
            await room.add(self._service.all_shards.page_bytes(limit, values))
            turns = self._pages.turns if values else None
            listing = await self._service.all_shards.page(
                prefix, call.get("after"), limit, values, partial=partial, turns=turns
            )
            body = await encode_page(
                listing, values, partial, self._answers.turns, lambda key: self._bring(key, partial)
            )
            del listing
            return await self._admit_answer(Response(200, body, JSON, head_only=call.head.method == "HEAD"))

    async def _bring(self, key: str, partial: bool) -> tuple[ListedItem | None, int]:
        """The item of a key on a page, whose value is large.
        As it is now, None if it is gone, or with `partial` if its shard is down; then with the partition that
        is missing."""
        try:
            async with self._pages.turns:
                answer = (await self._large.bring(key, self._service.table.owner_of(key).shard_id)).answer
            if answer.problem is not None:
                raise from_problem(answer.problem)
        except Unavailable:
            if partial:
                return None, 1 << self._service.table.partition_of(key)
            raise
        return None if answer.status == 404 else (key, answer.version, answer.value or b"", answer.ttl_left_ms), 0


def _shown(routed: Routed, key: str, match: list[int] | None, none_match: list[int] | None) -> Response:
    """The value, or what the conditions make of it."""
    answer, shard_id, partition = routed
    if answer.problem is not None:
        raise from_problem(answer.problem)
    lines = f"Kv-Shard: {shard_id}\r\nKv-Partition: {partition}\r\n"
    if answer.status == 404:
        if match is not _NOT_ASKED:
            raise PreconditionFailed(f"there is no key {key!r}.")
        return problem_response(NotFound(f"there is no key {key!r}."), lines)
    lines = f'ETag: "{answer.version}"\r\n{lines}Cache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n'
    if answer.ttl_left_ms:
        lines += f"Kv-Ttl: {answer.ttl_left_ms / 1000:.3f}\r\n"
    if match is not _NOT_ASKED and match is not None and answer.version not in match:
        raise PreconditionFailed(f"key {key!r} has version {answer.version}.", version=answer.version)
    if none_match is not _NOT_ASKED and (none_match is None or answer.version in none_match):
        return Response(304, lines=lines)
    return Response(200, answer.value or b"", BINARY, lines)


def _written(routed: Routed, key: str, lines: str) -> Response:
    answer, shard_id, partition = routed
    if answer.problem is not None:
        raise from_problem(answer.problem)
    place = f"Kv-Shard: {shard_id}\r\nKv-Partition: {partition}\r\n"
    if answer.status == 404:
        return problem_response(NotFound(f"there is no key {key!r}."), place)
    return Response(answer.status, lines=lines + place)


# --- documents --------------------------------------------------------------------------------------------------------


@refined(**{"not": having("value", "value_base64")})
class Item(Struct):
    """A key; with values=true also its value, in value or value_base64, and its ttl."""

    key: Key
    version: Version
    value: ValueText | UnsetType = UNSET
    value_base64: ValueBase64 | UnsetType = UNSET
    ttl: TtlLeft | UnsetType = UNSET


class Page(Struct):
    """A page of keys in byte order, over all shards."""

    items: Annotated[list[Item], about(maxItems="{list_keys_max}")]
    next: Next
    missing: Missing | UnsetType = UNSET


class KeyCount(Struct):
    """How many keys there are."""

    count: Count
    missing: Missing | UnsetType = UNSET


# --- the entries ------------------------------------------------------------------------------------------------------

_PLACE = ("Kv-Shard", "Kv-Partition")
_SHOWN = ("ETag", *_PLACE, "Kv-Ttl", "Cache-Control", "X-Content-Type-Options")
_GUARDED = "While the lock of the key's name is held, this needs its Lock-Token."
_GUARDS = (
    condition("If-Match", "412 unless the key has one of these; weak tags never match"),
    condition("If-None-Match", "412 if the key has one of these; `*`: 412 if there is the key"),
    lock_token("The token of the lease on the key; 412 `lock-lost` if it is no longer the holder's.", required=False),
    IDEMPOTENCY_KEY,
)
_GUARD_ERRORS: Errors = (BadCondition, PreconditionFailed, Locked, *WRITE)
_VALUE = Content(bytes, example("Ada", "text"), BINARY)
_TTL = Parameter(
    "ttl",
    "query",
    Annotated[float, about("Seconds until the key expires.", exclusiveMinimum=0, maximum="{ttl_s_max}")],
    example(60),
    decode=decode_ttl,
)
_EXAMPLE_ITEMS = [{"key": "users/1", "version": 41}, {"key": "users/2", "version": 40}]

KEY_ROUTES = (
    Route(
        "GET",
        "/v1/kv/{key}",
        KeyRoutes.get,
        READS_KEY,
        id="getValue",
        tag="keys",
        summary="Read the value",
        parameters=(
            KEY,
            condition("If-Match", "412 unless the version is among these; weak tags never match"),
            condition("If-None-Match", "304 without the value if the version is among these"),
        ),
        answers=(
            Success(200, "The value, byte for byte as it was put.", _VALUE, _SHOWN),
            Success(304, "If-None-Match names the current version.", None, _SHOWN),
        ),
        errors=(*KEY_IN_PATH, BadCondition, NotFound, PreconditionFailed, TooManyRequests, DataCorrupt),
        error_headers={NotFound: _PLACE},
        is_work=True,
    ),
    Route(
        "PUT",
        "/v1/kv/{key}",
        KeyRoutes.put,
        WRITES_KEY,
        id="putValue",
        tag="keys",
        summary="Store the value",
        description="The body is the value: raw bytes under any Content-Type, 0 to {value_bytes_max:,}. Without ttl "
        f"the key never expires, whatever it had before. {_GUARDED}",
        parameters=(KEY, _TTL, *_GUARDS),
        body=Body(_VALUE, "value_bytes_max", False, ValueTooLarge),
        answers=(
            Success(201, "The key is new. It is durable.", None, ("ETag", *_PLACE)),
            Success(204, "The value was replaced. It is durable.", None, ("ETag", *_PLACE)),
        ),
        errors=(*KEY_IN_PATH, BadTtl, ValueTooLarge, *BODY, *_GUARD_ERRORS, DiskFull),
        is_work=True,
    ),
    Route(
        "DELETE",
        "/v1/kv/{key}",
        KeyRoutes.delete,
        WRITES_KEY,
        id="deleteKey",
        tag="keys",
        summary="Remove the key",
        description=_GUARDED,
        parameters=(KEY, *_GUARDS),
        answers=(Success(204, "It is gone, durably.", None, _PLACE),),
        errors=(*KEY_IN_PATH, NotFound, *_GUARD_ERRORS),
        error_headers={NotFound: _PLACE},
        is_work=True,
    ),
    Route(
        "GET",
        "/v1/kv",
        KeyRoutes.list_keys,
        READS_PREFIX,
        id="listKeys",
        tag="many keys",
        summary="List or count keys",
        description="Keys in byte order over all shards. When a shard cannot answer, nor can this: a gap is worse. "
        "With partial=true it leaves out the partitions of a shard that is down, and names them as `missing`.",
        parameters=(
            *page_parameters("keys"),
            flag("values", "Bring the values, too."),
            flag("count", "Only the number of keys; goes with prefix and partial."),
        ),
        answers=(
            Success(
                200,
                "A page of keys, each as of when its shard was asked, or their number.",
                Content(
                    Annotated[Any, one_of(Page, KeyCount)],
                    {"a page": {"items": _EXAMPLE_ITEMS, "next": EXAMPLE_CURSOR}, "a number": {"count": 2}},
                ),
            ),
        ),
        errors=(BadCursor, TooManyRequests, DataCorrupt),
        is_work=True,
    ),
)
