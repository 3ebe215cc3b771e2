"""Read-only transactions: shared locks that are held while other stores are asked, and let go together.

Owns: which reads hold which locks; the end of those that take too long.
Promises: the release confirms that every lock was still the same one; then what was read holds for all of them at one
moment. Locks of reads are in memory only: they end with their connection, their partition, or the store's opening.
Leaves to others: taking the locks (`batch`), asking again (the router).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvstore.protocol import Answer, ReadLock, Reads, ReadUnlock, Reply
from kvstore.storage.rows import VALUE
from kvstore.store.ops import EndReads
from kvstore.store.ready import Ready
from kvstore.store.txn_steps import TxnSteps
from kvstore.store.write_set import Sink, WriteSet
from kvstore.transactions.intents import PreparedTxns, ReadHold
from kvstore.transactions.locks import Identity, LockTable


class ReadLocks:
    """The shared locks of read-only transactions, as one batch changes them."""

    def __init__(
        self, changes: WriteSet, locks: LockTable[Any, Any], holds: PreparedTxns, steps: TxnSteps, ready: Ready
    ) -> None:
        self._changes = changes
        self._locks = locks
        self._holds = holds
        self._steps = steps
        self._unlock = ready.unlock

    def read(self, op: ReadLock, gathered: dict[str, Identity], sink: Sink) -> Reads:
        """Under shared locks, which stay until they are let go, or `EndReads`. Raises ReadTooLarge, DataCorrupt."""
        for key, identity in gathered.items():
            if self._locks.is_alone(key, identity):  # what other readers saw must stay: then it expires after them
                self._changes.expire_if_due(VALUE, key, self._steps.partition_of(key))
        reads = self._steps.read_keys(op.keys)
        first = gathered[op.keys[0]]
        self._changes.undo.note_item(self._holds.readers, first.number)
        self._holds.readers[first.number] = ReadHold(gathered, self._changes.context.now_s, sink)
        return Reads(op.id, reads, (first.opening, first.number))

    def unlock(self, op: ReadUnlock) -> Answer:
        """200 if it still has them all: they go together, with the partition of any."""
        opening, number = op.lock
        hold = self._holds.readers.get(number)
        if hold is None or Identity(opening, number) not in hold.keys.values():
            return Answer(op.id, 409)
        self._let_go(number, hold)
        return Answer(op.id, 200)

    def refuse(self, reply: Reply) -> None:
        """The router is told of a refusal instead of that reply.
        If it brings reads, their locks end at the next sweep."""
        hold = self._holds.readers.get(reply.lock[1]) if isinstance(reply, Reads) else None
        if hold is not None:
            hold.refused = True

    def end(self, op: EndReads) -> Answer:
        """Let go what these reads hold."""
        for number in op.numbers:
            hold = self._holds.readers.get(number)
            if hold is not None:
                self._let_go(number, hold)
        return Answer(op.id, 200)

    def _let_go(self, number: int, hold: ReadHold) -> None:
        self._changes.undo.note_item(self._holds.readers, number)
        del self._holds.readers[number]
        for key, identity in hold.keys.items():
            self._unlock(key, identity)

    def forget(self, is_theirs: Callable[[str], bool]) -> None:
        """Reads that have a lock there have none any more."""
        for number, reader in list(self._holds.readers.items()):
            if any(map(is_theirs, reader.keys)):
                self._let_go(number, reader)
