"""The cluster map: its nodes, its shards, which shard owns which partition, as of which epoch.

Owns: the one document that the controller writes and all other processes follow.
Promises: pure data; every change is a new map with epoch + 1, so two maps of one cluster with the same epoch are equal.
Leaves to others: placing partitions (`ring`) and copies (`copies`), older forms of the document (`map_format`), storing
and spreading the map (controller), following it (router, shard).

A node is a process that serves stores, and has an address. A shard is a part of the keys, and has none: it is reached
where its primary is. The store of a shard lies on one node for each of its copies, one of which is the primary. Shard
s1 begins on node s1, its home.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from kvstore.placement.ring import ShardWeight, partition_of, place

ShardState = Literal["joining", "up", "leaving"]
CopyState = Literal["joining", "in-sync"]

MAP_FORMAT = 4


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A process that serves stores, reached at `url`. Copies of a shard go to different zones where there are some.

    `given_up`: it is held for lost, and no copy is placed on it.
    """

    id: str
    url: str
    host: str = ""
    zone: str = ""
    given_up: bool = False


class Primary(msgspec.Struct, frozen=True, kw_only=True):
    """The copy that answers for a shard: `copy_id` is drawn when a node makes the copy's files."""

    node: str
    copy_id: str


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """A copy beside the primary. `joined`: its joining number, the epoch of the map that named it joining."""

    node: str
    copy_id: str
    state: CopyState
    joined: int


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the keys.
    `store_id` is the random id of its store: an empty or foreign file is no owner.

    `term`: the epoch of the map that gave it. `replicas`: all copies but the primary. `clock_floor`: an older copy was
    made the primary, and gives versions above that one.
    """

    id: str
    store_id: str
    primary: Primary
    term: int
    weight: int = 1
    state: ShardState = "up"
    replicas: list[Replica] = []
    clock_floor: int = 0

    @property
    def nodes(self) -> list[str]:
        """The ids of those that have a copy, the primary's first."""
        return [self.primary.node, *(replica.node for replica in self.replicas)]


class Home(NamedTuple):
    """A shard whose only copy lies on the node of its name."""

    node: Node
    shard: Shard


def at_home(
    shard_id: str, url: str, store_id: str, *, copy_id: str = "", weight: int = 1, zone: str = "", term: int = 1
) -> Home:
    """A shard and its home. Without a `copy_id` that is the store's, as of copies made before there were any."""
    node = Node(id=shard_id, url=url, zone=zone)
    primary = Primary(node=shard_id, copy_id=copy_id or store_id)
    return Home(node, Shard(id=shard_id, store_id=store_id, primary=primary, term=term, weight=weight))


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Partitions that the shard `source` owns and the shard `to` is to own, moved together.

    The `id` names one try, for ever: once the move is given up or begun again, no map has it any more. `change` is the
    id of the change of the cluster that it is a part of.
    """

    id: str
    source: str
    to: str
    partitions: list[int]
    change: str = ""


class Strike(msgspec.Struct, frozen=True, kw_only=True):
    """A shard that was given up with all that it had, as of `epoch`.
    Its file is refused for ever, under any name.

    No shard answers for its `partitions` until they are `opened`, empty, by the map of that epoch (0: not yet). Every
    version given there since is above `clock`.
    """

    shard: str
    store_id: str
    epoch: int
    partitions: list[int]
    opened: int = 0
    clock: int = 0


class ClusterMap(msgspec.Struct, frozen=True, kw_only=True):
    """`owners[p]` is the index in `shards` of the shard that owns partition p; `shards` is in order of joining.

    `moves`: those that stand, under way or not begun yet, in the order in which they are to be done. `strikes`: all
    that there ever were, in order. `replicas`: how many copies of every key there are to be, the primary's among them.
    """

    cluster_id: str
    epoch: int
    partitions: int
    nodes: list[Node]
    shards: list[Shard]
    owners: list[int]
    replicas: int = 1
    moves: list[Move] = []
    strikes: list[Strike] = []
    format: int = MAP_FORMAT

    def shard(self, shard_id: str) -> Shard | None:
        """The shard of that id, or None."""
        return next((shard for shard in self.shards if shard.id == shard_id), None)

    def node(self, node_id: str) -> Node | None:
        """The node of that id, or None."""
        return next((node for node in self.nodes if node.id == node_id), None)

    def url_of(self, shard: Shard) -> str:
        """The address of the node with the shard's primary. Raises StopIteration for a shard whose primary's node is
        not in the map, which `checked_map` refuses.
        """
        return next(node.url for node in self.nodes if node.id == shard.primary.node)

    @property
    def last_strike(self) -> int:
        """The epoch of the last one, 0 without any."""
        return self.strikes[-1].epoch if self.strikes else 0

    def is_struck(self, store_id: str) -> bool:
        """The file of that id was given up."""
        return any(strike.store_id == store_id for strike in self.strikes)

    def openings(self) -> tuple[dict[int, int], dict[int, int], int]:
        """(struck, opened, last): by partition the epochs of its last strike and of its last opening; the epoch of the
        last strike of all, 0 without any.
        """
        struck = {partition: strike.epoch for strike in self.strikes for partition in strike.partitions}
        opened = {
            partition: strike.opened for strike in self.strikes for partition in strike.partitions if strike.opened
        }
        return struck, opened, self.last_strike

    def owner_of(self, key: bytes) -> Shard:
        """The shard that owns `key` (its UTF-8 bytes): one hash and one array look-up. Raises KeyError for a number of
        partitions that `ring.place` refuses.
        """
        return self.shards[self.owners[partition_of(key, self.partitions)]]

    def owned_by(self, shard_id: str) -> list[int]:
        """The partitions that the shard owns, ascending."""
        index = next((i for i, shard in enumerate(self.shards) if shard.id == shard_id), -1)
        return [partition for partition, owner in enumerate(self.owners) if owner == index]


def map_of(homes: Sequence[Home], **rest: Any) -> ClusterMap:
    """A map of these shards, each at home; `rest`: its other fields."""
    return ClusterMap(nodes=[home.node for home in homes], shards=[home.shard for home in homes], **rest)


def first_map(cluster_id: str, partitions: int, homes: Sequence[Home]) -> ClusterMap:
    """The map of epoch 1: all partitions placed on the first shards by the ring. Raises ValueError as `ring.place`
    does.
    """
    weights = [ShardWeight(shard.id, shard.weight) for _, shard in homes]
    index = {shard.id: i for i, (_, shard) in enumerate(homes)}
    owners = [index[owner] for owner in place(weights, partitions)]
    return map_of(homes, cluster_id=cluster_id, epoch=1, partitions=partitions, owners=owners)


def newest_of(maps: Iterable[ClusterMap | None]) -> ClusterMap | None:
    """That of the highest epoch; None without any."""
    return max((each for each in maps if each is not None), key=lambda each: each.epoch, default=None)


def checked_map(cluster_map: ClusterMap) -> ClusterMap:
    """The map. Raises ValueError where it contradicts itself: it names an owner or a partition that is not there."""
    partitions, shards = cluster_map.partitions, len(cluster_map.shards)
    if not 0 < cluster_map.epoch < 2**53:
        raise ValueError(f"{cluster_map.epoch} is no epoch")
    if len(cluster_map.owners) != partitions or not all(0 <= owner < shards for owner in cluster_map.owners):
        raise ValueError("not every partition has an owner among the shards")
    nodes = {node.id for node in cluster_map.nodes}
    for shard in cluster_map.shards:
        if not nodes.issuperset(shard.nodes):
            raise ValueError(f"a copy of shard {shard.id} is on a node that is not there")
    if not all(0 <= partition < partitions for move in cluster_map.moves for partition in move.partitions):
        raise ValueError("a move names a partition that is not there")
    for strike in cluster_map.strikes:
        if not all(0 <= number < 2**53 for number in (strike.epoch, strike.opened, strike.clock)):
            raise ValueError("an epoch or the clock of a strike is none")
        if not all(0 <= partition < partitions for partition in strike.partitions):
            raise ValueError("a strike names a partition that is not there")
    return cluster_map


def with_node_url(cluster_map: ClusterMap, node_id: str, url: str) -> ClusterMap:
    """The next map, in which that node is reached at another address.

    An id that is not there changes the epoch alone.
    """
    return with_node(cluster_map, *(msgspec.structs.replace(n, url=url) for n in cluster_map.nodes if n.id == node_id))


def with_node(cluster_map: ClusterMap, *changed: Node) -> ClusterMap:
    """The next map, in which each of these nodes takes the place of the one of its id. Adds none."""
    by_id = {node.id: node for node in changed}
    nodes = [by_id.get(node.id, node) for node in cluster_map.nodes]
    return msgspec.structs.replace(cluster_map, epoch=cluster_map.epoch + 1, nodes=nodes)
