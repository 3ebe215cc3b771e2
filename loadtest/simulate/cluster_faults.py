"""What happens to a simulated cluster: a schedule of faults and changes, drawn from the seed before it begins.

Owns: the kinds, and when they come.
Promises: each fault draws from a generator of its own, so a schedule from which some are taken out plays the others as
before. `heal` ends all of them.
Leaves to others: what each does (`process_faults`, `network_faults`, `disk_faults`, `copy_faults`, `changes`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from loadtest.simulate import changes, copy_faults, disk_faults, network_faults, process_faults
from loadtest.simulate.cluster import Cluster
from loadtest.simulate.environment import SYNC_S
from loadtest.simulate.network import lost_by_none
from loadtest.simulate.node import NodeServer

Act = Callable[[Cluster, random.Random], Awaitable[None]]

NEMESES: Mapping[str, Mapping[str, Act]] = {
    "kill": {
        "kill": process_faults.kill,
        "kill at a failpoint": process_faults.kill_at_failpoint,
        "orderly restart": process_faults.stop_in_order,
    },
    "power": {
        "power cut": process_faults.cut_power,
        "power cut in a call of the disk": process_faults.cut_power_in_call,
    },
    "pause": {"stand still": process_faults.stand_still, "sleep": process_faults.sleep},
    "network": {
        "cut": network_faults.cut,
        "cut one way": network_faults.cut_one_way,
        "isolate": network_faults.isolate,
        "reset": network_faults.reset,
        "slow link": network_faults.slow_link,
        "messages come twice": network_faults.send_twice,
    },
    "disk": {
        "sync fails": disk_faults.fail_sync,
        "slow disk": disk_faults.slow,
        "disk full": disk_faults.fill,
        "flip a bit": disk_faults.flip_a_bit,
    },
    "lose": {"lose a disk": disk_faults.lose},
    "copies": {
        "depose": copy_faults.depose,
        "interrupt a snapshot": copy_faults.interrupt,
        "die": copy_faults.die,
    },
    "late": {"pages come late": copy_faults.come_late},
    "early": {"return early": copy_faults.return_early},
    "thin": {"a copy falls out of a move": changes.fall_out},
    "many": {"many die": copy_faults.die_together},
    "ask": {"ask and die": copy_faults.ask_and_die},
    "clock": {"wall clock jumps": disk_faults.jump},
    "store": {"map store away": changes.take_record_away, "lose the record": changes.lose_record},
    "old-record": {"put an old record back": changes.put_record_back},
    "older": {"put an old copy back": copy_faults.put_old_back},
    "all-older": {"put all old copies back": copy_faults.put_all_old_back},
    "change": {
        "add a shard": changes.add_shard,
        "remove a shard": changes.remove_shard,
        "weigh a shard": changes.set_weight,
        "plan again": changes.replan,
        "cancel the moves": changes.cancel_moves,
        "leave behind": changes.leave_behind,
    },
}
ONLY_WITH_COPIES = ("copies", "late", "early", "thin", "many", "ask", "old-record", "older", "all-older")
# Each with a generator of its own, so a schedule without one is what it was before.
APART = {
    "late": "apart", "early": "early", "thin": "thin", "many": "mass", "ask": "pair", "all-older": "all-older",
    "old-record": "old-record",
}  # fmt: skip
# What they are about is lost by faults of the controller, too, at the wrong moment.
ALONE = ("old-record", "older", "all-older")
USUAL = tuple(each for each in NEMESES if each not in ALONE)
_ACTS = {kind: act for acts in NEMESES.values() for kind, act in acts.items()}
_WEIGHTS = {
    "depose": 3, "interrupt a snapshot": 2, "die": 2,
    "kill at a failpoint": 4, "reset": 2, "wall clock jumps": 2, "add a shard": 2, "remove a shard": 2,
    "weigh a shard": 2, "leave behind": 2, "lose a disk": 2,
}  # fmt: skip
_PAUSE_S = 0.9  # between two faults, in the mean
_PAUSE_APART_S = 40.0  # between two of those that are drawn apart


class Fault(NamedTuple):
    """`seed`: of its own generator."""

    at_s: float
    kind: str
    seed: int


def draw(rng: random.Random, seed: int, seconds: float, nemeses: Sequence[str]) -> list[Fault]:
    """The schedule of a run. `rng`: the generator for all but those of `APART`."""
    usual = [each for each in nemeses if each not in APART]
    faults = _drawn(rng, seconds, usual, _PAUSE_S)
    for nemesis in (each for each in nemeses if each in APART):
        apart = random.Random(f"{seed} schedule {APART[nemesis]}")
        faults += _drawn(apart, seconds, [nemesis], _PAUSE_APART_S if usual else _PAUSE_S)
    return sorted(faults)


def _drawn(rng: random.Random, seconds: float, nemeses: Sequence[str], pause_s: float) -> list[Fault]:
    kinds = [kind for nemesis in nemeses for kind in NEMESES[nemesis]]
    weights = [_WEIGHTS.get(kind, 1) for kind in kinds]
    faults: list[Fault] = []
    at_s = rng.expovariate(1 / pause_s)
    while at_s < seconds and kinds:
        faults.append(Fault(at_s, rng.choices(kinds, weights)[0], rng.getrandbits(32)))
        at_s += rng.expovariate(1 / pause_s)
    return faults


class Nemesis:
    """Plays a schedule."""

    def __init__(self, cluster: Cluster, schedule: Sequence[Fault]) -> None:
        self._cluster = cluster
        self._schedule = schedule
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, begin_s: float) -> None:
        """Begin each fault in its time. Raises what one of them finds."""
        loop = self._cluster.loop
        for fault in self._schedule:
            await asyncio.sleep(max(0.0, begin_s + fault.at_s - loop.time()))
            loop.note(f"fault: {fault.kind}")
            self._cluster.faults[fault.kind] += 1
            self._tasks.append(loop.create_task(self._play(fault)))
        for task in self._tasks:
            await task

    async def _play(self, fault: Fault) -> None:
        await _ACTS[fault.kind](self._cluster, random.Random(fault.seed))

    def heal(self) -> None:
        """From now on there are no faults."""
        cluster = self._cluster
        cluster.kill_points.kill_at.clear()
        cluster.controller.register.away = False
        cluster.network.slow.clear()
        cluster.network.doubles = False
        cluster.network.heal_links(list(cluster.network.cut), 0.5)
        cluster.network.loses = lost_by_none
        cluster.network.end_lateness(list(cluster.network.late))
        for server in cluster.servers:
            server.disk.capacity = None
            server.disk.power_cut_at = 0
            server.environment.sync_s = SYNC_S
            if server.process is not None:
                server.process.dies_after = None
            if isinstance(server, NodeServer):
                server.sync_fails = False
