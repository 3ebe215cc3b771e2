"""What GET /openapi.json answers: the document of this router's routes.

Owns: what is said of the API as a whole, of its header fields, and an example of each error.
Promises: nothing but what the routes say.
Leaves to others: its form (`transport.http.openapi`), the routes (`routes`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec

from kvstore.config import Limits
from kvstore.errors import (
    BadParameter,
    Conflict,
    KvError,
    Locked,
    MethodNotAllowed,
    PreconditionFailed,
    TooManyRequests,
    Unavailable,
)
from kvstore.router.routes.events import EVENT_DOCUMENTS
from kvstore.router.routes.words import ANY_ROUTE, Problem, Token
from kvstore.transport.change_documents import Count, ShardId
from kvstore.transport.http.openapi import About, openapi_document
from kvstore.transport.http.routes import Route
from kvstore.transport.http.schema import about

_ABOUT = """\
A sharded, durable key-value store, behind one address.

Every answer that is not a value is JSON; every error is an RFC 9457 problem document whose `code` is its identity.
An unknown or repeated query parameter and an unknown JSON field are refused (400). A JSON body is taken under any
Content-Type. Every route that takes GET takes HEAD; another method is answered with 405 and
`Allow`, another path with 404. With `Retry-After` nothing was done: send the request again then. After 504 a write may
or may not have been done: with the same Idempotency-Key it can be sent again and is done once.\
"""
_TAGS = {
    "keys": "One key",
    "many keys": "Listing, counting and batches",
    "locks": "Leases with fencing tokens",
    "transactions": "All or nothing, over any keys",
    "cluster": "What is where",
    "router": "This process",
    "page": "What the page in a browser lives on",
}
_HEADERS: dict[str, tuple[str, bool, Any]] = {
    "ETag": ("The version, quoted.", True, Annotated[str, about(pattern='^"[0-9]+"$', examples=['"41"'])]),
    "Current-ETag": ("ETag: the version, quoted; absent if there is no such key.", False, str),
    "Kv-Shard": ("The shard that answered.", True, ShardId),
    "Kv-Partition": ("The partition of the key.", True, Count),
    "Kv-Ttl": (
        "Seconds until the key expires; absent if it never does.",
        False,
        Annotated[float, about(exclusiveMinimum=0)],
    ),
    "Cache-Control": ("A cache asks again, with the ETag.", True, Annotated[str, about(const="no-cache")]),
    "X-Content-Type-Options": ("Browsers guess no type.", True, Annotated[str, about(const="nosniff")]),
    "Retry-After": (
        "Whole seconds to wait before the same request is sent again.",
        True,
        Annotated[int, about(minimum=1)],
    ),
    "Location": (
        "Where the change of the cluster can be followed.",
        True,
        Annotated[str, about(pattern="^/v1/changes/[0-9a-f]+$")],
    ),
    "Lock-Token": ("Show it to write the key, to renew the lease, to release it.", True, Token),
    "Content-Security-Policy": ("What a browser lets the page do: nothing beyond this router.", True, str),
    "Page-ETag": ("ETag: of the file.", True, Annotated[str, about(pattern='^"[0-9a-f]{32}"$')]),
    "Vary": ("What the answer depends on.", True, Annotated[str, about(const="Accept")]),
    "Allow": ("The methods that the route takes.", True, Annotated[str, about(examples=["GET, HEAD"])]),
}
_EXAMPLE_MEMBERS: dict[type[KvError], dict[str, Any]] = {
    BadParameter: {"parameter": "tll"},
    Conflict: {"retry_after_ms": 200},
    Locked: {"owner": "me", "ttl_left": 12.5, "retry_after_ms": 1000},
    MethodNotAllowed: {"allow": ["GET", "HEAD"]},
    PreconditionFailed: {"version": 41},
    TooManyRequests: {"retry_after_ms": 200},
    Unavailable: {"retry_after_ms": 1000, "shard": "s2"},
}
_OF_THE_ROUTER = About(
    info={
        "title": "kvstore",
        "version": "1",
        "description": _ABOUT,
        "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
    },
    tags=_TAGS,
    headers=_HEADERS,
    wire_names={"Page-ETag": "ETag", "Current-ETag": "ETag"},
    error_headers={
        MethodNotAllowed: "Allow",
        Conflict: "Retry-After",
        Locked: "Retry-After",
        PreconditionFailed: "Current-ETag",
        TooManyRequests: "Retry-After",
        Unavailable: "Retry-After",
    },
    example_members=_EXAMPLE_MEMBERS,
    problem=Problem,
    also=EVENT_DOCUMENTS,
    any_route=ANY_ROUTE,
)


def openapi_json(limits: Limits, routes: Iterable[Route]) -> bytes:
    """The document as JSON, indented for people."""
    document = openapi_document(routes, _OF_THE_ROUTER, limits)
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
