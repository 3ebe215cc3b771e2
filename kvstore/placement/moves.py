"""Moves: how a cluster map gets from one set of shards to another, a group of partitions at a time.

Owns: every change of a map's shards, owners and moves, and the plan of which partitions are to go where.
Promises: pure; each function returns the next map, with epoch + 1, or the very same map if nothing changes. In every
map that comes out: a partition has one owner, and is in one move at most; the source of a move owns its partitions;
nothing moves to a shard that leaves; a shard that leaves and owns nothing any more is not in the map, nor is
its node if no copy lies there.
Leaves to others: where a partition belongs (`ring`), how its data get there (shard), when (controller).

    with_new_shard ──┐                   ┌─ committed   the partitions are the destination's
    with_leaving    ─┼─> planned ─moves──┼─ voided      the same move again, under a new id
    with_weight     ─┘                   └─ cancelled   no move stands any more; what has moved stays where it is

A plan begins with what is: the owners, those of standing moves taken for done. The ring changes no more of that than
room asks for. Still a plan that overtakes another one may lead a partition away from a shard and another one to it.
That is work for nothing: the two change places in the plan until every shard only gives or only gets. What is
left is the minimum, each shard's room less what it owns, summed up over those that get.

Standing moves all of whose partitions still go to the same shard keep their id, so that a plan does not stop the work
under way. The others fall apart, and their partitions are grouped again. A partition that still goes to the same shard
stays with the change that had planned it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import msgspec

from kvstore.placement.cluster_map import ClusterMap, Home, Move, Node, Shard, Strike
from kvstore.placement.ring import ShardWeight, place


def with_new_shard(cluster_map: ClusterMap, home: Home) -> ClusterMap:
    """The shard joins, with its node: it owns nothing until moves to it are planned and committed.

    Raises ValueError if its id or its store is that of a shard which is there.
    """
    node, shard = home
    for other in cluster_map.shards:
        if shard.id == other.id or shard.store_id == other.store_id:
            raise ValueError(f"shard {other.id} is there with the store {other.store_id}")
    nodes = [*(other for other in cluster_map.nodes if other.id != node.id), node]
    joining = msgspec.structs.replace(shard, state="joining", term=cluster_map.epoch + 1)
    return _next(cluster_map, nodes=nodes, shards=[*cluster_map.shards, joining])


def with_leaving(cluster_map: ClusterMap, shard_id: str) -> ClusterMap:
    """The shard is to leave: it goes once `planned` moves have taken away what it owns.

    Raises KeyError if it is not there, ValueError if no other one would stay.
    """
    _shard(cluster_map, shard_id)
    if all(shard.id == shard_id for shard in _staying(cluster_map)):
        raise ValueError(f"no shard would stay to take over what {shard_id} owns")
    return _with_shard(cluster_map, shard_id, state="leaving")


def with_struck(cluster_map: ClusterMap, shard_id: str) -> ClusterMap:
    """The shard is lost with all that it had.
    Its file is struck, moves from and to it are void, and no shard answers for its partitions until they are
    `opened`. Raises KeyError if it is not there, ValueError if no other one would stay.
    """
    lost = _shard(cluster_map, shard_id)
    if cluster_map.is_struck(lost.store_id):
        return cluster_map
    if all(shard.id == shard_id for shard in _staying(cluster_map)):
        raise ValueError(f"no shard would stay to take over what {shard_id} owns")
    epoch, owned = cluster_map.epoch + 1, cluster_map.owned_by(shard_id)
    strike = Strike(shard=shard_id, store_id=lost.store_id, epoch=epoch, partitions=owned)
    standing = [move for move in cluster_map.moves if shard_id not in (move.source, move.to)]
    leaving = _with_shard(cluster_map, shard_id, state="leaving")
    strikes = [*cluster_map.strikes, strike]
    return msgspec.structs.replace(leaving, epoch=epoch, moves=standing, strikes=strikes)


def opened(cluster_map: ClusterMap, clock: int) -> ClusterMap:
    """The partitions of all lost shards are opened, empty, by those that stay; `clock` as in `Strike`.

    To be stored only when every other shard follows the strikes. Raises ValueError if no shard stays.
    """
    due = [strike for strike in cluster_map.strikes if not strike.opened]
    if not due:
        return cluster_map
    lost = {partition for strike in due for partition in strike.partitions}
    gone = {strike.shard for strike in due}
    targets = _targets(cluster_map, lost)
    index = {shard.id: i for i, shard in enumerate(cluster_map.shards)}
    owners = [index[targets[p]] if p in lost else owner for p, owner in enumerate(cluster_map.owners)]
    epoch = cluster_map.epoch + 1
    strikes = [
        strike if strike.opened else msgspec.structs.replace(strike, opened=epoch, clock=clock)
        for strike in cluster_map.strikes
    ]
    shards = [msgspec.structs.replace(s, state="leaving") if s.id in gone else s for s in cluster_map.shards]
    settled = _settled(cluster_map, shards=shards, owners=owners, moves=cluster_map.moves)
    return msgspec.structs.replace(settled, epoch=epoch, strikes=strikes)


def with_weight(cluster_map: ClusterMap, shard_id: str, weight: int) -> ClusterMap:
    """The shard's share becomes `weight` in proportion to the others'.

    Raises KeyError if it is not there, ValueError for a weight below 1.
    """
    _shard(cluster_map, shard_id)
    if weight < 1:
        raise ValueError(f"weight {weight} of shard {shard_id} is below 1")
    return _with_shard(cluster_map, shard_id, weight=weight)


def planned(
    cluster_map: ClusterMap, group_partitions: Callable[[str], int], new_id: Callable[[], str], change: str = ""
) -> ClusterMap:
    """The map with the moves that lead to the fair placement on the shards that stay.

    New moves belong to the change with the id `change`. `group_partitions` says how many partitions of a source are
    moved together at most; `new_id` makes an id that was never used. Raises ValueError if no shard stays.
    """
    targets = _targets(cluster_map)
    kept = [move for move in cluster_map.moves if all(targets[partition] == move.to for partition in move.partitions)]
    taken = {partition for move in kept for partition in move.partitions}
    new = [
        Move(id=new_id(), source=way.source, to=way.to, partitions=group, change=way.change)
        for way, group in _groups(cluster_map, targets, taken, group_partitions, change)
    ]
    moves = [*kept, *new]
    return _settled(cluster_map, shards=cluster_map.shards, owners=cluster_map.owners, moves=moves)


def committed(cluster_map: ClusterMap, move_id: str) -> ClusterMap:
    """The move is done: its partitions are the destination's.

    Raises KeyError if the move does not stand, ValueError if its partitions are not the source's.
    """
    move = _move(cluster_map, move_id)
    index = {shard.id: i for i, shard in enumerate(cluster_map.shards)}
    owners = list(cluster_map.owners)
    for partition in move.partitions:
        if owners[partition] != index[move.source]:
            raise ValueError(f"partition {partition} of move {move_id} is not shard {move.source}'s any more")
        owners[partition] = index[move.to]
    moves = [other for other in cluster_map.moves if other.id != move_id]
    return _settled(cluster_map, shards=cluster_map.shards, owners=owners, moves=moves)


def voided(cluster_map: ClusterMap, move_id: str, new_id: str) -> ClusterMap:
    """The try `move_id` is given up; the same partitions are to be moved again, as `new_id`.

    Raises KeyError if that move does not stand.
    """
    _move(cluster_map, move_id)
    moves = [msgspec.structs.replace(move, id=new_id) if move.id == move_id else move for move in cluster_map.moves]
    return _next(cluster_map, moves=moves)


def all_voided(cluster_map: ClusterMap, new_id: Callable[[], str]) -> ClusterMap:
    """Every try that stands is given up, and is to be made again."""
    moves = [msgspec.structs.replace(move, id=new_id()) for move in cluster_map.moves]
    return _next(cluster_map, moves=moves)


def cancelled(cluster_map: ClusterMap) -> ClusterMap:
    """No move stands any more, and no shard joins or leaves.
    A shard that joined and owns nothing yet is gone."""
    owning = set(cluster_map.owners)
    shards = [
        msgspec.structs.replace(shard, state="up" if i in owning or shard.state != "joining" else "leaving")
        for i, shard in enumerate(cluster_map.shards)
    ]
    return _settled(cluster_map, shards=shards, owners=cluster_map.owners, moves=[])


# --- where each partition is to be -----------------------------------------------------------------------------------


def _targets(cluster_map: ClusterMap, lost: Set[int] = frozenset()) -> list[str]:
    """The id of the shard that each partition is to be owned by. Of those that are `lost` none stays."""
    owners = [cluster_map.shards[index].id for index in cluster_map.owners]
    nodes = [ShardWeight(shard.id, shard.weight) for shard in _staying(cluster_map)]
    present: list[str | None] = [*owners]  # those that do not stay have no place in the ring
    for move in cluster_map.moves:
        for partition in move.partitions:
            present[partition] = move.to
    if lost:  # nothing comes off a lost disk, so no two partitions can change places
        present = [None if partition in lost else owner for partition, owner in enumerate(present)]
        return place(nodes, cluster_map.partitions, present)
    moving = {partition for move in cluster_map.moves for partition in move.partitions}
    return _without_detours(owners, place(nodes, cluster_map.partitions, present), moving)


def _without_detours(owners: Sequence[str], targets: list[str], moving: set[int]) -> list[str]:
    """The same number of partitions for each shard, and none that gets some while it gives others.

    Of those that could stay, and of those that could go elsewhere, the ones that are not `moving` yet come first.
    """
    moved = [partition for partition, owner in enumerate(owners) if owner != targets[partition]]
    for shard in sorted({targets[partition] for partition in moved}):
        going = [partition for partition in moved if owners[partition] == shard != targets[partition]]
        coming = [partition for partition in moved if targets[partition] == shard != owners[partition]]
        for group in (going, coming):
            group.sort(key=moving.__contains__)
        for stays, elsewhere in zip(going, coming, strict=False):
            targets[stays], targets[elsewhere] = shard, targets[stays]
    return targets


# --- groups ----------------------------------------------------------------------------------------------------------


class _Way(NamedTuple):
    source: str
    to: str
    change: str


def _groups(
    cluster_map: ClusterMap,
    targets: Sequence[str],
    taken: set[int],
    group_partitions: Callable[[str], int],
    change: str,
) -> Iterator[tuple[_Way, list[int]]]:
    """The partitions of all that is to move and is not `taken`, in rounds: a group of each way.

    Within a round the pairs come in diagonals, (0, 0) (1, 1) (2, 2), then (0, 1) (1, 2) (2, 0), and so on: as few
    neighbours as can be share a source or a destination.
    """
    going: defaultdict[_Way, list[int]] = defaultdict(list)
    planned_by = {(partition, move.to): move.change for move in cluster_map.moves for partition in move.partitions}
    for partition, target in enumerate(targets):
        owner = cluster_map.shards[cluster_map.owners[partition]].id
        if owner != target and partition not in taken:
            going[_Way(owner, target, planned_by.get((partition, target), change))].append(partition)
    sources = sorted({way.source for way in going})
    destinations = sorted({way.to for way in going})
    width = max(len(sources), len(destinations))

    def diagonal(way: _Way) -> tuple[int, int, str]:
        row, column = sources.index(way.source), destinations.index(way.to)
        return (column - row) % width, row, way.change

    rounds = [
        [(way, group) for group in _cut(going[way], max(1, group_partitions(way.source)))]
        for way in sorted(going, key=diagonal)
    ]
    for groups in zip_longest(*rounds):
        yield from (group for group in groups if group is not None)


def _cut(partitions: list[int], size_max: int) -> list[list[int]]:
    """In as few groups as can be, all of about the same size."""
    count = -(-len(partitions) // size_max)
    cuts = [len(partitions) * i // count for i in range(count + 1)]
    return [partitions[begin:end] for begin, end in pairwise(cuts)]


# --- the next map ----------------------------------------------------------------------------------------------------


def _settled(cluster_map: ClusterMap, shards: list[Shard], owners: list[int], moves: list[Move]) -> ClusterMap:
    """With these, and in order.
    Who joins and is to get nothing more is up, who leaves and owns nothing is gone."""
    getting = {move.to for move in moves}
    shards = [
        msgspec.structs.replace(shard, state="up") if shard.state == "joining" and shard.id not in getting else shard
        for shard in shards
    ]
    owning = set(owners)
    remaining = [i for i, shard in enumerate(shards) if shard.state != "leaving" or i in owning]
    index = {before: after for after, before in enumerate(remaining)}
    return _next(
        cluster_map,
        nodes=_nodes_of(cluster_map, {shards[i].id for i in remaining}),
        shards=[shards[i] for i in remaining],
        owners=[index[owner] for owner in owners],
        moves=moves,
    )


def _nodes_of(cluster_map: ClusterMap, stay: Set[str]) -> list[Node]:
    """Without the homes of shards that go, unless a copy of another shard lies there."""
    gone = {shard.id for shard in cluster_map.shards} - stay
    needed = {node for shard in cluster_map.shards if shard.id in stay for node in shard.nodes}
    return [node for node in cluster_map.nodes if node.id in needed or node.id not in gone]


def _next(cluster_map: ClusterMap, **changes: Any) -> ClusterMap:
    changed = msgspec.structs.replace(cluster_map, **changes)
    return cluster_map if changed == cluster_map else msgspec.structs.replace(changed, epoch=cluster_map.epoch + 1)


def _with_shard(cluster_map: ClusterMap, shard_id: str, **changes: Any) -> ClusterMap:
    shards = [
        msgspec.structs.replace(shard, **changes) if shard.id == shard_id else shard for shard in cluster_map.shards
    ]
    return _next(cluster_map, shards=shards)


def _staying(cluster_map: ClusterMap) -> list[Shard]:
    """A shard that is lost does not stay, whatever its state."""
    return [s for s in cluster_map.shards if s.state != "leaving" and not cluster_map.is_struck(s.store_id)]


def _shard(cluster_map: ClusterMap, shard_id: str) -> Shard:
    shard = cluster_map.shard(shard_id)
    if shard is None:
        raise KeyError(shard_id)
    return shard


def _move(cluster_map: ClusterMap, move_id: str) -> Move:
    for move in cluster_map.moves:
        if move.id == move_id:
            return move
    raise KeyError(move_id)
