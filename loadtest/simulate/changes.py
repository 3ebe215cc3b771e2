"""Changes of a simulated cluster, as operators ask for them, and faults of the controller's record.

Owns: which shards come, go and change weight; the record that is away, or lost or an old copy, and recovered from the
nodes.
Promises: what the controller refuses is noted, and no finding.
Leaves to others: when they come (`cluster_faults`), what a change does (`kvstore.controller`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial

from kvstore.controller.operator_changes import OperatorChanges
from kvstore.errors import KvError
from kvstore.placement.cluster_map import Shard
from loadtest.simulate.cluster import SHARDS_MAX, Cluster
from loadtest.simulate.network import Link, both_ways
from loadtest.simulate.network_faults import cut_for
from loadtest.simulate.view import in_sync

_LOOK_S, _LOOKS = 0.02, 50
_TAKEN_OVER_S = (2.0, 4.0)  # in which a copy takes over from a node that has ended
_OUT_S = (1.5, 3.0)  # in which a copy that does not answer is out, and its shard goes on


async def add_shard(cluster: Cluster, rng: random.Random) -> None:
    cluster.add_shard()


async def remove_shard(cluster: Cluster, rng: random.Random) -> None:
    if len(cluster.view.shards) > SHARDS_MAX // 3:
        name = rng.choice(cluster.view.shards).id
        await _ask(cluster, partial(_remove, name))


async def remove_gone(cluster: Cluster) -> None:
    """Shards whose nodes have left, and were members again by a request to join that was still under way then."""
    for shard in cluster.view.shards:
        if shard.id not in cluster.nodes and shard.state != "leaving":
            await _ask(cluster, partial(_remove, shard.id))


async def _remove(name: str, changes: OperatorChanges) -> None:
    await changes.remove(name)


async def set_weight(cluster: Cluster, rng: random.Random) -> None:
    if cluster.view.shards:
        name, weight = rng.choice(cluster.view.shards).id, rng.randint(1, 4)
        await _ask(cluster, lambda changes: changes.reweigh(name, weight))


async def weigh_served(cluster: Cluster, rng: random.Random) -> None:
    """Of the shards that are served one gets another weight."""
    served = [shard for shard in cluster.view.shards if cluster.view.primary(shard.id) is not None]
    if served:
        shard = rng.choice(served)
        await _ask(cluster, lambda changes: changes.reweigh(shard.id, 1 if shard.weight > 2 else 4))


async def replan(cluster: Cluster, rng: random.Random) -> None:
    await _ask(cluster, lambda changes: changes.replan())


async def cancel_moves(cluster: Cluster, rng: random.Random) -> None:
    await _ask(cluster, lambda changes: changes.cancel())


async def leave_behind(cluster: Cluster, rng: random.Random) -> None:
    """A router and the sources of some moves do not hear from the controller that the partitions have left."""
    if not cluster.view.shards:
        return
    shard = rng.choice(cluster.view.shards)
    await _ask(cluster, lambda changes: changes.reweigh(shard.id, 1 if shard.weight > 2 else 4))
    sources = await _sources(cluster)
    names = [rng.choice(cluster.routers).name, *(name for name in sources if rng.random() < 0.8)]
    await cut_for(cluster, rng, both_ways(cluster.controller.name, names), rng.uniform(1.0, 6.0))


async def _sources(cluster: Cluster) -> list[str]:
    """Those of the moves that the map names, as soon as there are any."""
    for _ in range(_LOOKS):
        found = cluster.view.map
        if found is not None and found.moves:
            return sorted({move.source for move in found.moves})
        await asyncio.sleep(_LOOK_S)
    return []


async def fall_out(cluster: Cluster, rng: random.Random) -> None:
    """A shard takes partitions.
    Its copies are cut from it until they are out and the move is at its end."""
    if not cluster.view.shards:
        return
    shard = rng.choice(cluster.view.shards)
    await _ask(cluster, lambda changes: changes.reweigh(shard.id, 1 if shard.weight > 2 else 4))
    to = await _receiving(cluster)
    if to is None:
        return
    links = both_ways(to.primary.node, [copy.node for copy in to.replicas])
    cluster.network.cut_links(links)
    await asyncio.sleep(rng.uniform(*_OUT_S))
    cluster.network.heal_links(links, rng.choice((0.0, 0.5, 1.0)))


async def _receiving(cluster: Cluster) -> Shard | None:
    """One to which rows of a move come, as soon as there is any."""
    for _ in range(_LOOKS * 10):
        parts = cluster.controller.parts
        tries = parts.mover.tries.by_pair.values() if parts is not None else ()
        for name in sorted(each.move.to for each in tries if each.step in ("copy", "tail")):
            if (shard := cluster.view.shard(name)) is not None and in_sync(shard):
                return shard
        await asyncio.sleep(_LOOK_S / 10)
    return None


async def take_record_away(cluster: Cluster, rng: random.Random) -> None:
    register = cluster.controller.register
    register.away = True
    await asyncio.sleep(rng.choice((0.2, 2.0, 6.0)) * rng.random())
    register.away = False


async def lose_record(cluster: Cluster, rng: random.Random) -> None:
    """The controller's file is lost; an operator recovers it from the nodes, as soon as all members answer.

    Not beside the disk of a node: what the file alone knows then may be which copy has all.
    """
    controller = cluster.controller
    if cluster.view.map is None or cluster.lost_disks.count():
        return
    if controller.process is not None:
        controller.process.kill()
    controller.register.lose()

    while cluster.view.map is None:
        await asyncio.sleep(rng.uniform(0.3, 2.0))
        await _ask(cluster, partial(_recover, cluster))


async def put_record_back(cluster: Cluster, rng: random.Random) -> None:
    """An old copy of the controller's record; later an operator goes on with the newest map of the nodes.
    It is of a moment before moves were committed and copies took over, or in a move.

    Not beside other faults: a node that is away then may be the only one that follows a newer map.
    """
    register = cluster.controller.register
    if not register.has_backup and cluster.view.is_whole():
        register.has_backup = True
        await _put_record_back(cluster, rng)
        register.has_backup = False


async def _put_record_back(cluster: Cluster, rng: random.Random) -> None:
    controller = cluster.controller
    cut: list[Link] = []
    if rng.random() < 0.5:
        await weigh_served(cluster, rng)
        source = await _freezing(cluster)
        if source is not None and rng.random() < 0.5:  # it does not hear that the move is committed
            cut = both_ways(controller.name, [source])
            cluster.network.cut_links(cut)
    kept, before = controller.register.back_up(), cluster.view.map
    if rng.random() < 0.3:
        cluster.add_shard()
    if rng.random() < 0.6:
        await weigh_served(cluster, rng)
    if rng.random() < 0.5:
        await _fail_over(cluster, rng)
    await asyncio.sleep(rng.choice((0.1, 3.0)) * rng.random())
    newest = cluster.view.map
    if before is None or newest is None or newest.epoch == before.epoch:
        cluster.network.heal_links(cut, 0.0)
        return
    cluster.loop.note(f"the controller has its record of epoch {before.epoch} again, and had that of {newest.epoch}")
    if controller.process is not None:
        controller.process.kill()
    controller.register.put_back(kept)
    cluster.invariants.maps.put_back()
    cluster.network.heal_links(cut, 0.0)
    await asyncio.sleep(rng.uniform(0.0, 1.0))
    for node in rng.sample(list(cluster.nodes.values()), rng.choice((0, 1, 2))):
        if node.process is not None:
            node.process.kill()
    await asyncio.sleep(rng.uniform(0.5, 5.0))
    while cluster.view.is_behind and _is_newer_followed(cluster):
        await _ask(cluster, partial(_recover, cluster))
        await asyncio.sleep(rng.uniform(0.3, 2.0))


async def _recover(cluster: Cluster, changes: OperatorChanges) -> None:
    found = await changes.recovery.found()
    ended = [shard for shard in found.silent if shard not in cluster.nodes]
    await changes.recover(found.map.cluster_id, found.map.epoch, ended)


async def _freezing(cluster: Cluster) -> str | None:
    """The source of a move that has frozen it, as soon as there is one."""
    for _ in range(_LOOKS * 10):
        if frozen := [each.move.source for each in cluster.view.controller.tries() if each.step in ("freeze", "done")]:
            return frozen[0]
        await asyncio.sleep(_LOOK_S / 10)
    return None


async def _fail_over(cluster: Cluster, rng: random.Random) -> None:
    """A node ends, and is back once another one has its shard, or nearly."""
    shards = [shard for shard in cluster.view.shards if in_sync(shard) and shard.primary.node in cluster.nodes]
    if not shards:
        return
    shard = rng.choice(shards)
    node = cluster.nodes[shard.primary.node]
    node.wanted = False
    if node.process is not None:
        node.process.kill()
    await asyncio.sleep(rng.uniform(*_TAKEN_OVER_S))
    if cluster.nodes.get(node.name) is node:
        cluster.bring_back(node)


def _is_newer_followed(cluster: Cluster) -> bool:
    """Whether some node follows a newer map than the controller has."""
    followed = [node.node.stores.cluster_map for node in cluster.nodes.values() if node.node is not None]
    epoch = max((each.epoch for each in followed if each is not None), default=0)
    return cluster.view.map is not None and cluster.view.map.epoch < epoch


async def _ask(cluster: Cluster, change: Callable[[OperatorChanges], Awaitable[object]]) -> None:
    controller = cluster.controller
    if controller.parts is None:
        return
    changes = controller.parts.changes

    async def run() -> None:
        try:
            await change(changes)
        except KvError as error:
            cluster.loop.note(f"refused: {error.detail}")

    controller.spawn(run())
