"""What befalls nodes that keep copies: a disk is lost, a copy rots, a primary is changed as planned.

Owns: which copy may be lost now, deleting and damaging files, asking for a promotion.
Promises: the last good copy in sync is never touched: beside a node whose files are deleted, and a copy in which a byte
is flipped, every shard has another one, by the controller's map, of which nothing was lost. Damage is not known before
it is met: as long as the copy counts as in sync, the node with the good one is left alone, and no primary goes to it.
Leaves to others: nodes that die, stand still or are cut off (nemeses), when (schedule), whether copies are equal in the
end (disk_audit).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec

from kvstore.placement.cluster_map import ClusterMap, Shard
from kvstore.store.opening import store_path
from loadtest.chaos.cluster import ChaosCluster
from loadtest.chaos.schedule import Step
from loadtest.chaos.summary import Fault
from loadtest.cluster.proxy import Proxy
from loadtest.drivers.aio import Wire

_HEARD_S = 0.5  # what a node has asked for before it died is decided
_MAP_TIMEOUT_S = 3.0


class CopyFaults:
    """`spoilt`: the ids of copies that were deleted or damaged. `busy`: the processes that other faults touch now."""

    def __init__(self, cluster: ChaosCluster, proxy: Proxy | None, wire: Wire) -> None:
        self.spoilt: set[str] = set()
        self.busy: Callable[[], Collection[str]] = tuple
        self._guarded = ""
        self._guarding: asyncio.Task[None] | None = None
        self._cluster = cluster
        self._proxy = proxy
        self._wire = wire
        self._one_by_one = asyncio.Lock()

    def free(self) -> set[str]:
        """The processes that may be touched."""
        return self._cluster.members() - {self._guarded}

    async def lose_disk(self, step: Step, rng: random.Random, fault: Fault) -> None:
        """A node is killed, and comes back with nothing: soon, or when others have taken its place."""
        name = rng.choice(sorted(name for name in self.free() if name.startswith("shard-")))
        fault.targets = [name]
        async with self._one_by_one:
            try:
                await self._end(name)
                if step.kind == "after a while":
                    await asyncio.sleep(step.for_s)
                cluster_map, node = await self._map_without(name), name.removeprefix("shard-")
                if cluster_map is None or not may_lose(cluster_map, node, self.spoilt):
                    fault.note = "killed only: another copy of what it has is not known to be there"
                    return
                self.spoilt |= {copy_id for shard in cluster_map.shards for copy_id in _copies(shard, node)}
                gone = files_of(self._cluster.data_dir, node)
                for path in gone:
                    path.unlink(missing_ok=True)
                fault.note = f"{len(gone)} files deleted"
            finally:
                self._cluster.let_come_back(name)

    async def rot(self, step: Step, rng: random.Random, fault: Fault) -> None:
        """A bit in the log or the file of a copy beside the primary is not what it was."""
        async with self._one_by_one:
            cluster_map = await self._map()
            found = [] if cluster_map is None else sorted(may_rot(cluster_map, self.spoilt))
            found = [each for each in found if f"shard-{each.good}" not in self.busy()] if not self._guarded else []
            if not found:
                fault.note = "no copy has another one beside it that is good and is left alone now"
                return
            shard_id, node, copy_id, good = rng.choice(found)
            fault.targets = [name := f"shard-{node}"]
            try:
                if step.kind.endswith("dead node"):
                    await self._end(name)
                path = store_path(self._cluster.data_dir, shard_id, node)
                if step.kind.startswith("log"):
                    path = rng.choice(sorted(path.parent.glob(f"{path.stem}.log.*")) or [path])
                if not path.exists():
                    fault.note = f"{path.name} has been taken away since the map named it"
                    return
                self.spoilt.add(copy_id)
                self._guarded = f"shard-{good}"
                self._guarding = asyncio.create_task(self._until_it_counts_no_more(shard_id, copy_id))
                fault.note = f"{path.name}, byte {flip(path, rng)}"
                if step.kind.endswith("dead node"):
                    await asyncio.sleep(step.for_s)
            finally:
                self._cluster.let_come_back(name)

    async def promote(self, step: Step, rng: random.Random, fault: Fault) -> None:
        """A shard is to be served by another node, as an operator asks it."""
        cluster_map = await self._map()
        if cluster_map is None:
            fault.note = "the controller does not answer"
            return
        shard = rng.choice(cluster_map.shards)
        to = rng.choice([each.node for each in shard.replicas if each.copy_id not in self.spoilt] or [shard.id])
        body = msgspec.json.encode({"to": to})
        reply = await self._wire.ask("POST", f"/v1/shards/{shard.id}/promote", body)
        fault.targets, fault.note = [shard.id], f"{shard.primary.node} to {to}: {reply.words}"

    def is_repaired(self) -> None:
        """All copies are equal and verified: what was damaged and kept its id is as good as any."""
        self.spoilt.clear()
        self._guarded = ""
        if self._guarding is not None:
            self._guarding.cancel()

    async def _until_it_counts_no_more(self, shard_id: str, copy_id: str) -> None:
        """Leave the node with the good copy alone as long as the damaged one is in sync by the map."""
        while True:
            await asyncio.sleep(_HEARD_S)
            cluster_map = await self._map()
            if cluster_map is not None and not counts(cluster_map, shard_id, copy_id):
                break
        self._guarded = ""

    async def _end(self, name: str) -> None:
        """The process is dead, also if it was just being started when its killing was asked for."""
        self._cluster.hold(name)
        await asyncio.sleep(_HEARD_S)
        self._cluster.kill(name)

    async def _map_without(self, name: str) -> ClusterMap | None:
        """The map once nothing that the dead process has sent can change it; None where that may still come."""
        await asyncio.sleep(_HEARD_S)
        ways = self._proxy.faults.by_way if self._proxy is not None else {}
        if await self._map() is None or any({name, "controller-0"} == set(way) for way in ways):
            return None
        await asyncio.sleep(_HEARD_S)
        return await self._map()

    async def _map(self) -> ClusterMap | None:
        try:
            async with asyncio.timeout(_MAP_TIMEOUT_S):
                return await self._cluster.cluster_map()
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return None


def may_lose(cluster_map: ClusterMap, node: str, spoilt: Collection[str]) -> bool:
    """Whether all that lies on the node in sync may be lost: see `_good_beside`."""
    return all(
        _good_beside(cluster_map, shard, copy_id, spoilt)
        for shard in cluster_map.shards
        for other, copy_id in _in_sync(shard)
        if other == node
    )


class MayRot(NamedTuple):
    """A copy in sync, but of no primary. `good`: the node of another one, the primary's if it is good."""

    shard: str
    node: str
    copy_id: str
    good: str


def may_rot(cluster_map: ClusterMap, spoilt: Collection[str]) -> set[MayRot]:
    """Copies in sync, but of primaries, beside which there is a good one: see `_good_beside`."""
    found = set()
    for shard in cluster_map.shards:
        for node, copy_id in _in_sync(shard)[1:]:
            if good := _good_beside(cluster_map, shard, copy_id, spoilt):
                found.add(MayRot(shard.id, node, copy_id, good[0]))
    return found


def _good_beside(cluster_map: ClusterMap, shard: Shard, copy_id: str, spoilt: Collection[str]) -> list[str]:
    """The nodes with a good copy in sync beside that one; none if too many would be spoilt with it.

    That are as many as there are to be: one more, which is there while copies change places, is about to go.
    """
    others = [(node, other) for node, other in _in_sync(shard) if other != copy_id]
    good = [node for node, other in others if other not in spoilt]
    return good if 1 + len(others) - len(good) < cluster_map.replicas else []


def counts(cluster_map: ClusterMap, shard_id: str, copy_id: str) -> bool:
    """Whether that copy of the shard is in sync by the map."""
    shard = cluster_map.shard(shard_id)
    return shard is not None and copy_id in [found for _, found in _in_sync(shard)]


def files_of(data_dir: Path, node: str) -> list[Path]:
    """All that a node has on disk: its own shard's files, and those of its copies of others."""
    copies = data_dir.glob(f"shard-*.copy-{node}.*")
    return sorted({*copies, *(path for path in data_dir.glob(f"shard-{node}.*") if ".copy-" not in path.name)})


def flip(path: Path, rng: random.Random) -> int:
    """Change one bit among the bytes that were written; where."""
    with path.open("r+b") as file:
        content = file.read().rstrip(b"\0")
        at = rng.randrange(max(1, len(content)))
        file.seek(at)
        file.write(bytes([(content[at] if content else 0) ^ 1 << rng.randrange(8)]))
    return at


def _in_sync(shard: Shard) -> list[tuple[str, str]]:
    """Nodes and copy ids, the primary's first."""
    replicas = [(replica.node, replica.copy_id) for replica in shard.replicas if replica.state == "in-sync"]
    return [(shard.primary.node, shard.primary.copy_id), *replicas]


def _copies(shard: Shard, node: str) -> list[str]:
    """The ids of its copies there, joining ones included."""
    found = [(shard.primary.node, shard.primary.copy_id), *((each.node, each.copy_id) for each in shard.replicas)]
    return [copy_id for where, copy_id in found if where == node]
