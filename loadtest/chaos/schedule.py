"""Which faults come when: a schedule from a seed.

Owns: the nemeses, their kinds of faults, how long each lasts and how soon the next one comes.
Promises: pure. The same seed gives the same schedule. Every nemesis asked for has its turn in each phase; all kinds
of one nemesis have theirs before any comes again; all faults are over `CALM_S` before the end of the phase, so that
what they held up has come to its end when the clients rest.
Leaves to others: carrying it out, and on whom: a step says by which draw the victims are chosen from the processes that
there are then (loadtest.chaos.nemeses).

Each nemesis goes its own way, so that its faults overlap with those of the others. What happens while shards come and
go is worth most, so each step of `reshard` takes one of another nemesis along, a moment later.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

Nemesis = Literal[
    "kill",
    "pause",
    "partition",
    "disk",
    "maps",
    "reshard",
    "die",
    "lose-disk",
    "stop",
    "cut",
    "rot",
    "promote",
    "sweep",
]

OF_COPIES: tuple[Nemesis, ...] = ("die", "lose-disk", "stop", "cut", "rot", "promote")  # what only copies survive
OF_ONE: tuple[Nemesis, ...] = ("kill", "pause", "partition", "disk", "maps", "reshard")
NEMESES: tuple[Nemesis, ...] = (*OF_ONE, *OF_COPIES)
SWEEP: Nemesis = "sweep"  # by itself: it needs all processes
KINDS: Mapping[Nemesis, Sequence[str]] = {
    "kill": ("router", "shard", "controller", "several", "all", "for some time", "at a point"),
    "pause": ("router", "shard", "controller", "several", "at a point", "slow at a point"),
    "partition": ("cut one way", "cut both ways", "isolate", "stall", "delay", "drop", "duplicate", "reset"),
    "disk": ("slow", "all slow", "slow, then its power is cut"),
    "reshard": ("add", "remove", "weigh", "cancel", "two at once"),
    "maps": ("kept from a source and a router",),
    "die": ("one node", "two nodes", "node and controller"),
    "lose-disk": ("at once", "after a while"),
    "stop": ("one node", "two nodes", "node and controller"),
    "cut": ("nodes one way", "nodes both ways", "node alone"),
    "rot": ("log", "file", "log of a dead node", "file of a dead node"),
    "promote": ("planned",),
    SWEEP: ("every point",),
}
LASTING_KILLS = ("for some time", "at a point")  # the others are over at once
PHASE_S_MIN = 16.0
PHASE_S_MAX = 60.0
HASTY_PHASE_S = 20.0  # for a run that is to find what is wrong soon
CALM_S = 6.0
_FIRST_S = 2.0  # of a phase nothing happens
_FIRST_WITHIN_S = 3.0
_LASTS_S_MIN = 1.0  # unless it is a moment
_LONGEST_S = 7.0  # longer than any time-out in loadtest.chaos.cluster.LIMITS


class Step(NamedTuple):
    """A fault of the schedule.
    When it begins, counted from the beginning of its phase, and for how long it lasts (0: a moment).

    `draw` is the seed of all choices that are left.
    """

    at_s: float
    for_s: float
    nemesis: Nemesis
    kind: str
    draw: int

    @property
    def end_s(self) -> float:
        return self.at_s + self.for_s


class _Habits(NamedTuple):
    """From the end of one fault to the next, and how long a fault lasts, from and to (seconds)."""

    gap_s: tuple[float, float]
    lasts_s: tuple[float, float]


_HABITS: Mapping[Nemesis, _Habits] = {
    "kill": _Habits((2.0, 7.0), (1.0, 5.0)),
    "pause": _Habits((2.0, 6.0), (2.5, _LONGEST_S + 1.5)),
    "partition": _Habits((1.0, 4.0), (1.0, 6.0)),
    "disk": _Habits((1.0, 5.0), (1.0, 5.0)),
    "maps": _Habits((1.0, 4.0), (1.0, 3.0)),
    "reshard": _Habits((4.0, 9.0), (0.0, 0.0)),
    "die": _Habits((3.0, 8.0), (4.0, _LONGEST_S + 1.0)),  # longer than a failover
    "lose-disk": _Habits((5.0, 12.0), (3.0, 6.0)),
    "stop": _Habits((3.0, 8.0), (3.0, _LONGEST_S + 1.0)),  # longer than every lease
    "cut": _Habits((3.0, 8.0), (3.0, _LONGEST_S)),
    "rot": _Habits((5.0, 12.0), (1.0, 4.0)),
    "promote": _Habits((2.0, 7.0), (0.0, 0.0)),
}


def phases(seconds: float, longest_s: float = PHASE_S_MAX) -> list[float]:
    """How long each phase of a run lasts: all the same, and none longer than that by much."""
    count = max(1, round(seconds / longest_s))
    return [max(seconds / count, PHASE_S_MIN)] * count


def plan(seed: int, phase: int, seconds: float, nemeses: Sequence[Nemesis]) -> list[Step]:
    """The faults of one phase, in the order in which they begin. `seconds` is at least PHASE_S_MIN."""
    rng = random.Random(f"{seed}/{phase}")
    end_s = seconds - CALM_S
    if SWEEP in nemeses:
        return [Step(_FIRST_S, end_s - _FIRST_S, SWEEP, KINDS[SWEEP][0], rng.randrange(2**32))]
    steps: list[Step] = []
    for nemesis in NEMESES:  # in this order, however they were asked for
        if nemesis in nemeses:
            steps += _lane(nemesis, end_s, rng, max(1.0, len(nemeses) / len(OF_ONE)))
    others = [nemesis for nemesis in NEMESES if nemesis in nemeses and nemesis != "reshard"]
    if others:
        steps += [_companion(rng.choice(others), step, end_s, rng) for step in steps if step.nemesis == "reshard"]
    return sorted(steps)


def _lane(nemesis: Nemesis, end_s: float, rng: random.Random, rest: float) -> Iterator[Step]:
    """`rest`: the more nemeses there are, the longer each of them rests, so that something is done in between."""
    kinds = _in_turn(KINDS[nemesis], rng)
    at_s = _FIRST_S + rng.uniform(0.0, _FIRST_WITHIN_S)
    is_first = True
    while at_s <= end_s - _LASTS_S_MIN:
        kind = next(kinds)
        step = _step(at_s, nemesis, kind, end_s, rng)
        if nemesis == "pause" and is_first:  # at least this one outlasts every time-out, if the phase does
            step = step._replace(for_s=min(_LONGEST_S + rng.uniform(0.0, 1.5), end_s - at_s))
        yield step
        at_s = step.end_s + rest * rng.uniform(*_HABITS[nemesis].gap_s)
        is_first = False


def _in_turn(kinds: Sequence[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(kinds, k=len(kinds))


def _step(at_s: float, nemesis: Nemesis, kind: str, end_s: float, rng: random.Random) -> Step:
    is_moment = nemesis == "kill" and kind not in LASTING_KILLS
    for_s = 0.0 if is_moment else min(rng.uniform(*_HABITS[nemesis].lasts_s), end_s - at_s)
    return Step(at_s, for_s, nemesis, kind, rng.randrange(2**32))


def _companion(nemesis: Nemesis, of: Step, end_s: float, rng: random.Random) -> Step:
    """A fault soon after that one."""
    at_s = min(of.at_s + rng.uniform(0.05, 1.2), end_s - _LASTS_S_MIN)
    return _step(at_s, nemesis, rng.choice(KINDS[nemesis]), end_s, rng)
