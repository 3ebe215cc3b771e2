"""Sets: keys below a prefix, one for each element, added, removed and listed.

Owns: what a client does to them, and how each answer enters the history.
Promises: an element is added once, and removed once at most, by the client that added it and was told so.
Leaves to others: whether the history can be (loadtest.histories).
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from loadtest.histories.history import Element, Members
from loadtest.workloads import calls
from loadtest.workloads.calls import Call, Reply, Steps
from loadtest.workloads.place import Place

_OWN_MAX = 10


class Sets:
    """One client. It keeps some elements of its own in the sets."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._own: deque[tuple[str, str]] = deque()

    def step(self) -> Steps[None]:
        rng = self._place.rng
        if rng.random() < 0.1:
            yield from read(self._place, self._any())
            return
        if self._own and rng.random() < len(self._own) / _OWN_MAX:
            name, element = self._own.popleft()
            # 404 is a failure: the store has said that it is there, and no other client removes it
            call = Call("set remove", "DELETE", f"/v1/kv/{name}{element}", expected=frozenset({204}))
            reply = yield from self._place.write(call)
            self._note(name, element, "remove", reply)
        else:
            name, element = self._any(), str(self._place.number())
            call = calls.put("set add", f"{name}{element}", b"1")._replace(expected=frozenset({201}))
            reply = yield from self._place.write(call)
            self._note(name, element, "add", reply)
            if reply.outcome == "done":
                self._own.append((name, element))
        yield from calls.rest(reply)

    def _any(self) -> str:
        return prefix_of(self._place.prefix, self._place.rng.randrange(self._place.shape.sets))

    def _note(self, name: str, element: str, action: Literal["add", "remove"], reply: Reply) -> None:
        outcome = "refused" if reply.status == 404 else reply.outcome
        self._place.record(Element, reply, outcome, set=name, element=element, action=action)


def prefix_of(prefix: str, number: int) -> str:
    return f"{prefix}set/{number}/"


def read(place: Place, name: str) -> Steps[bool]:
    """A whole set, page by page; False if a page could not be had."""
    items, reply = yield from calls.listing("set list", name)
    if items is None:
        yield from calls.rest(reply)
        return False
    place.record(Members, reply, set=name, elements=[item.key.removeprefix(name) for item in items])
    return True


def closing(place: Place) -> Steps[bool]:
    """What every set holds at the end; False if one could not be read."""
    for number in range(place.shape.sets):
        for _ in range(calls.RETRIES_MAX):
            if (yield from read(place, prefix_of(place.prefix, number))):
                break
            yield calls.Pause(0.5)
        else:
            return False
    return True
