"""Partitions whose shard was lost: what may still be done for attempts that were begun before they were reopened.

Owns: the rules of a struck and of a reopened partition.
Promises: pure. A vote that lay on a lost disk commits nothing; what was decided on a lost disk is unknown for ever, and
is never said to be aborted.
Leaves to others: striking and opening (`placement.moves`, the controller), rows and answers (`store.participant`).

A shard is lost with all that it has: its rows, its intents, its decisions. The controller *strikes* it in one map,
which every other store follows before the next map *opens* its partitions, empty, with new owners. An attempt names the
epoch of the map that its router followed when it began. So each store can tell an attempt that may have left a vote or
a decision on the lost disk from one that cannot, however late its messages come:

    prepare in a reopened partition         refused: the attempt begins again, with an epoch of now
    commit, ask at a reopened anchor        gone: it may have been decided there, one way or the other
    commit with a struck participant        refused for good: the vote is lost, and what the partition has by now was
                                            never looked at
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Openings(NamedTuple):
    """By partition, the epoch of its last strike and of its last opening; `last`: the epoch of the last strike."""

    struck: Mapping[int, int] = {}
    opened: Mapping[int, int] = {}
    last: int = 0

    def forgets(self, epoch: int, partition: int) -> bool:
        """What an attempt of that epoch has left in the partition is lost: nothing can be known of it."""
        return epoch < self.opened.get(partition, 0)

    def reopened_among(self, epoch: int, partitions: Iterable[int]) -> int | None:
        """One of the partitions in which an attempt of that epoch may not prepare."""
        return next((partition for partition in partitions if self.forgets(epoch, partition)), None)

    def struck_among(self, epoch: int, partitions: Iterable[int]) -> int | None:
        """One of the partitions whose vote for an attempt of that epoch is lost."""
        return next((partition for partition in partitions if epoch < self.struck.get(partition, 0)), None)
