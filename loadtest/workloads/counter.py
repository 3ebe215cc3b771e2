"""Counters, raised by compare-and-set.

Owns: what a client does to them, and how each answer enters the history.
Promises: a counter is raised only from what was read, on the version that was read.
Leaves to others: whether the history can be (loadtest.histories).
"""

from __future__ import annotations

from loadtest.histories.history import Count
from loadtest.workloads import calls
from loadtest.workloads.calls import Reply, Steps
from loadtest.workloads.place import Place

_READ_ONLY = 0.2


class Counters:
    """One client."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def step(self) -> Steps[None]:
        """Read a counter, and mostly raise it, however often others are faster."""
        key = key_of(self._place.prefix, self._place.rng.randrange(self._place.shape.counters))
        only_read = self._place.rng.random() < _READ_ONLY
        for _ in range(calls.RETRIES_MAX):
            found = yield calls.get("counter read", key)
            note_read(self._place, key, found)
            if found.outcome != "done" or only_read:
                yield from calls.rest(found)
                return
            value = (value_of(found) or 0) + 1
            reply = yield from self._place.write(calls.swap("counter raise", key, b"%d" % value, found.version))
            lost = reply.status in (409, 412)
            outcome = "refused" if lost else reply.outcome
            self._place.record(Count, reply, outcome, key=key, action="raise", value=value)
            if not lost:
                yield from calls.rest(reply)
                return


def key_of(prefix: str, number: int) -> str:
    return f"{prefix}counter/{number:02d}"


def value_of(reply: Reply) -> int | None:
    return int(reply.body) if reply.status == 200 else None


def note_read(place: Place, key: str, reply: Reply) -> None:
    """A read that was answered; any other one says nothing."""
    if reply.status in calls.GOT:
        place.record(Count, reply, key=key, action="read", value=value_of(reply))


def closing(place: Place) -> Steps[bool]:
    """What every counter holds at the end; False if one could not be read."""
    for number in range(place.shape.counters):
        key = key_of(place.prefix, number)
        reply = yield from calls.insist(calls.get("counter read", key))
        note_read(place, key, reply)
        if reply.status not in calls.GOT:
            return False
    return True
