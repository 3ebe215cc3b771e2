"""What befalls nodes that keep copies: a disk is lost, a copy rots, a primary is changed as planned.

Owns: which copy may be lost now, deleting and damaging files, asking for a promotion.
Promises: the last good copy in sync is never touched: beside a node whose files are deleted, and a copy in which a byte
is flipped, every shard has another one, by the controller's map, of which nothing was lost.
Leaves to others: nodes that die, stand still or are cut off (nemeses), when (schedule), whether copies are equal in the
end (disk_audit).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection
from pathlib import Path

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
    """`spoilt`: the ids of copies that were deleted or damaged."""

    def __init__(self, cluster: ChaosCluster, proxy: Proxy | None, wire: Wire) -> None:
        self.spoilt: set[str] = set()
        self._cluster = cluster
        self._proxy = proxy
        self._wire = wire
        self._one_by_one = asyncio.Lock()

    async def lose_disk(self, step: Step, rng: random.Random, fault: Fault) -> None:
        """A node is killed, and comes back with nothing: soon, or when others have taken its place."""
        name = rng.choice(sorted(name for name in self._cluster.members() if name.startswith("shard-")))
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
            if not found:
                fault.note = "no copy has another one beside its primary's that is good"
                return
            shard_id, node, copy_id = rng.choice(found)
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
        to = rng.choice([replica.node for replica in shard.replicas] or [shard.id])
        body = msgspec.json.encode({"to": to})
        reply = await self._wire.ask("POST", f"/v1/shards/{shard.id}/promote", body)
        fault.targets, fault.note = [shard.id], f"{shard.primary.node} to {to}: {reply.words}"

    def is_repaired(self) -> None:
        """All copies are equal and verified: what was damaged and kept its id is as good as any."""
        self.spoilt.clear()

    async def _end(self, name: str) -> None:
        """The process is dead, also if it was just being started when its killing was asked for."""
        self._cluster.hold(name)
        await asyncio.sleep(_HEARD_S)
        self._cluster.kill(name)

    async def _map_without(self, name: str) -> ClusterMap | None:
        """The map once nothing that the dead process has sent can change it; None where that may still come."""
        await asyncio.sleep(_HEARD_S)
        ways = self._proxy.faults if self._proxy is not None else {}
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
    """Whether all that lies on the node in sync lies on another one, too, of which nothing was lost."""
    return all(
        any(other != node and copy_id not in spoilt for other, copy_id in _in_sync(shard))
        for shard in cluster_map.shards
        if any(other == node for other, _ in _in_sync(shard))
    )


def may_rot(cluster_map: ClusterMap, spoilt: Collection[str]) -> set[tuple[str, str, str]]:
    """(shard, node, copy id) of copies in sync, but of primaries, beside which there is a good one."""
    return {
        (shard.id, node, copy_id)
        for shard in cluster_map.shards
        for node, copy_id in _in_sync(shard)[1:]
        if any(other != copy_id and other not in spoilt for _, other in _in_sync(shard))
    }


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
