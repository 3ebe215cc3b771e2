"""What the calls of the client return, and how it is read from the answers of a router.

Owns: items, pages, holders of locks and results of batches as plain values; their forms in JSON and headers.
Promises: pure; an answer of another shape than a router's raises KvError and says so.
Leaves to others: sending (`connection`), the results of transactions (`kvstore.txn`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import msgspec

from kvstore.addresses import DEFAULT_URL
from kvstore.errors import KvError, from_problem
from kvstore.operations import checked_key, finite, value_of

NO_ROUTER_NEXT_STEP = f"Give the address of a router: `kvstore up` prints it ({DEFAULT_URL} by default)."


@dataclass(frozen=True, slots=True)
class Item:
    """A value with its version; `ttl` is the time left in seconds, None if it does not expire."""

    value: bytes
    version: int
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class ListedItem:
    """A key of a listing. `value` and `ttl` (seconds left) are None unless values were asked for."""

    key: str
    version: int
    value: bytes | None = None
    ttl: float | None = None


@dataclass(frozen=True, slots=True)
class Holder:
    """A lock that is held.
    By whom, with which token, for how many seconds at most, and how many wait for it."""

    name: str
    owner: str
    token: int
    ttl_left: float
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """Items in key order; `next` is the cursor of the page after, None on the last one.

    `missing`: the partitions that were left out because their shard is down.
    """

    items: Sequence[ListedItem]
    next: str | None
    missing: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Counted:
    """How many keys there are, without those of the partitions that are `missing` because their shard is down."""

    count: int
    missing: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one operation of a batch. `error` is None if it was done, else the reason (not raised).

    A get or delete of a key that is not there has a `NotFound` as its error. `value` is that of a get.
    """

    key: str
    status: int
    version: int | None = None
    value: bytes | None = None
    ttl: float | None = None
    error: KvError | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a router: status, headers, body as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes


# --- what is sent -----------------------------------------------------------------------------------------------------


def quoted(key: str, in_path: bool = True) -> str:
    """Percent-encode all but unreserved characters, so that no proxy takes a part of the key for syntax.

    Raises KeyNotUtf8.
    """
    text = quote(checked_key(key).encode(), safe="")
    # `.` and `..` alone would be segments with a meaning; as `/` is encoded, no other key has segments.
    return text.replace(".", "%2E") if in_path and text in {".", ".."} else text


def condition_headers(if_version: int | None, if_absent: bool, token: int | None, once: str | None) -> dict[str, str]:
    """The header fields of a condition, a lock's token and an Idempotency-Key, as far as they are given."""
    headers = {}
    if if_version is not None:
        headers["If-Match"] = f'"{if_version}"'
    if if_absent:
        headers["If-None-Match"] = "*"
    if token is not None:
        headers["Lock-Token"] = str(token)
    if once is not None:
        headers["Idempotency-Key"] = once
    return headers


def ttl_text(ttl: float) -> str:
    """A time to live as decimal seconds, never with an exponent. Raises BadTtl."""
    return format(Decimal(repr(finite(ttl))), "f")  # decimal seconds, never an exponent


# --- what is received -------------------------------------------------------------------------------------------------


def result_from(entry: dict[str, Any]) -> Result:
    """What an entry of a batch's answer says."""
    status = int(entry["status"])
    error = None if status < 400 else from_problem({name: entry[name] for name in entry if name != "key"})
    return Result(
        key=entry["key"],
        status=status,
        version=entry.get("version"),
        value=value_of(entry),
        ttl=entry.get("ttl"),
        error=error,
    )


def listed_from(item: dict[str, Any]) -> ListedItem:
    """What an item of a listing says."""
    return ListedItem(item["key"], item["version"], value_of(item), item.get("ttl"))


def taken_of(answer: Answer) -> dict[str, Any]:
    """The document of an answer to a change. Raises KvError if it is no JSON object.

    With `change`, the id of the change of the cluster that it names, if it does.
    """
    path, _, change_id = answer.headers.get("Location", "").rpartition("/")
    return document_of(answer) | ({"change": change_id} if path == "/v1/changes" else {})


def document_of(answer: Answer) -> dict[str, Any]:
    """The document of the answer. Raises KvError if it is no JSON object."""
    try:
        return msgspec.json.decode(answer.body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KvError(
            f"the answer ({answer.status}) is not a JSON object: {error}: that is no router of kvstore.",
            next_step=NO_ROUTER_NEXT_STEP,
        ) from error


def version_of(answer: Answer) -> int:
    """The version in the answer's ETag. Raises KvError if there is none."""
    tag = answer.headers.get("ETag", "").strip('"')
    if not tag.isdecimal():
        raise KvError(
            f"the answer ({answer.status}) has no version in its ETag: that is no router of kvstore.",
            next_step=NO_ROUTER_NEXT_STEP,
        )
    return int(tag)
