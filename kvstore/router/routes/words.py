"""What several families of calls share: types of members, parameters, groups of errors, the document of a problem.

Owns: their descriptions and bounds, as the OpenAPI document has them.
Promises: plain data; nothing here knows a route.
Leaves to others: the syntax of header fields (`decode`), documents (the files beside this one).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Struct, UnsetType

from kvstore.config import PARTITIONS_MAX, PARTITIONS_MIN, Limits
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
    all_errors,
)
from kvstore.model import VERSION_MAX
from kvstore.router.decode import decode_cursor
from kvstore.transport.change_documents import ShardId
from kvstore.transport.http.requests import decode_key
from kvstore.transport.http.routes import Errors, Keys, Parameter, Right, Touches, example, flag, integer, text
from kvstore.transport.http.schema import about

ANY_ROUTE: Errors = (BadRequest, BadParameter, Foreign, UriTooLong, HeadersTooLarge, KvError, Unavailable)
KEY_IN_PATH: Errors = (KeyEmpty, KeyTooLong, KeyNotUtf8)
BODY: Errors = (ContentEncodingRefused, ExpectationFailed, NotImplementedYet, RequestTimeout, TooManyRequests)
WRITE: Errors = (Conflict, LockLost, IdempotencyKeyReused, TooManyRequests, DataCorrupt, OutcomeUnknown)  # on one key

OF_ANYONE = Touches(Right.NONE, Keys.NONE)
OF_THE_CLUSTER = Touches(Right.READ, Keys.NONE)
CHANGES_THE_CLUSTER = Touches(Right.ADMIN, Keys.ALL)
READS_KEY, WRITES_KEY = Touches(Right.READ, Keys.PATH), Touches(Right.WRITE, Keys.PATH)
READS_PREFIX = Touches(Right.READ, Keys.PREFIX)

EXAMPLE_CURSOR = "a3VzZXJzLzI"

# --- members ----------------------------------------------------------------------------------------------------------

Seconds = Annotated[float, about(minimum=0)]
Key = Annotated[str, about("1 to {key_bytes_max:,} bytes of UTF-8.", examples=["users/1"])]
Version = Annotated[
    int,
    about(
        "Rises with every change of the key and never restarts, not even after a delete.",
        minimum=1,
        maximum=VERSION_MAX,
    ),
]
Token = Annotated[
    int,
    about(
        "Rises with every grant of the lock's name, for ever. A guard, not a secret.", minimum=1, maximum=VERSION_MAX
    ),
]
ValueText = Annotated[str, about("The value, where its bytes are UTF-8.")]
ValueBase64 = Annotated[
    str,
    about(
        "The value in base64 (RFC 4648, section 4), where its bytes are not UTF-8.",
        contentEncoding="base64",
        pattern="^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    ),
]
TtlLeft = Annotated[float, about("Seconds until the key expires; absent if it never does.", exclusiveMinimum=0)]
Owner = Annotated[
    str,
    about(
        "A name for people: at most {owner_bytes_max:,} bytes of UTF-8.",
        maxLength="{owner_bytes_max}",
        examples=["me"],
    ),
]
LeaseLeft = Annotated[float, about("Seconds until the lease ends by itself.", minimum=0)]
Next = Annotated[str | None, about("Give it as `after` of the next page; null: end.")]
Partition = Annotated[int, about("The top bits of the hash.", minimum=0, maximum=PARTITIONS_MAX - 1)]
Missing = Annotated[
    list[Annotated[int, about(minimum=0, maximum=PARTITIONS_MAX - 1)]],
    about("With partial=true: the partitions whose keys may lack, since their shards are down."),
]
Partitions = Annotated[
    int, about("Their number, a power of two; fixed.", minimum=PARTITIONS_MIN, maximum=PARTITIONS_MAX)
]
Epoch = Annotated[int, about("Number of the cluster map; rises with every change of it.", minimum=1)]
Url = Annotated[str, about(format="uri")]
TxnId = Annotated[str, about("The transaction, for GET /v1/txn/{id}.")]


class ProblemMembers(Struct, kw_only=True):
    """What a program may need to react to an error; which of them are there depends on the code."""

    retry_after_ms: Annotated[int, about("Nothing was done; send it again after this time.", minimum=1)] | UnsetType = (
        UNSET
    )
    version: Version | UnsetType = UNSET
    owner: Annotated[str, about("Who holds the lock, as it named itself.")] | UnsetType = UNSET
    ttl_left: LeaseLeft | UnsetType = UNSET
    txn_id: TxnId | UnsetType = UNSET
    parameter: Annotated[str, about("The query parameter or field that is wrong.")] | UnsetType = UNSET
    shard: ShardId | UnsetType = UNSET
    allow: Annotated[list[str], about("The methods that the route takes.")] | UnsetType = UNSET
    bytes_max: Annotated[int, about("The limit in bytes that was passed.")] | UnsetType = UNSET
    key_bytes_max: Annotated[int, about("The limit of a key in bytes.")] | UnsetType = UNSET
    owner_bytes_max: Annotated[int, about("The limit of an owner's name in bytes.")] | UnsetType = UNSET
    ttl_s_max: Annotated[int, about("The limit of a ttl in seconds.")] | UnsetType = UNSET
    lock_ttl_s_min: Annotated[float, about("The shortest ttl of a lock in seconds.")] | UnsetType = UNSET
    lock_ttl_s_max: Annotated[int, about("The longest ttl of a lock in seconds.")] | UnsetType = UNSET


class Problem(ProblemMembers, kw_only=True):
    """An RFC 9457 problem document. Its identity is `code`; `detail` is for people."""

    type: Annotated[str, about(enum=[f"/problems/{error.code}" for error in all_errors()])]
    code: Annotated[str, about(enum=[error.code for error in all_errors()])]
    title: str
    status: Annotated[int, about("The HTTP status.", minimum=400, maximum=599)]
    detail: Annotated[str, about("What happened, to whom.")]
    next_step: Annotated[str, about("What to do about it.")]


# --- parameters -------------------------------------------------------------------------------------------------------


def decode_path_key(raw: str, limits: Limits) -> str:
    """Raises KeyEmpty, KeyTooLong, KeyNotUtf8."""
    if 0 < len(raw) <= limits.key_bytes_max and raw.isascii() and "%" not in raw:
        return raw
    return decode_key(raw, limits.key_bytes_max)


def _in_path(name: str, meaning: str, component: str) -> Parameter:
    return Parameter(
        name,
        "path",
        Annotated[str, about(minLength=1, maxLength="{key_bytes_max}")],
        {"plain": "greeting", "any character": "Übung 1?"},
        f"{meaning}1 to {{key_bytes_max:,}} bytes of UTF-8, percent-encoded. `/` needs no encoding: all that follows "
        f"the prefix is the {name}. (OpenAPI has no word for that; a generated client sends `%2F`, which names the "
        "same one.) Many clients rewrite `.` and `..` segments before they send: for one that has them encode its "
        "`/`, or use /v1/batch for a key.",
        decode_path_key,
        component=component,
    )


KEY = _in_path("key", "", "Key")
LOCK_NAME = _in_path("name", "The lock of that name guards the key of that name. ", "LockName")
IDEMPOTENCY_KEY = Parameter(
    "Idempotency-Key",
    "header",
    Annotated[str, about(pattern='^("[ -~]{1,255}"|[!#-~]([ -~]{0,253}[!-~])?)$')],
    example("1f0c9a52-6e0b-4c7e-9a54-0f2f8d3c7b61"),
    "1 to 255 characters, such as a random UUID; surrounding quotes are taken off. The same key and request give the "
    "first answer again and write nothing twice, for {idempotency_kept_s:,g} s; with another request to the same "
    "path: 422. A duplicate of a request that is still running waits for it. Only answers that decided something are "
    "kept: not 409, 423, 429 and 503.",
    component="IdempotencyKey",
)


def page_parameters(what: str) -> tuple[Parameter, ...]:
    """Those of a listing: `prefix`, `limit`, `after`, `partial`."""
    size = Annotated[int, about(f"Most {what} of a page.", minimum=1, maximum="{list_keys_max}")]
    cursor = Annotated[str, about(pattern="^[A-Za-z0-9_-]+$")]
    return (
        text("prefix", str, "users/", f"Only {what} that begin with this."),
        integer("limit", size, 100, "", 1, "list_keys_max", lambda limits: min(1000, limits.list_keys_max)),
        text("after", cursor, EXAMPLE_CURSOR, "`next` of the page before.")._replace(
            decode=lambda given, limits: decode_cursor(given)
        ),
        flag("partial", "Leave out what is down, and name its partitions as `missing`."),
    )


def condition(name: str, meaning: str) -> Parameter:
    """The parameter If-Match or If-None-Match."""
    tag = '(W/)?"[!#-~]*"'
    kind = Annotated[str, about(pattern=f"^(\\*|{tag}(, ?{tag})*)$")]
    described = f"`*` (any version), or quoted versions separated by commas: {meaning}."
    return Parameter(name, "header", kind, example('"41"'), described)


def lock_token(meaning: str, *, required: bool) -> Parameter:
    """The parameter Lock-Token."""
    kind = Annotated[int, about(minimum=0, maximum=VERSION_MAX)]
    return Parameter("Lock-Token", "header", kind, example(12), meaning, required=required)
