"""The OpenAPI 3.1 document of the public API: what GET /openapi.json answers.

Owns: the form of the document, and the header fields and an example of each error.
Promises: all that the operations say is in it, and nothing else. An error answer that several operations share is one
component, named after its codes, and after the tag if it has header fields of its own. HEAD is derived from GET.
Leaves to others: what there is to describe (`operations`), the shape of the JSON documents (`schemas`).

Any other method or path is answered with `method-not-allowed` or `no-such-route`, components that no operation names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from http import HTTPStatus
from itertools import groupby

import msgspec

from kvstore.config import Limits
from kvstore.errors import (
    BadParameter,
    Conflict,
    KvError,
    Locked,
    MethodNotAllowed,
    NoSuchRoute,
    PreconditionFailed,
    TooManyRequests,
    Unavailable,
    all_errors,
)
from kvstore.router.json_schema import codes, integer, number, ref, text
from kvstore.router.operation import ANY_ROUTE, Content, Errors, Json, Operation, Success, shared_parameters
from kvstore.router.operations import operations
from kvstore.router.page_operations import demo_operations
from kvstore.router.schemas import schemas
from kvstore.transport.http import PROBLEM_JSON

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
_HEADERS: Json = {
    name: {"description": description, "required": required, "schema": schema}
    for name, description, required, schema in (
        ("ETag", "The version, quoted.", True, text(pattern='^"[0-9]+"$', examples=['"41"'])),
        ("Current-ETag", "ETag: the version, quoted; absent if there is no such key.", False, text()),
        ("Kv-Shard", "The shard that answered.", True, ref("ShardId")),
        ("Kv-Partition", "The partition of the key.", True, integer()),
        ("Kv-Ttl", "Seconds until the key expires; absent if it never does.", False, number(exclusiveMinimum=0)),
        ("Cache-Control", "A cache asks again, with the ETag.", True, text(const="no-cache")),
        ("X-Content-Type-Options", "Browsers guess no type.", True, text(const="nosniff")),
        ("Retry-After", "Whole seconds to wait before the same request is sent again.", True, integer("", 1)),
        ("Location", "Where the change of the cluster can be followed.", True, text(pattern="^/v1/changes/[0-9a-f]+$")),
        ("Lock-Token", "Show it to write the key, to renew the lease, to release it.", True, ref("Token")),
        ("Content-Security-Policy", "What a browser lets the page do: nothing beyond this router.", True, text()),
        ("Page-ETag", "ETag: of the file.", True, text(pattern='^"[0-9a-f]{32}"$')),
        ("Vary", "What the answer depends on.", True, text(const="Accept")),
        ("Allow", "The methods that the route takes.", True, text(examples=["GET, HEAD"])),
    )
}
_ON_THE_WIRE = {"Page-ETag": "ETag"}  # where the name among the components is another one
# The header fields that come with an error: name on the wire, name among the components.
_HEADERS_OF: dict[type[KvError], dict[str, str]] = {
    MethodNotAllowed: {"Allow": "Allow"},
    Conflict: {"Retry-After": "Retry-After"},
    Locked: {"Retry-After": "Retry-After"},
    PreconditionFailed: {"ETag": "Current-ETag"},
    TooManyRequests: {"Retry-After": "Retry-After"},
    Unavailable: {"Retry-After": "Retry-After"},
}
_EXAMPLE_MEMBERS: dict[type[KvError], Json] = {
    BadParameter: {"parameter": "tll"},
    Conflict: {"retry_after_ms": 200},
    Locked: {"owner": "me", "ttl_left": 12.5, "retry_after_ms": 1000},
    MethodNotAllowed: {"allow": ["GET", "HEAD"]},
    PreconditionFailed: {"version": 41},
    TooManyRequests: {"retry_after_ms": 200},
    Unavailable: {"retry_after_ms": 1000, "shard": "s2"},
}


@functools.cache
def openapi_json(limits: Limits, demo: tuple[str, ...] = ()) -> bytes:
    """The document as JSON, indented for people. `demo`: the routes of a demo that this router has."""
    return msgspec.json.format(msgspec.json.encode(_document(limits, demo)), indent=1) + b"\n"


def _document(limits: Limits, demo: tuple[str, ...]) -> Json:
    refusals = {error.code: _refusal((error,), (), with_body=True) for error in (MethodNotAllowed, NoSuchRoute)}
    paths: Json = {}
    for operation in [*operations(limits), *demo_operations(demo)]:
        item = paths.setdefault(operation.route, {})
        item[operation.method.lower()] = _operation(operation, refusals, with_bodies=True)
        if operation.method == "GET":
            item["head"] = _operation(_head_of(operation), refusals, with_bodies=False)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kvstore",
            "version": "1",
            "description": _ABOUT,
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "This router."}],
        "tags": [{"name": name, "description": about} for name, about in _TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": schemas(limits),
            "parameters": shared_parameters(limits),
            "headers": _HEADERS,
            "responses": refusals,
            "examples": {error.code: {"value": _example(error)} for error in all_errors()},
        },
    }


def _head_of(get: Operation) -> Operation:
    """HEAD as the router answers it: like GET, without the body."""
    return get._replace(id=f"{get.id}Head", summary=f"{get.summary}: the header fields alone")


def _operation(operation: Operation, refusals: Json, *, with_bodies: bool) -> Json:
    """Its Operation object; the answers of its errors are added to `refusals`."""
    responses = {str(answer.status): _success(answer, with_body=with_bodies) for answer in operation.answers}
    errors = sorted({*ANY_ROUTE, *operation.errors}, key=lambda error: (error.status, error.code))
    for status, group in groupby(errors, lambda error: error.status):
        same_status = tuple(group)
        own_headers = [name for error in same_status for name in operation.error_headers.get(error, ())]
        prefixes = [*([] if with_bodies else ["head"]), *([operation.tag] if own_headers else [])]
        name = ".".join([*prefixes, *(error.code for error in same_status)])
        refusals[name] = _refusal(same_status, own_headers, with_body=with_bodies)
        responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
    fields = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "description": operation.description,
        "parameters": list(operation.parameters),
        "requestBody": operation.body,
        "responses": responses,
    }
    return {name: field for name, field in fields.items() if field}


def _success(answer: Success, *, with_body: bool) -> Json:
    response: Json = {"description": answer.description}
    if answer.headers:
        response["headers"] = {_ON_THE_WIRE.get(name, name): _header(name) for name in answer.headers}
    if answer.content and with_body:
        response["content"] = answer.content.render() | (answer.other.render() if answer.other else {})
    return response


def _refusal(errors: Errors, own_headers: Iterable[str], *, with_body: bool) -> Json:
    """The answer of these errors, which have their status in common; `own_headers` come on top of `_HEADERS_OF`."""
    status = errors[0].status
    titles = (f"`{error.code}`: {error.title}." for error in errors)
    response: Json = {"description": f"{HTTPStatus(status).phrase}. {' '.join(titles)}"}
    headers = {name: _header(name) for name in own_headers}
    headers |= {name: _header(part) for error in errors for name, part in _HEADERS_OF.get(error, {}).items()}
    if headers:
        response["headers"] = headers
    if with_body:
        narrowed = {"properties": {"code": codes(errors), "status": {"const": status}}}
        examples = {error.code: {"$ref": f"#/components/examples/{error.code}"} for error in errors}
        content = Content(PROBLEM_JSON, {"allOf": [ref("Problem"), narrowed]}, examples)
        response["content"] = content.render()
    return response


def _example(error: type[KvError]) -> Json:
    return error(**_EXAMPLE_MEMBERS.get(error, {})).problem()


def _header(name: str) -> Json:
    return {"$ref": f"#/components/headers/{name}"}
