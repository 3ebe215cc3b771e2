"""One sentence that says how the cluster is, and what happens next or what to do.

Owns: the order of importance, and the words.
Promises: pure; the sentence speaks of the document that it was made from and of nothing else.
Leaves to others: the document (`service`, `event_documents`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IN_DOUBT_LONG_S = 15.0

Document = Mapping[str, Any]


def advice(document: Document) -> dict[str, str]:
    """`level` (ok, busy, warning) and `sentence`, from `shards`, `moves`, `wanted`, `in_doubt`, `lost`."""
    shards: Sequence[Document] = document["shards"]
    given_up = [lost["shard"] for lost in document.get("lost", ()) if not lost["opened"]]
    down = [shard["id"] for shard in shards if shard["state"] == "down"]
    facts: Document = document.get("copies") or {}
    if given_up:
        return _said("warning", _given_up(given_up, [shard_id for shard_id in down if shard_id not in given_up]))
    if down:
        waits = [shard["id"] for shard in shards if shard["id"] in down and _has_successor(shard, facts)]
        return _said("warning", _taken_over(waits) if waits == down else _down(down))
    if full := [shard["id"] for shard in shards if shard.get("disk_full")]:
        return _said(
            "warning",
            f"The disk of {_names(full)} is nearly full: only deletes are taken there. Free some space on that disk.",
        )
    oldest_s = document["in_doubt"]["oldest_s"] or 0.0
    if oldest_s > IN_DOUBT_LONG_S:
        return _said(
            "warning",
            f"A transaction has been in doubt for {oldest_s:.0f} s: recovery waits for a shard that does not answer. "
            "Look into the logs of the shards.",
        )
    if document["wanted"] is None:
        return _said("warning", "The controller does not answer: all keys are served, but no shard can join or leave.")
    if sentence := _copies(facts):
        return _said("warning", sentence)
    if document["moves"]:
        return _moving(document["moves"])
    if document["wanted"]:
        return _said("busy", f"Shard {_names(document['wanted'])} is being started; then its partitions move to it.")
    if not shards:
        return _said("warning", "The cluster has no shards yet: start them, and they announce themselves.")
    copies = min(1 + len(shard.get("copies", ())) for shard in shards)
    if copies < document.get("replicas", 1):
        return _said("warning", _too_few_nodes(copies, document["replicas"]))
    in_sync = f", {copies} copies of every key are in sync" if copies > 1 else ""
    owned = f"{_count(len(shards), 'shard')} up, every partition has an owner{in_sync}, nothing moves"
    return _said("ok", f"All is well: {owned}.")


def _has_successor(shard: Document, facts: Document) -> bool:
    """A copy of it is in sync on a node that is heard."""
    return any(c["state"] == "in-sync" and c["node"] not in facts.get("silent", {}) for c in shard.get("copies", ()))


def _too_few_nodes(copies: int, replicas: int) -> str:
    return (
        f"Some shards are kept {'once' if copies == 1 else f'{copies} times'}, not {replicas} times: there are too few "
        "nodes. `kvstore shard add` brings one."
    )


def _taken_over(down: Sequence[str]) -> str:
    verb = "does" if len(down) == 1 else "do"
    return (
        f"Shard {_names(down)} {verb} not answer: a copy in sync takes over when its primary has been silent for long "
        "enough, and calls wait for it."
    )


def _copies(facts: Document) -> str:
    """What is not as it should be with them, as far as the controller has heard; empty if nothing is."""
    silent: Mapping[str, float] = facts.get("silent", {})
    missing: Mapping[str, Sequence[str]] = facts.get("missing", {})
    if facts.get("holds_still"):
        return (
            f"Nodes {_names(sorted(silent))} are silent, too many at once for any to be given up: every shard with a "
            "copy in sync is served; start them again."
        )
    if silent:
        verb = "is" if len(silent) == 1 else "are"
        return (
            f"Node {_names(sorted(silent))} {verb} silent: its shards are served by their copies, and it joins again "
            "when it is back."
        )
    if missing:
        shard, nodes = sorted(missing.items())[0]
        return f"Shard {shard} has no copy in sync on node {_names(nodes)} yet: that ends by itself."
    return ""


def _moving(moves: Sequence[Document]) -> dict[str, str]:
    partitions = sum(move["partitions"] for move in moves)
    if waiting := [move for move in moves if move["step"] == "waiting" and move["detail"]]:
        return _said("warning", f"{_count(partitions, 'partition')} cannot move yet: {waiting[0]['detail']}.")
    return _said(
        "busy", f"{_count(partitions, 'partition')} still to move: clients notice nothing, and it ends by itself."
    )


def _down(down: list[str]) -> str:
    verb = "does" if len(down) == 1 else "do"
    return (
        f"Shard {_names(down)} {verb} not answer: its keys cannot be read or written until it is back. "
        "`kvstore up` starts it again by itself; if it does not come back, its log says why."
    )


def _given_up(given_up: list[str], down: list[str]) -> str:
    verb = "is" if len(given_up) == 1 else "are"
    next_step = f"start {_names(down)}, or give it up, too" if down else "that takes a moment"
    return (
        f"Shard {_names(given_up)} {verb} given up as lost: its partitions are opened, empty, once every other shard "
        f"has heard of it; {next_step}."
    )


def _said(level: str, sentence: str) -> dict[str, str]:
    return {"level": level, "sentence": sentence}


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
