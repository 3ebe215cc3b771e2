"""What is done to a cluster while partitions move: processes that die or stand still.

Owns: the list of the points, the plan of the rounds, doing and watching one fault.
Promises: only processes of the given cluster are touched; one that stands still is woken again.
Leaves to others: the load and the judgement (loadtest.move_rounds), the signals (armed_cluster).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from loadtest import processes
from loadtest.armed_cluster import ArmedCluster
from loadtest.changes import Change
from loadtest.processes import Pid

Role = Literal["source", "destination", "controller", "router", "everything"]

SOURCE_POINTS = tuple(f"{step}-{side}-commit" for step in ("fence", "adopt", "trim") for side in ("before", "after"))
DESTINATION_POINTS = (
    *(f"{step}-{side}-commit" for step in ("adopt", "clear", "take", "complete") for side in ("before", "after")),
    *(f"move-{where}" for where in ("before-copy", "after-copy", "before-fence", "after-fence")),
    "move-after-last-pull",
    "move-after-complete",
)
CONTROLLER_POINTS = (
    "controller-before-plan",
    "controller-after-plan",
    "move-after-fence-seen",
    "move-before-commit",
    "move-after-commit",
    "move-before-void",
)
_POINTS: Mapping[Role, Sequence[str]] = {
    "source": SOURCE_POINTS,
    "destination": DESTINATION_POINTS,
    "controller": CONTROLLER_POINTS,
}
_POLL_S = 0.02
_LATE_S = 0.2  # the death of a process is seen so much later at most, on a busy machine
_TURNS_MAX = 3
_STILL_S = 2.8  # longer than limits.move_fence_timeout_s
_SELDOM = ("controller-", "adopt-", "trim-", "clear-", "move-before-void")


class Fault(NamedTuple):
    """At the `turn`-th passing of the point a process of that role dies, or stands still until it is woken; without a
    point at a random moment of the change. `everything` is all processes, at once."""

    role: Role
    point: str = ""
    action: Literal["kill", "stop"] = "kill"
    turn: int = 1

    def __str__(self) -> str:
        where = f"at {self.point}" + (f" ({self.turn})" if self.turn > 1 else "") if self.point else "at random"
        return f"{self.action} {self.role} {where}"


class Round(NamedTuple):
    """`more`: changes that are asked for soon after the first one, on whose parts the faults fall."""

    change: Change
    faults: Sequence[Fault]
    more: Sequence[Change] = ()


class Outage(NamedTuple):
    """From when to when (monotonic) a process was not there, or stood still."""

    name: str
    begin_s: float
    end_s: float

    @property
    def is_felt(self) -> bool:
        """Calls may fail meanwhile. The controller is needed by none."""
        return not self.name.startswith("controller-")


# --- what is to be done ----------------------------------------------------------------------------------------------


def all_points(shards: int, seed: int, turns_max: int = 2) -> list[Round]:
    """Every point once: as many as go together in a round, one for each process that takes part.

    The changes go there and back again: a shard is added and removed, another one gets weight and loses it.
    """
    rng = random.Random(seed)
    left = {role: rng.sample(points, k=len(points)) for role, points in _POINTS.items()}
    first = members = {f"s{number}": 1 for number in range(1, shards + 1)}
    rounds: list[Round] = []
    for change in itertools.cycle(_there_and_back(shards)):
        if members == first and not any(left.values()):
            break
        sources, destinations = change.shards(members)
        points: list[tuple[Role, str]] = []
        points += [("source", left["source"].pop()) for _ in sources[: len(left["source"])]]
        points += [("destination", left["destination"].pop()) for _ in destinations[: len(left["destination"])]]
        if (point := _of_controller(left["controller"], [point for _, point in points])) is not None:
            points.append(("controller", point))
        rounds.append(Round(change, [_fault(role, point, rng.randint(1, turns_max)) for role, point in points]))
        members = change.after(members)
    return rounds


def _of_controller(left: list[str], others: Sequence[str]) -> str | None:
    """One of those left. Nothing is voided unless a destination dies when it has begun."""
    is_voided = any(point in DESTINATION_POINTS and not point.startswith("adopt-") for point in others)
    for point in left if is_voided else [point for point in left if point != "move-before-void"]:
        left.remove(point)
        return point
    return None


def _there_and_back(shards: int) -> list[Change]:
    new = f"s{shards + 1}"
    return [Change("add", new), Change("remove", new), Change("weigh", "s1", 4), Change("weigh", "s1", 1)]


def _fault(role: Role, point: str, turn: int, action: Literal["kill", "stop"] = "kill") -> Fault:
    """Points that are passed seldom are met the first time."""
    return Fault(role, point, action, 1 if point.startswith(_SELDOM) else turn)


def at_random(rounds: int, shards: int, seed: int) -> list[Round]:
    """Any of the faults, one to three in a round, half of them at no named point."""
    rng = random.Random(seed)
    changes = itertools.cycle([*([change] for change in _there_and_back(shards)), *_together(shards)])
    found = []
    for _ in range(rounds):
        first, *more = next(changes)
        found.append(Round(first, [_any(rng) for _ in range(rng.randint(1, 3))], more))
    return found


def _together(shards: int) -> list[list[Change]]:
    """Changes that overtake one another; there and back again, too."""
    new, newer = f"s{shards + 1}", f"s{shards + 2}"
    return [
        [Change("add", new), Change("weigh", "s1", 3)],
        [Change("remove", new), Change("weigh", "s1", 1)],
        [Change("weigh", "s1", 4), Change("weigh", "s2", 3), Change("replan")],
        [Change("weigh", "s2", 1), Change("replan"), Change("weigh", "s1", 1)],
        [Change("add", new), Change("add", newer), Change("remove", "s2")],
        [Change("add", "s2"), Change("remove", newer), Change("remove", new)],
    ]


def _any(rng: random.Random) -> Fault:
    roles: tuple[Role, ...] = ("source", "destination", "controller", "router", "everything")
    role = rng.choice(roles)
    point = rng.choice(_POINTS[role]) if role in _POINTS and rng.random() < 0.5 else ""
    action: Literal["kill", "stop"] = "stop" if role in _POINTS and rng.random() < 0.25 else "kill"
    return _fault(role, point, rng.randint(1, _TURNS_MAX), action)


# --- doing it --------------------------------------------------------------------------------------------------------


def cast(the_round: Round, members: Mapping[str, int], cluster: ArmedCluster, rng: random.Random) -> dict[str, Fault]:
    """Which process meets which fault: none has two at a point, as far as there are enough of them."""
    sources, destinations = the_round.change.shards(members)
    free = {
        "source": [f"shard-{shard}" for shard in sources],
        "destination": [f"shard-{shard}" for shard in destinations],
        "controller": ["controller-0"],
        "router": [f"router-{number}" for number in range(cluster.routers)],
        "everything": ["everything"],
    }
    found = {}
    for fault in the_round.faults:
        names = [name for name in free[fault.role] if name not in found]
        if names:
            found[rng.choice(names)] = fault
    return found


async def strike(cluster: ArmedCluster, name: str, fault: Fault, delay_s: float) -> Outage:
    """A fault at no point: after that time. Returns when all is ready again."""
    await asyncio.sleep(delay_s)
    began_s = time.monotonic()
    if fault.action == "stop":
        return await _sleep_through(cluster, name, began_s)
    names = cluster.members() if name == "everything" else {name}
    victims = cluster.kill_all(names)
    await processes.wait_gone(victims, 10.0)
    await cluster.wait_ready(30.0)
    return Outage(name, began_s, time.monotonic())


async def watch(cluster: ArmedCluster, name: str, fault: Fault, armed: Pid | None, is_met: asyncio.Event) -> Outage:
    """The armed process meets its fault: for ever, if it does not. `armed` None: it is still to be started.

    `is_met` is set then; returns when all is ready again.
    """
    while armed is None:
        armed = cluster.pids().get(name)
        await asyncio.sleep(_POLL_S)
    while True:
        seen_s = time.monotonic()
        if fault.action == "stop" and cluster.stands_still(armed):
            is_met.set()
            return await _sleep_through(cluster, name, seen_s - _LATE_S)
        if fault.action == "kill" and not processes.is_running(armed):
            is_met.set()
            await cluster.wait_ready(30.0)
            return Outage(name, seen_s - _LATE_S, time.monotonic())
        await asyncio.sleep(_POLL_S)


async def _sleep_through(cluster: ArmedCluster, name: str, began_s: float) -> Outage:
    """For longer than a fence may last; then it wakes."""
    if name in cluster.pids():
        cluster.pause(name)
        await asyncio.sleep(_STILL_S)
        cluster.wake(name)
    await cluster.wait_ready(30.0)
    return Outage(name, began_s, time.monotonic())
