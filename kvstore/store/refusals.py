"""Answers of operations that were not done.

Owns: how an error becomes the answer of an operation; the errors that several rules give.
Promises: pure, but for a line in the log when this program itself is at fault.
Leaves to others: when an operation is refused (`batch`, `leases`, `reads`, `pipeline`).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Set
from typing import Any

from kvstore.errors import KvError, TooManyRequests, Unavailable, WrongOwner
from kvstore.protocol import Answer

log = logging.getLogger(__name__)

_FAULTS_TOLD_MAX = 1000
_faults_told: set[tuple[type, str]] = set()  # with their traceback; the same one may come again and again


def refusal(op_id: int, error: KvError) -> Answer:
    """The answer of an operation that was not done, and why."""
    return Answer(op_id, error.status, problem=error.problem())


def failure(op: Any, error: Exception) -> Answer:
    """The answer to an operation of a batch that failed; see `fault`.

    Raises the error itself if it is one of the disk or of memory: then what is committed cannot be relied on.
    """
    if isinstance(error, sqlite3.Error | OSError | MemoryError):
        raise error
    return fault(op, error)


def fault(op: Any, error: Exception) -> Answer:
    """The answer to an operation that failed by a fault of this program or the disk.
    Says in the log which."""
    if isinstance(error, KvError):
        return refusal(op.id, error)
    what = f"an operation failed: {type(op).__name__}"
    seen = (type(op), repr(error)[:200])
    if seen in _faults_told:
        log.error("%s: %r, as before", what, error)
    else:
        if len(_faults_told) < _FAULTS_TOLD_MAX:
            _faults_told.add(seen)
        log.error(what, exc_info=error)
    return refusal(op.id, KvError("The shard failed to do this operation and has undone it; its log says why."))


def wrong_owner(partition: int, epoch: int, frozen: Set[int]) -> WrongOwner:
    """The WrongOwner of an operation on a partition that is not served by the map of `epoch`.

    In `frozen` it is marked as fenced: only a map with a higher epoch than this one changes that.
    """
    members = {"fenced": True} if partition in frozen else {}
    return WrongOwner(f"This shard does not serve partition {partition}.", epoch=epoch, **members)


def no_lease() -> Unavailable:
    """The Unavailable of a node without the lease of the shard.

    Another node may serve it by now: nothing is answered that was only looked at here.
    """
    return Unavailable("This node does not hold the lease of the shard now: send it again.", retry_after_ms=50)


def queue_full(name: str) -> TooManyRequests:
    """The TooManyRequests of a full queue for a lock or a lease."""
    return TooManyRequests(f"Too many operations wait for {name!r}; try again.", retry_after_ms=500)
