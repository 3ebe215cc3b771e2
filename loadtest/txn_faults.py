"""What is done to a cluster while transactions run: processes that die at a named point, at random, or stand still.

Owns: the list of the points, the order of the faults, and doing one of them.
Promises: only processes of the given cluster are touched; a paused one is woken again.
Leaves to others: the load and the judgement (loadtest.txn_rounds), the signals (armed_cluster).

A slow point makes its process stand still there, each time it comes by, for about as long as a transaction may take:
then others resolve what it was at, and it goes on as if nothing had been. At the end it is killed, to be fast again.

A point that only recovery passes has to be provoked: who asks what became of an attempt has found an intent that its
router left behind, so for `ask-…` the routers are killed under load, again if need be.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

from loadtest import changes, processes
from loadtest.armed_cluster import ArmedCluster
from loadtest.changes import Change
from loadtest.processes import Pid
from loadtest.txn_wire import Wire, session

ROUTER_POINTS = (
    "txn-before-prepare-sent",
    "txn-after-prepare-sent",
    "txn-before-decide-sent",
    "txn-after-decide-sent",
    "txn-after-decided",
    "txn-before-finish-sent",
    "txn-after-finish-sent",
    "txn-before-forget-sent",
)
SHARD_POINTS = tuple(
    f"{step}-{side}-commit"
    for step in ("prepare", "decide", "finish", "abort", "ask", "forget")
    for side in ("before", "after")
)
RANDOM = ("kill router", "kill shard", "kill several", "kill all", "pause router")
SLOW = tuple(f"slow {point}" for point in (*ROUTER_POINTS, *SHARD_POINTS))
RESHARD = ("reshard", "reshard, kill shard", "reshard, kill several", "reshard, kill all")
NONE = "none"  # for comparison

# The process dies when it comes to the point for the n-th time, n random up to this; others: up to _TURNS_MAX.
_SELDOM = {"txn-before-forget-sent": 2, "abort": 3, "ask": 2, "forget": 2}
_TURNS_MAX = 60
_POLL_S = 0.02
_PROVOKE_EVERY_S = 2.0


class Fault(NamedTuple):
    """One of ROUTER_POINTS, SHARD_POINTS, SLOW, RANDOM or RESHARD; or NONE."""

    name: str

    @property
    def exists(self) -> bool:
        return bool(self.point) or self.name in RANDOM + RESHARD or self.name == NONE

    @property
    def is_slow(self) -> bool:
        return self.name in SLOW

    @property
    def point(self) -> str:
        """That at which a process dies or stands still; empty for the others."""
        name = self.name.removeprefix("slow ")
        return name if name in ROUTER_POINTS or name in SHARD_POINTS else ""


class Struck(NamedTuple):
    """What was done: to which processes, when it was over (on the monotonic clock), and whether it came about."""

    what: str
    killed: Sequence[Pid]
    over_s: float
    reached: bool = True


def plan(which: str, rounds: int, seed: int) -> list[Fault]:
    """`which`: failpoints, slow or reshard (each all in turn, again and again), random, or all (failpoints, random and
    slow by turns)."""
    rng = random.Random(seed)
    points = _in_turn((*ROUTER_POINTS, *SHARD_POINTS), rounds, rng)
    slow = _in_turn(SLOW, rounds, rng)
    others = [Fault(rng.choice(RANDOM)) for _ in range(rounds)]
    reshard = _in_turn(RESHARD, rounds, rng)
    kinds = {
        "failpoints": [points],
        "slow": [slow],
        "random": [others],
        "reshard": [reshard],
        "all": [points, others, slow],
    }[which]
    return [fault for faults in zip(*kinds, strict=True) for fault in faults][:rounds]


def _in_turn(names: Sequence[str], count: int, rng: random.Random) -> list[Fault]:
    """All of them before any comes again."""
    found: list[Fault] = []
    while len(found) < count:
        found += [Fault(name) for name in rng.sample(names, k=len(names))]
    return found[:count]


def arm(fault: Fault, cluster: ArmedCluster, rng: random.Random, txn_timeout_s: float) -> tuple[str, Pid] | None:
    """Before the load: arm the process that is to die or be slow, and say which it is. Raises RuntimeError."""
    if not fault.point:
        return None
    shard = f"shard-s{rng.randint(1, cluster.shards)}"
    name = shard if fault.point in SHARD_POINTS else f"router-{rng.randrange(cluster.routers)}"
    if fault.is_slow:
        action = f"pause:{round(1000 * txn_timeout_s * rng.choice((0.2, 0.6, 1.0, 1.4)))}"
    else:
        seldom = _SELDOM.get(fault.point, _SELDOM.get(fault.point.partition("-")[0], _TURNS_MAX))
        action = f"kill@{rng.randint(1, seldom)}"
    process = cluster.arm(name, f"{fault.point}={action}")
    if process is None:
        raise RuntimeError(f"{name} does not run")
    return name, process


async def strike(
    fault: Fault,
    cluster: ArmedCluster,
    armed: tuple[str, Pid] | None,
    rng: random.Random,
    txn_timeout_s: float,
    patience_s: float,
) -> Struck:
    """Under load: do it, or wait at most `patience_s` until the armed process has died by itself."""
    if armed is not None and fault.is_slow:
        await asyncio.sleep(patience_s / 2)
        return await _kill(cluster, [armed[0]], f"{armed[0]} was slow at {fault.point}")
    if armed is not None:
        return await _wait_for_death(fault, cluster, *armed, patience_s)
    await asyncio.sleep(rng.uniform(0.1, 0.8))  # the random moment
    if fault.name == NONE:
        return Struck("nothing happened", [], time.monotonic())
    if fault.name in RESHARD:
        return await _reshard(cluster, fault.name.partition(", ")[2], rng)
    if fault.name == "pause router":
        return await _pause_router(cluster, rng, txn_timeout_s)
    names = victims(fault.name, sorted(cluster.members()), rng)
    return await _kill(cluster, names, f"killed {', '.join(names)}")


async def _wait_for_death(fault: Fault, cluster: ArmedCluster, name: str, process: Pid, patience_s: float) -> Struck:
    provoked: list[Pid] = []
    began = last_s = time.monotonic()
    while processes.is_running(process):
        now_s = time.monotonic()
        if now_s - began > patience_s:
            cluster.arm(name, "")
            return Struck(f"{name} did not come to {fault.point}", provoked, now_s, reached=False)
        if fault.point.startswith("ask-") and now_s - last_s > (_PROVOKE_EVERY_S if provoked else 0.3):
            last_s = now_s
            provoked += [pid for number in range(cluster.routers) if (pid := cluster.kill(f"router-{number}"))]
        await asyncio.sleep(_POLL_S)
    return Struck(f"{name} died at {fault.point}", [*provoked, process], time.monotonic())


async def _pause_router(cluster: ArmedCluster, rng: random.Random, txn_timeout_s: float) -> Struck:
    """For longer than a transaction may take: what it then goes on with was resolved by others meanwhile."""
    name = f"router-{rng.randrange(cluster.routers)}"
    pause_s = txn_timeout_s * rng.uniform(1.2, 2.5)
    cluster.pause(name)
    try:
        await asyncio.sleep(pause_s)
    finally:
        cluster.wake(name)
    return Struck(f"{name} stood still for {pause_s:.1f} s", [], time.monotonic())


async def _reshard(cluster: ArmedCluster, kind: str, rng: random.Random) -> Struck:
    """One shard more, or one less if that was done before; while its moves stand some processes are killed."""
    async with session() as http:
        wire = Wire(http, cluster.urls, rng.randrange(1_000_000))
        document = await changes.cluster(wire)
        members = {shard["id"]: shard["weight"] for shard in document["shards"]}
        new = f"s{cluster.shards + 1}"
        change = Change("remove" if new in members else "add", new)
        await changes.ask(wire, change)
        what, killed = str(change), []
        if kind:
            await changes.until_moving(wire, change.after(members))
            await asyncio.sleep(rng.uniform(0.0, 0.3))
            names = victims(kind, sorted(cluster.members()), rng)
            killed = cluster.kill_all(names)
            what += f", killed {', '.join(names)}"
        await changes.until_settled(wire, change.after(members))
    return Struck(what, killed, time.monotonic())


def victims(kind: str, members: Sequence[str], rng: random.Random) -> list[str]:
    """Who is killed, of these processes."""
    routers = [name for name in members if name.startswith("router-")]
    shards = [name for name in members if name.startswith("shard-")]
    return {
        "kill router": rng.sample(routers, k=rng.randint(1, len(routers))),
        "kill shard": [rng.choice(shards)],
        "kill several": rng.sample(routers + shards, k=rng.randint(2, len(routers + shards) - 1)),
        "kill all": list(members),
    }[kind]


async def _kill(cluster: ArmedCluster, names: Sequence[str], what: str) -> Struck:
    pids = cluster.pids()
    targets = [pids[name] for name in names if name in pids]
    for target in targets:
        processes.send_signal(target, signal.SIGKILL)
    await processes.wait_gone(targets, 10.0)
    return Struck(what, targets, time.monotonic())
