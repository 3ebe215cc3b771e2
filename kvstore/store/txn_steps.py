"""What the steps and conditions of a transaction mean for the rows of this store.

Owns: whether conditions hold; what a step reads and writes; what it may not touch, because it is leased.
Promises: called with the keys' locks held, or free.
Leaves to others: when (`participant`, `read_locks`), rows and clock (`write_set`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvstore import failpoints
from kvstore.errors import Locked
from kvstore.model import Condition, Read, TxnOp
from kvstore.placement.ring import partition_of
from kvstore.storage.rows import VALUE
from kvstore.store.leases import Leases
from kvstore.store.write_set import NUMBER_MAX, WriteSet
from kvstore.transactions.coordination import too_much_read
from kvstore.transactions.locks import LockTable


class TxnSteps:
    """The steps of transactions, as one batch does them."""

    def __init__(self, changes: WriteSet, locks: LockTable[Any, Any], leases: Leases) -> None:
        self._changes = changes
        self._locks = locks
        self._leases = leases
        self._partitions = len(changes.context.generations)

    def partition_of(self, key: str) -> int:
        """The partition of the key."""
        return partition_of(key.encode(), self._partitions)

    def end_what_is_due(self, keys: Iterable[str]) -> None:
        """Make the expiry of leases and values of these keys a fact, where their time has passed."""
        for key in keys:
            if self._locks.lease(key) is not None:
                self._leases.on(key, self.partition_of(key))
            if self._changes.before(VALUE, key).expires_at_ms:
                self._changes.expire_if_due(VALUE, key, self.partition_of(key))

    def hold_all(self, conditions: list[Condition]) -> bool:
        """Whether all of them hold."""
        return not conditions or all(self._holds_true(condition) for condition in conditions)

    def _holds_true(self, condition: Condition) -> bool:
        if condition.token is not None:
            if failpoints.planted("ignore-token"):
                return True
            lease = self._locks.lease(condition.key)
            return lease is not None and lease.token == condition.token
        before = self._changes.before(VALUE, condition.key)
        if condition.exists is not None:
            return before.live == condition.exists
        return before.live and before.version == condition.version

    def locked(self, steps: list[TxnOp], conditions: list[Condition]) -> Locked | None:
        """The error if the steps write to what is leased, and no condition names its token."""
        if not self._locks.lease_count or failpoints.planted("ignore-token"):
            return None
        for step in steps:
            lease = self._locks.lease(step.key) if step.op != "get" else None
            if lease is not None and not any(c.token == lease.token and c.key == step.key for c in conditions):
                return self._leases.locked(lease)
        return None

    def read(self, steps: Iterable[TxnOp]) -> list[Read]:
        """What the gets among the steps find. Raises ReadTooLarge, DataCorrupt."""
        keys = [step.key for step in steps if step.op == "get"]
        return self.read_keys(keys) if keys else []

    def read_keys(self, keys: Iterable[str]) -> list[Read]:
        """What gets of these keys find, in their order. Raises ReadTooLarge (`too_much_read`), DataCorrupt."""
        reads: list[Read] = []
        left = self._changes.context.read_bytes_max
        for key in keys:
            left -= self._changes.before(VALUE, key).size
            if left < 0:
                raise too_much_read(self._changes.context.read_bytes_max)
            state = self._changes.state(VALUE, key)
            reads.append(Read(state.version if state.body is not None else 0, state.body))
        return reads

    def write(self, step: TxnOp, version: int, decided_ms: int) -> None:
        """Do the put or the delete, at that version."""
        body = step.value if step.op == "put" else None
        # An intent may have been stored when other limits were in force; it must be able to be applied all the same.
        expires_at_ms = min(decided_ms + step.ttl_ms, NUMBER_MAX) if step.ttl_ms else 0
        self._changes.write(VALUE, step.key, self.partition_of(step.key), body, expires_at_ms, version)
