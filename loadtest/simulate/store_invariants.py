"""What must hold of a store after each event: what is visible is durable; versions and floors never fall.

Owns: `StoreInvariants`; `Violation`, which all that is found is.
Promises: looks at more than numbers only when one of them has changed.
Leaves to others: whose event it was (`cluster`, `machine`), what clients see (`loadtest.histories`).
"""

from __future__ import annotations

from kvstore.store.store import Store

Place = tuple[str, str]  # node and shard


class Violation(Exception):
    """A promise was broken."""


class StoreInvariants:
    """What was seen of stores so far, by the node that has them and their shard."""

    def __init__(self) -> None:
        self._seen: dict[Place, object] = {}  # when it was looked at last
        self._floors: dict[tuple[Place, str], tuple[int, int, int]] = {}  # what the clocks of a store there have shown

    def disk_gone(self, node: str) -> None:
        """What comes there is not what was."""
        self._floors = {of: floors for of, floors in self._floors.items() if of[0][0] != node}
        self._seen = {place: seen for place, seen in self._seen.items() if place[0] != node}

    def check(self, place: Place, store: Store) -> None:
        """Raises Violation."""
        log = store.tables.log
        applied, visible = store.tables.engine.applied.position, store.applier.visible
        seen = (applied, visible, log.synced, log.last, store.tables.visible)
        if seen == self._seen.get(place):
            return
        self._seen[place] = seen
        if not applied.number <= visible <= log.durable <= log.last.number:
            order = f"applied {applied.number}, visible {visible}, durable {log.durable}, last {log.last.number}"
            raise Violation(f"{' of '.join(place)}: {order}")
        clock = store.clock
        of = place, store.identity.store_id  # a node whose shard has left begins another store of that name
        now, before = (clock.version, clock.sequence, clock.attempts_floor), self._floors.get(of)
        if now != before:
            if before is not None and any(after < early for after, early in zip(now, before, strict=True)):
                raise Violation(f"{' of '.join(place)}: version, sequence, floor went from {before} to {now}")
            self._floors[of] = now
