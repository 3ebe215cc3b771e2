"""Which nodes are silent, and since when.

Owns: when each node was heard last, and from when on this process may count.
Promises: pure; times are arguments, in seconds of any one clock. Silence counts from the start of this process at the
earliest, and from the end of any time in which this process itself stood still: it heard nothing then.
Leaves to others: what counts as being heard (`heard`), what follows from silence (`replicas`).
"""

from __future__ import annotations

from collections.abc import Collection

from kvstore.replication import failover

_STALLED_SHARE = 0.5  # of `failover_after_s`: a controller that was away for so long begins to count again


class FailureDetector:
    """When nodes were heard. `failover_after_s`: after so many seconds one is held for dead."""

    def __init__(self, failover_after_s: float, now: float) -> None:
        self.failover_after_s = failover_after_s
        self._counts_from = now
        self._turned_at = now
        self._heard_at: dict[str, float] = {}

    def turn(self, now: float) -> None:
        """This process is awake. To be called often: what it did not hear while it stood still was not silence."""
        if now - self._turned_at >= self.failover_after_s * _STALLED_SHARE:
            self._counts_from = now
        self._turned_at = now

    def count_from(self, now: float) -> None:
        """No silence before that moment counts."""
        self._counts_from = now

    def note(self, node: str, now: float) -> None:
        """The node is heard."""
        self._heard_at[node] = now

    def keep(self, nodes: Collection[str]) -> None:
        """Forget all other nodes."""
        self._heard_at = {node: at for node, at in self._heard_at.items() if node in nodes}

    def heard_at(self, node: str) -> float:
        """When the node was heard last; the time from which this process counts if it never was since."""
        return max(self._heard_at.get(node, self._counts_from), self._counts_from)

    def silent_for(self, node: str, now: float) -> float:
        """For how many seconds it was not heard, as far as this process knows."""
        return now - self.heard_at(node)

    def is_silent(self, node: str, now: float) -> bool:
        """Whether it is held for dead."""
        return failover.silent(self._heard_at.get(node), self._counts_from, now, self.failover_after_s)

    def is_near(self, node: str, at: float, now: float) -> bool:
        """Whether what it asked for at that time still holds: it was heard since then, and not long ago."""
        heard_at = self._heard_at.get(node)
        return heard_at is not None and failover.hears_sender(at, heard_at, now, self.failover_after_s)
