"""What happens to a simulated cluster: a schedule of faults and changes, drawn from the seed before it begins.

Owns: the kinds, when they come, and what each does.
Promises: each fault draws from a generator of its own, so a schedule from which some are taken out plays the others as
before. `heal` ends all of them.
Leaves to others: what a fault means to its victim (`servers`, `network`, `disk`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

from kvstore import failpoints
from kvstore.controller.service import ClusterService
from kvstore.errors import KvError
from loadtest.simulate.cluster import SHARDS_MAX, Cluster
from loadtest.simulate.copy_faults import depose, die, interrupt, put_old_back
from loadtest.simulate.disk import keep_all, lose_all
from loadtest.simulate.node import NodeServer
from loadtest.simulate.servers import Server

POINTS = tuple(dict.fromkeys(point for points in failpoints.POINTS.values() for point in points))
NEMESES: dict[str, tuple[str, ...]] = {
    "kill": ("kill", "kill at a failpoint", "orderly restart"),
    "power": ("power cut", "power cut in a call of the disk"),
    "pause": ("stand still", "sleep"),
    "network": ("cut", "cut one way", "isolate", "reset", "slow link", "messages come twice"),
    "disk": ("sync fails", "slow disk", "disk full", "flip a bit"),
    "lose": ("lose a disk",),
    "copies": ("depose", "interrupt a snapshot", "die"),
    "clock": ("wall clock jumps",),
    "store": ("map store away", "lose the record"),
    "older": ("put an old copy back",),
    "change": ("add a shard", "remove a shard", "weigh a shard", "plan again", "cancel the moves", "leave behind"),
}
ONLY_WITH_COPIES = ("copies", "older")
ALONE = ("older",)  # what it is about is lost by faults of the controller, too, if they come at the wrong moment
USUAL = tuple(each for each in NEMESES if each not in ALONE)
_WEIGHTS = {
    "depose": 3, "interrupt a snapshot": 2, "die": 2,
    "kill at a failpoint": 4, "reset": 2, "wall clock jumps": 2, "add a shard": 2, "remove a shard": 2,
    "weigh a shard": 2, "leave behind": 2, "lose a disk": 2,
}  # fmt: skip
_PAUSE_S = 0.9  # between two faults, in the mean
_SYNC_S = 0.0001
_LOOK_S, _LOOKS = 0.02, 50


class Fault(NamedTuple):
    """`seed`: of its own generator."""

    at_s: float
    kind: str
    seed: int


def draw(rng: random.Random, seconds: float, nemeses: Sequence[str]) -> list[Fault]:
    """The schedule of a run."""
    kinds = [kind for nemesis in nemeses for kind in NEMESES[nemesis]]
    weights = [_WEIGHTS.get(kind, 1) for kind in kinds]
    faults: list[Fault] = []
    at_s = rng.expovariate(1 / _PAUSE_S)
    while at_s < seconds and kinds:
        faults.append(Fault(at_s, rng.choices(kinds, weights)[0], rng.getrandbits(32)))
        at_s += rng.expovariate(1 / _PAUSE_S)
    return faults


class Nemesis:
    """Plays a schedule."""

    def __init__(self, cluster: Cluster, schedule: Sequence[Fault]) -> None:
        self._cluster = cluster
        self._schedule = schedule
        self._tasks: list[asyncio.Task[None]] = []
        self._healed = False
        self.kinds: dict[str, Callable[[random.Random], Awaitable[None]]] = {
            "kill": self._kill, "kill at a failpoint": self._kill_at_point, "orderly restart": self._close,
            "power cut": self._cut_power, "power cut in a call of the disk": self._cut_in_call,
            "stand still": self._stand_still, "sleep": self._sleep,
            "cut": self._cut, "cut one way": self._cut_one_way, "isolate": self._isolate, "reset": self._reset,
            "slow link": self._slow_link, "sync fails": self._fail_sync, "slow disk": self._slow_disk,
            "disk full": self._fill, "flip a bit": self._flip, "wall clock jumps": self._jump,
            "map store away": self._take_store_away, "add a shard": self._add, "remove a shard": self._remove,
            "weigh a shard": self._weigh, "plan again": self._plan, "leave behind": self._leave_behind,
            "messages come twice": self._double, "lose a disk": self._lose_disk,
            "lose the record": self._lose_record,
            "cancel the moves": self._cancel, "depose": partial(depose, cluster),
            "interrupt a snapshot": partial(interrupt, cluster), "die": partial(die, cluster),
            "put an old copy back": partial(put_old_back, cluster),
        }  # fmt: skip

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
        await self.kinds[fault.kind](random.Random(fault.seed))

    def heal(self) -> None:
        """From now on there are no faults."""
        cluster = self._cluster
        self._healed = True
        cluster.kill_at.clear()
        cluster.controller.register.away = False
        cluster.network.slow.clear()
        cluster.network.doubles = False
        for link in list(cluster.network.cut):
            cluster.network.heal_link(link, 0.5)
        for server in cluster.servers:
            server.disk.capacity = None
            server.disk.power_cut_at = 0
            server.environment.sync_s = _SYNC_S
            if server.process is not None:
                server.process.dies_after = None
            if isinstance(server, NodeServer):
                server.sync_fails = False

    # --- whom it meets ------------------------------------------------------------------------------------------------

    def _any(self, rng: random.Random) -> Server:
        """A node, mostly."""
        cluster = self._cluster
        chosen = rng.random()
        if chosen < 0.2:
            return rng.choice(cluster.routers)
        return cluster.controller if chosen < 0.35 else self._node(rng)

    def _node(self, rng: random.Random) -> NodeServer:
        return rng.choice(list(self._cluster.nodes.values()))

    def _hosts(self, rng: random.Random) -> tuple[str, str]:
        one = self._any(rng).name
        others = [server.name for server in self._cluster.servers if server.name != one]
        return one, rng.choice(others)

    # --- processes ----------------------------------------------------------------------------------------------------

    async def _kill(self, rng: random.Random) -> None:
        process = self._any(rng).process
        if process is not None:
            process.dies_after = rng.randrange(300)

    async def _kill_at_point(self, rng: random.Random) -> None:
        self._cluster.kill_at[rng.choice(POINTS)] = rng.randint(1, 3)

    async def _close(self, rng: random.Random) -> None:
        self._node(rng).stop()

    async def _cut_power(self, rng: random.Random) -> None:
        """Of a node, of which only the disk stays; of another one, which has nothing to lose."""
        server = self._any(rng)
        if isinstance(server, NodeServer):
            server.cut_power(_fate(rng))
        else:
            server.lose_power()

    async def _cut_in_call(self, rng: random.Random) -> None:
        node = self._node(rng)
        node.fate = _fate(rng)
        node.disk.power_cut_at = node.disk.calls + rng.randint(1, 40)

    async def _stand_still(self, rng: random.Random) -> None:
        process = self._any(rng).process
        if process is not None and not process.stands_still:
            process.stands_still = True
            await asyncio.sleep(rng.choice((0.05, 0.5, 3.0, 8.0)) * rng.random())
            self._cluster.loop.go_on(process)

    async def _sleep(self, rng: random.Random) -> None:
        """Its host sleeps, and its clock with it."""
        process = self._any(rng).process
        if process is not None and not process.stands_still:
            process.stands_still = True
            slept_s = rng.choice((0.05, 0.5, 3.0, 8.0)) * rng.random()
            await asyncio.sleep(slept_s)
            self._cluster.loop.wake(process, slept_s)

    # --- links --------------------------------------------------------------------------------------------------------

    async def _cut(self, rng: random.Random) -> None:
        one, other = self._hosts(rng)
        await self._cut_links(rng, [(one, other), (other, one)])

    async def _cut_one_way(self, rng: random.Random) -> None:
        await self._cut_links(rng, [self._hosts(rng)])

    async def _isolate(self, rng: random.Random) -> None:
        one = self._any(rng).name
        others = [server.name for server in self._cluster.servers if server.name != one]
        links = [(one, other) for other in others] + [(other, one) for other in others]
        await self._cut_links(rng, links)

    async def _cut_links(self, rng: random.Random, links: list[tuple[str, str]], seconds: float = 0.0) -> None:
        """For so long; if that is 0, for a while."""
        network = self._cluster.network
        for link in links:
            network.cut_link(link)
        await asyncio.sleep(seconds or rng.choice((0.1, 1.0, 6.0)) * rng.random())
        reset_share = rng.choice((0.0, 0.5, 1.0))
        for link in links:
            network.heal_link(link, reset_share)

    async def _reset(self, rng: random.Random) -> None:
        for one, other in combinations([server.name for server in self._cluster.servers], 2):
            if rng.random() < 0.3:
                self._cluster.network.reset_between(one, other)

    async def _slow_link(self, rng: random.Random) -> None:
        network, link = self._cluster.network, self._hosts(rng)
        network.slow[link] = rng.choice((0.005, 0.05, 0.3))
        await asyncio.sleep(rng.uniform(0.2, 4.0))
        network.slow.pop(link, None)

    async def _double(self, rng: random.Random) -> None:
        self._cluster.network.doubles = True
        await asyncio.sleep(rng.uniform(0.5, 5.0))
        self._cluster.network.doubles = False

    # --- disks, clocks, the controller's store ------------------------------------------------------------------------

    async def _fail_sync(self, rng: random.Random) -> None:
        self._node(rng).sync_fails = True

    async def _slow_disk(self, rng: random.Random) -> None:
        """At the end, often, the power is cut while something is not synced that others have."""
        node = self._node(rng)
        node.environment.sync_s = rng.choice((0.005, 0.02, 0.1))
        await asyncio.sleep(rng.uniform(0.1, 3.0))
        if rng.random() < 0.5:
            node.cut_power(_fate(rng))
        node.environment.sync_s = _SYNC_S

    async def _fill(self, rng: random.Random) -> None:
        node = self._node(rng)
        disk, node.was_full = node.disk, True
        disk.capacity = disk.used_bytes + rng.choice((0, 1000, 150_000, 250_000, 500_000))
        await asyncio.sleep(rng.uniform(0.1, 3.0))
        disk.capacity = None

    async def _flip(self, rng: random.Random) -> None:
        """A bit of a log is wrong while its node starts: it must refuse, or not mind.
        Then the disk is mended. Or another copy takes the place of the damaged one, which is rebuilt; if
        there is none, the disk is mended."""
        node = self._node(rng)
        if not node.folder.engines or node.process is None:
            return
        node.process.kill()
        path = rng.choice(sorted(node.disk.files))
        bit = rng.randrange(8 * max(1, len(node.disk.content(path))))
        if node.is_damaged or bit >= 8 * len(node.disk.content(path)):
            return
        node.disk.flip(path, bit)
        node.is_damaged = True
        while node.is_damaged and not node.refused:
            await asyncio.sleep(0.05)
            if node.node is not None and not node.node.stores.damage:
                break
            if node.process is not None and self._damage_stays(node):
                node.refused = True
                node.process.kill()
        if node.refused and path in node.disk.files:
            node.disk.flip(path, bit)
        node.is_damaged = node.refused = False

    def _damage_stays(self, node: NodeServer) -> bool:
        """Whether it is the primary of a damaged store that no other copy can take over, by the newest map."""
        cluster_map = self._cluster.stored_map
        for shard_id in node.node.stores.damage if node.node is not None else ():
            shard = cluster_map.shard(shard_id) if cluster_map is not None else None
            is_primary = shard is not None and shard.primary.node == node.name
            if shard is not None and is_primary and not any(each.state == "in-sync" for each in shard.replicas):
                return True
        return False

    async def _lose_disk(self, rng: random.Random) -> None:
        """Never the last copy of anything: so nothing may be lost by it."""
        node = self._node(rng)
        cluster_map = self._cluster.stored_map
        is_member = cluster_map is not None and cluster_map.node(node.name) is not None
        if is_member and not node.is_damaged and self._cluster.may_lose_a_disk():
            self._cluster.loop.note(f"{node.name} loses its disk")
            self._cluster.lose_disk(node)

    async def _jump(self, rng: random.Random) -> None:
        """Once, or to and fro for a while, as under a daemon that does not find the time."""
        most_ms = rng.choice((300, 3_000, 30_000))
        for _ in range(rng.choice((1, 1, 3, 6))):
            for node in list(self._cluster.nodes.values()):
                if rng.random() < 0.5:
                    node.environment.jump_ms = rng.randrange(-most_ms, most_ms)
            self._any(rng).environment.jump_ms = rng.randrange(-most_ms, most_ms)
            await asyncio.sleep(rng.uniform(0.1, 0.8))

    async def _take_store_away(self, rng: random.Random) -> None:
        register = self._cluster.controller.register
        register.away = True
        await asyncio.sleep(rng.choice((0.2, 2.0, 6.0)) * rng.random())
        register.away = False

    async def _lose_record(self, rng: random.Random) -> None:
        """The controller's file is lost; a person has it recovered from the nodes, as soon as all members answer.

        Not beside the disk of a node: what the file alone knows then may be which copy has all.
        """
        cluster, controller = self._cluster, self._cluster.controller
        if cluster.stored_map is None or cluster.disks_lost():
            return
        if controller.process is not None:
            controller.process.kill()
        controller.register.lose()
        while cluster.stored_map is None:
            await asyncio.sleep(rng.uniform(0.3, 2.0))
            await self._ask(self._recover)

    async def _recover(self, service: ClusterService) -> None:
        found = await service.recovery()
        ended = [shard for shard in found["silent"] if shard not in self._cluster.nodes]
        await service.recover(found["cluster_id"], found["epoch"], ended)

    # --- changes of the cluster ---------------------------------------------------------------------------------------

    async def _add(self, rng: random.Random) -> None:
        self._cluster.add_shard()

    async def _remove(self, rng: random.Random) -> None:
        cluster_map = self._cluster.stored_map
        if cluster_map is not None and len(cluster_map.shards) > SHARDS_MAX // 3:
            name = rng.choice(cluster_map.shards).id
            await self._ask(lambda service: service.remove(name))

    async def _weigh(self, rng: random.Random) -> None:
        cluster_map = self._cluster.stored_map
        if cluster_map is not None:
            name, weight = rng.choice(cluster_map.shards).id, rng.randint(1, 4)
            await self._ask(lambda service: service.reweigh(name, weight))

    async def _leave_behind(self, rng: random.Random) -> None:
        """A router and the sources of some moves do not hear from the controller that the partitions have left."""
        cluster_map = self._cluster.stored_map
        if cluster_map is None:
            return
        shard = rng.choice(cluster_map.shards)
        await self._ask(lambda service: service.reweigh(shard.id, 1 if shard.weight > 2 else 4))
        sources = await self._sources()
        own = self._cluster.controller.name
        names = [rng.choice(self._cluster.routers).name, *(name for name in sources if rng.random() < 0.8)]
        links = [link for name in names for link in ((own, name), (name, own))]
        await self._cut_links(rng, links, rng.uniform(1.0, 6.0))

    async def _sources(self) -> list[str]:
        """Those of the moves that the map names, as soon as there are any."""
        for _ in range(_LOOKS):
            cluster_map = self._cluster.stored_map
            if cluster_map is not None and cluster_map.moves:
                return sorted({move.source for move in cluster_map.moves})
            await asyncio.sleep(_LOOK_S)
        return []

    async def _plan(self, rng: random.Random) -> None:
        await self._ask(lambda service: service.replan())

    async def _cancel(self, rng: random.Random) -> None:
        await self._ask(lambda service: service.cancel())

    async def _ask(self, change: Callable[[ClusterService], Awaitable[object]]) -> None:
        controller = self._cluster.controller
        service = controller.service
        if service is None:
            return

        async def run() -> None:
            try:
                await change(service)
            except KvError as error:
                self._cluster.loop.note(f"refused: {error.detail}")

        controller.spawn(run())


def _fate(rng: random.Random) -> Callable[[int], int]:
    """What a disk keeps of what was not synced."""

    def keep_any(newest: int) -> int:
        return rng.randint(0, newest)

    def keep_some(newest: int) -> int:
        return newest if rng.random() < 0.5 else 0

    return rng.choice((lose_all, keep_all, keep_any, keep_some))
