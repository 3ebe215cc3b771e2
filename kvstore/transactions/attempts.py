"""Attempts: every try of a transaction has an identity of its own, an age, and a stamp.

Owns: how stamps are drawn, and the rule of wait-die.
Promises: pure: `now_us` is an argument.
Leaves to others: what an attempt does (`intents`, `decisions`, `coordination`).

The retry of a transaction is a new attempt: a message of the old one that arrives late must not be taken for one of
the new. It keeps the start of the first, which is its age. Wait-die (Rosenkrantz, Stearns and Lewis, 1978): who asks
for a lock may wait only if it is older than every attempt with an age that holds it or stands before it in the queue,
conflicting or not; else it gives up all it has ("dies") and tries again, as old as before. So every wait is of an
older for a younger: no circle can close, also not one over several stores, which none of them could see; and who
grows older and older has its turn in the end.
An attempt that holds nothing may wait behind any other, since none can wait for it but those that stand behind it in
the same queue, and they are older than all that stand ahead. So a retry takes the lock that was in its way first, by
itself, waiting for it if need be, and asks for all others when it has that: under contention it dies once instead of
again and again.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.model import Attempt

Age = tuple[int, str]


def may_wait(age: Age, ahead: Iterable[Age | None]) -> bool:
    """Whether an attempt of that age may wait behind these: wait-die (Rosenkrantz, Stearns and Lewis, 1978).

    Operations without an age hold nothing while they wait, so they close no circle.
    """
    return all(other is None or age < other for other in ahead)


class Stamps:
    """Stamps of one router's process: they rise strictly, follow the clock, and stay above every floor seen."""

    def __init__(self, router: str) -> None:
        """`router` is random, drawn again at each start of the process."""
        self._router = router
        self._last = 0

    def see(self, floor: int) -> None:
        """A store refused an attempt stamped at or below this."""
        self._last = max(self._last, floor)

    def draw(self, now_us: int, start: int = 0, epoch: int = 0) -> Attempt:
        """A new attempt by the map of epoch `epoch`; `now_us` is Unix time in microseconds.

        `start` is the start of the first try when this is a retry; 0: this is the first.
        """
        self._last = max(self._last + 1, now_us)
        return Attempt(start or self._last, self._last, self._router, epoch)
