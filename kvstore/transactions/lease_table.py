"""The leases of a store: what clients hold, with a fencing token, and who waits for it.

Owns: leases, the queue of each name, and the identities of locks and leases.
Promises: pure: `now_s` is an argument, on a monotonic clock. Expiry is a change, made by `end`, never a look at a
clock. No identity is used twice.
Leaves to others: locks (`locks`, whose table extends this one), rows and tokens (`store.leases`).

A lease (Gray and Cheriton, 1989) is a right that ends by itself after its time, so a holder that has died bars no one
for ever. A holder that was only slow must be kept from writing as if it still held it: its token, which rises with
every grant, is what Chubby calls the lock generation number of a sequencer (Burrows, 2006), and others a fencing token.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from kvstore.transactions.undo import Undo

W = TypeVar("W")  # what waits for a lease: opaque here


class Identity(NamedTuple):
    """A lock as this opening of the store granted it; never used again."""

    opening: str
    number: int


class Lease:
    """A client's hold on a name. `deadline_s` is infinite until the grant or renewal is visible. `granted_to`: the only
    one who has been told of it, as long as that is so (and the store has not been reopened)."""

    __slots__ = ("deadline_s", "granted_to", "identity", "name", "owner", "token", "ttl_s")

    def __init__(self, name: str, owner: str, token: int, ttl_s: float, identity: Identity) -> None:
        self.name = name
        self.owner = owner
        self.token = token
        self.ttl_s = ttl_s
        self.identity = identity
        self.deadline_s = math.inf
        self.granted_to: Any = None

    def left_s(self, now_s: float) -> float:
        """Seconds until the deadline; the whole ttl while it has not begun to run."""
        return min(self.ttl_s, max(0.0, self.deadline_s - now_s))


class LeaseTable(Generic[W]):
    """The leases and their queues. `opening` is random, drawn again at each opening of the store.

    `waiters_max` bounds the queue of each name.
    """

    def __init__(self, opening: str, waiters_max: int) -> None:
        self.undo = Undo()
        self._opening = opening
        self._waiters_max = waiters_max
        self._count = 0
        self._leases: dict[str, Lease] = {}
        self._lease_queues: dict[str, deque[W]] = {}

    def _identity(self) -> Identity:
        self._count += 1
        return Identity(self._opening, self._count)

    def lease(self, name: str) -> Lease | None:
        """The lease on the name, past its deadline or not; None without one.

        Expiry is a change, made by `end`, never a look at a clock.
        """
        return self._leases.get(name)

    def leases(self) -> Iterator[Lease]:
        """All leases, past their deadline or not. The table must not be changed between two steps."""
        return iter(self._leases.values())

    @property
    def lease_count(self) -> int:
        """How many names are leased."""
        return len(self._leases)

    def grant(self, name: str, owner: str, token: int, ttl_s: float) -> Lease:
        """A new lease, whose time does not run before `start`. Raises ValueError if the name has one."""
        if name in self._leases:
            raise ValueError(f"{name!r} is leased")
        self.undo.note_item(self._leases, name)
        lease = self._leases[name] = Lease(name, owner, token, ttl_s, self._identity())
        return lease

    def end(self, name: str) -> None:
        """The lease is over: released, or expired. Raises KeyError if there is none."""
        self.undo.note_item(self._leases, name)
        del self._leases[name]

    def forget_lease(self, name: str) -> tuple[W, ...]:
        """Drop the lease of a name that is another store's now; returns those who waited for it here.

        Raises KeyError if there is none. It cannot be taken back by `undo`.
        """
        del self._leases[name]
        return tuple(self._lease_queues.pop(name, ()))

    def suspend(self, lease: Lease) -> None:
        """The lease is renewed, but this is not visible yet: it does not end before `start`."""
        self.undo.note_attribute(lease, "deadline_s")
        lease.deadline_s = math.inf

    def start(self, lease: Lease, now_s: float) -> None:
        """The grant or renewal is visible: from `now_s` on, monotonic, the lease's time runs."""
        lease.deadline_s = now_s + lease.ttl_s

    def queue_for_lease(self, name: str, waiter: W) -> None:
        """Put the waiter at the end of the name's queue. Raises OverflowError when the queue is full."""
        queue = self._note_queue(name)
        if len(queue) >= self._waiters_max:
            raise OverflowError(name)
        queue.append(waiter)
        self._lease_queues[name] = queue

    def _note_queue(self, name: str) -> deque[W]:
        """The queue, which is about to be changed."""
        queue = self._lease_queues.get(name)
        if queue is None:
            self.undo.note_item(self._lease_queues, name)
            return deque()
        self.undo.note_copy(self._lease_queues, name, queue.copy())
        return queue

    def next_for_lease(self, name: str) -> W | None:
        """Take the first waiter out of the queue; None if it is empty."""
        queue = self._note_queue(name)
        if not queue:
            return None
        waiter = queue.popleft()
        if not queue:
            del self._lease_queues[name]
        return waiter

    def waiting_for_lease(self, name: str) -> tuple[W, ...]:
        """The waiters, in order of arrival."""
        return tuple(self._lease_queues.get(name, ()))

    def leave_lease_queue(self, name: str, waiter: Any) -> bool:
        """The waiter gives up its place; False if it had none (any more)."""
        queue = self._note_queue(name)
        try:
            queue.remove(waiter)
        except ValueError:
            return False
        if not queue:
            del self._lease_queues[name]
        return True
