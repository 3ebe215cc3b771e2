"""The lock table of a store: who may change a key now, and who waits for it.

Owns: locks (shared and exclusive, held by transactions and, for the moment of their execution, by every write) and
their queues; with `lease_table`, one table of names, so that locks and leases exclude each other by construction.
Promises: pure: no clock, no socket, no await; `now_s` is an argument, on a monotonic clock. Everything here is
changed in the order of the store's batches, by the batch itself, so a decision and the rows that record it are one
step.
Leaves to others: leases (`lease_table`), rows (`store.batch`), timers (`store.maintenance`), answers
(`store.pipeline`).

The problem. The textbook lock asks whether a key is free and then sets it: two clients can both be told yes. It lets
any client release it, cannot wait, and gives the holder nothing to show: a holder that slept through its lease writes
as if it still held it. Checking a token is commonly left to the resource that is written to; here the store itself is
written to, so it checks.

The invariants.
  1. At most one lease per name, and a lease ends only by release with its token, or when its deadline has passed.
  2. A token is a step of the version clock at the grant: it rises with every grant of a name, for ever, because the
     clock is durable and never goes back. A write that shows a token is done only while the lease with that very token
     stands.
  3. An identity names the store's opening and a count within it, and is never used again: "still the same lock" means
     that no other operation had it in between.
  4. Waiting for a lease is a queue of its own. It stands before later acquires of that name and before nothing else: an
     operation that shows the holder's token, a renewal, a release and an expiry never wait behind it.
  5. First come, first served, except for those that have left: a grant looks again whether its waiter is still there.
  6. What holds a lock while it waits for another one has an age, and waits only behind younger ones (wait-die, see
     `attempts`). Operations without an age hold nothing while they wait.

A lease's time runs from when its grant became visible (`start`): until then its deadline is "never". After a restart
or move a lease has its full time again. Late is safe, early is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, Literal, TypeVar

from kvstore import failpoints
from kvstore.transactions.attempts import Age, may_wait
from kvstore.transactions.lease_table import Identity, Lease, LeaseTable

__all__ = ["Died", "Identity", "Lease", "LockTable", "Mode"]

Q = TypeVar("Q")  # what waits for a lock: opaque here
W = TypeVar("W")  # what waits for a lease: opaque here; the batch puts an operation and the sink of its answer

Mode = Literal["shared", "exclusive"]


class Died(Exception):
    """The asking transaction is not older than all ahead: it must give up what it has, and try again."""


_NO_QUEUE: deque[Any] = deque()  # of all locks for which nothing waits: never changed


class _Lock(Generic[Q]):
    """`queue` is made for the first waiter: most locks never have one."""

    __slots__ = ("holders", "queue")

    def __init__(self) -> None:
        self.holders: dict[Identity, tuple[Mode, Age | None]] = {}
        self.queue: deque[tuple[Mode, Age | None, Q]] = _NO_QUEUE

    def copy(self) -> _Lock[Q]:
        """Its present state, for `Undo`."""
        copy: _Lock[Q] = _Lock()
        copy.holders, copy.queue = self.holders.copy(), self.queue.copy()
        return copy

    def admits(self, mode: Mode) -> bool:
        if not self.holders:
            return True
        return mode == "shared" and all(held == "shared" for held, _ in self.holders.values())

    def ages(self) -> Iterator[Age | None]:
        """Of all who would stand before a newcomer."""
        yield from (age for _, age in self.holders.values())
        yield from (age for _, age, _ in self.queue)


class LockTable(LeaseTable[W], Generic[Q, W]):
    """The locks, and the leases beside them. `opening` is random, drawn again at each opening of the store.

    `waiters_max` bounds the queue of each lock, and that of each lease.
    """

    def __init__(self, opening: str, waiters_max: int) -> None:
        super().__init__(opening, waiters_max)
        self._locks: dict[str, _Lock[Q]] = {}

    # --- locks --------------------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """No lock is held."""
        return not self._locks

    def hold(self, name: str, age: Age) -> Identity:
        """Take, exclusively, a lock that was held before the store was reopened. Raises ValueError if it is not
        free."""
        if name in self._locks:
            raise ValueError(f"{name!r} is locked")
        self.undo.note_item(self._locks, name)
        lock = self._locks[name] = _Lock()
        identity = self._identity()
        lock.holders[identity] = "exclusive", age
        return identity

    def is_free(self, name: str) -> bool:
        """No client holds the name's lock nor waits for it.
        A write may run at once, and need not take it at all, since it is over before any other operation can
        ask."""
        return name not in self._locks

    def lock(
        self, name: str, mode: Mode, waiter: Q, age: Age | None = None, *, holds_nothing: bool = False
    ) -> Identity | None:
        """Take the lock, or queue the waiter and return None.

        Raises Died if it has an age, holds something and may not wait; OverflowError when the queue is full.
        """
        if mode == "shared" and failpoints.planted("ignore-intent"):
            return self._identity()  # it bars no one
        lock = self._note_lock(name)
        if lock is None:
            self.undo.note_item(self._locks, name)
            lock = self._locks[name] = _Lock()
        if not lock.queue and lock.admits(mode):
            identity = self._identity()
            lock.holders[identity] = mode, age
            return identity
        if age is not None and not holds_nothing and not may_wait(age, lock.ages()):
            raise Died(name)
        if len(lock.queue) >= self._waiters_max:
            raise OverflowError(name)
        if not lock.queue:
            lock.queue = deque()
        lock.queue.append((mode, age, waiter))
        return None

    def _note_lock(self, name: str) -> _Lock[Q] | None:
        """The lock, which is about to be changed."""
        lock = self._locks.get(name)
        if lock is not None:
            self.undo.note_copy(self._locks, name, lock.copy())
        return lock

    def holds(self, name: str, identity: Identity) -> bool:
        """It is still that same lock."""
        lock = self._locks.get(name)
        return lock is not None and identity in lock.holders

    def is_alone(self, name: str, identity: Identity) -> bool:
        """No other client holds that lock."""
        return name in self._locks and self._locks[name].holders.keys() == {identity}

    def unlock(self, name: str, identity: Identity) -> list[tuple[Identity, Q]]:
        """Let the lock go; returns those who have it now, in order of arrival.

        No-op if it is held no more.
        """
        lock = self._locks.get(name)
        if lock is None or identity not in lock.holders:
            return []
        if len(lock.holders) == 1 and not lock.queue:
            self.undo.note_item(self._locks, name)
            del self._locks[name]  # as it is: it may be put back
            return []
        self._note_lock(name)
        del lock.holders[identity]
        return self._promote(name, lock)

    def waiting(self, name: str) -> list[Q]:
        """Who waits for the lock, in order of arrival."""
        lock = self._locks.get(name)
        return [waiter for _, _, waiter in lock.queue] if lock else []

    def all_waiting(self) -> list[tuple[str, Q]]:
        """(name, waiter) of all that wait for a lock."""
        return [(name, waiter) for name, lock in self._locks.items() for _, _, waiter in lock.queue]

    def leave(self, name: str, waiter: Q) -> list[tuple[Identity, Q]]:
        """The waiter gives up its place; returns those for whom that cleared the way, in order of arrival."""
        lock = self._note_lock(name)
        if lock is None:
            return []
        lock.queue = deque(entry for entry in lock.queue if entry[2] is not waiter)
        return self._promote(name, lock)

    def _promote(self, name: str, lock: _Lock[Q]) -> list[tuple[Identity, Q]]:
        granted = []
        while lock.queue and lock.admits(lock.queue[0][0]):
            mode, age, waiter = lock.queue.popleft()
            identity = self._identity()
            lock.holders[identity] = mode, age
            granted.append((identity, waiter))
        if not lock.holders and not lock.queue:
            del self._locks[name]
        return granted
