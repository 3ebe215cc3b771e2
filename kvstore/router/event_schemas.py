"""The documents of GET /v1/events and of the demo, as JSON Schemas: a part of `schemas`.

Owns: the shape of the data of every kind of event.
Promises: as `schemas`. The names in `EVENTS` are the kinds that a listener can meet, and each has its schema.
Leaves to others: the documents themselves (`event_documents`, `rates`, `demo`), when they are told (`feed`).
"""

from __future__ import annotations

from typing import Any

from kvstore.router.json_schema import Schema, array, document, integer, number, one_of, ref, text
from kvstore.router.rates import NAMES

EVENTS = {
    "map": "MapEvent",
    "cluster": "ClusterEvent",
    "moves": "Moves",
    "locks": "LocksEvent",
    "transactions": "TransactionsEvent",
    "rates": "RatesEvent",
    "play": "PlayEvent",
}

_NULL: Schema = {"type": "null"}
_AT = {"at_ms": integer("Unix time in milliseconds.")}
_AGE = {"age_s": number("Seconds since its first intent.", minimum=0)}


def event_schemas() -> dict[str, Schema]:
    """Their component schemas by name."""
    return {
        "Snapshot": document(
            "Everything that is known. A kind of which nothing is known yet is missing.",
            {"router": text("The id of this router.")},
            {kind: ref(name) for kind, name in EVENTS.items()}
            | {
                "history": array(ref("RatesEvent"), "What was told of rates before, the oldest first."),
                "demo": {"const": True, "description": "There with `kvstore up --demo`."},
            },
        ),
        **_map_and_cluster(),
        **_work(),
        "RatesEvent": document(
            "What this router answered in the last second.",
            {
                **_AT,
                **{name: number("A second.", minimum=0) for name in (*NAMES, "errors", "refused")},
                **{
                    f"{group}_p{percent}_ms": {
                        "type": ["number", "null"],
                        "description": "About; null: there were none.",
                    }
                    for group in ("read", "write")
                    for percent in (50, 99)
                },
            },
        ),
        **_demo(),
    }


def _map_and_cluster() -> dict[str, Schema]:
    pair = array(integer(), minItems=2, maxItems=2)
    member = {"id": ref("ShardId"), "weight": integer("", 1), "state": text(enum=["joining", "up", "leaving"])}
    way = {"from": ref("ShardId"), "to": ref("ShardId"), "partitions": array(pair, "Runs: the first, and how many.")}
    lost = {
        "shard": ref("ShardId"),
        "epoch": ref("Epoch"),
        "partitions": integer(),
        "opened": integer("Of which epoch its partitions are open again, empty; 0: not yet."),
    }
    return {
        "MapEvent": document(
            "The cluster map and its ring.",
            {
                "epoch": ref("Epoch"),
                "partitions": ref("Partitions"),
                "members": array(document("", member)),
                "owners": array(pair, "Runs of partitions from 0 on: an index in `members`, and how many."),
                "virtual_nodes": array(
                    pair, "Top 32 bits of a point on the ring, and an index in `members`; empty if there are too many."
                ),
                "moves": array(document("", way), "In the order of `moves` in the event of that name, of that epoch."),
                "lost": array(document("", lost), "Shards that were given up with all that they had, in order."),
            },
        ),
        "ShardEvent": _shard(),
        "ClusterEvent": document(
            "The shards with their numbers, and one sentence on all of it.",
            {
                "cluster_id": text(),
                "epoch": ref("Epoch"),
                "partitions": ref("Partitions"),
                "replicas": integer("", 1),
                "shards": array(ref("ShardEvent"), "In the order of joining."),
                "in_doubt": document("", {"count": integer(), "oldest_s": {"type": ["number", "null"], "minimum": 0}}),
                "advice": document("", {"level": text(enum=["ok", "busy", "warning"]), "sentence": text()}),
            },
        ),
    }


def _shard() -> Schema:
    rate = {"type": ["number", "null"], "minimum": 0}
    numbers = ("partitions", "keys", "bytes", "file_bytes", "log_bytes", "waiting_writes")
    return document(
        "As in GET /v1/cluster, and more: what the shard did in the last second, what lies on its disk.",
        {
            "id": ref("ShardId"),
            "url": text(),
            "state": text(enum=["joining", "up", "leaving", "down"]),
            "weight": integer("", 1),
            **{name: integer() for name in numbers},
            "disk_full": {"type": "boolean"},
            **dict.fromkeys(("reads_per_s", "writes_per_s", "commit_p99_ms"), rate),
        },
    )


def _work() -> dict[str, Schema]:
    lock: dict[str, Any] = {
        "name": ref("Key"),
        "owner": ref("Owner"),
        "token": ref("Token"),
        "ttl": number(minimum=0),
        "ttl_left": number("As of `at_ms`.", minimum=0),
        "waiting": integer("How many wait."),
        "waiters": array(ref("Owner"), "The first of them, in their order."),
        "shard": ref("ShardId"),
    }
    held = {"shard": ref("ShardId"), "keys": array(ref("Key"), "Some of them."), "keys_count": integer()}
    attempt: dict[str, Any] = {
        "id": text("For GET /v1/txn/{id}."),
        "anchor": ref("Key"),
        **_AGE,
        "abandoned": {"type": "boolean", "description": "Its router is gone: recovery asks what became of it."},
        "at": array(document("", held), "In which shards it holds keys."),
    }
    return {
        "LocksEvent": document(
            "Locks that are held.", {**_AT, "count": integer("Of all."), "items": array(document("", lock), "Some.")}
        ),
        "TransactionsEvent": document(
            "Transactions over several shards that hold keys: at work, or in doubt.",
            {**_AT, "intents": integer("Keys that carry one."), "items": array(document("", attempt), "Some.")},
        ),
    }


def _demo() -> dict[str, Schema]:
    stop = text("Where the coordinator is killed.", enum=["never", "before-decision", "after-decision"])
    account = {"key": ref("Key"), "shard": ref("ShardId"), "version": integer(), "balance": integer()}
    step = {
        "at_ms": number("Since the play-through began.", minimum=0),
        "kind": text(enum=["sent", "answered", "result", "killed", "intent", "resolved"]),
        **{name: text() for name in ("from", "to", "message", "says")},
    }
    return {
        "Transfer": document("", {}, {"amount": integer("", 1, maximum=100, default=10), "stop": stop})
        | {"additionalProperties": False},
        "TransferTaken": document("", {"play": integer("Its number.", 1)}),
        "Coordinate": document("", {"transaction": ref("Transaction")}, {"stop": stop})
        | {"additionalProperties": False},
        "PlayEvent": one_of(
            "The play-through of a transfer, as far as it is.",
            document(
                "",
                {
                    "number": integer("", 1),
                    "state": text(enum=["running", "recovering", "committed", "aborted", "failed"]),
                    "stop": stop,
                    "amount": integer("", 1),
                    "txn": text(),
                    "accounts": array(document("", account)),
                    "from": text(),
                    "to": text(),
                    "steps": array(document("", step)),
                    "says": text(),
                },
            ),
        ),
    }
