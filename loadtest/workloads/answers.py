"""What an HTTP answer of a router means: done, refused or unknown.

Owns: the reply to one call, the three outcomes, problem documents, the answer of a transaction.
Promises: pure, and the only place that says so. `done`: the answer is a definite success, or a definite statement such
as 404 or 412. `refused`: nothing was done by this try, so nothing may ever show. `unknown`: it was done, or will be, or
not. A status that no contract knows is unknown.
Leaves to others: sending (`loadtest.drivers`), what a call expects (`calls`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from loadtest.histories.history import Outcome

NEVER_SENT = 0
NO_ANSWER = -1
REFUSED = frozenset({NEVER_SENT, 409, 423, 429, 503, 507})  # the contract: nothing was done by this try
TROUBLE = REFUSED | {NO_ANSWER, 504}  # what a cluster under faults may answer to anything
_DONE = frozenset({304, 404, 412})  # besides all below 300


def outcome_of(status: int) -> Outcome:
    """Whether a call with this status was done, refused, or no client knows."""
    if status in _DONE or 200 <= status < 300:
        return "done"
    return "refused" if status in REFUSED or 400 <= status < 500 else "unknown"


class Problem(msgspec.Struct):
    """The document of an error."""

    status: int
    code: str
    detail: str = ""
    txn_id: str | None = None


class Reply(NamedTuple):
    """`status`: NEVER_SENT, NO_ANSWER, or that of HTTP. `error`: why there is none. `begin_s` is before the request was
    sent, `end_s` after its answer came, both of the monotonic clock. `location`: the path that a 202 names."""

    status: int
    body: bytes = b""
    version: int | None = None
    error: str = ""
    begin_s: float = 0.0
    end_s: float = 0.0
    location: str = ""

    @property
    def outcome(self) -> Outcome:
        return outcome_of(self.status)

    @property
    def code(self) -> str:
        """The problem code of a refusal, or words for an answer that did not come."""
        if self.status in (NEVER_SENT, NO_ANSWER):
            return "not connected" if self.status == NEVER_SENT else "no answer"
        problem = problem_of(self)
        return str(self.status) if problem is None else problem.code

    @property
    def said(self) -> str:
        """The answer in short: `201`, `503 unavailable`, `no answer: TimeoutError`."""
        if self.status in (NEVER_SENT, NO_ANSWER):
            return f"{'never sent' if self.status == NEVER_SENT else 'no answer'}: {self.error}"
        problem = problem_of(self) if self.status >= 400 else None
        return str(self.status) if problem is None else f"{self.status} {problem.code}"

    @property
    def words(self) -> str:
        """As `said`, with the detail of an error."""
        problem = problem_of(self) if self.status >= 400 else None
        return self.said if problem is None else f"{self.said}: {problem.detail}"

    @property
    def change(self) -> str:
        """The id of the change of the cluster that a 202 names."""
        return self.location.removeprefix("/v1/changes/")


NOTHING = Reply(200)


def problem_of(reply: Reply) -> Problem | None:
    """The problem document of an error."""
    try:
        return msgspec.json.decode(reply.body, type=Problem)
    except msgspec.DecodeError:
        return None


class _Patience(msgspec.Struct):
    retry_after_ms: int = 0


def retry_after_ms(reply: Reply) -> int:
    """How long a refusal asks its client to wait."""
    if reply.status not in REFUSED:
        return 0
    try:
        return msgspec.json.decode(reply.body, type=_Patience).retry_after_ms
    except msgspec.DecodeError:
        return 100


# --- transactions ----------------------------------------------------------------------------------------------------


class Got(msgspec.Struct):
    """One entry of the results of a transaction."""

    key: str
    version: int | None = None
    value: str | None = None
    exists: bool = True


class Answered(msgspec.Struct):
    """The 200 of POST /v1/txn."""

    id: str
    succeeded: bool
    version: int | None
    results: list[Got]


def answer_of(reply: Reply) -> Answered | None:
    """The 200 of a transaction; None for every other answer."""
    try:
        return msgspec.json.decode(reply.body, type=Answered) if reply.status == 200 else None
    except msgspec.DecodeError:
        return None


def txn_id(reply: Reply) -> str | None:
    """The id of the transaction, which a 200 and a 504 name."""
    if (answered := answer_of(reply)) is not None:
        return answered.id
    problem = problem_of(reply) if reply.status == 504 else None
    return None if problem is None else problem.txn_id


def contradiction(body: Mapping[str, Any], answered: Answered) -> str | None:
    """What in a 200 does not fit its own request, or None."""
    steps = body["then"] if answered.succeeded else body.get("else", [])
    if [step["key"] for step in steps] != [result.key for result in answered.results]:
        return "its results are not those of the branch that ran"
    writes = [result.version for step, result in zip(steps, answered.results, strict=True) if step["op"] != "get"]
    if any(version != answered.version for version in writes):
        return "a key that it wrote has another version than the transaction"
    if (answered.version is None) != (not writes):
        return "its version does not fit: null is for a branch that writes nothing"
    if not answered.succeeded and not body.get("if"):
        return "it has no conditions, and they did not hold"
    return None
