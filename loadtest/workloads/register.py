"""Registers: keys that many clients read, write, delete and swap.

Owns: what a client does to them, and how each answer enters the history.
Promises: every value is written once in a whole history. A deletion that found nothing enters as what it learnt, a
read.
Leaves to others: whether the history can be (loadtest.histories).
"""

from __future__ import annotations

from loadtest.histories.history import Register
from loadtest.workloads import calls
from loadtest.workloads.calls import Reply, Steps
from loadtest.workloads.place import Place

HOT_SHARE = 0.4


class Registers:
    """One client."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def step(self) -> Steps[None]:
        rng = self._place.rng
        key = key_of(self._place.prefix, self._number())
        chosen = rng.random()
        if chosen < 0.45:
            reply = yield from read(self._place, key)
        elif chosen < 0.75:
            reply = yield from self._write(key)
        elif chosen < 0.85:
            reply = yield from self._delete(key)
        else:
            reply = yield from self._swap(key)
        yield from calls.rest(reply)

    def _number(self) -> int:
        shape, rng = self._place.shape, self._place.rng
        return rng.randrange(shape.hot if shape.hot and rng.random() < HOT_SHARE else shape.registers)

    def _value(self) -> str:
        return f"{self._place.client}.{self._place.number()}"

    def _write(self, key: str) -> Steps[Reply]:
        value = self._value()
        reply = yield from self._place.write(calls.put("register write", key, value.encode()))
        version = reply.version if reply.outcome == "done" else None
        self._place.record(Register, reply, key=key, action="write", value=value, version=version)
        return reply

    def _delete(self, key: str) -> Steps[Reply]:
        reply = yield from self._place.write(calls.delete("register delete", key))
        self._place.record(Register, reply, key=key, action="read" if reply.status == 404 else "delete")
        return reply

    def _swap(self, key: str) -> Steps[Reply]:
        found = yield from read(self._place, key)
        if found.outcome != "done":
            return found
        value = self._value()
        reply = yield from self._place.write(calls.swap("register swap", key, value.encode(), found.version))
        note_swap(self._place, reply, key, value, text_of(found))
        return reply


def key_of(prefix: str, number: int) -> str:
    return f"{prefix}register/{number:03d}"


def text_of(reply: Reply) -> str | None:
    """The value that a read found."""
    return reply.body.decode() if reply.status == 200 else None


def read(place: Place, key: str) -> Steps[Reply]:
    reply = yield calls.get("register read", key)
    note_read(place, key, reply)
    return reply


def note_read(place: Place, key: str, reply: Reply) -> None:
    """A read that was answered; any other one says nothing."""
    if reply.status in calls.GOT:
        version = reply.version if reply.status == 200 else None
        place.record(Register, reply, key=key, action="read", value=text_of(reply), version=version)


def note_swap(place: Place, reply: Reply, key: str, value: str, expected: str | None) -> None:
    """A compare-and-set of a key that was read as `expected`."""
    version = reply.version if reply.status in calls.PUT else None
    met = reply.status != 412
    place.record(Register, reply, key=key, action="swap", value=value, expected=expected, met=met, version=version)


def closing(place: Place) -> Steps[bool]:
    """What every register holds at the end; False if one could not be read."""
    for number in range(place.shape.registers):
        key = key_of(place.prefix, number)
        reply = yield from calls.insist(calls.get("register read", key))
        note_read(place, key, reply)
        if reply.status not in calls.GOT:
            return False
    return True
