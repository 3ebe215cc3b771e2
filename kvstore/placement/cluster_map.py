"""The cluster map: who is a member, which shard owns which partition, as of which epoch.

Owns: the one document that the controller writes and everybody else follows.
Promises: pure data; every change is a new map with epoch + 1, so two maps of one cluster with the same epoch are equal.
Leaves to others: placing partitions (`ring`), storing and spreading the map (controller), following it (router, shard).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from kvstore.placement.ring import Node, partition_of, place

MemberState = Literal["joining", "up", "leaving"]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A shard as the map knows it. `store_id` is the random id of its file: an empty or foreign file is no owner."""

    id: str
    url: str
    store_id: str
    weight: int = 1
    state: MemberState = "up"


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """Partitions that the shard `source` owns and the shard `to` is to own, moved together.

    The `id` names one try, for ever: once the move is given up or begun anew, no map has it any more. `change` is the
    id of the change of the cluster that it is a part of.
    """

    id: str
    source: str
    to: str
    partitions: list[int]
    change: str = ""


class Strike(msgspec.Struct, frozen=True, kw_only=True):
    """A shard that was given up with all that it had, as of `epoch`: its file is refused for ever, under any name.

    Of its `partitions` nobody answers until they are `opened`, empty, by the map of that epoch (0: not yet). Every
    version given there since is above `clock`.
    """

    shard: str
    store_id: str
    epoch: int
    partitions: list[int]
    opened: int = 0
    clock: int = 0


class ClusterMap(msgspec.Struct, frozen=True, kw_only=True):
    """`owners[p]` is the index in `members` of the shard that owns partition p; `members` is in order of joining.

    `moves`: those that stand, under way or not begun yet, in the order in which they are to be done. `strikes`: all
    that there ever were, in order.
    """

    cluster_id: str
    epoch: int
    partitions: int
    members: list[Member]
    owners: list[int]
    replicas: int = 1
    moves: list[Move] = []
    strikes: list[Strike] = []

    def member(self, shard_id: str) -> Member | None:
        """The member of that id, or None."""
        return next((member for member in self.members if member.id == shard_id), None)

    @property
    def last_strike(self) -> int:
        """The epoch of the last one, 0 without any."""
        return self.strikes[-1].epoch if self.strikes else 0

    def is_struck(self, store_id: str) -> bool:
        """The file of that id was given up."""
        return any(strike.store_id == store_id for strike in self.strikes)

    def openings(self) -> tuple[dict[int, int], dict[int, int], int]:
        """By partition the epochs of its last strike and of its last opening; that of the last strike of all."""
        struck = {partition: strike.epoch for strike in self.strikes for partition in strike.partitions}
        opened = {
            partition: strike.opened for strike in self.strikes for partition in strike.partitions if strike.opened
        }
        return struck, opened, self.last_strike

    def owner_of(self, key: bytes) -> Member:
        """The shard that owns `key` (its UTF-8 bytes)."""
        return self.members[self.owners[partition_of(key, self.partitions)]]

    def owned_by(self, shard_id: str) -> list[int]:
        """The partitions that the shard owns, ascending."""
        index = next((i for i, member in enumerate(self.members) if member.id == shard_id), -1)
        return [partition for partition, owner in enumerate(self.owners) if owner == index]


def first_map(cluster_id: str, partitions: int, members: list[Member]) -> ClusterMap:
    """Epoch 1: all partitions placed on the first members by the ring."""
    nodes = [Node(member.id, member.weight) for member in members]
    index = {member.id: i for i, member in enumerate(members)}
    owners = [index[owner] for owner in place(nodes, partitions)]
    return ClusterMap(cluster_id=cluster_id, epoch=1, partitions=partitions, members=members, owners=owners)


def checked_map(cluster_map: ClusterMap) -> ClusterMap:
    """The map. Raises ValueError where it contradicts itself: it names an owner or a partition that is not there."""
    partitions, members = cluster_map.partitions, len(cluster_map.members)
    if not 0 < cluster_map.epoch < 2**53:
        raise ValueError(f"{cluster_map.epoch} is no epoch")
    if len(cluster_map.owners) != partitions or not all(0 <= owner < members for owner in cluster_map.owners):
        raise ValueError("not every partition has an owner among the members")
    if not all(0 <= partition < partitions for move in cluster_map.moves for partition in move.partitions):
        raise ValueError("a move names a partition that is not there")
    for strike in cluster_map.strikes:
        if not all(0 <= number < 2**53 for number in (strike.epoch, strike.opened, strike.clock)):
            raise ValueError("an epoch or the clock of a strike is none")
        if not all(0 <= partition < partitions for partition in strike.partitions):
            raise ValueError("a strike names a partition that is not there")
    return cluster_map


def with_member_url(cluster_map: ClusterMap, shard_id: str, url: str) -> ClusterMap:
    """The next map, in which that shard is reached at another address."""
    members = [
        msgspec.structs.replace(member, url=url) if member.id == shard_id else member for member in cluster_map.members
    ]
    return msgspec.structs.replace(cluster_map, epoch=cluster_map.epoch + 1, members=members)
