"""The operations of the public API as data: which route takes what, and how it can answer.

Owns: the list `operations`, with parameters, bodies, header fields, error classes and examples.
Promises: complete and true: tests compare it with the routes and parameters of `app`, and drive a cluster by it.
Leaves to others: the shape of JSON documents (`schemas`), the errors (`errors`), the OpenAPI document (`openapi`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadCondition,
    BadCursor,
    BadParameter,
    BadRequest,
    BadTtl,
    BodyTooLarge,
    ContentEncodingRefused,
    DataCorrupt,
    DiskFull,
    ExpectationFailed,
    Foreign,
    HeadersTooLarge,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    KvError,
    NotFound,
    NotImplementedYet,
    OutcomeUnknown,
    PreconditionFailed,
    TooManyRequests,
    Unavailable,
    UriTooLong,
    ValueTooLarge,
)
from kvstore.router.schemas import Schema, integer, number, one_of, ref, text
from kvstore.transport.http import BINARY, JSON

Json = dict[str, Any]
Errors = tuple[type[KvError], ...]

METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"

ANY_ROUTE: Errors = (BadRequest, BadParameter, Foreign, UriTooLong, HeadersTooLarge, KvError, Unavailable)
_KEY_IN_PATH: Errors = (KeyEmpty, KeyTooLong, KeyNotUtf8)
_WRITE: Errors = (TooManyRequests, NotImplementedYet, OutcomeUnknown)
_BODY: Errors = (ContentEncodingRefused, ExpectationFailed, TooManyRequests)

_EXAMPLE_CLUSTER = {
    "cluster_id": "0f5c7a1e9b2d4c63", "epoch": 1, "partitions": 4096, "replicas": 1,
    "shards": [{"id": "s1", "url": "http://127.0.0.1:9101", "state": "up", "weight": 1, "partitions": 4096,
                "keys": 25013, "bytes": 3626885}],
    "moves": [], "in_doubt": {"count": 0, "oldest_s": None},
}  # fmt: skip
_EXAMPLE_EXPLANATION = {
    "key": "users/1", "hash": "8c9d0f3a5b6e7c21", "partition": 2249, "partitions": 4096, "epoch": 1, "walk": ["s1"],
    "owner": "s1", "owner_url": "http://127.0.0.1:9101", "owner_state": "up", "row": "value", "version": 41,
    "sequence": 57, "bytes": 5, "expires_at_ms": None, "cached": True,
}  # fmt: skip
_EXAMPLE_BATCH = {
    "ops": [
        {"op": "put", "key": "users/1", "value": "Ada", "ttl": 60},
        {"op": "put", "key": "bytes", "value_base64": "/wA="},
        {"op": "get", "key": "users/1"},
        {"op": "delete", "key": "absent"},
    ]
}
_EXAMPLE_PAGE = {
    "items": [{"key": "users/1", "version": 41}, {"key": "users/2", "version": 40}],
    "next": "a3VzZXJzLzI",
}
_EXAMPLE_RESULTS = {
    "results": [
        {"status": 201, "key": "users/1", "version": 41},
        {"status": 204, "key": "bytes", "version": 42},
        {"status": 200, "key": "users/1", "version": 41, "value": "Ada", "ttl": 59.998},
        {"status": 404, "key": "absent", "code": "not-found", "detail": "there is no key 'absent'"},
    ]
}


class Content(NamedTuple):
    """A body: its media type, its schema, and Example objects by name."""

    media_type: str
    schema: Schema
    examples: Json

    def render(self) -> Json:
        """As the `content` of OpenAPI."""
        return {self.media_type: {"schema": self.schema, "examples": self.examples}}


class Success(NamedTuple):
    """An answer that is no error. `headers` are names among the components."""

    status: int
    description: str
    content: Content | None = None
    headers: tuple[str, ...] = ()


class Operation(NamedTuple):
    """What a method of a route takes and answers. The `errors` come on top of `ANY_ROUTE`."""

    route: str
    method: str
    id: str
    tag: str
    summary: str
    answers: tuple[Success, ...]
    errors: Errors = ()
    description: str = ""
    parameters: tuple[Json, ...] = ()
    body: Json | None = None


def operations(limits: Limits) -> list[Operation]:
    """All of them but HEAD, which is that of GET without bodies."""
    value = Content(
        BINARY, {"type": "string", "format": "binary", "maxLength": limits.value_bytes_max}, _example("text", "Ada")
    )
    return [
        _get(value),
        _put(value, limits),
        _delete(),
        _list(limits),
        _batch(limits),
        *_on_the_cluster(),
        *_on_the_router(),
    ]


# --- one key ----------------------------------------------------------------------------------------------------------

_PLACE = ("Kv-Shard", "Kv-Partition")
_SHOWN = ("ETag", *_PLACE, "Kv-Ttl", "Cache-Control", "X-Content-Type-Options")
_NOT_YET = "Conditions (If-Match, If-None-Match), Idempotency-Key and Lock-Token are refused (501) until they exist."


def key_parameter(limits: Limits) -> Json:
    """The parameter `key` of every path that has one."""
    return {
        "name": "key",
        "in": "path",
        "required": True,
        "description": f"1 to {limits.key_bytes_max:,} bytes of UTF-8, percent-encoded. `/` needs no encoding: "
        "all that follows the prefix is the key. (OpenAPI has no word for that; a generated client sends `%2F`, which "
        "names the same key.) Many clients rewrite `.` and `..` segments before they send: for a key that has them "
        "encode its `/`, or use /v1/batch.",
        "schema": {"type": "string", "minLength": 1, "maxLength": limits.key_bytes_max},
        "examples": _example("plain", "greeting") | _example("any character", "Übung 1?"),
    }


_KEY = {"$ref": "#/components/parameters/Key"}


def _get(value: Content) -> Operation:
    return Operation(
        "/v1/kv/{key}",
        "GET",
        id="getValue",
        tag="keys",
        summary="Read the value",
        parameters=(
            _KEY,
            _condition("If-Match", "412 unless the version is among these; weak tags never match"),
            _condition("If-None-Match", "304 without the value if the version is among these"),
        ),
        answers=(
            Success(200, "The value, byte for byte as it was put.", value, _SHOWN),
            Success(304, "If-None-Match names the current version.", None, _SHOWN),
        ),
        errors=(*_KEY_IN_PATH, BadCondition, NotFound, PreconditionFailed, TooManyRequests, DataCorrupt),
    )


def _put(value: Content, limits: Limits) -> Operation:
    ttl = number(
        "Seconds until the key expires, in decimals without exponent.", exclusiveMinimum=0, maximum=limits.ttl_s_max
    )
    return Operation(
        "/v1/kv/{key}",
        "PUT",
        id="putValue",
        tag="keys",
        summary="Store the value",
        description=f"The body is the value: raw bytes under any Content-Type, 0 to {limits.value_bytes_max:,}. "
        f"Without ttl the key never expires, whatever it had before. {_NOT_YET}",
        parameters=(_KEY, _query("ttl", ttl, 60)),
        body={"required": False, "content": value.render()},
        answers=(
            Success(201, "The key is new. It is durable.", None, ("ETag", *_PLACE)),
            Success(204, "The value was replaced. It is durable.", None, ("ETag", *_PLACE)),
        ),
        errors=(*_KEY_IN_PATH, BadTtl, ValueTooLarge, *_BODY, *_WRITE, DiskFull),
    )


def _delete() -> Operation:
    return Operation(
        "/v1/kv/{key}",
        "DELETE",
        id="deleteKey",
        tag="keys",
        summary="Remove the key",
        description=_NOT_YET,
        parameters=(_KEY,),
        answers=(Success(204, "It is gone, durably. ETag is the version of the deletion.", None, ("ETag", *_PLACE)),),
        errors=(*_KEY_IN_PATH, NotFound, *_WRITE),
    )


# --- many keys --------------------------------------------------------------------------------------------------------


def _list(limits: Limits) -> Operation:
    most = limits.list_keys_max
    examples = _example("a page", _EXAMPLE_PAGE) | _example("a number", {"count": 2})
    return Operation(
        "/v1/kv",
        "GET",
        id="listKeys",
        tag="many keys",
        summary="List or count keys",
        description="Keys in byte order over all shards. When a shard cannot answer, nor can this: a gap is worse.",
        parameters=(
            _query("prefix", text("Only keys that begin with this."), "users/"),
            _query("limit", integer("Most keys of a page.", 1, maximum=most, default=min(1000, most)), 100),
            _query("after", text("`next` of the page before.", pattern="^[A-Za-z0-9_-]+$"), _EXAMPLE_PAGE["next"]),
            _query("values", _flag("Bring the values, too."), True),
            _query("count", _flag("Only the number of keys; goes with prefix alone."), True),
        ),
        answers=(
            Success(
                200, "A page of keys, or their number.", Content(JSON, one_of("", ref("Page"), ref("Count")), examples)
            ),
        ),
        errors=(BadCursor, TooManyRequests, DataCorrupt),
    )


def _batch(limits: Limits) -> Operation:
    body = Content(JSON, ref("Batch"), _example("each kind", _EXAMPLE_BATCH))
    results = Content(JSON, ref("BatchResults"), _example("of the request", _EXAMPLE_RESULTS))
    return Operation(
        "/v1/batch",
        "POST",
        id="doBatch",
        tag="many keys",
        summary="Do many independent operations",
        description="Not atomic: an operation that cannot be done fails alone, within the answer 200. A body that is "
        f"not well formed is refused whole, and nothing is done. At most {limits.body_bytes_max:,} bytes. {_NOT_YET}",
        body={"required": True, "content": body.render()},
        answers=(Success(200, "A result per operation, in their order.", results),),
        errors=(BadBody, BodyTooLarge, *_BODY, NotImplementedYet),
    )


# --- the cluster and the router ---------------------------------------------------------------------------------------


def _on_the_cluster() -> list[Operation]:
    return [
        Operation(
            "/v1/cluster",
            "GET",
            id="getCluster",
            tag="cluster",
            summary="The shards and what they hold",
            answers=(_document("The cluster map, and the numbers of each shard.", "Cluster", _EXAMPLE_CLUSTER),),
        ),
        Operation(
            "/v1/explain/{key}",
            "GET",
            id="explainKey",
            tag="cluster",
            summary="The way of a key",
            parameters=(_KEY,),
            answers=(_document("From its hash to its row.", "Explanation", _EXAMPLE_EXPLANATION),),
            errors=_KEY_IN_PATH,
        ),
    ]


def _on_the_router() -> list[Operation]:
    openapi = Content(JSON, {"type": "object", "required": ["openapi"]}, _example("its start", {"openapi": "3.1.0"}))
    metrics = Content(METRICS_TEXT, {"type": "string"}, _example("a gauge", 'kvstore_channel_up{shard="s1"} 1.0\n'))
    ready = _document(
        "It has a cluster map, and every shard that the map calls up has answered it.",
        "Ready",
        {"status": "ready", "router": "0"},
    )
    index = _document(
        "All routes.", "Index", {"name": "kvstore", "routes": ["/", "/v1/kv"], "documentation": "/openapi.json"}
    )
    alive = _document("It is.", "Alive", {"status": "alive", "router": "0"})
    return [
        _of_router("/healthz", "getHealth", "Whether the process is alive", alive),
        _of_router("/readyz", "getReadiness", "Whether this router can serve", ready),
        _of_router("/metrics", "getMetrics", "Metrics of all", Success(200, "Prometheus text format.", metrics)),
        _of_router("/openapi.json", "getOpenapi", "This document", Success(200, "OpenAPI 3.1.", openapi)),
        _of_router("/", "getIndex", "What there is to call", index),
    ]


# --- parts ------------------------------------------------------------------------------------------------------------


def _of_router(route: str, operation_id: str, summary: str, answer: Success) -> Operation:
    return Operation(route, "GET", id=operation_id, tag="router", summary=summary, answers=(answer,))


def _document(description: str, schema: str, example: Any) -> Success:
    return Success(200, description, Content(JSON, ref(schema), _example("an answer", example)))


def _example(name: str, value: Any) -> Json:
    return {name: {"value": value}}


def _query(name: str, schema: Schema, example: Any) -> Json:
    return {"name": name, "in": "query", "schema": schema, "example": example}


def _flag(description: str) -> Schema:
    return {"type": "boolean", "default": False, "description": description}


def _condition(name: str, meaning: str) -> Json:
    tag = '(W/)?"[!#-+\\--~]*"'
    return {
        "name": name,
        "in": "header",
        "description": f"`*` (any version), or quoted versions separated by commas: {meaning}.",
        "schema": text(pattern=f"^(\\*|{tag}(, ?{tag})*)$"),
        "example": '"41"',
    }
