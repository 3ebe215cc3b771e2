"""Locks that are leases, their tokens, and what is written under them.
Is there one holder at a time, and the last one?

Owns: the rules for leases, fencing tokens, and counters that are raised in critical sections.
Promises: pure. What it reports is wrong with certainty: of an unknown acquire no client knows the token, so that no
client can be wrong by it; an unknown release or guarded write may have been done or not.
Leaves to others: counters without locks (counters).

A lease does not end early, so its holder holds the lock for sure

    from   the end of the acquire
    to     the begin of its first release that was not refused, or its last begin of an acquire or renewal that was
           acknowledged + ttl, whichever is first

It may be held longer. But once a newer token was granted, or the release was acknowledged, everything that begins
later with the old token must be refused (Kleppmann, "How to do distributed locking", 2016: the store checks the fence).
So in a critical section no other client can write, and a counter that is read and then raised in it loses no update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from loadtest.histories.findings import Findings, Floor, Violation, ended_s, times
from loadtest.histories.history import Count, Guarded, Lease

_NEVER = float("inf")
_WORDS = {"acquire": "the acquire", "renew": "the renewal", "release": "the release"}


class Kind(StrEnum):
    TWO_HOLDERS = "two holders"
    TOKEN_BACK = "token did not rise"
    TOKEN_TWICE = "token granted twice"
    FOREIGN_TOKEN = "token that no client was granted"
    STALE_TOKEN = "stale token accepted"  # a newer one had been granted, or shown
    RELEASED = "accepted after the release"
    LOST_UPDATE = "lost update"  # a guarded value was acknowledged twice, or read when it was old
    SKIPPED = "value that no client wrote"
    TOO_FEW = "guarded writes are missing"  # a read shows less than was acknowledged before


def check(history: Iterable[Lease | Guarded | Count]) -> list[Violation]:
    """All that is wrong with it. The counts are reads of guarded keys, and otherwise none are given."""
    by_lock: dict[str, list[Lease | Guarded]] = {}
    by_key: dict[str, list[Guarded]] = {}
    reads: dict[str, list[Count]] = {}
    for operation in history:
        if isinstance(operation, Count):
            reads.setdefault(operation.key, []).append(operation)
            continue
        by_lock.setdefault(operation.lock, []).append(operation)
        if isinstance(operation, Guarded):
            by_key.setdefault(operation.key, []).append(operation)
    findings = Findings()
    for lock, operations in by_lock.items():
        _Lock(lock, operations, findings).judge()
    for key, writes in by_key.items():
        _GuardedKey(key, writes, reads.get(key, []), findings).judge()
    return findings.violations


class _Held(NamedTuple):
    """The lock is held for sure between these times, by who acquired it so. `to_s` <= `from_s`: perhaps never."""

    from_s: float
    to_s: float
    by: Lease


class _Lock:
    def __init__(self, lock: str, operations: Sequence[Lease | Guarded], findings: Findings) -> None:
        self._lock = lock
        self._findings = findings
        self._done = [op for op in operations if op.outcome == "done" and op.token is not None]
        self._grants = [op for op in self._done if isinstance(op, Lease) and op.action == "acquire"]
        self._uses = [op for op in self._done if not (isinstance(op, Lease) and op.action == "acquire")]
        self._leases = [op for op in operations if isinstance(op, Lease) and op.outcome != "refused"]

    def judge(self) -> None:
        self._check_tokens()
        self._check_holders()
        self._check_uses()

    def _blame(self, kind: Kind, detail: str) -> None:
        self._findings.blame(kind, self._lock, f"lock {self._lock}: {detail}")

    def _check_tokens(self) -> None:
        granted: dict[int, Lease] = {}
        floor = Floor([(ended_s(op), op.token or 0, op) for op in self._done])
        for grant in self._grants:
            token = grant.token or 0
            if granted.setdefault(token, grant) is not grant:
                self._blame(Kind.TOKEN_TWICE, f"{_name(granted[token])} and {_name(grant)} were granted token {token}")
            known = floor.before(grant.begin_s)
            if known is not None and token <= known[0]:
                detail = f"{_name(grant)} was granted token {token}; before it began, {_name(known[1])} had token"
                self._blame(Kind.TOKEN_BACK, f"{detail} {known[0]}")

    def _check_holders(self) -> None:
        """No two hold it, and no client is granted it from begin to end of another client's hold."""
        last: _Held | None = None
        for held in sorted(self._holds(), key=lambda held: held.from_s):
            is_sure = last is not None and (held.from_s < held.to_s or held.by.begin_s > last.from_s)
            if last is not None and is_sure and held.from_s < last.to_s:
                detail = f"{_name(last.by)} holds it for sure until {last.to_s:.4f}, and {_name(held.by)} was granted"
                self._blame(Kind.TWO_HOLDERS, f"{detail} token {held.by.token}")
            if last is None or held.to_s > last.to_s:
                last = held

    def _holds(self) -> list[_Held]:
        by_token: dict[int, list[Lease]] = {}
        for lease in self._leases:
            if lease.token is not None:
                by_token.setdefault(lease.token, []).append(lease)
        return [self._hold(grant, by_token[grant.token or 0]) for grant in self._grants]

    def _hold(self, grant: Lease, same_token: Sequence[Lease]) -> _Held:
        to_s = grant.begin_s + grant.ttl_s
        for lease in same_token:
            if lease.action == "renew" and lease.outcome == "done":
                to_s = max(to_s, lease.begin_s + (lease.ttl_s or grant.ttl_s))
        released_s = min((lease.begin_s for lease in same_token if lease.action == "release"), default=_NEVER)
        return _Held(ended_s(grant), min(to_s, released_s), grant)

    def _check_uses(self) -> None:
        """Each token shown was granted, is the newest that was known, and was not given back."""
        granted = {grant.token for grant in self._grants}
        floor = Floor([(ended_s(op), op.token or 0, op) for op in self._done])
        released: dict[int, Lease] = {}
        for use in self._uses:
            if isinstance(use, Lease) and use.action == "release":
                other = released.setdefault(use.token or 0, use)
                released[use.token or 0] = min(other, use, key=ended_s)
        for use in self._uses:
            token = use.token or 0
            if token not in granted:
                self._blame(Kind.FOREIGN_TOKEN, f"{_name(use)} was accepted with token {token}")
            known = floor.before(use.begin_s)
            if known is not None and known[0] > token:
                detail = f"{_name(use)} was accepted with token {token}; before it began, {_name(known[1])} had token"
                self._blame(Kind.STALE_TOKEN, f"{detail} {known[0]}")
            if token in released and ended_s(released[token]) < use.begin_s:
                detail = f"{_name(use)} was accepted with token {token}, which {_name(released[token])}"
                self._blame(Kind.RELEASED, f"{detail} had given back before it began")


class _GuardedKey:
    """A key that is read as `value` - 1 and written as `value`, in critical sections only.
    It is absent at first: 0."""

    def __init__(self, key: str, writes: Sequence[Guarded], reads: Sequence[Count], findings: Findings) -> None:
        self._key = key
        self._findings = findings
        self._all = writes
        self._done = [op for op in writes if op.outcome == "done"]
        self._possible = [op for op in writes if op.outcome != "refused"]
        self._reads = [op for op in reads if op.action == "read" and op.outcome == "done"]

    def judge(self) -> None:
        self._check_updates()
        self._check_values_read()
        self._check_reads()

    def _blame(self, kind: Kind, detail: str) -> None:
        self._findings.blame(kind, self._key, f"key {self._key}: {detail}")

    def _check_updates(self) -> None:
        wrote: dict[int, Guarded] = {}
        floor = self._floor()
        for write in self._done:
            if wrote.setdefault(write.value, write) is not write:
                self._blame(Kind.LOST_UPDATE, f"{_name(wrote[write.value])} and {_name(write)} were both acknowledged")
            known = floor.before(write.begin_s)
            if known is not None and known[0] >= write.value:
                detail = f"{_name(write)} had read {write.value - 1}; before it began, {_name(known[1])}"
                self._blame(Kind.LOST_UPDATE, detail)

    def _floor(self) -> Floor[Guarded]:
        return Floor([(ended_s(write), write.value, write) for write in self._done])

    def _check_values_read(self) -> None:
        """A client wrote what was read: also what was read by those whose own write was refused."""
        begun_s: dict[int, float] = {0: -_NEVER}
        for write in self._possible:
            begun_s[write.value] = min(write.begin_s, begun_s.get(write.value, _NEVER))
        found: list[tuple[int, Guarded | Count]] = [(write.value - 1, write) for write in self._all]
        found += [(read.value or 0, read) for read in self._reads]
        for value, by in found:
            if (begun_s.get(value, _NEVER) >= ended_s(by) and by.end_s is not None) or value not in begun_s:
                detail = f"{_name(by)} had read {value}, which no client can have written until then"
                self._blame(Kind.SKIPPED, detail)

    def _check_reads(self) -> None:
        floor = self._floor()
        for read in self._reads:
            known = floor.before(read.begin_s)
            if known is not None and (read.value or 0) < known[0]:
                self._blame(Kind.TOO_FEW, f"{_name(read)} showed {read.value}; before it began, {_name(known[1])}")


def _name(operation: Lease | Guarded | Count) -> str:
    if isinstance(operation, Lease):
        return f"{_WORDS[operation.action]} {times(operation)}"
    if isinstance(operation, Guarded):
        return f"the guarded write of {operation.key} = {operation.value} {times(operation)}"
    return f"the read {times(operation)}"
