"""The feed behind GET /v1/events.
What is known now, what of it has changed, and who has seen how much of it.

Owns: the newest document of each kind, the numbers of events, the bound on how often a kind is told.
Promises: pure: `now_s` is an argument. A kind is told at most once in `gap_s`; the last change of a burst is never
lost, only late. Nothing is kept for a listener: one that is behind gets the newest document of each kind that has
changed since, once, so memory does not depend on how many listen, nor on how slowly.
Leaves to others: where documents come from (`event_documents`), sockets (`events`).

An event's id is START-NUMBER: START is random, drawn when this router started. A listener that comes back with an id
of this start goes on from there; any other id, or none, gets a snapshot of everything.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

GAP_S = 0.25
_ID = re.compile(r"([0-9a-f]{1,32})-([0-9]{1,15})")


class Event(NamedTuple):
    """`data` is one line of JSON."""

    id: str
    kind: str
    data: bytes

    def encode(self) -> bytes:
        """As server-sent events travel (HTML Standard, section 9.2)."""
        return b"id: %s\nevent: %s\ndata: %s\n\n" % (self.id.encode(), self.kind.encode(), self.data)


class _Kind:
    """`identity`: what tells a change from what merely goes on, such as an age. `number`: when it was last told."""

    __slots__ = ("document", "identity", "number", "told", "told_s")

    def __init__(self) -> None:
        self.document: Any = None
        self.identity: Any = None
        self.told: tuple[Any, Any] | None = None  # document and identity
        self.number = 0
        self.told_s = float("-inf")

    def is_due(self) -> bool:
        if self.identity is None:
            return False
        return self.told is None or (self.document != self.told[0] and self.identity != self.told[1])


class Feed:
    """`start`: random, of this start of the router. `about`: members of every snapshot that never change."""

    def __init__(self, start: str, about: dict[str, Any], gap_s: float = GAP_S) -> None:
        self._start = start
        self._about = about
        self._gap_s = gap_s
        self._kinds: dict[str, _Kind] = {}
        self.number = 0

    def keep(self, kind: str, document: Any) -> None:
        """For snapshots only: its changes are not told."""
        self._kinds.setdefault(kind, _Kind()).document = document

    def offer(self, kind: str, document: Any, identity: Any = None) -> None:
        """The newest document of the kind.
        It is told unless it or its `identity` (by default: it) is as last told."""
        known = self._kinds.setdefault(kind, _Kind())
        known.document, known.identity = document, document if identity is None else identity

    def release(self, now_s: float) -> float | None:
        """Tell what is due, by the monotonic clock.

        Returns in how many seconds to call again; None: when something new was offered.
        """
        wait_s = None
        for kind in self._kinds.values():
            if not kind.is_due():
                continue
            left_s = kind.told_s + self._gap_s - now_s
            if left_s > 0:
                wait_s = left_s if wait_s is None else min(wait_s, left_s)
                continue
            self.number += 1
            kind.told, kind.number, kind.told_s = (kind.document, kind.identity), self.number, now_s
        return wait_s

    def since(self, number: int) -> list[Event]:
        """What was told after that number, the newest of each kind, in the order in which it was told."""
        told = sorted((known.number, kind) for kind, known in self._kinds.items() if known.number > number)
        return [Event(self._id(number), kind, msgspec.json.encode(self._kinds[kind].document)) for number, kind in told]

    def snapshot(self) -> Event:
        """Everything, as of now."""
        documents = {kind: known.document for kind, known in self._kinds.items()}
        return Event(self._id(self.number), "snapshot", msgspec.json.encode(self._about | documents))

    def number_of(self, event_id: str | None) -> int | None:
        """What a listener with that Last-Event-ID has seen; None: it needs a snapshot."""
        match = _ID.fullmatch(event_id or "")
        if match is None or match[1] != self._start or int(match[2]) > self.number:
            return None
        return int(match[2])

    def _id(self, number: int) -> str:
        return f"{self._start}-{number}"
