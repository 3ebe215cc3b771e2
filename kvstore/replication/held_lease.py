"""The lease that a primary holds in one term.

Owns: the grants, until when they last together, since when the controller is needed in vain.
Promises: how long the lease lasts is computed again after each change of what it depends on.
Leaves to others: the rules (`lease`), which copies are waited for (`shipping`).
"""

from __future__ import annotations

from kvstore.replication import lease, shipping
from kvstore.replication.places import Times
from kvstore.replication.session import Session
from kvstore.replication.shipping import Shipping


class HeldLease:
    """`needed_s`: since when the controller has been needed to take a copy out, and has not answered.

    `close`: how often a copy renewed its grant only in the last quarter of its time, or behind its end.
    """

    def __init__(self, times: Times) -> None:
        self.grants = lease.Grants()
        self.needed_s: float | None = None
        self.close = 0
        self._times = times
        self._until: float | None = None  # None: to be computed again

    def until(self, state: Shipping) -> float:
        """Until when the primary may answer what no record of its own carries, unless something changes."""
        if self._until is None:
            awaited = [link.session for link in shipping.awaited(state)]
            self._until = lease.until(self.grants, awaited) if state.serves else float("-inf")
        return self._until

    def note_change(self) -> None:
        """Copies that are waited for, their sessions, or whether the term is open have changed."""
        self._until = None

    def take(self, named: Session, asked_s: float, now: float) -> None:
        """The copy of that session grants the lease, counted from when it was asked."""
        if float("-inf") < self.grants.of(named) - now < self._times.lease_s / 4:
            self.close += 1
        self.grants = lease.held(self.grants, named, asked_s, self._times.lease_s)
        self._until = None

    def give_back(self) -> None:
        """Hold nothing more in this term."""
        self.grants = lease.give_back(self.grants)
        self._until = None

    def may_ask(self, now: float) -> bool:
        """Whether beacons may be sent: not once the controller was needed for long in vain, nor the lease given back,
        since each answer would keep the copy that is to take over from it for `lease_s` more."""
        if self.grants.given_back:
            return False
        return lease.may_ask(self.needed_s, now, self._times.failover_after_s)
