"""The operations of the public API as data: which route takes what, and how it can answer.

Owns: the list `operations`, with parameters, bodies, header fields, error classes and examples.
Promises: complete and true: tests compare it with the routes and parameters of `app`, and drive a cluster by it.
Leaves to others: those on locks (`lock_operations`), transactions (`txn_operations`) and members
(`membership_operations`), the types and what several have in common (`operation`), the shape of JSON documents
(`schemas`), the errors (`errors`), the OpenAPI document (`openapi`).
"""

from __future__ import annotations

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadCondition,
    BadCursor,
    BadTtl,
    BodyTooLarge,
    DataCorrupt,
    DiskFull,
    Locked,
    NotFound,
    PreconditionFailed,
    TooManyRequests,
    ValueTooLarge,
)
from kvstore.router.json_schema import number, one_of, ref
from kvstore.router.lock_operations import lock_operations
from kvstore.router.membership_operations import EXAMPLE_CHANGE, EXAMPLE_MOVE, membership_operations
from kvstore.router.operation import (
    BODY,
    EXAMPLE_CURSOR,
    IDEMPOTENCY_KEY,
    KEY,
    KEY_IN_PATH,
    WRITE,
    Content,
    Errors,
    Operation,
    Success,
    condition,
    example,
    flag,
    json_answer,
    lock_token,
    page_parameters,
    query,
)
from kvstore.router.page_operations import EXAMPLE_PAGE_HTML, page_operations
from kvstore.router.txn_operations import txn_operations
from kvstore.transport.http.responses import BINARY, JSON

METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"

_EXAMPLE_CLUSTER = {
    "cluster_id": "0f5c7a1e9b2d4c63", "epoch": 1, "partitions": 4096, "replicas": 1,
    "shards": [{"id": "s1", "url": "http://127.0.0.1:9101", "state": "up", "weight": 1, "partitions": 4096,
                "keys": 25013, "bytes": 3626885}],
    "moves": [EXAMPLE_MOVE], "in_doubt": {"count": 0, "oldest_s": None}, "wanted": [], "ending": [],
    "last_change": EXAMPLE_CHANGE,
    "advice": "210 partitions still to move: clients notice nothing, and it ends by itself.",
}  # fmt: skip
_EXAMPLE_EXPLANATION = {
    "key": "users/1", "hash": "8c9d0f3a5b6e7c21", "partition": 2249, "partitions": 4096, "epoch": 1, "walk": ["s1"],
    "owner": "s1", "owner_url": "http://127.0.0.1:9101", "owner_state": "up", "row": "value", "version": 41,
    "sequence": 57, "bytes": 5, "expires_at_ms": None, "cached": True,
    "lock": {"owner": "me", "token": 12, "ttl_left": 29.5}, "intent": None,
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
    "next": EXAMPLE_CURSOR,
}
_EXAMPLE_RESULTS = {
    "results": [
        {"status": 201, "key": "users/1", "version": 41},
        {"status": 204, "key": "bytes", "version": 42},
        {"status": 200, "key": "users/1", "version": 41, "value": "Ada", "ttl": 59.998},
        {"status": 404, "key": "absent", "code": "not-found", "detail": "there is no key 'absent'"},
    ]
}


def operations(limits: Limits) -> list[Operation]:
    """All of them but HEAD, which is that of GET without bodies."""
    value = Content(
        BINARY, {"type": "string", "format": "binary", "maxLength": limits.value_bytes_max}, example("text", "Ada")
    )
    return [
        _get(value),
        _put(value, limits),
        _delete(),
        _list(limits),
        _batch(limits),
        *lock_operations(limits),
        *txn_operations(limits),
        *_on_the_cluster(),
        *membership_operations(),
        *_on_the_router(),
        *page_operations(),
    ]


# --- one key ----------------------------------------------------------------------------------------------------------

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


def _get(value: Content) -> Operation:
    return Operation(
        "/v1/kv/{key}",
        "GET",
        id="getValue",
        tag="keys",
        summary="Read the value",
        parameters=(
            KEY,
            condition("If-Match", "412 unless the version is among these; weak tags never match"),
            condition("If-None-Match", "304 without the value if the version is among these"),
        ),
        answers=(
            Success(200, "The value, byte for byte as it was put.", value, _SHOWN),
            Success(304, "If-None-Match names the current version.", None, _SHOWN),
        ),
        errors=(*KEY_IN_PATH, BadCondition, NotFound, PreconditionFailed, TooManyRequests, DataCorrupt),
        error_headers={NotFound: _PLACE},
    )


def _put(value: Content, limits: Limits) -> Operation:
    ttl = number("Seconds until the key expires.", exclusiveMinimum=0, maximum=limits.ttl_s_max)
    return Operation(
        "/v1/kv/{key}",
        "PUT",
        id="putValue",
        tag="keys",
        summary="Store the value",
        description=f"The body is the value: raw bytes under any Content-Type, 0 to {limits.value_bytes_max:,}. "
        f"Without ttl the key never expires, whatever it had before. {_GUARDED}",
        parameters=(KEY, query("ttl", ttl, 60), *_GUARDS),
        body={"required": False, "content": value.render()},
        answers=(
            Success(201, "The key is new. It is durable.", None, ("ETag", *_PLACE)),
            Success(204, "The value was replaced. It is durable.", None, ("ETag", *_PLACE)),
        ),
        errors=(*KEY_IN_PATH, BadTtl, ValueTooLarge, *BODY, *_GUARD_ERRORS, DiskFull),
    )


def _delete() -> Operation:
    return Operation(
        "/v1/kv/{key}",
        "DELETE",
        id="deleteKey",
        tag="keys",
        summary="Remove the key",
        description=_GUARDED,
        parameters=(KEY, *_GUARDS),
        answers=(Success(204, "It is gone, durably.", None, _PLACE),),
        errors=(*KEY_IN_PATH, NotFound, *_GUARD_ERRORS),
        error_headers={NotFound: _PLACE},
    )


# --- many keys --------------------------------------------------------------------------------------------------------


def _list(limits: Limits) -> Operation:
    examples = example("a page", _EXAMPLE_PAGE) | example("a number", {"count": 2})
    return Operation(
        "/v1/kv",
        "GET",
        id="listKeys",
        tag="many keys",
        summary="List or count keys",
        description="Keys in byte order over all shards. When a shard cannot answer, nor can this: a gap is worse. "
        "With partial=true it leaves out the partitions of a shard that is down, and names them as `missing`.",
        parameters=(
            *page_parameters(limits, "keys"),
            query("values", flag("Bring the values, too."), True),
            query("count", flag("Only the number of keys; goes with prefix and partial."), True),
        ),
        answers=(
            Success(
                200,
                "A page of keys, each as of when its shard was asked, or their number.",
                Content(JSON, one_of("", ref("Page"), ref("Count")), examples),
            ),
        ),
        errors=(BadCursor, TooManyRequests, DataCorrupt),
    )


def _batch(limits: Limits) -> Operation:
    body = Content(JSON, ref("Batch"), example("each kind", _EXAMPLE_BATCH))
    results = Content(JSON, ref("BatchResults"), example("of the request", _EXAMPLE_RESULTS))
    return Operation(
        "/v1/batch",
        "POST",
        id="doBatch",
        tag="many keys",
        summary="Do many independent operations",
        description="Not atomic: an operation that cannot be done fails alone, within the answer 200. A body that is "
        f"not well formed is refused whole, and nothing is done. At most {limits.body_bytes_max:,} bytes. Headers that "
        "speak of one key (If-Match, If-None-Match, Lock-Token, Idempotency-Key) are refused (400): a key whose lock "
        "is held cannot be written by a batch.",
        body={"required": True, "content": body.render()},
        answers=(Success(200, "A result per operation, in their order.", results),),
        errors=(BadBody, BodyTooLarge, *BODY),
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
            answers=(json_answer("The cluster map, and the numbers of each shard.", "Cluster", _EXAMPLE_CLUSTER),),
        ),
        Operation(
            "/v1/explain/{key}",
            "GET",
            id="explainKey",
            tag="cluster",
            summary="The way of a key",
            parameters=(KEY,),
            answers=(json_answer("From its hash to its row.", "Explanation", _EXAMPLE_EXPLANATION),),
            errors=KEY_IN_PATH,
        ),
    ]


def _on_the_router() -> list[Operation]:
    openapi = Content(JSON, {"type": "object", "required": ["openapi"]}, example("its start", {"openapi": "3.1.0"}))
    metrics = Content(METRICS_TEXT, {"type": "string"}, example("a gauge", 'kvstore_channel_up{shard="s1"} 1.0\n'))
    ready = json_answer(
        "It has a cluster map, and every shard that the map calls up has answered it.",
        "Ready",
        {"status": "ready", "router": "0"},
    )
    routes = {"name": "kvstore", "routes": ["/", "/v1/kv"], "documentation": "/openapi.json"}
    index = json_answer(
        "All routes; the page to a browser, which asks for HTML.", "Index", routes, headers=("Vary",)
    )._replace(other=EXAMPLE_PAGE_HTML)
    alive = json_answer("It is.", "Alive", {"status": "alive", "router": "0"})
    return [
        _of_router("/healthz", "getHealth", "Whether the process is alive", alive),
        _of_router("/readyz", "getReadiness", "Whether this router can serve", ready),
        _of_router("/metrics", "getMetrics", "Metrics of all", Success(200, "Prometheus text format.", metrics)),
        _of_router("/openapi.json", "getOpenapi", "This document", Success(200, "OpenAPI 3.1.", openapi)),
        _of_router("/", "getIndex", "What there is to call", index),
    ]


def _of_router(route: str, operation_id: str, summary: str, answer: Success) -> Operation:
    return Operation(route, "GET", id=operation_id, tag="router", summary=summary, answers=(answer,))
