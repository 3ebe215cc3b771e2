"""The call for the cluster as it changes, GET /v1/events, and the documents of the events.

Owns: the shape of the data of every kind of event; the entry.
Promises: the names in `EVENTS` are the kinds that a listener can meet, and each has its document.
Leaves to others: listeners (`router.events`), what the documents hold (`event_documents`, `rates`, `demo`,
`demo_failover`), when they are told (`feed`).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Struct, UnsetType, defstruct

from kvstore.errors import TooManyRequests
from kvstore.router.events import EVENT_STREAM, Events
from kvstore.router.rates import NAMES
from kvstore.router.routes.cluster import Copy, InDoubt, Node
from kvstore.router.routes.words import Epoch, Key, LeaseLeft, Owner, Partitions, Seconds, Token
from kvstore.transport.change_documents import Change, Count, Moves, ShardId
from kvstore.transport.http.routes import Content, Keys, Parameter, Right, Route, Success, Touches, example
from kvstore.transport.http.schema import about

AtMs = Annotated[int, about("Unix time in milliseconds.", minimum=0)]
Pair = Annotated[list[Count], about(minItems=2, maxItems=2)]
Rate = Annotated[float | None, about(minimum=0)]


class EventMember(Struct):
    """A shard of the map."""

    id: ShardId
    weight: Annotated[int, about(minimum=1)]
    state: Annotated[str, about(enum=["joining", "up", "leaving"])]
    primary: Annotated[str, about("The node that answers for it.")]
    copies: Annotated[list[ShardId], about("The nodes with copies of it.")]


class EventNode(Struct):
    """A node on the circle of nodes, from which the places of copies follow."""

    id: ShardId
    point: Annotated[int, about("Top 32 bits of its hash.", minimum=0)]


class EventWay(Struct, rename={"source": "from"}):
    """A move of the map."""

    source: ShardId
    to: ShardId
    partitions: Annotated[list[Pair], about("Runs: the first, and how many.")]


class LostEvent(Struct):
    """A shard that was given up with all that it had."""

    shard: ShardId
    epoch: Epoch
    partitions: Count
    opened: Annotated[int, about("Of which epoch its partitions are open again, empty; 0: not yet.", minimum=0)]


class MapEvent(Struct):
    """The cluster map and its ring."""

    epoch: Epoch
    partitions: Partitions
    replicas: Annotated[int, about("How often every key is to be kept.", minimum=1)]
    members: list[EventMember]
    nodes: Annotated[list[EventNode], about("A shard's copies go to the next ones clockwise of the node of its name.")]
    owners: Annotated[list[Pair], about("Runs of partitions from 0 on: an index in `members`, and how many.")]
    virtual_nodes: Annotated[
        list[Pair], about("Top 32 bits of a point on the ring, and an index in `members`; empty if there are too many.")
    ]
    moves: Annotated[list[EventWay], about("In the order of `moves` in the event of that name, of that epoch.")]
    lost: Annotated[list[LostEvent], about("Shards that were given up with all that they had, in order.")]


class ShardEvent(Struct):
    """As in GET /v1/cluster, and more: what the shard did in the last second, what lies on its disk."""

    id: ShardId
    url: str
    state: Annotated[str, about(enum=["joining", "up", "leaving", "down"])]
    weight: Annotated[int, about(minimum=1)]
    partitions: Count
    primary: Annotated[str, about("The node that answers for it.")]
    term: Annotated[int, about("The epoch of the map that named its primary.", minimum=0)]
    copies: Annotated[list[Copy], about("Those on other nodes.")]
    keys: Count
    bytes: Count
    file_bytes: Count
    log_bytes: Annotated[int, about("Of the log's segments.", minimum=0)]
    unapplied_rows: Annotated[int, about("Committed in the log, and not yet in the file.", minimum=0)]
    waiting_writes: Count
    disk_full: bool
    reads_per_s: Rate
    writes_per_s: Rate
    commit_p99_ms: Rate


class Advice(Struct):
    """One sentence on all of it."""

    level: Annotated[str, about(enum=["ok", "busy", "warning"])]
    sentence: str


class ClusterEvent(Struct):
    """The shards with their numbers, and one sentence on all of it."""

    cluster_id: str
    epoch: Epoch
    partitions: Partitions
    replicas: Annotated[int, about(minimum=1)]
    nodes: Annotated[list[Node], about("The processes that serve shards.")]
    shards: Annotated[list[ShardEvent], about("In the order of joining.")]
    in_doubt: InDoubt
    advice: Advice


class ChangesEvent(Struct):
    """Changes of the cluster: those that run, and the last that ended."""

    items: Annotated[list[Change] | None, about("The newest first; null while the controller does not answer.")]


class LockEvent(Struct):
    """A lock that is held."""

    name: Key
    owner: Owner
    token: Token
    ttl: Seconds
    ttl_left: LeaseLeft
    waiting: Annotated[int, about("How many wait.", minimum=0)]
    waiters: Annotated[list[Owner], about("The first of them, in their order.")]
    shard: ShardId


class LocksEvent(Struct):
    """Locks that are held."""

    at_ms: AtMs
    count: Annotated[int, about("Of all.", minimum=0)]
    items: Annotated[list[LockEvent], about("Some.")]


class HeldKeys(Struct):
    """What an attempt holds in one shard."""

    shard: ShardId
    keys: Annotated[list[Key], about("Some of them.")]
    keys_count: Count


class AttemptEvent(Struct):
    """A transaction over several shards that holds keys."""

    id: Annotated[str, about("For GET /v1/txn/{id}.")]
    anchor: Key
    age_s: Annotated[float, about("Seconds since its first intent.", minimum=0)]
    abandoned: Annotated[bool, about("Its router is gone: recovery asks what became of it.")]
    at: Annotated[list[HeldKeys], about("In which shards it holds keys.")]


class TransactionsEvent(Struct):
    """Transactions over several shards that hold keys: at work, or in doubt."""

    at_ms: AtMs
    intents: Annotated[int, about("Keys that carry one.", minimum=0)]
    items: Annotated[list[AttemptEvent], about("Some.")]


_PERCENTILE = Annotated[float | None, about("About; null: there were none.")]
_PER_SECOND = Annotated[float, about("A second.", minimum=0)]
RatesEvent = defstruct(
    "RatesEvent",
    [
        ("at_ms", AtMs),
        *((name, _PER_SECOND) for name in (*NAMES, "errors", "refused")),
        *((f"{group}_p{percent}_ms", _PERCENTILE) for group in ("read", "write") for percent in (50, 99)),
    ],
    namespace={"__doc__": "What this router answered in the last second."},
)


class PlayAccount(Struct):
    """An account of the play-through."""

    key: Key
    shard: ShardId
    version: Count
    balance: Count


class PlayStep(Struct, rename={"source": "from"}):
    """One thing that happened."""

    at_ms: Annotated[float, about("Since the play-through began.", minimum=0)]
    kind: Annotated[str, about(enum=["sent", "answered", "result", "killed", "intent", "resolved"])]
    source: str
    to: str
    message: str
    says: str


class PlayEvent(Struct, rename={"source": "from"}):
    """The play-through of a transfer, as far as it is."""

    number: Annotated[int, about(minimum=1)]
    state: Annotated[str, about(enum=["running", "recovering", "committed", "aborted", "failed"])]
    stop: Annotated[str, about("Where the coordinator is killed.", enum=["never", "before-decision", "after-decision"])]
    amount: Annotated[int, about(minimum=1)]
    txn: str
    accounts: list[PlayAccount]
    source: str
    to: str
    steps: list[PlayStep]
    says: str


class FailoverStep(Struct):
    """One thing that was seen."""

    at_ms: Annotated[float, about("Since the first write.", minimum=0)]
    kind: Annotated[
        str,
        about(
            "`lease`: that which a copy had granted is over; `out`: a copy that is not waited for any more; `home`: "
            "its primary is where it was before.",
            enum=[
                "killed", "silent", "lease", "promoted", "serves", "acknowledged", "out", "back", "in-sync", "home",
            ],
        ),
    ]  # fmt: skip
    says: str
    shard: Annotated[ShardId | None, about("Null: it is about the node.")]


class LogPosition(Struct):
    """The end of a copy's log, as its node told last."""

    node: ShardId
    role: Annotated[str, about(enum=["primary", "opening", "copy", "filling", "damaged"])]
    serves: bool
    term: Count
    number: Annotated[int, about("Of its last record.", minimum=0)]
    silent_s: Annotated[float, about("For how long it had not heard its primary then.", minimum=0)]
    told_s: Annotated[float, about("How old that word is.", minimum=0)]


class FailoverEvent(Struct):
    """A node that was killed from the page, and what followed, as far as it is."""

    number: Annotated[int, about(minimum=1)]
    state: Annotated[str, about(enum=["running", "done", "failed"])]
    node: ShardId
    away_s: Annotated[float, about("How long it stays dead.", minimum=0)]
    lease_s: Annotated[float, about("How long a copy's grant lasts.", minimum=0)]
    failover_after_s: Annotated[float, about("After what silence a primary is replaced.", minimum=0)]
    now_ms: Annotated[float, about("When this was told, since the first write.", minimum=0)]
    killed_ms: Annotated[float | None, about("Null: not yet.", minimum=0)]
    led: Annotated[list[ShardId], about("The shards whose primary was there.")]
    steps: list[FailoverStep]
    positions: Annotated[dict[str, list[LogPosition]], about("By shard, the primary's first.")]
    writes: Annotated[
        list[tuple[float, float, str]],
        about("Of one key, one after the other: when it began, how long it took, `ok`, `unknown` (504) or `failed`."),
    ]
    says: str


class Snapshot(Struct):
    """Everything that is known. A kind of which nothing is known yet is missing."""

    router: Annotated[str, about("The id of this router.")]
    map: MapEvent | UnsetType = UNSET
    cluster: ClusterEvent | UnsetType = UNSET
    moves: Moves | UnsetType = UNSET
    changes: ChangesEvent | UnsetType = UNSET
    locks: LocksEvent | UnsetType = UNSET
    transactions: TransactionsEvent | UnsetType = UNSET
    rates: RatesEvent | UnsetType = UNSET  # type: ignore[valid-type]
    play: PlayEvent | UnsetType = UNSET
    failover: FailoverEvent | UnsetType = UNSET
    history: Annotated[list[RatesEvent], about("What was told of rates before, the oldest first.")] | UnsetType = (  # type: ignore[valid-type]
        UNSET
    )
    demo: Annotated[bool, about("There with `kvstore up --demo`.", const=True)] | UnsetType = UNSET


EVENTS: dict[str, type] = {
    "map": MapEvent,
    "cluster": ClusterEvent,
    "moves": Moves,
    "changes": ChangesEvent,
    "locks": LocksEvent,
    "transactions": TransactionsEvent,
    "rates": RatesEvent,
    "play": PlayEvent,
    "failover": FailoverEvent,
}
EVENT_DOCUMENTS: tuple[type, ...] = (Snapshot, *EVENTS.values())

# --- the entry --------------------------------------------------------------------------------------------------------

_KINDS = ", ".join(f"`{kind}` ({document.__name__})" for kind, document in EVENTS.items())
_EXAMPLE = (
    'id: 5c1e-8\nevent: snapshot\ndata: {"router":"0","cluster":…}\n\n'
    'id: 5c1e-9\nevent: rates\ndata: {"at_ms":1790000000000,"reads":812.0,…}\n\n'
)

EVENT_ROUTES = (
    Route(
        "GET",
        "/v1/events",
        Events.stream,
        Touches(Right.READ, Keys.ALL),
        id="getEvents",
        tag="page",
        summary="The cluster as it changes",
        description="Server-sent events, for the page and for people: `curl -N`. First a `snapshot` (Snapshot), or "
        f"after a Last-Event-ID of this router's start what has changed since; then changes: {_KINDS}. The data of "
        "each is the whole new document of that kind, with the schema named, at most four a second of a kind. A "
        "comment when nothing was said for 15 s. A listener that does not read is cut off.",
        parameters=(
            Parameter(
                "Last-Event-ID",
                "header",
                str,
                example("5c1e-9"),
                "The id of the last event seen. One that this router does not know gets a snapshot.",
            ),
        ),
        answers=(
            Success(
                200,
                "It does not end by itself.",
                Content(str, example(_EXAMPLE, "its start"), EVENT_STREAM),
                ("Cache-Control", "X-Content-Type-Options"),
            ),
        ),
        errors=(TooManyRequests,),
    ),
)
