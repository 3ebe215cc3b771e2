"""One sentence that says how the cluster is, and what happens next or what to do.

Owns: the order of importance, and the words.
Promises: pure; the sentence speaks of the document that it was made from and of nothing else.
Leaves to others: the document (`cluster_views`, `event_documents`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IN_DOUBT_LONG_S = 15.0

Document = Mapping[str, Any]


def advice(document: Document) -> dict[str, str]:
    """`level` (ok, busy, warning) and `sentence`, from `shards`, `moves`, `wanted`, `in_doubt`, `lost`,
    `copies`, `behind`."""
    shards: Sequence[Document] = document["shards"]
    given_up = [lost["shard"] for lost in document.get("lost", ()) if not lost["opened"]]
    down = [shard["id"] for shard in shards if shard["state"] == "down"]
    facts: Document = document.get("copies") or {}
    if behind := document.get("behind"):
        return _said(
            "warning",
            f"The controller changes nothing: {behind} Keys are served, but no copy takes over, and no shard can join "
            "or leave. Run `kvstore controller recover`.",
        )
    if given_up:
        return _said("warning", _given_up(given_up, [shard_id for shard_id in down if shard_id not in given_up]))
    if down:
        return _said("warning", _down(down, shards, facts))
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
    if sentence := _copies(facts, shards):
        return _said("warning", sentence)
    if document["moves"]:
        return _moving(document["moves"])
    if document["wanted"]:
        return _said("busy", f"Shard {_names(document['wanted'])} is being started; then its partitions move to it.")
    if not shards:
        return _said("warning", "The cluster has no shards yet: start them, and they announce themselves.")
    copies = min(1 + len(shard.get("copies", ())) for shard in shards)
    in_sync = f", {copies} copies of every key are in sync" if copies > 1 else ""
    owned = f"{_count(len(shards), 'shard')} up, every partition has an owner{in_sync}, nothing moves"
    return _said("ok", f"All is well: {owned}.")


def _copies(facts: Document, shards: Sequence[Document]) -> str:
    """What is not as it should be with them, as far as the controller has heard; empty if nothing is."""
    silent: Mapping[str, float] = facts.get("silent", {})
    missing: Mapping[str, Sequence[str]] = facts.get("missing", {})
    if facts.get("holds_still"):
        return (
            f"Nodes {_names(sorted(silent))} are silent, too many at once: every shard with a copy in sync is served, "
            "but nothing moves and no node is given up. Start them again."
        )
    if damaged := facts.get("damaged"):
        shard, on = sorted(damaged.items())[0]
        return _damaged(shard, sorted(on), shards, silent)
    if disputed := facts.get("disputed"):
        shard, count = sorted(disputed.items())[0]
        return (
            f"{_count(count, 'partition')} of shard {shard}: all copies have the same rows, and the primary others, "
            f"though all verify. Nothing is changed by itself: `kvstore shard promote {shard} --to NODE` goes on with "
            "what the copies have."
        )
    if unproved := facts.get("unproved"):
        shard, nodes = sorted(unproved.items())[0]
        return (
            f"The copy of shard {shard} on node {_names(nodes)} takes records, and did not tell in several comparisons "
            "what rows it has: it is not sure that it could take over. It is rebuilt if there is another one in sync. "
            "Look at the disk of that node, and start it again."
        )
    if given_up := facts.get("given_up"):
        return _given_up_nodes(given_up)
    if silent:
        return _silent(sorted(silent), facts.get("given_up_in_s"))
    if missing:
        shard, nodes = sorted(missing.items())[0]
        filled = _filled(facts, shard)
        return f"Shard {shard} has no copy in sync on node {_names(nodes)} yet: {filled}that ends by itself."
    if lacking := facts.get("lacking_nodes"):
        more = "another one" if lacking == 1 else f"{lacking} more"
        return f"There are fewer nodes than copies of every key are asked for: add {more} with `kvstore shard add`."
    if shared := facts.get("one_zone"):
        return (
            f"Copies of shard {shared[0]} lie in one zone, which may fail as a whole: there are too few zones. Add a "
            "node in another one."
        )
    return ""


def _damaged(shard_id: str, nodes: Sequence[str], shards: Sequence[Document], silent: Mapping[str, float]) -> str:
    """Of a shard that is served."""
    shard: Document = next((each for each in shards if each["id"] == shard_id), {})
    said = f"The copy of shard {shard_id} on node {_names(nodes)} is damaged"
    if shard.get("primary") not in nodes:
        return f"{said}: it is rebuilt from the primary. The node's log says what is wrong."
    others = [copy["node"] for copy in shard.get("copies", ()) if _is_in_sync(copy) and copy["node"] not in nodes]
    if any(node not in silent for node in others):
        return f"{said}: one in sync takes its place, and it is rebuilt from that. The node's log says what is wrong."
    waits_for = f"none in sync can take its place before node {others[0]} is back" if others else "no other is in sync"
    return (
        f"{said}, and {waits_for}: what can be read is served. Save it with `kvstore export`; the node's log says what "
        "is wrong, and what can be done."
    )


def _filled(facts: Document, shard: str) -> str:
    """How far the snapshot for its copy has come, if there is one, or how many records it lacks."""
    for copy in facts.get("copies", {}).get(shard, ()):
        if copy["state"] != "in-sync":
            if copy.get("rows_total"):
                return f"{copy['rows_done']:,} of {copy['rows_total']:,} rows are there, and "
            if copy.get("lag"):
                return f"it lacks {_count(copy['lag'], 'record')}, and "
    return ""


def _silent(nodes: Sequence[str], given_up_in_s: float | None) -> str:
    is_one = len(nodes) == 1
    said = (
        f"Node {_names(nodes)} {'is' if is_one else 'are'} silent: {'its' if is_one else 'their'} shards are served by "
        f"their copies, and it joins again when it is back"
    )
    if given_up_in_s is None:
        return f"{said}."
    return (
        f"{said}. In {given_up_in_s:.0f} s it is given up: its copies get other places, and the keys of its own shard "
        "move to the other shards."
    )


def _given_up_nodes(nodes: Sequence[str]) -> str:
    is_one = len(nodes) == 1
    return (
        f"Node {_names(nodes)} {'was' if is_one else 'were'} silent for too long and {'is' if is_one else 'are'} given "
        "up: copies are made elsewhere, and the keys of its own shard move to the others. It joins again with an empty "
        "folder."
    )


def _moving(moves: Sequence[Document]) -> dict[str, str]:
    partitions = sum(move["partitions"] for move in moves)
    if waiting := [move for move in moves if move["step"] == "waiting" and move["detail"]]:
        return _said("warning", f"{_count(partitions, 'partition')} cannot move yet: {waiting[0]['detail']}.")
    return _said(
        "busy", f"{_count(partitions, 'partition')} still to move: clients notice nothing, and it ends by itself."
    )


def _down(down: list[str], shards: Sequence[Document], facts: Document) -> str:
    for shard_id, older in sorted(facts.get("older", {}).items()):
        if shard_id in down:
            return _older(shard_id, older, facts.get("stranded", {}).get(shard_id, {}).get("other"))
    for shard_id, stranded in sorted(facts.get("stranded", {}).items()):
        if shard_id in down:
            return _stranded(shard_id, stranded, facts)
    is_one = len(down) == 1
    said = f"Shard {down[0]} does not answer: its" if is_one else f"Shards {_names(down)} do not answer: their"
    said += " keys cannot be read or written until"
    copies = [copy["node"] for s in shards if s["id"] in down for copy in s.get("copies", ()) if _is_in_sync(copy)]
    if copies and facts:
        takes = f"the copy on node {copies[0]} takes" if is_one else "copies take"
        return f"{said} {takes} over, within a few seconds, or {'its own node is' if is_one else 'nodes are'} back."
    back = "it is" if is_one else "they are"
    return f"{said} {back} back. `kvstore up` starts what has ended again; if that does not help, its log says why."


def _is_in_sync(copy: Document) -> bool:
    return bool(copy["state"] == "in-sync")


def _stranded(shard_id: str, stranded: Document, facts: Document) -> str:
    if stranded.get("is_damaged"):
        return _not_whole(shard_id, stranded, facts)
    nodes: Sequence[str] = stranded["nodes"]
    said = f"Shard {shard_id} has no copy in sync that could take over: it is served again when node {nodes[0]} is back"
    if len(nodes) > 1:
        said += f", or {_names(nodes[1:])}"
    if (other := stranded["other"]) is None:
        return f"{said}. If its disk is lost, `kvstore shard remove {shard_id} --lost` gives up its keys."
    return (
        f"{said}. If that disk is lost, `kvstore shard promote {shard_id} --to {other} --accept-loss` goes on with the "
        "older copy there."
    )


def _not_whole(shard_id: str, stranded: Document, facts: Document) -> str:
    """The primary's copy is damaged, and no copy in sync that is heard can take its place."""
    primary, *in_sync = stranded["nodes"]
    silent: Mapping[str, float] = facts.get("silent", {})
    away = [node for node in in_sync if node in silent]
    joining = [copy["node"] for copy in facts.get("copies", {}).get(shard_id, ()) if copy["node"] in silent]
    said = f"Shard {shard_id} is not served: its copy on node {primary} is damaged, and "
    if away:
        said += f"one in sync takes its place when node {', or '.join(away)} is back. If that is lost, "
    else:
        said += f"there is no other one in sync. If node {primary} was started with another folder, give it its own. "
    if (to := stranded["other"]) is not None:
        said += f"`kvstore shard promote {shard_id} --to {to} --accept-loss` goes on with the older copy there"
    elif joining and not away:
        said += f"Node {joining[0]} may have an older one to go on with: start it"
    else:
        said += f"`kvstore shard remove {shard_id} --lost` gives up its keys, which a backup may have"
    return f"{said}; `kvstore store check` shows what is left of the files on node {primary} while that is stopped."


def _older(shard_id: str, facts: Document, other: str | None) -> str:
    """`other`: where a copy could be gone on with, if the primary's node is silent."""
    accept = f"promote {shard_id} --to {other} --accept-loss" if other else f"accept-old {shard_id}"
    return (
        f"Shard {shard_id} is not served: what is here of it ends with record {facts['number']:,}, and record "
        f"{facts['told']:,} was acknowledged, so an old folder was put back. Start the node with the newer files, or "
        f"put them back. If they are lost, `kvstore shard {accept}` goes on with what is there."
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
