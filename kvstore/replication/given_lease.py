"""The lease that a copy gives its primary.

Owns: the grant that the copy has given, and when it has heard its primary last.
Promises: nothing is granted in a session that has not begun, by a disk that does not answer, or while the copy promises
a higher term to itself. A primary whose settings say a longer time than the copy's is granted that.
Leaves to others: the rules (`lease`), the primary's side (`held_lease`), the answer to a beacon (`serving`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore import failpoints
from kvstore.environment import Environment
from kvstore.replication import lease
from kvstore.replication.configuration import Configuration
from kvstore.replication.copy_log import CopyLog
from kvstore.replication.copy_notes import CopyNotes
from kvstore.replication.places import Times
from kvstore.replication.session import Session
from kvstore.said_once import SaidOnce

_log = logging.getLogger(__name__)


class GivenLease:
    """`given`: no promotion is taken before it has run out. `heard_at`: when the primary was heard last."""

    def __init__(
        self,
        notes: CopyNotes,
        own_log: CopyLog,
        logged: Configuration | None,
        environment: Environment,
        times: Times,
        *,
        was_served: bool,
    ) -> None:
        """`logged`: what the last map in the log says of the store. `was_served`: by this process until now, so its
        grants have run out."""
        self._notes = notes
        self._log = own_log
        self._environment = environment
        self._times = times
        now, identity = environment.boottime_s(), notes.identity
        given = lease.granted_at_start(logged, identity.copy_id, identity.promised, now, times.lease_s)
        self.given = lease.Granted(now) if was_served else given
        self.heard_at = now
        self._is_withheld = False
        self._unequal = SaidOnce()

    @property
    def silent_s(self) -> float:
        """For how many seconds the copy has not heard its primary."""
        return self._environment.boottime_s() - self.heard_at

    def may_be_promoted(self) -> bool:
        """Whether what the copy has granted has run out."""
        return lease.may_be_promoted(self.given, self._environment.boottime_s())

    def hear(self) -> None:
        """The primary is heard now."""
        self.heard_at = self._environment.boottime_s()

    def beacon(self, named: Session, asked_s: float = 0.0) -> bool:
        """Grant the primary its lease, for as long as it asks or as the own settings say, whichever is longer.

        False: the beacon is not answered.
        """
        now = self._environment.boottime_s()
        if self._is_withheld or not lease.grants(
            self._notes.following, named, self._log.sync_since, now, self._times.disk_stall_s
        ):
            return False
        self.heard_at = now
        self.given = lease.granted(self.given, now, max(self._times.lease_s, asked_s))
        if asked_s and asked_s != self._times.lease_s and self._unequal.is_news(str(asked_s)):
            _log.warning(
                "lease_s is %g s here, %g s at a primary: the longer one counts. Give every process the same --config",
                self._times.lease_s, asked_s,
            )  # fmt: skip
        return True

    def returned(self, named: Session) -> None:
        """The primary of that session has given its lease back."""
        self.given = lease.returned(self.given, self._notes.following, named, self._environment.boottime_s())

    @contextmanager
    def withheld(self) -> Iterator[None]:
        """Nothing is granted within."""
        self._is_withheld = not failpoints.planted("grant-while-promising")
        try:
            yield
        finally:
            self._is_withheld = False
