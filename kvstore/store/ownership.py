"""Which partitions a batch serves, and who is told that it does not.

Owns: the generations of the partitions while a batch is decided.
Promises: pure. No generation is given twice in a process.
Leaves to others: what leaves with a partition (`batch`), what the map says (`partitions`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from typing import Any

from kvstore.placement.ring import partition_of
from kvstore.protocol import Answer, GetTxn, Prepare
from kvstore.store.ops import Expire
from kvstore.store.refusals import refusal, wrong_owner
from kvstore.store.write_set import Context

_generations = itertools.count(1)  # of partitions, in any store of this process: none comes twice


class Ownership:
    """`changed`: partitions came or went in this batch."""

    def __init__(self, context: Context) -> None:
        self.generations: Sequence[int] = context.generations
        self.epoch = context.epoch
        self.frozen = context.frozen
        self.changed = False
        self._openings = context.openings

    def partition_of(self, key: str) -> int:
        """The partition of the key."""
        return partition_of(key.encode(), len(self.generations))

    def partition(self, op: Any) -> int:
        """The partition of a plain operation."""
        if type(op) is Expire and op.partition >= 0:
            return int(op.partition)
        return partition_of(op.key.encode(), len(self.generations))

    def foreign(self, op: Any, keys: list[str]) -> int | None:
        """A partition of the operation that is not served; None if all are."""
        generations = self.generations
        for key in keys:
            partition = partition_of(key.encode(), len(generations))
            if not generations[partition]:
                return partition
        kind = type(op)
        if kind is GetTxn:
            return op.partition if op.partition >= 0 and not generations[op.partition] else None
        if kind is Expire:
            partition = self.partition(op)
            return None if generations[partition] else partition
        return None

    def reopened(self, op: Prepare, keys: list[str]) -> int | None:
        """A partition of its keys that was lost and reopened since the attempt began."""
        openings = self._openings
        return openings.reopened_among(op.attempt.epoch, map(self.partition_of, keys)) if openings.opened else None

    def refuse(self, op: Any, partition: int) -> Answer:
        """The answer to an operation on a partition that is not served."""
        return refusal(op.id, wrong_owner(partition, self.epoch, self.frozen))

    def depart(self, partitions: Set[int], epoch: int, frozen: Set[int]) -> None:
        """These are served no more; the epoch and what is frozen are these now."""
        self.generations = [
            0 if partition in partitions else generation for partition, generation in enumerate(self.generations)
        ]
        self.epoch, self.frozen, self.changed = epoch, frozen, True

    def arrive(self, partitions: Set[int]) -> None:
        """These are served from now on."""
        generations = list(self.generations)
        for partition in partitions:
            generations[partition] = next(_generations)
        self.generations, self.changed = generations, True
