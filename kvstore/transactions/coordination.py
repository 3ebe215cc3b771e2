"""Coordination: what the answers to the prepares of an attempt mean.

Owns: the verdict on the votes.
Promises: pure. The version of a committed transaction is 1 + the highest vote, so it is above every version that any
of its keys ever had, and above the vote of every intent that is counted.
Leaves to others: sending and waiting (`router.coordinator`), what each store does (`storage.participant`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.errors import Conflict, KvError, OutcomeUnknown, Unavailable, WrongOwner, from_problem
from kvstore.protocol import Answer, Outcome, Vote


class Commit(NamedTuple):
    """All have voted: the anchor is to decide. `succeeded`: which branch runs."""

    version: int
    anchor_vote: int
    succeeded: bool


class Again(NamedTuple):
    """This attempt is over, nothing was written, and another one may succeed.

    `floor`: to be stamped above it. `epoch`: with a map of at least this epoch. `same_request`: what stands in the way
    is the same request, whose outcome is not known yet.
    """

    floor: int = 0
    epoch: int = 0
    same_request: bool = False


class Refused(NamedTuple):
    """This attempt is over, nothing was written, and the client is told why."""

    error: KvError


Verdict = Commit | Again | Refused | Outcome


def judge(votes: Sequence[Vote]) -> Commit | Refused:
    """What follows when all stores have voted. Refused: the branch that runs writes to what somebody has leased."""
    succeeded = all(vote.holds for vote in votes)
    for vote in votes:
        locked = vote.locked_then if succeeded else vote.locked_otherwise
        if locked is not None:
            return Refused(from_problem(locked))
    return Commit(1 + max(vote.vote for vote in votes), max(vote.anchor_vote for vote in votes), succeeded)


def judge_refusal(reply: Answer | Outcome | KvError) -> Again | Refused | Outcome:
    """What follows when one of the stores did not vote. An Outcome: the same request was answered with it before.

    A store that may or may not have prepared has decided nothing, so that is no unknown outcome.
    """
    if isinstance(reply, Outcome):
        return reply if reply.state == "repeated" else Again(floor=reply.floor)
    error = from_problem(reply.problem) if isinstance(reply, Answer) else reply
    if isinstance(error, WrongOwner):
        return Again(epoch=int(error.members.get("epoch", 0)))
    if isinstance(error, Conflict):
        return Again(same_request=bool(error.members.get("same_request")))
    if isinstance(error, OutcomeUnknown):
        return Refused(Unavailable(f"{error.detail}; nothing was decided", retry_after_ms=500))
    return Refused(error)
