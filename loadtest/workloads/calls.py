"""One call of a client, and what answers it expects.

Owns: the words between a workload and the driver that sends its requests: calls out, replies in.
Promises: pure. No two errors share a sentence unless they share a problem code.
Leaves to others: what an answer means (`answers`), sending (`loadtest.drivers`), what is asked for (the other modules
of this folder).

A workload's step is a generator: it yields a Call and is sent the Reply, or yields a Pause and is sent NOTHING. So a
step reads like the client that it is, and runs under any driver.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from loadtest.workloads.answers import NEVER_SENT as NEVER_SENT
from loadtest.workloads.answers import NO_ANSWER as NO_ANSWER
from loadtest.workloads.answers import NOTHING as NOTHING
from loadtest.workloads.answers import TROUBLE, contradiction, retry_after_ms
from loadtest.workloads.answers import Answered as Answered
from loadtest.workloads.answers import Reply as Reply
from loadtest.workloads.answers import answer_of as answer_of

RETRIES_MAX = 20
_PAUSE_MAX_S = 1.0


class Call(NamedTuple):
    """A request. `name`: what statistics file it under. `expected`: the statuses that are no failure. `check` looks at
    an expected answer and says what is wrong with it, in words that are the same for the same fault."""

    name: str
    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = {}
    expected: frozenset[int] = frozenset({200})
    check: Callable[[Reply], str | None] | None = None


class Pause(NamedTuple):
    """The client waits."""

    seconds: float


Result = TypeVar("Result")
Steps = Generator[Call | Pause, Reply, Result]


def failure(call: Call, reply: Reply) -> str | None:
    """What to count this answer under, if it is a failure."""
    if reply.status not in call.expected:
        return reply.said
    wrong = call.check(reply) if call.check is not None else None
    return None if wrong is None else f"{reply.status} wrong answer: {wrong}"


def complaint(call: Call, reply: Reply) -> str | None:
    """What is wrong with an answer that no router may give to this call, whatever fails around it."""
    wrong = failure(call, reply)
    if wrong is None or (reply.status in TROUBLE and reply.status not in call.expected):
        return None
    return f"{call.name} ({call.method} {call.path}) was answered {wrong}: {reply.words}"


def patience(reply: Reply) -> Pause:
    """How long to wait after a refusal: as long as it asks for, within bounds."""
    asked_ms = retry_after_ms(reply)
    return Pause(min(asked_ms / 1000, _PAUSE_MAX_S))


def rest(reply: Reply) -> Steps[None]:
    """After a refusal or without an answer, wait a little: a client that hammers a store in trouble proves nothing."""
    if reply.outcome == "refused" and reply.status not in (409, 423):
        yield patience(reply)
    elif reply.outcome == "unknown":
        yield Pause(0.1)


# --- the calls -------------------------------------------------------------------------------------------------------

GOT = frozenset({200, 404})
PUT = frozenset({201, 204})
SWAPPED = frozenset({201, 204, 409, 412})
DELETED = frozenset({204, 404})
TRANSACTED = frozenset({200, 409, 423})


def get(name: str, key: str, check: Callable[[Reply], str | None] | None = None) -> Call:
    return Call(name, "GET", f"/v1/kv/{key}", expected=GOT, check=check)


def put(name: str, key: str, value: bytes) -> Call:
    return Call(name, "PUT", f"/v1/kv/{key}", value, expected=PUT)


def swap(name: str, key: str, value: bytes, version: int | None) -> Call:
    """Write if the key still has that version; None: if there is still no such key."""
    condition = {"If-None-Match": "*"} if version is None else {"If-Match": f'"{version}"'}
    return Call(name, "PUT", f"/v1/kv/{key}", value, condition, SWAPPED)


def put_brief(name: str, key: str, value: bytes, ttl_s: float) -> Call:
    """Write a key that expires."""
    return Call(name, "PUT", f"/v1/kv/{key}?ttl={ttl_s:g}", value, expected=PUT)


def look_up(name: str, txn_id: str, statuses: frozenset[str]) -> Call:
    """What became of a transaction; `statuses` are those that may be: also `unknown`, for one that is not known any
    more, and `unmet`, for one that is committed and of which a condition did not hold."""

    def check(reply: Reply) -> str | None:
        found = msgspec.json.decode(reply.body) if reply.status == 200 else {"status": "unknown"}
        status = "unmet" if found.get("succeeded") is False else found["status"]
        return None if status in statuses else f"{status}, which cannot be; possible: {', '.join(sorted(statuses))}"

    return Call(name, "GET", f"/v1/txn/{txn_id}", expected=GOT, check=check)


def delete(name: str, key: str) -> Call:
    return Call(name, "DELETE", f"/v1/kv/{key}", expected=DELETED)


def page(name: str, prefix: str, limit: int, values: bool = False, after: str | None = None) -> Call:
    path = f"/v1/kv?prefix={prefix}&limit={limit}"
    path += "&values=true" if values else ""
    path += "" if after is None else f"&after={after}"
    return Call(name, "GET", path, check=lambda reply: _disorder(reply, prefix, limit))


def batch(name: str, operations: list[dict[str, Any]]) -> Call:
    return Call(name, "POST", "/v1/batch", msgspec.json.encode({"ops": operations}), check=_failed_operation)


def reading(keys: Sequence[str]) -> dict[str, Any]:
    """The body of a transaction that reads these keys."""
    return {"then": [{"op": "get", "key": key} for key in keys]}


def transaction(name: str, body: dict[str, Any]) -> Call:
    def check(reply: Reply) -> str | None:
        if reply.status != 200:
            return None
        answered = answer_of(reply)
        return "not that of a transaction" if answered is None else contradiction(body, answered)

    return Call(name, "POST", "/v1/txn", msgspec.json.encode(body), expected=TRANSACTED, check=check)


# --- the answers -----------------------------------------------------------------------------------------------------


class Item(msgspec.Struct):
    key: str
    version: int
    value: str | None = None


class Page(msgspec.Struct):
    items: list[Item]
    next: str | None


def page_of(reply: Reply) -> Page | None:
    """The 200 of a listing; None for every other answer."""
    try:
        return msgspec.json.decode(reply.body, type=Page) if reply.status == 200 else None
    except msgspec.DecodeError:
        return None


def once(call: Call) -> Steps[Reply]:
    """The call by itself, as `insist` is one that is repeated."""
    return (yield call)


def listing(
    name: str, prefix: str, values: bool = False, limit: int = 1000, ask: Callable[[Call], Steps[Reply]] = once
) -> Steps[tuple[list[Item] | None, Reply]]:
    """All keys below `prefix`, page by page; None if a page could not be had.

    The reply is that of the last page; it begins with that of the first one."""
    items: list[Item] = []
    reply = yield from ask(page(name, prefix, limit, values))
    begin_s = reply.begin_s
    while (found := page_of(reply)) is not None:
        items += found.items
        if found.next is None:
            return items, reply._replace(begin_s=begin_s)
        reply = yield from ask(page(name, prefix, limit, values, found.next))
    return None, reply


def pages(name: str, prefix: str, values: bool = False, limit: int = 1000) -> Steps[list[Item] | None]:
    """The keys alone of a `listing`."""
    items, _ = yield from listing(name, prefix, values, limit)
    return items


def insist(call: Call) -> Steps[Reply]:
    """A call that may be repeated without harm, until it is answered as expected: the last reply."""
    for _ in range(RETRIES_MAX):
        reply = yield call
        if failure(call, reply) is None and reply.outcome == "done":
            break
        yield Pause(0.5)
    return reply


class _Result(msgspec.Struct):
    status: int
    code: str = ""


class _Results(msgspec.Struct):
    results: list[_Result]


def _failed_operation(reply: Reply) -> str | None:
    try:
        results = msgspec.json.decode(reply.body, type=_Results).results
    except msgspec.DecodeError:
        return "not that of a batch"
    return next(
        (f"{each.status} {each.code} in a batch" for each in results if each.status not in (201, 204, 404)), None
    )


def _disorder(reply: Reply, prefix: str, limit: int) -> str | None:
    found = page_of(reply)
    if found is None:
        return "not that of a listing"
    keys = [item.key for item in found.items]
    if any(not key.startswith(prefix) for key in keys):
        return "a key of another prefix"
    if any(later <= earlier for earlier, later in itertools.pairwise(keys)):
        return "keys out of order"
    return "more keys than asked for" if len(keys) > limit else None
