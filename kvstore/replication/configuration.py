"""What the cluster map says of one shard's copies, as the rules of replication see it.

Owns: `Configuration`, the view of one shard in a map of one epoch; `Request`, a change of it that a primary asks for.
Promises: pure data. A term is the epoch of the map that gave it, and a joining number that of the map that named the
copy joining, so that neither is ever given twice.
Leaves to others: who may change it (`failover`), and the document that holds it (`placement.cluster_map`).

The map's own classes are for the wire and the disk; these are compared and hashed a million times by the tests' model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from kvstore.placement import cluster_map as maps

CopyState = Literal["joining", "in-sync"]
RequestKind = Literal["in-sync", "out"]


class Primary(NamedTuple):
    """The node that serves the shard, and the random id of its copy of the store."""

    node: str
    copy_id: str


class Replica(NamedTuple):
    """Another copy of the store. `joined`: the epoch of the map that named it, as in `Configuration`."""

    node: str
    copy_id: str
    state: CopyState
    joined: int


class Configuration(NamedTuple):
    """One shard as of the map `epoch`: its store, its `term`, who serves it and who has copies."""

    shard: str
    store_id: str
    epoch: int
    term: int
    primary: Primary
    replicas: tuple[Replica, ...] = ()

    @property
    def ids(self) -> dict[str, str]:
        """By node, the ids of its copies, the primary's among them."""
        return {self.primary.node: self.primary.copy_id, **{copy.node: copy.copy_id for copy in self.replicas}}

    def copy_on(self, node: str) -> Replica | None:
        """The copy that lies on that node, if one does; the primary is none."""
        return next((copy for copy in self.replicas if copy.node == node), None)

    def names(self, copy_id: str, joined: int) -> bool:
        """Whether that very copy is still one.
        It is out when it is gone, or there with a higher joining number."""
        return any(copy.copy_id == copy_id and copy.joined == joined for copy in self.replicas)

    @property
    def in_sync(self) -> tuple[Replica, ...]:
        """The copies, without the primary, that have all that was acknowledged."""
        return tuple(copy for copy in self.replicas if copy.state == "in-sync")


class Request(NamedTuple):
    """A change of the configuration that a primary asks for; granted only if all that it names still stands."""

    kind: RequestKind
    shard: str
    term: int
    primary: str  # its copy's id
    copy_id: str
    joined: int


def configuration_of(cluster_map: maps.ClusterMap, shard_id: str) -> Configuration | None:
    """What the map says of that shard's copies; None if it has no such shard."""
    shard = cluster_map.shard(shard_id)
    if shard is None:
        return None
    replicas = tuple(Replica(each.node, each.copy_id, each.state, each.joined) for each in shard.replicas)
    primary = Primary(shard.primary.node, shard.primary.copy_id)
    return Configuration(shard.id, shard.store_id, cluster_map.epoch, shard.term, primary, replicas)


def configurations(cluster_map: maps.ClusterMap) -> list[Configuration]:
    """Those of all shards, in the order of the map."""
    return [found for shard in cluster_map.shards if (found := configuration_of(cluster_map, shard.id)) is not None]


def with_configuration(cluster_map: maps.ClusterMap, config: Configuration) -> maps.ClusterMap:
    """The next map, in which that shard's copies are as `config` says.

    Raises ValueError unless the configuration was made for the next epoch of a map that has the shard.
    """
    if config.epoch != cluster_map.epoch + 1 or cluster_map.shard(config.shard) is None:
        raise ValueError(f"shard {config.shard} as of epoch {config.epoch} does not follow map {cluster_map.epoch}")
    replicas = [maps.Replica(**each._asdict()) for each in config.replicas]
    primary = maps.Primary(**config.primary._asdict())
    shards = [
        msgspec.structs.replace(shard, term=config.term, primary=primary, replicas=replicas)
        if shard.id == config.shard
        else shard
        for shard in cluster_map.shards
    ]
    return msgspec.structs.replace(cluster_map, epoch=config.epoch, shards=shards)
