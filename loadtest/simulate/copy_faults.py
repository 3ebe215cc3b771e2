"""Faults that only a cluster with copies has.
A primary that is deposed and does not know, or is back while that is done; a snapshot that another one begins again,
pages that come late, a node that stays dead.

Owns: what happens in which order, watched for in the cluster, so that rules of copies are needed by it.
Promises: each ends by itself, and leaves no link cut.
Leaves to others: when they come (`cluster_faults`), what must hold (`invariants`, `ending`).

    depose      the primary stands still, or is cut from the controller and its copies, until one is promoted; as soon
                as that one has promised its term it is reached again, but the controller later; or both at once
    return      the primary is cut from the controller and its copies until one of these is about to open a higher term;
                what it has sent comes while the promise of that is written, on a slow disk
    interrupt   a page of a snapshot is held up on its way until another primary sends its own snapshot to that copy, or
                has sent all of it
    come late   a page of a snapshot is lost on its way, and its primary begins again; the kernel of the one that has
                ended sends the page again when its pause is over, to a copy that has gone on with the next snapshot
    die         a node is away for longer than `down_out_s`: it is given up, and comes back
    together    so many nodes are away for that long that none is given up, and that nothing moves
    ask         a primary asks to take a copy out, and both are dead before the controller can do that
    put back    a primary and its copy end at once; the copy comes back first, with its files of some time ago
    put all     a primary and all its copies in sync end at once, and come back with their files of some time ago; what
                they would serve is a violation; later they come back with their newest files
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from kvstore.placement.cluster_map import Shard
from kvstore.replication.messages import SnapshotPage, decode_from_primary
from kvstore.storage.engine import Engine
from loadtest.simulate import changes
from loadtest.simulate.cluster import Cluster
from loadtest.simulate.environment import SYNC_S
from loadtest.simulate.network import End, both_ways, lost_by_none
from loadtest.simulate.node import Backup, NodeServer
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.view import good_copies, in_sync

T = TypeVar("T")

_LOOK_S = 0.01
_PROMOTED_S = 6.0
_PROMISE_S = 0.05
_FILLING_S = 5.0
_BEATS_S = 0.6  # in which a node of a simulated cluster beats more than once
_ASKED_S = (1.0, 1.6)  # in which a primary asks to take out a copy that does not answer
_NOT_HEARD_S = 3.5
_FILLED_S = 4.0  # then the second one is whole, mostly
_PAGE_S = 0.03  # what a page of the second snapshot takes
_ANY_PAGE_S = 12.0
_PASSED_MAX = 8  # pages before the one that is lost
_LOST_S = 0.3
_SENT_AGAIN_S = (1.4, 3.0)  # after the loss: TCP's first pause is 0.2 s, and each is twice the one before


async def depose(cluster: Cluster, rng: random.Random) -> None:
    """The primary of some shard, as described above."""
    shards = [shard for shard in cluster.view.shards if in_sync(shard)]
    if not shards:
        return
    shard = rng.choice(shards)
    primary, own = shard.primary.node, cluster.controller.name
    to_copies = both_ways(primary, (each.node for each in shard.replicas))
    to_controller = both_ways(primary, [own])
    stale = rng.choice(cluster.routers).name  # which does not hear of it, either
    to_router = both_ways(stale, [own]) if rng.random() < 0.5 else []
    links = [*to_copies, *to_controller, *to_router]
    slowed = [(each.node, own) for each in in_sync(shard)]  # so that an opening takes a while
    cluster.network.slow.update(dict.fromkeys(slowed, rng.uniform(0.05, 0.3)))
    process = cluster.nodes[primary].process if primary in cluster.nodes else None
    how = rng.choice(("stops", "returns", "is a copy at once"))
    cluster.network.cut_links([*to_controller, *to_router] if how == "stops" else links)
    if how == "is a copy at once":
        await _until(lambda: _has_other_primary(cluster, shard), _PROMOTED_S)
    else:
        if how == "stops" and process is not None:
            process.stands_still = True
        await _until(lambda: _is_opened_elsewhere(cluster, shard), _PROMOTED_S)
        if how == "stops" and process is not None:
            cluster.loop.go_on(process)
        cluster.network.heal_links(to_copies, rng.choice((0.0, 1.0)))
        await asyncio.sleep(rng.uniform(0.5, 3.0))
    for link in slowed:
        cluster.network.slow.pop(link, None)
    cluster.network.heal_links(links, rng.choice((0.0, 0.5, 1.0)))


async def return_early(cluster: Cluster, rng: random.Random) -> None:
    """The primary of some shard, as described above."""
    shards = [shard for shard in cluster.view.shards if in_sync(shard)]
    if not shards:
        return
    shard = rng.choice(shards)
    primary, nodes = shard.primary.node, [each.node for each in shard.replicas]
    to_copies, to_controller = both_ways(primary, nodes), both_ways(primary, [cluster.controller.name])
    disks = [cluster.nodes[each].environment for each in nodes if each in cluster.nodes]
    cluster.network.cut_links([*to_copies, *to_controller])
    for disk in disks:
        disk.sync_s = _PROMISE_S
    await _until(lambda: _is_opening(cluster, shard), _PROMOTED_S)
    cluster.network.heal_links(to_copies, 0.0)
    await asyncio.sleep(rng.uniform(0.1, 2.0))
    for disk in disks:
        disk.sync_s = SYNC_S
    cluster.network.heal_links(to_controller, rng.choice((0.0, 0.5, 1.0)))


async def interrupt(cluster: Cluster, rng: random.Random) -> None:
    """The snapshot that begins next where another copy can take over.
    That one serves for a while before it sends its own, so that the page held up is of an older state."""
    found = await _until(lambda: _filling(cluster), _FILLING_S)
    if not found:
        return
    shard, node, before = found
    primary, heirs = shard.primary.node, [each.node for each in in_sync(shard)]
    page, beside = (primary, node), both_ways(node, heirs)
    others = both_ways(primary, [cluster.controller.name, *heirs])
    cluster.network.cut_links([page, *others, *beside])
    if await _until(lambda: _has_other_primary(cluster, shard), _PROMOTED_S):
        await asyncio.sleep(rng.uniform(1.0, 3.0))
    slowed = [(heir, node) for heir in heirs]
    cluster.network.slow.update(dict.fromkeys(slowed, _PAGE_S))
    cluster.network.heal_links(beside, rng.choice((0.0, 1.0)))
    await _until(lambda: _fills(cluster, shard.id, node, shard.term, before), _FILLING_S)
    await asyncio.sleep(rng.choice((rng.uniform(0.0, 12 * _PAGE_S), rng.uniform(1.0, _FILLED_S))))
    cluster.network.heal_links([page], 0.0)
    await asyncio.sleep(rng.uniform(0.1, 2.0))
    for link in slowed:
        cluster.network.slow.pop(link, None)
    cluster.network.heal_links(others, rng.choice((0.0, 0.5, 1.0)))


async def come_late(cluster: Cluster, rng: random.Random) -> None:
    """One of the next pages of any snapshot. What goes by other connections is not late."""
    network, passed = cluster.network, rng.randrange(_PASSED_MAX)
    late: list[End] = []

    def is_lost(end: End, message: Any) -> bool:
        nonlocal passed
        passed -= (is_page := not late and _is_page(message))
        if is_page and passed < 0:
            late.append(end)
        return is_page and passed < 0

    network.loses = is_lost
    await _until(lambda: late, _ANY_PAGE_S)
    if network.loses is is_lost:
        network.loses = lost_by_none
    for end in late:
        assert end.owner is not None
        again_s, lost_s = rng.choice(_SENT_AGAIN_S), rng.uniform(0.0, _LOST_S)
        await asyncio.sleep(lost_s)
        end.owner.kill()
        cluster.loop.note(f"{end.owner.name} is killed, and a page that it has sent to {end.peer.host} is late")
        await asyncio.sleep(again_s - lost_s)
        network.end_lateness([end])
        cluster.loop.note(f"the page comes to {end.peer.host}")


def _is_page(message: Any) -> bool:
    try:
        return isinstance(message, bytes) and isinstance(decode_from_primary(message), SnapshotPage)
    except msgspec.DecodeError:
        return False


async def die(cluster: Cluster, rng: random.Random) -> None:
    """Some node, unless that leaves a store without a copy in sync on a node that runs."""
    names = [name for name, node in cluster.nodes.items() if node.is_alive and node.wanted]
    if not names:
        return
    name = rng.choice(names)
    if not all(_lives_without(cluster, shard, name) for shard in cluster.view.shards):
        return
    node = cluster.nodes[name]
    assert node.process is not None
    node.wanted = False
    node.process.kill()
    cluster.loop.note(f"{name} stays dead")
    await asyncio.sleep(rng.choice((1.0, 1.5)) * node.limits.down_out_s)
    if cluster.nodes.get(name) is node:
        cluster.bring_back(node)


async def die_together(cluster: Cluster, rng: random.Random) -> None:
    """More nodes at once than may be silent while others are given up.
    When they are held for dead a shard that is served is to get more keys, or fewer."""
    if not await _until(lambda: all(node.wanted for node in cluster.nodes.values()), _PROMOTED_S):
        return
    runs = [name for name, node in cluster.nodes.items() if node.is_alive]
    count = max(cluster.view.wanted_copies(), (len(cluster.nodes) + 1) // 2)
    dead = [cluster.nodes[name] for name in rng.sample(runs, min(count, len(runs)))]
    for node in dead:
        assert node.process is not None
        node.wanted = False
        node.process.kill()
        cluster.loop.note(f"{node.name} stays dead, as one of {len(dead)}")
    seconds = rng.uniform(1.2, 1.7) * max((node.limits.down_out_s for node in dead), default=0.0)
    await asyncio.sleep(seconds / 2)
    await changes.weigh_served(cluster, rng)
    await asyncio.sleep(seconds / 2)
    for node in dead:
        if cluster.nodes.get(node.name) is node:
            cluster.bring_back(node)


async def ask_and_die(cluster: Cluster, rng: random.Random) -> None:
    """The primary of some shard and one of its copies, while the controller's store is away."""
    found = [(shard, copy) for shard in cluster.view.shards for copy in in_sync(shard)]
    if not found or not all(node.wanted for node in cluster.nodes.values()):
        return
    shard, copy = rng.choice(found)
    nodes = [cluster.nodes[each] for each in (shard.primary.node, copy.node) if each in cluster.nodes]
    links, register = both_ways(shard.primary.node, [copy.node]), cluster.controller.register
    cluster.network.cut_links(links)
    register.away = True
    await asyncio.sleep(rng.uniform(*_ASKED_S))
    for node in nodes:
        node.wanted = False
        if node.process is not None:
            node.process.kill()
    cluster.loop.note(f"{shard.primary.node} and {copy.node} stay dead")
    await asyncio.sleep(_NOT_HEARD_S)
    register.away = False
    cluster.network.heal_links(links, 0.0)
    for node in reversed(nodes):
        await asyncio.sleep(rng.uniform(0.5, 2.0))
        if cluster.nodes.get(node.name) is node:
            cluster.bring_back(node)


async def put_old_back(cluster: Cluster, rng: random.Random) -> None:
    """Of some shard, whose primary comes back later. What the files lack was committed well before its last beat."""
    found = [(shard, copy) for shard in cluster.view.shards for copy in in_sync(shard)]
    if not found:
        return
    shard, copy = rng.choice(found)
    node, primary = cluster.nodes.get(copy.node), cluster.nodes.get(shard.primary.node)
    kept = node.back_up(shard.id) if node is not None else None
    await asyncio.sleep(rng.uniform(0.5, 3.0))
    committed = _committed(cluster, shard)
    await asyncio.sleep(_BEATS_S)
    if node is None or primary is None or kept is None or not (node.is_alive and primary.is_alive):
        return
    now = next((each for each in cluster.view.shards if each == shard), None)
    if now is None or committed <= kept.number or not cluster.view.is_whole():
        return
    cluster.loop.note(f"{node.name} gets its copy of {shard.id} back as of record {kept.number} of {committed}")
    for each in (primary, node):
        each.wanted = False
        if each.process is not None:
            each.process.kill()
    node.put_back(kept)
    await asyncio.sleep(rng.uniform(0.0, 2.0))
    cluster.bring_back(node)
    await asyncio.sleep(rng.uniform(3.0, 6.0))
    cluster.bring_back(primary)


async def put_all_old_back(cluster: Cluster, rng: random.Random) -> None:
    """Of some shard. What the files lack was committed well before its primary's last beat."""
    shards = [shard for shard in cluster.view.shards if in_sync(shard)]
    if not shards:
        return
    shard = rng.choice(shards)
    nodes = [cluster.nodes[name] for name, _ in good_copies(shard) if name in cluster.nodes]
    old = [node.back_up(shard.id) for node in nodes]
    await asyncio.sleep(rng.uniform(0.5, 3.0))
    committed = _committed(cluster, shard)
    await asyncio.sleep(_BEATS_S)
    is_served = all(_is_served(cluster, each.primary.node, each.id) for each in cluster.view.shards)
    if shard not in cluster.view.shards or not cluster.view.is_whole() or not is_served:
        return  # another one is under way, perhaps
    newest = [node.back_up(shard.id) for node in nodes]
    if None in [*old, *newest] or committed <= max(kept.number for kept in old if kept is not None):
        return
    cluster.loop.note(f"{[node.name for node in nodes]} get {shard.id} back, of which record {committed} was committed")
    await _put_back(cluster, nodes, old, rng)
    for _ in range(int(rng.uniform(3.0, 6.0) / _LOOK_S)):
        await asyncio.sleep(_LOOK_S)
        if any(_is_served(cluster, node.name, shard.id) for node in nodes):
            raise Violation(f"{shard.id} is served with old files, without record {committed}, which was committed")
    await _put_back(cluster, nodes, newest, rng)


async def _put_back(
    cluster: Cluster, nodes: Sequence[NodeServer], kept: Sequence[Backup | None], rng: random.Random
) -> None:
    """All end at once, and come back one after the other with these files."""
    for node, files in zip(nodes, kept, strict=True):
        node.wanted = False
        if node.process is not None:
            node.process.kill()
        if files is not None:
            node.put_back(files)
            cluster.invariants.put_back(node.name, files.copy_id)
    for node in rng.sample(nodes, len(nodes)):
        await asyncio.sleep(rng.uniform(_BEATS_S, 1.5))
        cluster.bring_back(node)


def _is_served(cluster: Cluster, node: str, shard_id: str) -> bool:
    resident = cluster.view.resident(node, shard_id)
    return resident is not None and resident.local.hosted is not None and resident.local.hosted.is_open


def _committed(cluster: Cluster, shard: Shard) -> int:
    """The number of the last committed record, if its primary runs."""
    store = cluster.view.store(shard.primary.node, shard.id)
    return store.durable if store is not None else 0


def _has_other_primary(cluster: Cluster, shard: Shard) -> bool:
    """Or it has left."""
    now = cluster.view.shard(shard.id)
    return now is None or now.primary.node != shard.primary.node


def _is_opened_elsewhere(cluster: Cluster, shard: Shard) -> bool:
    """A copy has promised a higher term, most likely to itself."""
    copies = (cluster.view.copy(each.node, shard.id) for each in shard.replicas)
    return any(copy is not None and copy.following.promised > shard.term for copy in copies)


def _is_opening(cluster: Cluster, shard: Shard) -> bool:
    """A copy begins to open a higher term, which it has to promise first."""
    residents = (cluster.view.resident(each.node, shard.id) for each in shard.replicas)
    openings = (resident._opening for resident in residents if resident is not None)
    configs = (opening.config for opening in openings if opening is not None)
    return any(config is not None and config.term > shard.term for config in configs)


def _filling(cluster: Cluster) -> tuple[Shard, str, Engine] | None:
    """A shard with a copy that gets a snapshot, its node and file; another copy can take over."""
    for shard in cluster.view.shards:
        for replica in shard.replicas:
            copy = cluster.view.copy(replica.node, shard.id)
            if copy is not None and in_sync(shard) and _fills(cluster, shard.id, replica.node):
                return shard, replica.node, copy.engine
    return None


def _fills(cluster: Cluster, shard_id: str, node: str, above_term: int = 0, not_into: Engine | None = None) -> bool:
    """Whether a snapshot of a higher term than that is on its way there, and into another file than that."""
    copy = cluster.view.copy(node, shard_id)
    named = copy.following.session if copy is not None and copy.is_filling else None
    return named is not None and named.term > above_term and copy is not None and copy.engine is not not_into


def _lives_without(cluster: Cluster, shard: Shard, name: str) -> bool:
    return any(node != name and cluster.view.has(node, shard.id, each) for node, each in good_copies(shard))


async def _until(look: Callable[[], T], seconds: float) -> T:
    """What it finds, as soon as that is true, or in the end."""
    left = int(seconds / _LOOK_S)
    while not (found := look()) and left:
        left -= 1
        await asyncio.sleep(_LOOK_S)
    return found
