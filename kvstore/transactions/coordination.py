"""Coordination: what the answers to the prepares of an attempt mean.

Owns: the verdict on the votes.
Promises: pure. The version of a committed transaction is above the highest vote and the clock of the anchor's store, so
it is above every version that any of its keys ever had, and above the vote of every intent that is counted.
Leaves to others: sending and waiting (`router.coordinator`), what each store does (`store.participant`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvstore.errors import Conflict, KvError, OutcomeUnknown, ReadTooLarge, Unavailable, WrongOwner, from_problem
from kvstore.protocol import Answer, Outcome, Vote


class Prepared(NamedTuple):
    """All have voted: the anchor's store is to do its part and decide. See `protocol.DecideCommit`.

    `vote`: the highest; `holds`: every condition does. `locked_then`, `locked_otherwise`: a problem document (RFC 9457)
    of a lock in the way of that branch, None without one.
    """

    vote: int
    holds: bool
    locked_then: dict[str, Any] | None
    locked_otherwise: dict[str, Any] | None


class Retry(NamedTuple):
    """This attempt is over, nothing was written, and another one may succeed.

    `epoch`: with a map of at least this epoch, or with one above it if a partition is `fenced`, about to leave. `key`:
    on which there was a conflict. `same_request`: what stands in the way is the same request, whose outcome is not
    known yet.
    """

    epoch: int = 0
    key: str = ""
    same_request: bool = False
    fenced: bool = False


class Rejected(NamedTuple):
    """This attempt is over, nothing was written, and the client is told why."""

    error: KvError


def judge(votes: Sequence[Vote]) -> Prepared:
    """What the votes of all stores but the anchor's come to. Raises ValueError without any vote."""
    return Prepared(
        max(vote.vote for vote in votes),
        all(vote.holds for vote in votes),
        next((vote.locked_then for vote in votes if vote.locked_then), None),
        next((vote.locked_otherwise for vote in votes if vote.locked_otherwise), None),
    )


def judge_refusal(reply: Answer | Outcome | KvError) -> Retry | Rejected | Outcome:
    """What follows when a store did not vote, or the anchor's did not commit, for good.

    An Outcome: the same request was answered with it before. A store that may or may not have prepared has decided
    nothing, so that is no unknown outcome.
    """
    if isinstance(reply, Outcome):
        return reply if reply.state == "repeated" else Retry()
    error = from_problem(reply.problem) if isinstance(reply, Answer) else reply
    if isinstance(error, WrongOwner):
        return Retry(epoch=max(1, error.epoch), fenced=error.fenced)
    if isinstance(error, Conflict):
        return Retry(key=str(error.members.get("key", "")), same_request=bool(error.members.get("same_request")))
    if isinstance(error, OutcomeUnknown):
        return Rejected(Unavailable(f"Nothing was decided: {error.detail}", retry_after_ms=500))
    return Rejected(error)


def too_much_read(bytes_max: int) -> ReadTooLarge:
    """The ReadTooLarge of a transaction that reads more than `txn_read_bytes_max`."""
    return ReadTooLarge(f"the values that it reads have more than {bytes_max:,} bytes.", bytes_max=bytes_max)
