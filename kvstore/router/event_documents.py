"""The documents of the events: the map with its ring, shards and copies, locks and transactions, put together.

Owns: the shape of `map`, `cluster`, `changes`, `locks` and `transactions`, as the OpenAPI document describes them.
Promises: pure. Runs of partitions with the same owner are told as one, so a map is a few kilobytes.
Leaves to others: asking the shards and the pace (`events`), what changed (`feed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import msgspec

from kvstore.metrics import Histogram, ShardStats
from kvstore.placement import partition_set
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.ring import VIRTUAL_NODES_PER_WEIGHT, ShardWeight, key_hash, virtual_nodes
from kvstore.router.cluster_documents import copies_of
from kvstore.router.rates import percentile_ms

LIVE_MAX = 50  # locks, and attempts, that a shard is asked to list
CHANGES_ENDED_MAX = 10  # the last that ended, beside those that run
VIRTUAL_NODES_MAX = 4096  # that are told: beyond, a drawing could not show them apart

Live = Mapping[str, Any]


class Sample(msgspec.Struct):
    """A shard's answer to one question: its numbers, and what is at work there."""

    stats: ShardStats
    live: dict[str, Any]
    at_s: float


def map_document(cluster_map: ClusterMap) -> dict[str, Any]:
    """`owners`: runs of [index in members, partitions]; `virtual_nodes`: [top 32 bits of the point, index];
    `nodes`: each with the top 32 bits of its point on the circle of nodes, where copies find their places."""
    shards = cluster_map.shards
    index = {shard.id: i for i, shard in enumerate(shards)}
    points = _points(tuple(ShardWeight(shard.id, shard.weight) for shard in shards))
    return {
        "epoch": cluster_map.epoch,
        "partitions": cluster_map.partitions,
        "replicas": cluster_map.replicas,
        "members": [
            {
                "id": s.id,
                "weight": s.weight,
                "state": s.state,
                "primary": s.primary.node,
                "copies": [copy.node for copy in s.replicas],
            }
            for s in shards
        ],
        "nodes": [{"id": node.id, "point": key_hash(node.id.encode()) >> 32} for node in cluster_map.nodes],
        "owners": [[owner, len(list(run))] for owner, run in groupby(cluster_map.owners)],
        "virtual_nodes": [[point >> 32, index[shard]] for point, shard in points],
        "moves": [
            {"from": m.source, "to": m.to, "partitions": partition_set.runs(m.partitions)} for m in cluster_map.moves
        ],
        "lost": lost_documents(cluster_map),
    }


def changes_document(items: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """`items`: as the controller tells them, the newest first; None if it does not answer."""
    if items is None:
        return {"items": None}
    ended = [item["id"] for item in items if item["state"] != "running"]
    left_out = set(ended[CHANGES_ENDED_MAX:])
    return {"items": [item for item in items if item["id"] not in left_out]}


def changes_identity(document: Mapping[str, Any]) -> Any:
    """What tells a change from the time that passes, of which whole seconds count."""
    items = document["items"]
    return "away" if items is None else [{**item, "seconds": int(item["seconds"])} for item in items]


def lost_documents(cluster_map: ClusterMap) -> list[dict[str, Any]]:
    """The shards that were ever given up with all that they had; `opened` 0: their partitions are not open yet."""
    return [
        {"shard": each.shard, "epoch": each.epoch, "partitions": len(each.partitions), "opened": each.opened}
        for each in cluster_map.strikes
    ]


@lru_cache(maxsize=2)
def _points(weights: tuple[ShardWeight, ...]) -> list[tuple[int, str]]:
    """Kept, since most maps differ in owners only; nothing if there are too many, which would take long to place."""
    if sum(each.weight for each in weights) * VIRTUAL_NODES_PER_WEIGHT > VIRTUAL_NODES_MAX:
        return []
    return virtual_nodes(weights)


def shard_documents(
    cluster_map: ClusterMap, now: Mapping[str, Sample | None], before: Mapping[str, Sample]
) -> list[dict[str, Any]]:
    """One for each shard, in the order of joining. `now`: None for a shard that does not answer."""
    owned = [0] * len(cluster_map.shards)
    for owner in cluster_map.owners:
        owned[owner] += 1
    documents = []
    for shard, partitions in zip(cluster_map.shards, owned, strict=True):
        sample, last = now.get(shard.id), before.get(shard.id)
        known = sample or last
        numbers = _numbers(known.stats) if known is not None else _numbers(ShardStats())
        documents.append(
            {
                "id": shard.id,
                "url": cluster_map.url_of(shard),
                "state": shard.state if sample is not None else "down",
                "weight": shard.weight,
                "partitions": partitions,
                "primary": shard.primary.node,
                "term": shard.term,
                "copies": copies_of(shard),
                **numbers,
                **_work(sample, last),
            }
        )
    return documents


def _numbers(stats: ShardStats) -> dict[str, Any]:
    return {
        "keys": stats.keys,
        "bytes": stats.bytes,
        "file_bytes": stats.file_bytes,
        "log_bytes": stats.log_bytes,
        "unapplied_rows": stats.unapplied_rows,
        "waiting_writes": stats.write_queue_ops,
        "disk_full": stats.disk_full,
    }


def _work(now: Sample | None, before: Sample | None) -> dict[str, float | None]:
    """What the shard did since the sample before; nothing if it was started again in between."""
    nothing = {"reads_per_s": 0.0, "writes_per_s": 0.0, "commit_p99_ms": None}
    if now is None or before is None or now.at_s <= before.at_s:
        return nothing
    seconds = now.at_s - before.at_s
    reads, writes = _reads(now.stats) - _reads(before.stats), now.stats.batch_ops.total - before.stats.batch_ops.total
    if reads < 0 or writes < 0:
        return nothing
    return {
        "reads_per_s": round(reads / seconds, 1),
        "writes_per_s": round(writes / seconds, 1),
        "commit_p99_ms": _fresh_p99(now.stats.commit_s, before.stats.commit_s),
    }


def _reads(stats: ShardStats) -> int:
    return stats.cache_hits + stats.cache_misses


def _fresh_p99(now: Histogram, before: Histogram) -> float | None:
    fresh = [a - b for a, b in zip(now.counts, before.counts, strict=True)]
    return percentile_ms(fresh, now.bounds, 99)


def locks_document(live: Mapping[str, Live]) -> dict[str, Any]:
    """By name; `count` is of all, `items` those that the shards listed."""
    items = [{**lease, "shard": shard} for shard, facts in live.items() for lease in facts["leases"]]
    items.sort(key=lambda lease: str(lease["name"]))
    return {"count": sum(facts["leases_count"] for facts in live.values()), "items": items}


def locks_identity(document: Mapping[str, Any], now_s: float) -> list[Any]:
    """What is the same while the locks are: a renewal changes it, time that passes does not."""
    return [
        (item["name"], item["token"], tuple(item["waiters"]), item["waiting"], round(now_s + item["ttl_left"]))
        for item in document["items"]
    ] + [document["count"]]


def transactions_document(live: Mapping[str, Live]) -> dict[str, Any]:
    """Each attempt once, with the shards in which it holds keys; the oldest first."""
    found: dict[str, dict[str, Any]] = {}
    for shard, facts in live.items():
        for attempt in facts["attempts"]:
            merged = found.setdefault(
                attempt["id"],
                {"id": attempt["id"], "anchor": attempt["anchor"], "age_s": 0.0, "abandoned": False, "at": []},
            )
            merged["age_s"] = max(merged["age_s"], attempt["age_s"])
            merged["abandoned"] = merged["abandoned"] or attempt["abandoned"]
            merged["at"].append({"shard": shard, "keys": attempt["keys"], "keys_count": attempt["keys_count"]})
    return {
        "intents": sum(facts["intents"] for facts in live.values()),
        "items": sorted(found.values(), key=lambda item: -item["age_s"]),
    }


def transactions_identity(document: Mapping[str, Any]) -> list[Any]:
    """What is the same while the same attempts hold the same keys."""
    return [(item["id"], item["abandoned"], item["at"]) for item in document["items"]] + [document["intents"]]


def in_doubt(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """As in GET /v1/cluster."""
    return {"count": len(items), "oldest_s": max((item["age_s"] for item in items), default=None)}
