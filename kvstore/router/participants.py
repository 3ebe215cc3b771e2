"""What a transaction is to the coordinator, and which part of it each store has.

Owns: the transaction as decoded, its result, the split by owner, putting what the parts read together again.
Promises: pure.
Leaves to others: the JSON (`routes.txn`), sending (`coordinator`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from kvstore.model import Condition, Read, TxnOp
from kvstore.protocol import Vote
from kvstore.transport.channel import Channel


class Transaction(msgspec.Struct, frozen=True):
    """What a client asks for: if all conditions hold, `then`, else `otherwise`.

    `chosen_anchor`: a key of it that is to be the anchor instead of the first that it names.
    """

    conditions: list[Condition]
    then: list[TxnOp]
    otherwise: list[TxnOp]
    chosen_anchor: str = ""

    @property
    def anchor(self) -> str:
        """The key whose store decides."""
        if self.chosen_anchor:
            return self.chosen_anchor
        return self.conditions[0].key if self.conditions else self.then[0].key

    @property
    def keys(self) -> list[str]:
        """The keys of conditions, and of both branches."""
        return [*(each.key for each in self.conditions), *(step.key for step in (*self.then, *self.otherwise))]

    @property
    def writes_only(self) -> bool:
        """Whether it has no get."""
        for branch in (self.then, self.otherwise):
            for step in branch:
                if step.op == "get":
                    return False
        return True

    @property
    def reads_only(self) -> bool:
        """Whether it writes nothing, and all that it asks can be told by the values of its keys."""
        steps = (*self.then, *self.otherwise)
        return all(step.op == "get" for step in steps) and all(c.token is None for c in self.conditions)


class Result(NamedTuple):
    """`version` is None if the branch that ran wrote nothing; `reads` are those of its gets, in order."""

    id: str
    succeeded: bool
    version: int | None
    reads: list[Read]


class TxnShare:
    """What one store has of a transaction. `then_gets`: the place of each of its gets among all of the branch."""

    __slots__ = ("channel", "conditions", "keys", "otherwise", "otherwise_gets", "then", "then_gets")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.keys: dict[str, None] = {}
        self.conditions: list[Condition] = []
        self.then: list[TxnOp] = []
        self.otherwise: list[TxnOp] = []
        self.then_gets: list[int] = []
        self.otherwise_gets: list[int] = []

    def add(self, steps: list[TxnOp], gets: list[int], step: TxnOp, place: int) -> None:
        """Append the step; `place` is that of the get among all of its branch."""
        steps.append(step)
        self.keys[step.key] = None
        if step.op == "get":
            gets.append(place)


def split(transaction: Transaction, owner_of: Callable[[str], Channel]) -> list[TxnShare]:
    """The parts of a transaction, by owner. Raises what `owner_of` raises."""
    parts: dict[str, TxnShare] = {}

    def part_of(key: str) -> TxnShare:
        channel = owner_of(key)
        part = parts.get(channel.shard_id)
        if part is None:
            part = parts[channel.shard_id] = TxnShare(channel)
        return part

    for condition in transaction.conditions:
        part = part_of(condition.key)
        part.conditions.append(condition)
        part.keys[condition.key] = None
    gets = 0
    for step in transaction.then:
        part = part_of(step.key)
        part.add(part.then, part.then_gets, step, gets)
        gets += step.op == "get"
    gets = 0
    for step in transaction.otherwise:
        part = part_of(step.key)
        part.add(part.otherwise, part.otherwise_gets, step, gets)
        gets += step.op == "get"
    return list(parts.values())


def holds(condition: Condition, read: Read) -> bool:
    """Whether the condition holds for what was read of its key."""
    if condition.exists is not None:
        return (read.value is not None) == condition.exists
    return read.value is not None and read.version == condition.version


def reads_of_others(
    others: list[TxnShare], votes: list[Vote], transaction: Transaction
) -> tuple[list[Read | None], list[Read | None]]:
    """What the gets of each branch found, in its order; None for those of the anchor's store."""
    if transaction.writes_only:
        return [], []
    branches: list[list[Read | None]] = [
        [None] * sum(step.op == "get" for step in branch) for branch in (transaction.then, transaction.otherwise)
    ]
    for part, vote in zip(others, votes, strict=True):
        reads = iter(vote.reads)
        for branch, places in zip(branches, (part.then_gets, part.otherwise_gets), strict=True):
            for place in places:
                branch[place] = next(reads)
    return branches[0], branches[1]
