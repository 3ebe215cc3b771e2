"""Nodes and copies as people see them: what GET /v1/cluster says of them, as far as the controller has heard.

Owns: the form of these facts.
Promises: pure.
Leaves to others: what was heard (`heard`), what is missing (`copy_places`), the rest of the document (the router).
"""

from __future__ import annotations

from typing import Any

from kvstore.controller.copy_places import Places
from kvstore.controller.heard import Heard
from kvstore.controller.replicas import too_many_silent
from kvstore.replication.configuration import Configuration, Replica, configuration_of


def described(places: Places) -> dict[str, Any]:
    """`silent`: for how many seconds each node that is held for dead was silent; `copies`: those of each shard;
    `unserved`: shards whose primary does not answer; `missing`: by shard, nodes whose copy is not in sync;
    `holds_still`: so many nodes are silent that none is given up; `positions`: what each node told last of its copies,
    by shard."""
    cluster_map, heard, now = places.cluster_map, places.heard, places.now
    configs = [c for shard in cluster_map.shards if (c := configuration_of(cluster_map, shard.id)) is not None]
    return {
        "silent": {
            node.id: round(heard.silent_for(node.id, now), 1)
            for node in cluster_map.nodes
            if heard.is_silent(node.id, now)
        },
        "copies": {config.shard: [_copy(config, copy, heard) for copy in config.replicas] for config in configs},
        "unserved": [config.shard for config in configs if not places.serves(config)],
        "missing": {config.shard: missing for config in configs if (missing := places.missing(config))},
        "holds_still": too_many_silent(cluster_map, heard, now),
        "positions": {config.shard: _positions(config, heard, now) for config in configs},
    }


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
