"""When a primary begins to wait for a copy that joins.

Owns: when the controller was heard last; the copies that were nearly there while it was away. One whose record is an
old copy, so that it changes nothing, is as good as away.
Promises: batches do not wait for long for what the copy lacks, nor for a copy that could not be taken out again: should
it go while the controller is away, all writes would stand until that is back.
Leaves to others: what it means to wait (`shipping`), the connection (`copy_link`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from kvstore.replication import shipping
from kvstore.replication.session import Session
from kvstore.replication.shipping import Link, LinkKey, Shipping
from kvstore.replication.tail import Tail

_LAG_MAX = 64  # records that a joining copy may lack when the primary begins to wait for it


class Streaming(Protocol):
    """The connection to one copy."""

    @property
    def room_bytes(self) -> int:
        """How many bytes may be under way."""

    @property
    def is_streaming(self) -> bool:
        """Whether records reach the copy."""


class Nearing:
    """Of one term. `tail`: the records that came last; times in seconds of the primary's clock."""

    def __init__(self, tail: Tail, away_s: float, now_s: float) -> None:
        """`away_s`: the controller is away that has not been heard for so long. An opening has heard it."""
        self._tail = tail
        self._away_s = away_s
        self._heard_s = now_s
        self._put_off: dict[LinkKey, Session] = {}

    def acked(self, state: Shipping, link: Link, room_bytes: int, now_s: float) -> Shipping:
        """The state once the copy has acknowledged: batches wait for it, too, if it is nearly there."""
        if not shipping.is_nearly_there(state, link, _LAG_MAX):
            return state
        if now_s - self._heard_s >= self._away_s:
            self._put_off[link.key] = link.session
            return state
        is_short = self._tail.reaches_end(link.acked, state.last, room_bytes)
        return shipping.wait_from(state, link.session) if is_short else state

    def controller_heard(self, state: Shipping, links: Mapping[LinkKey, Streaming], now_s: float) -> Shipping:
        """The state once the controller has answered: what was put off is looked at again."""
        self._heard_s = now_s
        put_off, self._put_off = self._put_off, {}
        for key, named in put_off.items():
            link, at = shipping.find(state, named), links.get(key)
            if link is not None and at is not None and at.is_streaming:
                state = self.acked(state, link, at.room_bytes, now_s)
        return state
