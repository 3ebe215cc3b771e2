"""Nodes and copies as people see them: what GET /v1/cluster says of them, as far as the controller has heard.

Owns: the form of these facts.
Promises: pure.
Leaves to others: what was heard (`heard`), what is missing (`copy_places`), the words (the router).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client.metrics_core import Metric

from kvstore.controller.changes import Change
from kvstore.controller.copy_places import Places
from kvstore.controller.damage import reported
from kvstore.controller.heard import Heard
from kvstore.controller.replicas import too_many_silent
from kvstore.environment import utc_text
from kvstore.metrics import CopyStats, copy_families
from kvstore.placement.copies import zone_of
from kvstore.replication.beats import CopyReport
from kvstore.replication.configuration import Configuration, Replica, configurations

FAILOVERS_SHOWN_MAX = 5


def described(places: Places, known: Sequence[Change] = ()) -> dict[str, Any]:
    """`silent`: for how many seconds each node that is held for dead was silent; `copies`: those of each shard;
    `unserved`: shards whose primary does not answer; `missing`: by shard, nodes whose copy is not in sync;
    `under_replicated`: shards with fewer copies in sync than are asked for;
    `given_up`: nodes whose shard has not left yet;
    `stranded`: shards without a primary, and without a copy in sync that could take over; `older`: shards that are not
    served since all that is here of them is older than it should be; `lacking_nodes`: so many more are asked for;
    `one_zone`: shards whose copies share a zone or host; `holds_still`: so many nodes are silent that nothing moves;
    `damaged`: by shard and node, what is wrong with the copy's files; `disputed`: by shard, partitions that are the
    same in all copies, and not at the primary; `unproved`: by shard, nodes whose copy does not tell what rows it has;
    `given_up_in_s`: until the first of them is given up, None if none will be; `failovers`: the last, newest
    first; `positions`: what each node told last of its copies, by shard."""
    cluster_map, heard, now = places.cluster_map, places.heard, places.now
    configs = configurations(cluster_map)
    holds_still = too_many_silent(cluster_map, heard, now)
    return {
        "silent": {
            node.id: round(heard.detector.silent_for(node.id, now), 1)
            for node in cluster_map.nodes
            if heard.detector.is_silent(node.id, now)
        },
        "copies": {config.shard: [_copy(config, copy, heard) for copy in config.replicas] for config in configs},
        "unserved": places.unserved(),
        "missing": {config.shard: missing for config in configs if (missing := places.missing(config))},
        "given_up": [node.id for node in cluster_map.nodes if node.given_up],
        "stranded": {config.shard: _stranded(config, places) for config in configs if _is_stranded(config, places)},
        "older": {config.shard: found for config in configs if (found := _older(config, places)) is not None},
        "under_replicated": [
            shard.id
            for shard, config in zip(cluster_map.shards, configs, strict=True)
            if shard.state != "leaving" and 1 + len(config.in_sync) < cluster_map.replicas
        ],
        "lacking_nodes": max(0, cluster_map.replicas - sum(not node.given_up for node in cluster_map.nodes)),
        "one_zone": [config.shard for config in configs if _shares_zone(config, places)],
        "holds_still": holds_still,
        "damaged": reported(configs, heard),
        "disputed": _disputed(configs, places),
        "unproved": _unproved(configs, places),
        "given_up_in_s": None if holds_still else _given_up_in_s(places),
        "failovers": [_failover(c) for c in reversed(known) if c.kind == "failover"][:FAILOVERS_SHOWN_MAX],
        "positions": {config.shard: _positions(config, heard, now) for config in configs},
    }


def families(stats: CopyStats, facts: dict[str, Any] | None) -> Iterator[Metric]:
    """Metrics of copies. `facts`: as `described`; None where there is one copy of everything."""
    copies = [copy for each in facts["copies"].values() for copy in each] if facts is not None else []
    by_state = Counter({"in-sync": 0, "joining": 0}) + Counter(str(copy["state"]) for copy in copies)
    silent = len(facts["silent"]) if facts is not None else 0
    rows_left = sum(copy["rows_total"] - copy["rows_done"] for copy in copies if "rows_total" in copy)
    under_replicated = len(facts["under_replicated"]) if facts is not None else 0
    return copy_families(stats, dict(by_state), silent, rows_left, under_replicated)


def _copy(config: Configuration, copy: Replica, heard: Heard) -> dict[str, Any]:
    """`lag` in records, None where the primary has not told it; the rows of a snapshot that is under way."""
    report = heard.report(config.primary.node, config.shard, config.primary.copy_id)
    facts: dict[str, Any] = {"node": copy.node, "state": copy.state, "lag": None}
    if report is None:
        return facts
    facts["lag"] = report.behind.get(copy.copy_id)
    if (rows := report.snapshots.get(copy.copy_id)) is not None:
        facts |= {"rows_done": rows[0], "rows_total": rows[1]}
    return facts


def _positions(config: Configuration, heard: Heard, now: float) -> list[dict[str, Any]]:
    """The end of each log, primary first; `told_s`: how old that word is, `silent_s`: since its primary was heard."""
    places = [(config.primary.node, config.primary.copy_id), *((copy.node, copy.copy_id) for copy in config.replicas)]
    found = []
    for node, copy_id in places:
        report = heard.report(node, config.shard, copy_id)
        if report is not None:
            facts = {"node": node, "role": report.role, "serves": report.serves}
            facts |= {"term": report.term, "number": report.number, "silent_s": round(report.silent_s, 2)}
            found.append(facts | {"told_s": round(now - heard.told_at(node), 2)})
    return found


def _disputed(configs: Sequence[Configuration], places: Places) -> dict[str, int]:
    reports = [(config.shard, _of_primary(config, places)) for config in configs]
    return {shard: report.disputed for shard, report in reports if report is not None and report.disputed}


def _unproved(configs: Sequence[Configuration], places: Places) -> dict[str, list[str]]:
    reports = [(config.shard, _of_primary(config, places)) for config in configs]
    return {shard: report.unproved for shard, report in reports if report is not None and report.unproved}


def _of_primary(config: Configuration, places: Places) -> CopyReport | None:
    return places.copies.report(config.primary.node, config.shard, config.primary.copy_id)


def _is_stranded(config: Configuration, places: Places) -> bool:
    """It has no primary, and no copy in sync is on a node that is heard."""
    return places.copies.has_no_primary(config) and not places.copies.in_sync_here(config)


def _stranded(config: Configuration, places: Places) -> dict[str, Any]:
    """The nodes that are waited for, the primary's first, and another one whose copy has something, if one is heard.

    `is_damaged`: the primary's copy is, so that node is waited for in vain.
    """
    here = [copy.node for copy in config.replicas if places.copies.complete(config, copy) is not None]
    waits_for = [config.primary.node, *(copy.node for copy in config.in_sync)]
    report = places.heard.report(config.primary.node, config.shard)
    is_damaged = report is not None and report.role == "damaged"
    return {"nodes": waits_for, "other": here[0] if here else None, "is_damaged": is_damaged}


def _older(config: Configuration, places: Places) -> dict[str, int] | None:
    """The end of the longest log that is here, and the number of a record that was committed."""
    report = places.copies.older(config)
    return {"number": report.number, "told": places.heard.committed(config.store_id)} if report is not None else None


def _shares_zone(config: Configuration, places: Places) -> bool:
    """Where zones or hosts are named: two of its copies would fail together with one of them."""
    nodes = [
        node
        for name in (config.primary.node, *(c.node for c in config.replicas))
        if (node := places.cluster_map.node(name))
    ]
    zones = [zone_of(node) for node in nodes]
    return len(set(zones)) < len(zones)


def _given_up_in_s(places: Places) -> float | None:
    if not places.limits.down_out_s or places.cluster_map.replicas < 2:
        return None
    left = [
        places.limits.down_out_s - places.heard.detector.silent_for(node.id, places.now)
        for node in places.cluster_map.nodes
        if not node.given_up and places.heard.detector.is_silent(node.id, places.now)
    ]
    return max(0.0, round(min(left), 1)) if left else None


def _failover(change: Change) -> dict[str, Any]:
    seconds = max(0, (change.ended_ms or change.began_ms) - change.began_ms) / 1000
    at = utc_text(change.ended_ms or change.began_ms)
    return {"shard": change.shard, "to": change.to, "at": at, "seconds": seconds, "cause": change.detail}
