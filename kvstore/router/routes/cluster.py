"""The calls on what is where: the shards and what they hold, the way of a key.

Owns: `/v1/cluster` and `/v1/explain`.
Promises: GET /v1/cluster waits for the controller for a second at most, and says so when it did not answer.
Leaves to others: the numbers (`cluster_views`), what the controller tells (`controller_client`).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Struct, UnsetType

from kvstore.router.advice import advice
from kvstore.router.cluster_documents import with_copies
from kvstore.router.cluster_views import ClusterViews
from kvstore.router.controller_client import Controller
from kvstore.router.event_documents import lost_documents
from kvstore.router.routes.changes import EXAMPLE_CHANGE, EXAMPLE_MOVE
from kvstore.router.routes.words import (
    KEY,
    KEY_IN_PATH,
    OF_THE_CLUSTER,
    READS_KEY,
    Epoch,
    Key,
    LeaseLeft,
    Owner,
    Partition,
    Partitions,
    Token,
    Url,
    Version,
)
from kvstore.router.service import RouterService
from kvstore.transport.change_documents import Count, Ending, LastChange, MoveUnderWay, ShardId, Wanted, Weight
from kvstore.transport.http.responses import Response, json_response
from kvstore.transport.http.routes import (
    Call,
    Content,
    Route,
    Success,
    example,
)
from kvstore.transport.http.schema import about, having, refined


class ClusterRoutes:
    """The calls that tell of the cluster and of a key's way."""

    def __init__(self, service: RouterService, views: ClusterViews, controller: Controller) -> None:
        self._service = service
        self._views = views
        self._controller = controller

    async def cluster(self, call: Call) -> Response:
        changes = await self._controller.described(self._service.table.cluster_map)
        facts, behind = changes.pop("copies", None), changes.pop("behind", None)
        document = with_copies(await self._views.cluster(changes.pop("epoch")) | changes, facts)
        lost = lost_documents(cluster_map) if (cluster_map := self._service.table.cluster_map) is not None else []
        about = {"lost": lost, "copies": facts, "behind": behind}
        return json_response(200, document | {"advice": advice(document | about)["sentence"]})

    async def explain(self, call: Call) -> Response:
        return json_response(200, await self._views.explain(call.argument))


# --- documents --------------------------------------------------------------------------------------------------------


class InDoubt(Struct):
    """Transactions whose outcome is open."""

    count: Count
    oldest_s: Annotated[float | None, about(minimum=0)]


class Node(Struct):
    """A process that serves shards, at an address."""

    id: ShardId
    url: Url
    state: Annotated[
        str,
        about(
            "`down`: no shard whose primary is there answers this router, or the controller does not hear it.",
            enum=["up", "down"],
        ),
    ]
    host: str | UnsetType = UNSET
    zone: Annotated[str, about("Copies of a shard go to different ones where they can.")] | UnsetType = UNSET


class Copy(Struct):
    """A copy of a shard beside its primary."""

    node: ShardId
    state: Annotated[str, about("`in-sync`: it has all that was acknowledged.", enum=["joining", "in-sync"])]
    lag: Annotated[int | None, about("How many records it is behind; null if that is not known.", minimum=0)]
    rows_done: Annotated[int, about("Of the snapshot that it is being sent.", minimum=0)] | UnsetType = UNSET
    rows_total: Annotated[int, about("Of that snapshot.", minimum=0)] | UnsetType = UNSET


class Shard(Struct):
    """`keys` and `bytes` (of keys and values) are at most 1 s old.
    Of a shard that is down, the last known."""

    id: ShardId
    url: Url
    state: Annotated[str, about("`down`: it does not answer this router.", enum=["joining", "up", "leaving", "down"])]
    weight: Weight
    partitions: Annotated[int, about("How many it owns.", minimum=0)]
    keys: Count
    bytes: Count
    primary: Annotated[str, about("The node that answers for it.")]
    term: Annotated[int, about("The epoch of the map that named its primary.", minimum=0)]
    copies: Annotated[list[Copy], about("Those on other nodes.")]


class UnderReplicated(Struct):
    """A shard with fewer copies than are asked for."""

    shard: ShardId
    in_sync: Annotated[int, about("Copies that have all that was acknowledged, the primary's among them.", minimum=1)]
    wanted: Annotated[int, about("How many there are to be.", minimum=2)]
    awaited: Annotated[str, about("What comes next, in words.")]


class Failover(Struct):
    """A copy took over from a primary."""

    shard: ShardId
    to: Annotated[ShardId, about("The node of the new primary.")]
    at: Annotated[str, about("When it served.", format="date-time")]
    seconds: Annotated[float, about("From the last sign of the old primary until the new one served.", minimum=0)]
    cause: Annotated[str, about("What was found of the old primary, and what came of it.")]


class Cluster(Struct):
    """The cluster as this router sees it."""

    cluster_id: str
    epoch: Epoch
    partitions: Partitions
    replicas: Annotated[int, about("Copies of every key.", minimum=1)]
    nodes: Annotated[list[Node], about("The processes that serve shards.")]
    shards: Annotated[list[Shard], about("In the order of joining.")]
    moves: Annotated[list[MoveUnderWay], about("Partitions under way to another shard.")]
    in_doubt: InDoubt
    under_replicated: Annotated[list[UnderReplicated], about("In the order of joining.")]
    failovers: Annotated[list[Failover], about("The last ones, the newest first, as far as the controller answers.")]
    wanted: Annotated[Wanted | None, about("Null while the controller does not answer.")]
    ending: Annotated[Ending | None, about("Null while the controller does not answer.")]
    last_change: Annotated[LastChange | None, about("Null: there was none.")]
    advice: Annotated[
        str, about("One sentence: that all is well, or what is not, and what happens next or what to do.")
    ]


class Intent(Struct):
    """A transaction is about to write the key, or has read it or tests it."""

    txn: Annotated[str, about("The transaction, for GET /v1/txn/{id}.")]
    anchor: Annotated[str, about("The key beside which its decision is kept.")]
    age_s: Annotated[float, about("Seconds since it was left here.", minimum=0)]
    vote: Annotated[int, about("If it is committed, then at a version above this.", minimum=0)]


class LockOfKey(Struct):
    """The lease that guards the key."""

    owner: Owner
    token: Token
    ttl_left: LeaseLeft


_OF_ROW = ("lock", "intent", "version", "sequence", "bytes", "expires_at_ms", "cached")


@refined(
    oneOf=[
        having("detail", owner_state="down"),
        having("detail", owner_state="up") | {"not": having("row")},
        having("detail", owner_state="up", row="damaged"),
        having("lock", "intent", owner_state="up", row="absent"),
        having(*_OF_ROW, owner_state="up", row="tombstone"),
        having(*_OF_ROW, owner_state="up", row="value"),
    ]
)
class Explanation(Struct):
    """The way of a key, and what its owner knows of it."""

    key: Key
    hash: Annotated[str, about("xxh3-64 of the key, hexadecimal.", pattern="^[0-9a-f]{16}$")]
    partition: Partition
    partitions: Partitions
    epoch: Epoch
    walk: Annotated[list[ShardId], about("The shards in the order in which the ring meets them from the key's point.")]
    owner: ShardId
    owner_url: Url
    primary: Annotated[str, about("The node that answers for the owner.")]
    copies: Annotated[list[ShardId], about("The nodes with copies of the owner.")]
    owner_state: Annotated[str, about("`down`: it could not be asked.", enum=["up", "down"])]
    detail: Annotated[str, about("Why the owner or the row cannot be read.")] | UnsetType = UNSET
    row: (
        Annotated[
            str,
            about(
                "What the owner stores. `tombstone`: a deletion; `damaged`: it does not match its checksum.",
                enum=["value", "tombstone", "absent", "damaged"],
            ),
        ]
        | UnsetType
    ) = UNSET
    version: Version | UnsetType = UNSET
    sequence: Annotated[int, about("Number of the change in the owner's file.", minimum=0)] | UnsetType = UNSET
    bytes: Annotated[int, about("Size of the value.", minimum=0)] | UnsetType = UNSET
    expires_at_ms: Annotated[int | None, about("Unix time in milliseconds; null: never.")] | UnsetType = UNSET
    cached: Annotated[bool, about("Whether the owner has it in memory.")] | UnsetType = UNSET
    lock: Annotated[LockOfKey | None, about("Who may write the key; null: every client.")] | UnsetType = UNSET
    intent: (
        Annotated[Intent | None, about("What a transaction that is not finished here has left on the key.")] | UnsetType
    ) = UNSET


# --- the entries ------------------------------------------------------------------------------------------------------

_EXAMPLE_CLUSTER = {
    "cluster_id": "0f5c7a1e9b2d4c63", "epoch": 1, "partitions": 4096, "replicas": 1,
    "nodes": [{"id": "s1", "url": "http://127.0.0.1:9101", "state": "up"}],
    "shards": [{"id": "s1", "url": "http://127.0.0.1:9101", "state": "up", "weight": 1, "partitions": 4096,
                "keys": 25013, "bytes": 3626885, "primary": "s1", "term": 1, "copies": []}],
    "moves": [EXAMPLE_MOVE], "in_doubt": {"count": 0, "oldest_s": None}, "under_replicated": [], "failovers": [],
    "wanted": [], "ending": [],
    "last_change": EXAMPLE_CHANGE,
    "advice": "210 partitions still to move: clients notice nothing, and it ends by itself.",
}  # fmt: skip
_EXAMPLE_EXPLANATION = {
    "key": "users/1", "hash": "8c9d0f3a5b6e7c21", "partition": 2249, "partitions": 4096, "epoch": 1, "walk": ["s1"],
    "owner": "s1", "owner_url": "http://127.0.0.1:9101", "primary": "s1", "copies": [],
    "owner_state": "up", "row": "value", "version": 41,
    "sequence": 57, "bytes": 5, "expires_at_ms": None, "cached": True,
    "lock": {"owner": "me", "token": 12, "ttl_left": 29.5}, "intent": None,
}  # fmt: skip

CLUSTER_ROUTES = (
    Route(
        "GET",
        "/v1/cluster",
        ClusterRoutes.cluster,
        OF_THE_CLUSTER,
        id="getCluster",
        tag="cluster",
        summary="The shards and what they hold",
        answers=(
            Success(
                200, "The cluster map, and the numbers of each shard.", Content(Cluster, example(_EXAMPLE_CLUSTER))
            ),
        ),
    ),
    Route(
        "GET",
        "/v1/explain/{key}",
        ClusterRoutes.explain,
        READS_KEY,
        id="explainKey",
        tag="cluster",
        summary="The way of a key",
        parameters=(KEY,),
        answers=(Success(200, "From its hash to its row.", Content(Explanation, example(_EXAMPLE_EXPLANATION))),),
        errors=KEY_IN_PATH,
    ),
)
