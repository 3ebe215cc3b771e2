"""Keys that expire: read by many around their last moment, and swapped just then by the one that wrote them.

Owns: what a client does to them, and how it enters the history: as registers, each with one deletion of its own that
no client asked for.
Promises: a key is used once. Its deletion begins when its time to live is over, at the earliest, and may come at any
time after that; a swap that was done ends its time to live.
Leaves to others: whether the history can be (loadtest.histories.registers).
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from loadtest.histories.history import Register
from loadtest.workloads import calls, register
from loadtest.workloads.answers import Reply
from loadtest.workloads.calls import Pause, Steps
from loadtest.workloads.place import Place

_TTL_S = 0.3
_CLOCKS_S = 0.01  # two clocks of one machine, of which one counts milliseconds
_NEAR_S = 0.008  # of its end
_READS = 12
_RECENT = 6


class _Brief(NamedTuple):
    key: str
    due_s: float


class Expiring:
    """One client. All of a process know the keys that are about to expire."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._now_s = 0.0

    def step(self) -> Steps[None]:
        recent: deque[_Brief] = self._place.shared.setdefault("brief", deque(maxlen=_RECENT))
        due = [brief for brief in recent if brief.due_s > self._now_s]
        if due and self._place.rng.random() < 0.6:
            reply = yield from self._watch(self._place.rng.choice(due))
        else:
            reply = yield from self._write(recent)
        yield from calls.rest(reply)

    def _watch(self, brief: _Brief) -> Steps[Reply]:
        """Read it again and again, from shortly before its end on."""
        yield Pause(max(0.0, brief.due_s - self._now_s - _NEAR_S))
        for _ in range(_READS):
            reply = yield from register.read(self._place, brief.key)
            self._now_s = reply.end_s
            if reply.outcome != "done":
                break
        return reply

    def _write(self, recent: deque[_Brief]) -> Steps[Reply]:
        """Write it, wait until it is about to expire, and swap it."""
        place = self._place
        key, value = f"{place.prefix}brief/{place.number()}", f"{place.client}.{place.number()}"
        reply = yield calls.put_brief("brief write", key, value.encode(), _TTL_S)
        self._now_s = reply.end_s
        done = reply.outcome == "done"
        version = reply.version if done else None
        place.record(Register, reply, key=key, action="write", value=value, version=version)
        if reply.outcome == "refused":
            return reply
        expires_s = reply.begin_s + _TTL_S - _CLOCKS_S
        place.note(Register(client=f"{place.client}, expiry", begin_s=expires_s, key=key, action="delete"))
        if not done:
            return reply
        recent.append(_Brief(key, reply.end_s + _TTL_S))
        yield Pause(_TTL_S - place.rng.uniform(0.0, _NEAR_S))
        other = f"{place.client}.{place.number()}"
        reply = yield calls.swap("brief swap", key, other.encode(), reply.version)
        self._now_s = reply.end_s
        register.note_swap(place, reply, key, other, value)
        return (yield from register.read(place, key))
