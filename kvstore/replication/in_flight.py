"""What was sent to one copy and is not answered yet.

Owns: the frames of records and the beacons under way in one session, and for how long the copy has owed an answer.
Promises: only an answer that says something new counts: a copy that repeats itself owes the rest all the same.
Leaves to others: sending (`copy_link`), what an answer changes (`shipping`, `lease`), how long a copy may take
(`patience`).
"""

from __future__ import annotations

from collections import deque

from kvstore.replication import patience


class InFlight:
    """`sent`: the number of the last record that was sent. `bytes`: of the records that are not acknowledged."""

    def __init__(self) -> None:
        self.sent = 0
        self.bytes = 0
        self.patience = patience.Patience()
        self._frames: deque[tuple[int, int]] = deque()  # of each: its last number, its bytes
        self._beacons: dict[int, float] = {}  # when each was sent
        self._beacon = 0

    def begin(self, sent: int) -> None:
        """A session begins behind that record; what the copy owes from an earlier one it owes still."""
        self.sent = sent
        self.bytes = 0
        self._frames.clear()
        self._beacons.clear()

    def records(self, last: int, size: int, now: float) -> None:
        """A frame is sent, with the records up to `last`."""
        self.sent = last
        self.bytes += size
        self._frames.append((last, size))
        self.patience = patience.owes(self.patience, now)

    def beacon(self, now: float) -> int:
        """A beacon is sent; its number."""
        self._beacon += 1
        self._beacons[self._beacon] = now
        self.patience = patience.owes(self.patience, now)
        return self._beacon

    def acked(self, number: int, now: float) -> bool:
        """The copy has the records up to that number. Returns whether these were the last ones it owed."""
        owed = len(self._frames)
        while self._frames and self._frames[0][0] <= number:
            self.bytes -= self._frames.popleft()[1]
        if not owed or len(self._frames) < owed:
            self._answered(now)
        return bool(owed) and not self._frames

    def granted(self, number: int, now: float) -> float | None:
        """The copy answers that beacon; when it was asked. None if no such beacon is under way."""
        asked_s = self._beacons.pop(number, None)
        if asked_s is not None:
            self._beacons = {later: at for later, at in self._beacons.items() if later > number}
            if not self._frames:  # else the lease is granted, and a record is owed all the same
                self._answered(now)
        return asked_s

    def _answered(self, now: float) -> None:
        self.patience = patience.answered(self.patience, now, owes_more=bool(self._frames or self._beacons))
