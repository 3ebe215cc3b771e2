"""What an operation of the public API is, and the parts that several of them have in common.

Owns: the types that `operations` and `lock_operations` are written in; the groups of errors and parameters that
they share.
Promises: plain data: nothing here knows a route.
Leaves to others: the operations (`operations`, `lock_operations`), their form in the document (`openapi`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from kvstore.config import Limits
from kvstore.errors import (
    BadParameter,
    BadRequest,
    Conflict,
    ContentEncodingRefused,
    DataCorrupt,
    ExpectationFailed,
    Foreign,
    HeadersTooLarge,
    IdempotencyKeyReused,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    KvError,
    LockLost,
    NotImplementedYet,
    OutcomeUnknown,
    RequestTimeout,
    TooManyRequests,
    Unavailable,
    UriTooLong,
)
from kvstore.protocol import VERSION_MAX
from kvstore.router.json_schema import Schema, integer, ref, text
from kvstore.transport.http.responses import JSON

Json = dict[str, Any]
Errors = tuple[type[KvError], ...]

ANY_ROUTE: Errors = (BadRequest, BadParameter, Foreign, UriTooLong, HeadersTooLarge, KvError, Unavailable)
KEY_IN_PATH: Errors = (KeyEmpty, KeyTooLong, KeyNotUtf8)
BODY: Errors = (ContentEncodingRefused, ExpectationFailed, NotImplementedYet, RequestTimeout, TooManyRequests)
WRITE: Errors = (Conflict, LockLost, IdempotencyKeyReused, TooManyRequests, DataCorrupt, OutcomeUnknown)  # on one key

EXAMPLE_CURSOR = "a3VzZXJzLzI"


class Content(NamedTuple):
    """A body: its media type, its schema, and Example objects by name."""

    media_type: str
    schema: Schema
    examples: Json

    def render(self) -> Json:
        """As the `content` of OpenAPI."""
        return {self.media_type: {"schema": self.schema, "examples": self.examples}}


class Success(NamedTuple):
    """An answer that is no error. `headers` are names among the components; `other`: in another media type."""

    status: int
    description: str
    content: Content | None = None
    headers: tuple[str, ...] = ()
    other: Content | None = None


class Operation(NamedTuple):
    """What a method of a route takes and answers.

    The `errors` come on top of `ANY_ROUTE`. `error_headers` come with them here, and not wherever they are answered.
    """

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
    error_headers: Mapping[type[KvError], tuple[str, ...]] = {}


def json_answer(description: str, schema: str, value: Any, status: int = 200, headers: tuple[str, ...] = ()) -> Success:
    """A JSON document of that component schema; `value` is an example of it."""
    return Success(status, description, Content(JSON, ref(schema), example("an answer", value)), headers)


def example(name: str, value: Any) -> Json:
    return {name: {"value": value}}


def query(name: str, schema: Schema, value: Any) -> Json:
    return {"name": name, "in": "query", "schema": schema, "example": value}


def flag(description: str) -> Schema:
    return {"type": "boolean", "default": False, "description": description}


# --- parameters -------------------------------------------------------------------------------------------------------

KEY = {"$ref": "#/components/parameters/Key"}
LOCK_NAME = {"$ref": "#/components/parameters/LockName"}
IDEMPOTENCY_KEY = {"$ref": "#/components/parameters/IdempotencyKey"}


def shared_parameters(limits: Limits) -> Json:
    """The component parameters by name."""
    return {
        "Key": _in_path("key", "", limits),
        "LockName": _in_path("name", "The lock of that name guards the key of that name. ", limits),
        "IdempotencyKey": {
            "name": "Idempotency-Key",
            "in": "header",
            "description": "1 to 255 characters, such as a random UUID; surrounding quotes are taken off. The same key "
            "and request give the first answer again and write nothing twice, for "
            f"{limits.idempotency_kept_s:,g} s; with another request to the same path: 422. A duplicate of a request "
            "that is still running waits for it. Only answers that decided something are kept: not 409, 423, 429 and "
            "503.",
            "schema": text(pattern='^("[ -~]{1,255}"|[!#-~]([ -~]{0,253}[!-~])?)$'),
            "example": "1f0c9a52-6e0b-4c7e-9a54-0f2f8d3c7b61",
        },
    }


def _in_path(name: str, meaning: str, limits: Limits) -> Json:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": f"{meaning}1 to {limits.key_bytes_max:,} bytes of UTF-8, percent-encoded. `/` needs no "
        f"encoding: all that follows the prefix is the {name}. (OpenAPI has no word for that; a generated client sends "
        "`%2F`, which names the same one.) Many clients rewrite `.` and `..` segments before they send: for one that "
        "has them encode its `/`, or use /v1/batch for a key.",
        "schema": {"type": "string", "minLength": 1, "maxLength": limits.key_bytes_max},
        "examples": example("plain", "greeting") | example("any character", "Übung 1?"),
    }


def page_parameters(limits: Limits, what: str) -> tuple[Json, ...]:
    """Those of a listing: `prefix`, `limit`, `after`, `partial`."""
    most = limits.list_keys_max
    return (
        query("prefix", text(f"Only {what} that begin with this."), "users/"),
        query("limit", integer(f"Most {what} of a page.", 1, maximum=most, default=min(1000, most)), 100),
        query("after", text("`next` of the page before.", pattern="^[A-Za-z0-9_-]+$"), EXAMPLE_CURSOR),
        query("partial", flag("Leave out what is down, and name its partitions as `missing`."), True),
    )


def condition(name: str, meaning: str) -> Json:
    """The parameter If-Match or If-None-Match."""
    tag = '(W/)?"[!#-~]*"'
    return {
        "name": name,
        "in": "header",
        "description": f"`*` (any version), or quoted versions separated by commas: {meaning}.",
        "schema": text(pattern=f"^(\\*|{tag}(, ?{tag})*)$"),
        "example": '"41"',
    }


def lock_token(meaning: str, *, required: bool) -> Json:
    """The parameter Lock-Token."""
    return {
        "name": "Lock-Token",
        "in": "header",
        "required": required,
        "description": meaning,
        "schema": integer(maximum=VERSION_MAX),
        "example": 12,
    }
