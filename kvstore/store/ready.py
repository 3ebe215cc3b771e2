"""Operations that have got the lock for which they waited, in the order in which they got it.

Owns: who goes on next, within the batch that let the lock go or in the next one.
Promises: an operation is ready once for each lock that it was granted.
Leaves to others: the locks (`transactions.locks`), going on (`batch`).
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from kvstore.transactions.locks import Identity, LockTable


class Granted(NamedTuple):
    """The operation `queued` has the lock of `key` now."""

    key: str
    identity: Identity
    queued: Any


class Ready:
    """Lives as long as the lock table: a batch that is full leaves the rest to the next one.

    `granted`: all of them, in order; for others to look at.
    """

    def __init__(self, locks: LockTable[Any, Any]) -> None:
        self._locks = locks
        self.granted: deque[Granted] = deque()

    def __len__(self) -> int:
        return len(self.granted)

    def next(self) -> Granted:
        """Take the first. Raises IndexError."""
        return self.granted.popleft()

    @property
    def first(self) -> Granted:
        """Look at the first. Raises IndexError."""
        return self.granted[0]

    def unlock(self, key: str, identity: Identity) -> None:
        """Let the lock go; those that have it now are ready."""
        undo = self._locks.undo
        undo.note_length(self.granted)
        for granted in self._locks.unlock(key, identity):
            self.granted.append(Granted(key, *granted))

    def leave(self, key: str, queued: Any) -> None:
        """The operation leaves the queue of that lock; those for which this cleared the way are ready."""
        self._locks.undo.note_length(self.granted)
        self.granted.extend(Granted(key, *granted) for granted in self._locks.leave(key, queued))
