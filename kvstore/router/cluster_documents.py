"""What a router tells of the cluster and of a key's way.
It is made from its map and from what the shards count.

Owns: the form of GET /v1/cluster and of the map's part of GET /v1/explain.
Promises: pure.
Leaves to others: asking the shards (`cluster_views`), what the controller adds (`controller_client`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from kvstore.metrics import ShardStats
from kvstore.placement.cluster_map import ClusterMap, Shard
from kvstore.placement.ring import ShardWeight, key_hash, walk


def cluster(
    cluster_map: ClusterMap,
    stats: Mapping[str, ShardStats | None],
    last_stats: Mapping[str, ShardStats],
    in_doubt: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The document. `stats`: None of a shard that does not answer, whose `last_stats` are told; `in_doubt`: by shard,
    the ages of transactions that hold keys there."""
    partitions = [0] * len(cluster_map.shards)
    for owner in cluster_map.owners:
        partitions[owner] += 1
    return {
        "cluster_id": cluster_map.cluster_id,
        "epoch": cluster_map.epoch,
        "partitions": cluster_map.partitions,
        "replicas": cluster_map.replicas,
        "nodes": nodes_of(cluster_map, {shard_id for shard_id, known in stats.items() if known is not None}),
        "shards": [
            _shard(cluster_map, shard, count, stats.get(shard.id), last_stats.get(shard.id))
            for shard, count in zip(cluster_map.shards, partitions, strict=True)
        ],
        "moves": [],
        "failovers": [],
        "in_doubt": _transactions_in_doubt(cluster_map, in_doubt),
    }


def with_copies(document: dict[str, Any], facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """The document, whose `nodes` and `shards` stand, with what the controller has heard of nodes and copies.

    `facts`: None if it does not answer. Which shards are under-replicated is added either way.
    """
    if facts is None:
        return document | {"under_replicated": under_replicated(document)}
    copies: Mapping[str, list[dict[str, Any]]] = facts["copies"]
    nodes = [node | ({"state": "down"} if node["id"] in facts["silent"] else {}) for node in document["nodes"]]
    shards = [shard | {"copies": copies.get(shard["id"], shard["copies"])} for shard in document["shards"]]
    told = document | {"nodes": nodes, "shards": shards, "failovers": facts["failovers"]}
    return told | {"under_replicated": under_replicated(told, facts)}


def under_replicated(document: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The shards that have fewer copies in sync, the primary's among them, than are asked for, and what is awaited."""
    found = []
    for shard in document["shards"]:
        in_sync = sum(copy["state"] == "in-sync" for copy in shard["copies"]) + 1
        if in_sync < document["replicas"] and shard["state"] != "leaving":
            awaited = _awaited(shard, document, facts)
            found.append({"shard": shard["id"], "in_sync": in_sync, "wanted": document["replicas"], "awaited": awaited})
    return found


def _awaited(shard: Mapping[str, Any], document: Mapping[str, Any], facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "the controller, which does not answer"
    missing: Sequence[str] = facts["missing"].get(shard["id"], ())
    if silent := [node for node in missing if node in facts["silent"]]:
        after = "" if facts["given_up_in_s"] is None else f", or another place in {facts['given_up_in_s']:.0f} s"
        return f"node {silent[0]}, which is silent{after}"
    for copy in shard["copies"]:
        if copy["state"] == "joining":
            lag = ""
            if copy["lag"] is not None:
                lag = f", which is {copy['lag']:,} records behind" if copy["lag"] else ", which has every record by now"
            if "rows_total" in copy:
                lag = f", which has {copy['rows_done']:,} of {copy['rows_total']:,} rows"
            return f"the copy on node {copy['node']}{lag}"
    if missing:
        return f"a copy on node {missing[0]}, which is being made"
    nodes = len(document["nodes"])
    return f"another node: there {'is' if nodes == 1 else 'are'} only {nodes}"


def way(cluster_map: ClusterMap, key: str, partition: int, url: str) -> dict[str, Any]:
    """The way of a key, as the map has it; `url`: where its owner is asked."""
    owner = cluster_map.shards[cluster_map.owners[partition]]
    weights = [ShardWeight(shard.id, shard.weight) for shard in cluster_map.shards]
    return {
        "key": key,
        "hash": f"{key_hash(key.encode()):016x}",
        "partition": partition,
        "partitions": cluster_map.partitions,
        "epoch": cluster_map.epoch,
        "walk": walk(weights, partition, cluster_map.partitions),
        "owner": owner.id,
        "owner_url": url,
        "primary": owner.primary.node,
        "copies": owner.nodes[1:],
    }


def _transactions_in_doubt(cluster_map: ClusterMap, in_doubt: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Attempts that hold keys in any shard, each counted once; of a shard that is down, those last known."""
    ages: dict[str, float] = {}
    for shard in cluster_map.shards:
        for name, age_s in in_doubt.get(shard.id, {}).items():
            ages[name] = max(age_s, ages.get(name, 0.0))
    return {"count": len(ages), "oldest_s": max(ages.values(), default=None)}


def _shard(
    cluster_map: ClusterMap, shard: Shard, partitions: int, stats: ShardStats | None, last_stats: ShardStats | None
) -> dict[str, Any]:
    known = stats or last_stats or ShardStats()
    return {
        "id": shard.id,
        "url": cluster_map.url_of(shard),
        "state": shard.state if stats is not None else "down",
        "weight": shard.weight,
        "partitions": partitions,
        "keys": known.keys,
        "bytes": known.bytes,
        "primary": shard.primary.node,
        "term": shard.term,
        "copies": copies_of(shard),
    }


def copies_of(shard: Shard) -> list[dict[str, Any]]:
    """Those beside its primary, as the map has them."""
    return [{"node": copy.node, "state": copy.state, "lag": None} for copy in shard.replicas]


def nodes_of(cluster_map: ClusterMap, answering: Set[str]) -> list[dict[str, Any]]:
    """Each node of the map; `down` while no shard whose primary is there answers."""
    down = {shard.primary.node for shard in cluster_map.shards} - {
        shard.primary.node for shard in cluster_map.shards if shard.id in answering
    }
    return [
        {
            "id": node.id,
            "url": node.url,
            **({"host": node.host} if node.host else {}),
            **({"zone": node.zone} if node.zone else {}),
            "state": "down" if node.given_up or node.id in down else "up",
        }
        for node in cluster_map.nodes
    ]
