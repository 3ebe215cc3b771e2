"""Histories of a simulated store that is right, of any size; the same seed makes the same history."""

from __future__ import annotations

import heapq
import itertools
import random

import msgspec

from loadtest.histories.history import Register


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`skew`: 0 for keys that are all alike, about 1 for Zipf's law. `unknown`: the share of operations without an
    answer, of which half are never done and the others at some later time. `versions`: answers tell them."""

    operations: int = 100_000
    keys: int = 1_000
    clients: int = 32
    skew: float = 0.0
    unknown: float = 0.0
    versions: bool = True
    seed: int = 1


def simulate(plan: Plan) -> list[Register]:
    """What the clients of a linearizable store would have recorded, in the order of the ends. There are some more than
    planned: those that are under way when there are enough come to their ends."""
    return _Simulation(plan).run()


class _Simulation:
    """Each operation takes effect at one instant between its begin and its end."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._weights = list(itertools.accumulate(1 / rank**plan.skew for rank in range(1, plan.keys + 1)))
        self._state: dict[str, tuple[str | None, int]] = {}
        self._read: dict[tuple[str, str], str | None] = {}  # what a client knows of a key
        self._numbers = itertools.count(1)
        self._ordinals = itertools.count()  # of events at the same time, the earlier planned is first
        self._events: list[tuple[float, int, str, Register]] = []
        self._history: list[Register] = []

    def run(self) -> list[Register]:
        for number in range(self._plan.clients):
            self._begin(f"c{number}", self._random.random())
        while self._events:
            now_s, _, phase, operation = heapq.heappop(self._events)
            if phase == "effect":
                self._apply(operation)
                continue
            if operation.outcome == "unknown":
                operation.value = None if operation.action in ("read", "delete") else operation.value
                operation.version, operation.met = None, True
            elif operation.action != "delete":
                self._read[operation.client, operation.key] = operation.value if operation.met else None
            self._history.append(operation)
            if len(self._history) < self._plan.operations:
                self._begin(operation.client, now_s)
        return self._history

    def _begin(self, client: str, now_s: float) -> None:
        draw = self._random
        begin_s = now_s + draw.random() * 0.001
        effect_s = begin_s + draw.expovariate(1000)
        end_s = effect_s + draw.expovariate(1000)
        key = f"k{draw.choices(range(self._plan.keys), cum_weights=self._weights)[0]}"
        action = draw.choices(("read", "write", "swap", "delete"), (50, 30, 15, 5))[0]
        value = f"v{next(self._numbers)}" if action in ("write", "swap") else None
        operation = Register(client=client, begin_s=begin_s, key=key, action=action, value=value)  # type: ignore[arg-type]
        operation.expected = self._read.get((client, key)) if action == "swap" else None
        is_unknown = draw.random() < self._plan.unknown
        if not is_unknown:
            operation.outcome, operation.end_s = "done", end_s
        else:
            effect_s = begin_s + draw.expovariate(5)
        if not is_unknown or (action != "read" and draw.random() < 0.5):
            self._plan_event(effect_s, "effect", operation)
        self._plan_event(end_s, "end", operation)

    def _plan_event(self, at_s: float, phase: str, operation: Register) -> None:
        heapq.heappush(self._events, (at_s, next(self._ordinals), phase, operation))

    def _apply(self, operation: Register) -> None:
        """The store does it, and what it answers is put into the operation."""
        value, version = self._state.get(operation.key, (None, 0))
        if operation.action == "read":
            operation.value = value
        elif operation.action == "swap" and value != operation.expected:
            operation.met = operation.outcome == "unknown"
        else:
            version += 1
            self._state[operation.key] = (operation.value, version)
        if self._plan.versions and operation.outcome == "done":
            gone = operation.action != "delete" and self._state.get(operation.key, (None, 0))[0] is None
            operation.version = None if gone else version
