"""Clients of a simulated store: how they call it, and how what they are told enters the history.

Owns: the way of a call, and what its answer means.
Promises: each value is written once in a whole history, and a call without an answer enters as one of unknown outcome.
Leaves to others: the way to the store (`machine`), what is called (`store_registers`, `store_groups`, `store_sets`,
`store_leases`), whether the history can be (`loadtest.histories`).
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, Literal

from kvstore.model import Attempt
from kvstore.protocol import Answer
from loadtest.histories.history import AnyOperation, Register
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.store_machine import Lost, StoreMachine

PATIENCE_S = 3.0
_REFUSED = frozenset({409, 413, 421, 423, 429, 503, 507})

Outcome = Literal["done", "refused", "unknown"]


class History:
    """What all clients did."""

    def __init__(self, machine: StoreMachine) -> None:
        self.operations: list[AnyOperation] = []
        self.calls = 0
        self.values = 0
        self._machine = machine

    def add(self, operation: AnyOperation) -> None:
        self.operations.append(operation)
        self._machine.loop.note(f"{operation.client}: {operation!r}")

    def next_value(self) -> int:
        self.values += 1
        return self.values


class Client:
    """One client, which does one thing after another."""

    def __init__(self, name: str, machine: StoreMachine, history: History, rng: random.Random) -> None:
        self.name = name
        self.machine = machine
        self.history = history
        self.rng = rng
        self.stamp = 0  # of its youngest attempt
        self._ids = 0

    @property
    def now_s(self) -> float:
        return self.machine.loop.time()

    def id(self) -> int:
        """Of the next message."""
        self._ids += 1
        self.history.calls += 1
        return self._ids

    def attempt(self) -> Attempt:
        """Of a transaction; younger than all before."""
        self.stamp = max(self.stamp + 1, int(self.now_s * 1e6) + 1)
        return Attempt(self.stamp, self.stamp, self.name)

    def value(self) -> str:
        """Some are so large that a few of them fill a segment of the log."""
        number = self.history.next_value()
        return f"v{number}" + "x" * (self.rng.randrange(20_000) if self.rng.random() < 0.15 else 0)

    async def ask(self, op: Any, patience_s: float = PATIENCE_S) -> Any:
        """None if it is not known what became of it."""
        try:
            reply = await self.machine.ask(op, patience_s)
        except Lost:
            return None
        if isinstance(reply, Answer) and reply.status >= 500 and reply.status not in _REFUSED:
            raise Violation(f"{op!r} was answered {reply!r}")
        return reply

    async def insist(self, op: Any) -> Any:
        """The answer, however long that takes."""
        while True:
            reply = await self.ask(op)
            if reply is not None and not (isinstance(reply, Answer) and reply.status in _REFUSED):
                return reply
            await asyncio.sleep(self.rng.uniform(0.01, 0.2))

    def note(self, kind: type[AnyOperation], begin_s: float, outcome: Outcome, **more: Any) -> None:
        """An operation, which ends now, if it does."""
        end_s = None if outcome == "unknown" else self.now_s
        self.history.add(kind(client=self.name, begin_s=begin_s, end_s=end_s, outcome=outcome, **more))

    def note_register(self, key: str, action: str, begin_s: float, outcome: Outcome, **more: Any) -> None:
        self.note(Register, begin_s, outcome, key=key, action=action, **more)


def short(value: bytes | None) -> str | None:
    """Values in histories without what makes them large."""
    return None if value is None else value.decode().rstrip("x")


def outcome_of(reply: Answer | None, also_refused: int = 0) -> Outcome:
    if reply is None:
        return "unknown"
    return "refused" if reply.status in _REFUSED or reply.status == also_refused else "done"
