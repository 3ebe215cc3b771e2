"""The operations of a store: those of routers, and its own.

Owns: which messages are decided in batches; the store's own operations; an operation that waits for locks.
Promises: plain data.
Leaves to others: what they do (`writes`, `leases`, `participant`), who may go on (`batch`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from kvstore.model import Attempt
from kvstore.protocol import (
    Abort,
    Acquire,
    ApplyIntents,
    CancelWait,
    DecideCommit,
    Delete,
    GetLock,
    GetTxn,
    Prepare,
    Put,
    ReadLock,
    ReadUnlock,
    Release,
    Renew,
    ResolveTxn,
    Transact,
)
from kvstore.storage.rows import VALUE
from kvstore.store.write_set import Sink
from kvstore.transactions.locks import Identity, LockTable


class Expire(msgspec.Struct):
    """Make the expiry of a row a fact, if its deadline has passed. `partition` -1: that of its key."""

    key: str
    kind: str = VALUE
    partition: int = -1
    id: int = 0


class ExpireLease(msgspec.Struct):
    """End the lease on `key`, if its time has passed."""

    key: str
    id: int = 0


class EndWait(msgspec.Struct):
    """The waiter that asked with `acquire` has waited long enough."""

    key: str
    acquire: Acquire
    id: int = 0


class EndLockWaits(msgspec.Struct):
    """What has waited for a lock since before `since_s`, or is gone, waits no longer.

    `plain_since_s` is for those without an age, which outwait a dead router's intents.
    """

    since_s: float
    plain_since_s: float
    id: int = 0


class DropDecisions(msgspec.Struct):
    """These attempts' decisions may go, as far as they are kept here."""

    attempts: list[Attempt]
    id: int = 0


class EndReads(msgspec.Struct):
    """These read-only transactions have held their locks for too long, or are gone."""

    numbers: list[int]
    id: int = 0


PlainOp = Put | Delete | Acquire | Renew | Release | CancelWait | GetLock | Expire | ExpireLease | EndWait
TransactionOp = Transact | Prepare | DecideCommit | ApplyIntents | Abort | ResolveTxn | GetTxn | ReadLock | ReadUnlock
WriteOp = PlainOp | TransactionOp | DropDecisions | EndReads | EndLockWaits
Waiter = tuple[WriteOp, Sink]


class Queued:
    """An operation in the queue of a lock; `gathered` are the locks that it has already."""

    __slots__ = ("gathered", "keys", "op", "since_s", "sink")

    def __init__(self, op: Any, sink: Sink, since_s: float, keys: list[str]) -> None:
        self.op = op
        self.sink = sink
        self.since_s = since_s
        self.keys = keys
        self.gathered: dict[str, Identity] = {}


Locks = LockTable[Queued, Waiter]


def keys_of(op: Transact | Prepare | DecideCommit) -> list[str]:
    """All keys that it names, in the order in which they are locked."""
    if len(op.then) == 1 and not op.otherwise and not op.conditions:  # most parts of transactions over many stores
        return [op.then[0].key]
    keys = {condition.key for condition in op.conditions}
    keys.update(step.key for step in op.then)
    keys.update(step.key for step in op.otherwise)
    return sorted(keys)


def named_keys(op: Any) -> list[str]:
    """The keys of an operation of a transaction that must be owned."""
    kind = type(op)
    if kind in _WITH_STEPS:
        return keys_of(op)
    if kind is ResolveTxn:
        return [op.key]
    return list(op.keys) if kind in _WITH_KEYS else []


_WITH_STEPS = frozenset({Transact, Prepare, DecideCommit})
_WITH_KEYS = frozenset({ApplyIntents, Abort, ReadLock, ReadUnlock})
