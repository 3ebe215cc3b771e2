"""One client of a router over HTTP: requests that are sent once, and what their answers mean.

Owns: POST /v1/txn and single calls, the session, the sense of a status, what a 200 must look like.
Promises: a write is sent once: aiohttp's silent repeat is off (see `session`). An answer that no router may give
becomes a complaint, and its outcome is unknown.
Leaves to others: what to ask for (loadtest.txn_clients).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec
from yarl import URL

from loadtest.histories.history import Outcome

REQUEST_TIMEOUT_S = 30.0
_REFUSALS = frozenset({409, 423, 429, 503, 507})  # the contract: nothing was done by this try


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


class Problem(msgspec.Struct):
    status: int
    code: str
    detail: str = ""
    txn_id: str | None = None


class Reply(NamedTuple):
    """`status` 0: never sent; -1: sent, and no answer came. `change`: the id of the change of the cluster it names."""

    status: int
    body: bytes = b""
    version: int | None = None
    change: str = ""

    @property
    def outcome(self) -> Outcome:
        if self.status in (-1, 504):
            return "unknown"
        return "refused" if self.status == 0 or self.status in _REFUSALS else "done"

    @property
    def words(self) -> str:
        """The answer in short."""
        if self.status in (0, -1):
            return "never sent" if self.status == 0 else "no answer"
        if self.status < 400:
            return str(self.status)
        problem = problem_of(self)
        return str(self.status) if problem is None else f"{self.status} {problem.code}: {problem.detail}"


_answers = msgspec.json.Decoder(Answered)
_problems = msgspec.json.Decoder(Problem)


def session(timeout_s: float = REQUEST_TIMEOUT_S) -> aiohttp.ClientSession:
    """One that sends every request once."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    http = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
    http._retry_connection = False
    return http


class Wire:
    """The routers, as one client sees them: each request goes to any of them.

    `counts`: requests by outcome, and answers that were refusals or unknown by status. `complaints`: sentences on
    answers that no router may give.
    """

    def __init__(self, http: aiohttp.ClientSession, urls: Sequence[str], seed: int) -> None:
        self.urls = urls
        self.rng = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        self._http = http

    async def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Sent once. Never raises for what the other side does."""
        url = URL(self.rng.choice(self.urls) + path, encoded=True)
        try:
            async with self._http.request(method, url, data=body, headers=headers) as response:
                answer = await response.read()
                tag = response.headers.get("ETag", "").strip('"')
                change = response.headers.get("Location", "").removeprefix("/v1/changes/")
                reply = Reply(response.status, answer, int(tag) if tag.isdecimal() else None, change)
                if reply.outcome != "done":
                    self.counts[str(reply.status)] += 1
                return reply
        except aiohttp.ClientConnectorError:
            return Reply(0)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return Reply(-1)

    async def transact(self, body: dict[str, Any], once: str | None = None) -> tuple[Reply, Answered | None]:
        """POST /v1/txn; the decoded answer if it is a 200 that makes sense."""
        headers = {} if once is None else {"Idempotency-Key": once}
        reply = await self.ask("POST", "/v1/txn", msgspec.json.encode(body), headers)
        if reply.status != 200:
            if reply.outcome == "done":  # neither success nor a refusal
                self.complain(f"POST /v1/txn was answered {reply.status}: {reply.body[:300]!r}")
                reply = Reply(-1)
            elif reply.status == 504 and not txn_id(reply):
                self.complain(f"a 504 without the id of the transaction: {reply.body[:300]!r}")
            return reply, None
        try:
            answered = _answers.decode(reply.body)
        except msgspec.DecodeError as error:
            self.complain(f"POST /v1/txn was answered {reply.body[:300]!r}: {error}")
            return Reply(-1), None
        if wrong := contradiction(body, answered):
            self.complain(f"POST /v1/txn was answered 200, but {wrong}: {reply.body[:300]!r}")
        return reply, answered

    def complain(self, sentence: str) -> None:
        self.complaints.append(sentence)


def problem_of(reply: Reply) -> Problem | None:
    """The problem document of an error."""
    try:
        return _problems.decode(reply.body)
    except msgspec.DecodeError:
        return None


def txn_id(reply: Reply) -> str | None:
    """The id that a 504 names."""
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
