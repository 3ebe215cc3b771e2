"""Documents of changes of the cluster.
What a client sends to a router, and a router passes on to the controller.

Owns: the members of these bodies and answers, with their bounds, as the OpenAPI document has them.
Promises: an unknown member of a body is refused, by the router and by the controller alike.
Leaves to others: the calls (`router.routes.changes`, `controller.routes`), what a change means (`controller.service`).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Struct, UnsetType

from kvstore.config import REPLICAS_MAX, WEIGHT_MAX
from kvstore.transport.http.schema import about

Count = Annotated[int, about(minimum=0)]
ShardId = Annotated[str, about("The id of a shard.", pattern="^[a-z0-9][a-z0-9-]{0,31}$", examples=["s1"])]
Weight = Annotated[int, about("Its share is in proportion to this.", minimum=1, maximum=WEIGHT_MAX)]
Replicas = Annotated[int, about("Copies of every key, each on another node.", minimum=1, maximum=REPLICAS_MAX)]
Moved = Annotated[int | None, about("Estimated; null if a shard is down.", minimum=0)]
Pause = Annotated[float, about("For how long no shard answered for a group of partitions, in milliseconds.", minimum=0)]


class NewShard(Struct, forbid_unknown_fields=True):
    """A shard that is to join."""

    id: ShardId
    url: Annotated[str | None, about("Where it serves already.", format="uri")] = None
    weight: Weight = 1


class ShardChange(Struct, forbid_unknown_fields=True):
    """What is to be changed of a shard."""

    weight: Weight


class NewPrimary(Struct, forbid_unknown_fields=True):
    """Where the primary of a shard is to be."""

    to: Annotated[ShardId, about("A node whose copy of the shard is in sync.")]
    accept_loss: Annotated[bool, about("Although it is not: what it lacks is lost for good.")] = False
    confirm: Annotated[ShardId | None, about("The id of the shard again, with accept_loss.")] = None


class NewReplicas(Struct, forbid_unknown_fields=True):
    """How often every key is to be kept."""

    replicas: Replicas


class AcceptOld(Struct, forbid_unknown_fields=True):
    """The confirmation."""

    confirm: ShardId


class AcceptedOld(Struct):
    """What the shard had told; what its copy lacks of that is lost."""

    id: ShardId
    told: Annotated[int, about("Number of the last record of its log that it had told to be durable.", minimum=0)]
    version: Annotated[int, about("The highest version that it had told.", minimum=0)]


class Undecided(Struct):
    """A transaction whose first key, `anchor`, a lost shard had."""

    id: str
    anchor: str


class ChangeTaken(Struct):
    """The change is written down."""

    epoch: Annotated[int, about("Number of the cluster map in which it is.", minimum=0)]
    id: ShardId | UnsetType = UNSET
    state: (
        Annotated[
            str,
            about(
                "`wanted`: `kvstore up` is to start it; `gone`: it was wanted only.",
                enum=["wanted", "joining", "up", "leaving", "gone"],
            ),
        ]
        | UnsetType
    ) = UNSET
    to: Annotated[ShardId, about("The node of the new primary.")] | UnsetType = UNSET
    replicas: Replicas | UnsetType = UNSET
    number: Annotated[int, about("Of a promotion with loss: the last record of that copy.", minimum=0)] | UnsetType = (
        UNSET
    )
    told: Annotated[int, about("And of which record the shard had told.", minimum=0)] | UnsetType = UNSET
    partitions: Annotated[int, about("Of a shard that was given up: how many it had.", minimum=0)] | UnsetType = UNSET
    transactions: Annotated[list[Undecided], about("Of a shard that was given up: those undecided.")] | UnsetType = (
        UNSET
    )


class PlannedMove(Struct, rename={"source": "from"}):
    """For a pair of shards."""

    source: ShardId
    to: ShardId
    partitions: Count
    keys: Moved
    bytes: Moved


class Plan(Struct):
    """What would move."""

    partitions: Count
    keys: Moved
    bytes: Moved
    moves: list[PlannedMove]


class MoveUnderWay(Struct, rename={"source": "from"}):
    """A group of partitions that moves from one shard to another."""

    source: ShardId
    to: ShardId
    partitions: Count
    step: Annotated[
        str,
        about(
            "`queued`: not begun; `waiting`: for a shard that is down, or after a try that failed, as `detail` says; "
            "`freeze`: no shard answers for these partitions; `unknown`: the controller does not answer.",
            enum=["queued", "waiting", "copy", "tail", "freeze", "done", "failed", "unknown"],
        ),
    ]
    keys_done: Count
    keys_total: Count
    bytes_done: Count
    write_pause_ms: Pause
    detail: Annotated[str, about("What it waits for; empty if for nothing.")]


class LastChange(Struct):
    """The present or last change since the controller's start."""

    partitions: Count
    keys: Count
    bytes: Annotated[int, about("Of keys and values.", minimum=0)]
    groups: Annotated[int, about("How many moves are done.", minimum=0)]
    seconds: Annotated[float, about("From the plan to the last commit, or until now.", minimum=0)]
    write_pause_ms_max: Pause
    write_pause_ms_p99: Pause


Wanted = Annotated[list[ShardId], about("Shards that `kvstore up` is to start; they are no members yet.")]
Ending = Annotated[list[ShardId], about("Processes of shards that are no members any more, until they have ended.")]


class Moves(Struct):
    """What is under way. `wanted` and `ending` are null in events while the controller does not answer."""

    epoch: Annotated[int, about("Of the map in which these moves stand; 0 before the cluster is formed.", minimum=0)]
    moves: Annotated[list[MoveUnderWay], about("In the order in which they are done.")]
    wanted: Wanted | None
    ending: Ending | None
    last: Annotated[LastChange | None, about("Null: there was none.")]


class Change(Struct):
    """A change of the cluster: what was asked for, how far it is, how it ended."""

    id: Annotated[str, about("It is never used again.")]
    kind: Annotated[
        str,
        about(
            "`remove-lost`: a shard whose disk is lost is given up; `rebalance`: moves are planned again; `recover`: "
            "the map was taken from the nodes; `promote`: a planned change of a primary; `failover`: a copy took over "
            "from a primary that was silent; `rebuild`: a damaged copy was rebuilt.",
            enum=[
                "add",
                "remove",
                "remove-lost",
                "weight",
                "rebalance",
                "cancel",
                "accept-old",
                "recover",
                "promote",
                "replicas",
                "failover",
                "rebuild",
            ],
        ),
    ]
    shard: Annotated[ShardId | None, about("Null if it is not about one shard.")]
    weight: Annotated[Weight | None, about("Null if none was asked for.")]
    to: Annotated[ShardId | None, about("The node of the new primary; null if it is about none.")]
    replicas: Annotated[Replicas | None, about("Null if no number was asked for.")]
    state: Annotated[
        str,
        about(
            "`superseded`: another change asks for the contrary.", enum=["running", "done", "cancelled", "superseded"]
        ),
    ]
    detail: Annotated[str, about("A sentence: how far it is, what it waits for, why it ended.")]
    waiting_for: Annotated[str | None, about("What it waits for; null if for nothing.")]
    progress: Annotated[
        float | None,
        about("The part that is done, of partitions; null while nothing is to move.", minimum=0, maximum=1),
    ]
    partitions_done: Count
    partitions_total: Count
    keys_done: Count
    keys_total: Annotated[int | None, about("Estimated; null if a shard was down.", minimum=0)]
    bytes_done: Annotated[int, about("Of keys and values.", minimum=0)]
    groups_done: Annotated[int, about("How many moves are done.", minimum=0)]
    started_at: Annotated[str, about("When it was asked for.", format="date-time")]
    ended_at: Annotated[Annotated[str, about(format="date-time")] | None, about("When it ended; null while it runs.")]
    seconds: Annotated[float, about("From the start to the end, or until now.", minimum=0)]
    write_pause_ms_max: Pause
    write_pause_ms_p99: Pause


class Changes(Struct):
    """Those that are known."""

    items: Annotated[list[Change], about("The newest first.")]
