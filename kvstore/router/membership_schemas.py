"""The JSON documents that speak of changes of the cluster, as JSON Schemas: a part of `schemas`.

Owns: the shape of what the routes of shards and moves take and give, and of a move.
Promises: as `schemas`.
Leaves to others: routes, statuses and header fields (`membership_operations`), the words of a schema (`json_schema`).
"""

from __future__ import annotations

from typing import Any

from kvstore.config import WEIGHT_MAX
from kvstore.router.json_schema import Schema, array, closed, document, integer, number, one_of, ref, text

_NULL: Schema = {"type": "null"}


def membership_schemas() -> dict[str, Schema]:
    """Their component schemas by name."""
    step = text(
        "`queued`: not begun; `waiting`: for a shard that is down, or after a try that failed, as `detail` says; "
        "`fence`: nobody answers for these partitions; `unknown`: the controller does not answer.",
        enum=["queued", "waiting", "copy", "tail", "fence", "done", "failed", "unknown"],
    )
    way, partitions = {"from": ref("ShardId"), "to": ref("ShardId")}, {"partitions": integer()}
    moved = {"keys": integer(), "bytes": integer("Of keys and values.")}
    planned = {
        name: {"type": ["integer", "null"], "minimum": 0, "description": "Estimated; null if a shard is down."}
        for name in ("keys", "bytes")
    }
    pause = number("For how long nobody answered for a group of partitions, in milliseconds.", minimum=0)
    return {
        "NewShard": closed(
            document(
                "A shard that is to join.",
                {"id": ref("ShardId")},
                {"url": text("Where it serves already.", format="uri"), "weight": weight_schema(default=1)},
            )
        ),
        "ShardChange": closed(document("What is to be changed of a shard.", {"weight": weight_schema()})),
        "AcceptOld": closed(
            document("The confirmation.", {"confirm": ref("ShardId")}),
        ),
        "AcceptedOld": document(
            "What the shard had told; what its copy lacks of that is lost.",
            {
                "id": ref("ShardId"),
                "told": integer("Number of the last record of its log that it had told to be durable."),
                "version": integer("The highest version that it had told."),
            },
        ),
        "ChangeTaken": document(
            "The change is written down.",
            {"epoch": integer("Number of the cluster map in which it is.")},
            {
                "id": ref("ShardId"),
                "state": text(
                    "`wanted`: `kvstore up` is to start it; `gone`: it was wanted only.",
                    enum=["wanted", "joining", "up", "leaving", "gone"],
                ),
            },
        ),
        "Plan": document(
            "What would move.",
            {
                **partitions,
                **planned,
                "moves": array(document("", {**way, **partitions, **planned}), "For each pair of shards."),
            },
        ),
        "Moves": document(
            "What is under way.",
            {
                "epoch": integer("Of the map in which these moves stand; 0 before the cluster is formed."),
                "moves": array(ref("Move"), "In the order in which they are done."),
                "wanted": ref("Wanted"),
                "ending": ref("Ending"),
                "last": ref("LastChange"),
            },
        ),
        "Move": document(
            "A group of partitions that moves from one shard to another.",
            {
                **way,
                **partitions,
                "step": step,
                "keys_done": integer(),
                "keys_total": integer(),
                "bytes_done": integer(),
                "write_pause_ms": pause,
                "detail": text("What it waits for; empty if for nothing."),
            },
        ),
        "Changes": document("Those that are known.", {"items": array(ref("Change"), "The newest first.")}),
        "Change": _change_schema(pause),
        "Wanted": array(ref("ShardId"), "Shards that `kvstore up` is to start; they are no members yet."),
        "Ending": array(ref("ShardId"), "Processes of shards that are no members any more, until they have ended."),
        "LastChange": one_of(
            "The present or last change since the controller's start; null: there was none.",
            _NULL,
            document(
                "",
                {
                    **partitions,
                    **moved,
                    "groups": integer("How many moves are done."),
                    "seconds": number("From the plan to the last commit, or until now.", minimum=0),
                    "write_pause_ms_max": pause,
                    "write_pause_ms_p99": pause,
                },
            ),
        ),
    }


def _change_schema(pause: Schema) -> Schema:
    count = integer("", 0)
    unknown = {"type": ["integer", "null"], "minimum": 0, "description": "Estimated; null if a shard was down."}
    return document(
        "A change of the cluster: what was asked for, how far it is, how it ended.",
        {
            "id": text("It is never used again."),
            "kind": text(
                "`remove-lost`: a shard whose disk is lost is given up; `rebalance`: moves are planned again; "
                "`recover`: the map was taken from the nodes.",
                enum=["add", "remove", "remove-lost", "weight", "rebalance", "cancel", "accept-old", "recover"],
            ),
            "shard": one_of("Null if it is not about one shard.", _NULL, ref("ShardId")),
            "weight": one_of("Null if none was asked for.", _NULL, weight_schema()),
            "state": text(
                "`superseded`: another change asks for the contrary.",
                enum=["running", "done", "cancelled", "superseded"],
            ),
            "detail": text("A sentence: how far it is, what it waits for, why it ended."),
            "waiting_for": one_of("Null if for nothing.", _NULL, text("What it waits for.")),
            "progress": {
                "type": ["number", "null"], "minimum": 0, "maximum": 1,
                "description": "The part that is done, of partitions; null while nothing is to move.",
            },
            "partitions_done": count,
            "partitions_total": count,
            "keys_done": count,
            "keys_total": unknown,
            "bytes_done": integer("Of keys and values.", 0),
            "groups_done": integer("How many moves are done.", 0),
            "started_at": text("When it was asked for.", format="date-time"),
            "ended_at": one_of("Null while it runs.", _NULL, text("When it ended.", format="date-time")),
            "seconds": number("From the start to the end, or until now.", minimum=0),
            "write_pause_ms_max": pause,
            "write_pause_ms_p99": pause,
        },
    )  # fmt: skip


def weight_schema(**more: Any) -> Schema:
    """The weight of a shard."""
    return integer("Its share is in proportion to this.", 1, maximum=WEIGHT_MAX, **more)
