"""Where a client of a judged workload is.
Below which keys, under which name, and to whom it tells what it was told.

Owns: the prefix of a run, names of clients, numbers that are never used twice in a history.
Promises: pure.
Leaves to others: where the history goes.
"""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from loadtest.histories.history import AnyOperation, Outcome
from loadtest.workloads.answers import NO_ANSWER, REFUSED, Reply
from loadtest.workloads.calls import Call, Pause, Steps

_NUMBERS_OF_A_PROCESS = 1_000_000_000_000
_PATIENCE_S = 5.0
_AGAIN_S = 0.05
_ASKED_AGAIN = 0.1
_KEYS_MIN = 4
_COUNTS = ("accounts", "registers", "lists", "counters", "locks", "sets")


class Shape(NamedTuple):
    """How many keys of each kind there are, and how clients behave.

    `hot`: so many registers, which take 40 % of the calls. `keyed`: the share of writes that carry an Idempotency-Key
    and are sent until their outcome is known. `oversleeps`: the share of lock holders that outstay their lease (of
    one of `leases_s`) and write nevertheless; `keeps`: the share that never gives its lock back.
    """

    accounts: int = 100
    registers: int = 100
    hot: int = 0
    lists: int = 24
    counters: int = 20
    locks: int = 20
    sets: int = 8
    keyed: float = 0.0
    leases_s: Sequence[float] = (5.0,)
    oversleeps: float = 0.02
    keeps: float = 0.0

    def crowded(self, times: int) -> Shape:
        """So many times fewer keys of each kind, so that clients meet more often."""
        counts = {name: max(_KEYS_MIN, count // times) for name in _COUNTS if (count := getattr(self, name))}
        return self._replace(**counts)


LOAD = Shape()
FAULTS = Shape(
    accounts=100,
    registers=200,
    hot=8,
    lists=8,
    counters=4,
    locks=4,
    sets=3,
    keyed=0.25,
    leases_s=(0.8, 1.5, 3.0),
    oversleeps=0.1,
    keeps=0.1,
)


class Place:
    """`prefix`: all keys of the run begin with it. `noted`: there is a history; without one `note` does nothing. All
    clients of a process take their numbers from the same `numbers`, and find in `shared` what the others of their
    workload left there."""

    def __init__(
        self,
        prefix: str,
        client: str,
        numbers: Iterator[int],
        rng: random.Random,
        note: Callable[[AnyOperation], None] | None = None,
        shape: Shape = LOAD,
        shared: dict[str, Any] | None = None,
    ) -> None:
        self.prefix = prefix
        self.client = client
        self.rng = rng
        self.shape = shape
        self.shared: dict[str, Any] = {} if shared is None else shared
        self.noted = note is not None
        self.note = _ignore if note is None else note
        self._numbers = numbers

    def number(self) -> int:
        """One that no other client of this history has."""
        return next(self._numbers)

    def record(
        self, kind: Callable[..., AnyOperation], reply: Reply, outcome: Outcome | None = None, **fields: Any
    ) -> None:
        """Note an operation of that kind with this reply. `outcome`: where the reply alone does not tell it."""
        outcome = outcome or reply.outcome
        end_s = None if outcome == "unknown" else reply.end_s
        said = reply.said
        self.note(kind(client=self.client, begin_s=reply.begin_s, end_s=end_s, outcome=outcome, said=said, **fields))

    def write(self, call: Call) -> Steps[Reply]:
        """Send it once; or, in the share `keyed` of the cases, with an Idempotency-Key until its outcome is known.

        A refusal says nothing about the tries before it. Some of those that were done are asked for once more: the
        answer must be the first one.
        """
        if self.rng.random() >= self.shape.keyed:
            return (yield call)
        key = str(uuid.UUID(int=self.rng.getrandbits(128)))
        call = call._replace(headers={**call.headers, "Idempotency-Key": key})
        reply = yield call
        begin_s, was_sent = reply.begin_s, reply.outcome == "unknown"
        while reply.outcome != "done" and was_sent:
            if reply.end_s - begin_s > _PATIENCE_S:
                return Reply(NO_ANSWER, error="its outcome stays unknown", begin_s=begin_s, end_s=reply.end_s)
            yield Pause(_AGAIN_S)
            reply = yield call
        if reply.status < 300 and reply.outcome == "done" and self.rng.random() < _ASKED_AGAIN:
            yield _same_again(call, reply)
        return reply._replace(begin_s=begin_s)


class Workload(Protocol):
    """What one client does again and again."""

    def step(self) -> Steps[None]: ...


def numbers_of(process: int) -> Iterator[int]:
    """Those of one of the processes of a run, which count from 0."""
    return itertools.count(process * _NUMBERS_OF_A_PROCESS + 1)


def _same_again(call: Call, first: Reply) -> Call:
    def check(reply: Reply) -> str | None:
        same = reply.status in REFUSED or (reply.status, reply.version) == (first.status, first.version)
        return None if same else "not the answer that the same Idempotency-Key got before"

    statuses = call.expected | {first.status}
    return call._replace(name=f"{call.name}, again", expected=statuses, check=check)


def _ignore(operation: AnyOperation) -> None:
    """There is no history."""
