"""The messages between router and shard: msgpack arrays, many to a frame.

Owns: the shape of every message of the channel, and their encoding.
Promises: a message is a small array with a tag, so that encoding and decoding cost well under a microsecond each.
Leaves to others: batching, order and loss (`transport.channel`), meaning (`shard.service`).

Requests carry an `id`, unique per connection, and every request but `Names` and `ForStore` gets exactly one answer with
that id, or the connection ends. `status` of an answer is the HTTP status that the router gives to its client, 421
excepted.

What a field can never hold is said by its type, and refused when a message is decoded. Two kinds of fields have no such
bounds: those that are only compared, and those of `Attempt`, `TxnOp` and `Read`, which lie in the file, too. What is
stored must be able to be read, whatever was allowed when it was written: of these `shard.admission` looks at what comes
in, as at all limits that can be configured.

What kind a message is, is asked by `type(message)`: where the answer is no, `isinstance` takes as long as all else that
is done to look at a message, because a struct's class has a class of its own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvstore.model import VERSION_MAX, Attempt, Condition, IdempotencyKey, Preconditions, Read, TxnOp

_PARTITIONS_MAX = 65_536
_SIGNED = 2**63 - 1

Version = Annotated[int, Meta(ge=0, le=VERSION_MAX)]
Millis = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Stored = Annotated[int, Meta(ge=0, le=_SIGNED)]
Checksum = Annotated[int, Meta(ge=-_SIGNED - 1, le=_SIGNED)]
Limit = Annotated[int, Meta(ge=1, lt=2**31)]
Partition = Annotated[int, Meta(ge=0, lt=_PARTITIONS_MAX)]
PartitionSet = Annotated[bytes, Meta(max_length=_PARTITIONS_MAX // 8)]
SomeKeys = Annotated[list[str], Meta(min_length=1)]
LockShown = tuple[Annotated[str, Meta(max_length=64)], Annotated[int, Meta(ge=0, le=_SIGNED)]]


class Message(msgspec.Struct, array_like=True, gc=False):
    """A message of the channel. `id`: unique among the requests of a connection; that of the request in its answer."""

    id: int


class Get(Message, tag=1):
    """Read the key. `bytes_max`: a larger value is not brought, only its size; 0: any is."""

    key: str
    bytes_max: Annotated[int, Meta(ge=0, le=_SIGNED)] = 0


class Put(Message, tag=2):
    """Store the value. Answer: 201 for a new key, else 204, with its version.

    `ttl_ms` 0 means: never expires. The shard that executes it counts from its own clock.
    """

    key: str
    value: bytes
    ttl_ms: Millis = 0
    guard: Preconditions | None = None
    once: IdempotencyKey | None = None


class Delete(Message, tag=3):
    """Delete the key. Answer: 204 with the version of the deletion, or 404."""

    key: str
    guard: Preconditions | None = None
    once: IdempotencyKey | None = None


class Acquire(Message, tag=8):
    """Ask for a lease on the name `key`; `wait_ms` 0 means: now or not at all."""

    key: str
    ttl_ms: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    wait_ms: Millis
    owner: str
    once: IdempotencyKey | None = None


class Renew(Message, tag=9):
    """Begin the time of the lease with that token again."""

    key: str
    token: int
    once: IdempotencyKey | None = None


class Release(Message, tag=10):
    """Give a lease back.
    `acquire`: only if it was granted to the Acquire with that id on this connection, and to no other client that
    repeated its Idempotency-Key; that answer was not taken, so it is forgotten. `withdraw`: no matter which token,
    all that came or may yet come of an Acquire with that Idempotency-Key ends."""

    key: str
    token: int
    once: IdempotencyKey | None = None
    acquire: int = 0
    withdraw: str | None = None


class CancelWait(Message, tag=11):
    """Cancel the wait of the Acquire with the id `acquire` of this connection."""

    key: str
    acquire: int


class GetLock(Message, tag=12):
    """Who holds the name `key`."""

    key: str


class ScanLeases(Message, tag=13):
    """A page of leases, in order of their names; `wanted` and `until` as in `Scan`."""

    prefix: str
    after: str
    limit: Limit
    wanted: PartitionSet = b""
    until: str = ""


# --- transactions (see `transactions.attempts` for the words) ---------------------------------------------------------


class Transact(Message, tag=14):
    """A transaction all of whose keys are here: done in one batch. `key` is its anchor. Answer: Outcome."""

    key: str
    attempt: Attempt
    conditions: list[Condition]
    then: list[TxnOp]
    otherwise: list[TxnOp]
    once: IdempotencyKey | None = None


class Prepare(Message, tag=15):
    """This store's part of a transaction over several. `anchor` is its first key, in another store. Answer: Vote.

    `once`: its Idempotency-Key. `first`: a key to be locked before all others, the attempt holding
    nothing yet in any store.
    """

    anchor: str
    attempt: Attempt
    conditions: list[Condition]
    then: list[TxnOp]
    otherwise: list[TxnOp]
    once: str | None = None
    first: str = ""


class DecideCommit(Message, tag=16):
    """All other stores have voted: do the anchor's store's part, and decide, in one batch. Answer: Outcome.

    `key` is the anchor; `conditions`, `then`, `otherwise`: the part of its store. Of the others: `vote`, the highest;
    `holds`, whether all their conditions did; `keys`; `locked_then`, `locked_otherwise`, as in `Vote`. `then_reads` and
    `otherwise_reads`: what the gets of each branch found, None where this store has to look; given with `once` only,
    for the kept reply.
    """

    key: str
    attempt: Attempt
    conditions: list[Condition]
    then: list[TxnOp]
    otherwise: list[TxnOp]
    vote: Version
    holds: bool
    locked_then: dict[str, Any] | None
    locked_otherwise: dict[str, Any] | None
    keys: list[str]
    once: IdempotencyKey | None = None
    then_reads: list[Read | None] = []
    otherwise_reads: list[Read | None] = []


class ApplyIntents(Message, tag=17):
    """The attempt was decided: apply its intents on these keys. Answered when none of them is left, durably."""

    attempt: Attempt
    keys: list[str]
    version: Version
    succeeded: bool
    decided_ms: Millis


class Abort(Message, tag=18):
    """The attempt was not and will not be decided: drop its intents on these keys, and its waiting prepares."""

    attempt: Attempt
    keys: list[str]


class ResolveTxn(Message, tag=19):
    """What became of the attempt? Undecided ones are aborted for good. `key` is the anchor. Answer: Outcome."""

    key: str
    attempt: Attempt


class GetTxn(Message, tag=20):
    """What is known of the attempt `name`? Changes nothing. Answer: Outcome.

    `partition`: that of its anchor; -1 asks whether it holds any key in this store.
    """

    partition: Annotated[int, Meta(ge=-1, lt=_PARTITIONS_MAX)]
    name: str


class ReadLock(Message, tag=21):
    """Lock these keys shared, and read them. Answer: Reads."""

    attempt: Attempt
    keys: SomeKeys


class ReadUnlock(Message, tag=22):
    """Let the locks of a Reads go. Answered with 200 if they were held all the time, else 409."""

    keys: SomeKeys
    lock: LockShown


class Forget(Message, tag=23):
    """These attempts, anchored here, are finished everywhere: their decisions may go."""

    attempts: list[Attempt]


# --- moves of partitions (see `shard.receiver` for the whole of one) --------------------------------------------------


class Follow(Message, tag=24):
    """Take over this map (ClusterMap as JSON), if it is newer.
    Answered with 200 when it, or a newer one, is durable and in force; the answer's `version` is the epoch of that
    one."""

    cluster_map: bytes


class Receive(Message, tag=25):
    """To the destination: carry out the move `move`, which stands in your map. Answer: Progress, as soon as its step
    is another one than `seen`, at the latest after half a second. 409: it does not stand in your map (yet)."""

    move: str
    seen: str = ""


class Pull(Message, tag=26):
    """From destination to source: rows of these partitions. Answer: Rows.

    `after_row` -1: those changed after `sequence`, in that order, with tombstones. Else a copy, without tombstones: one
    partition after the other, of the first one those rows that lie behind `after_row` in the file. `sequence` 0 begins
    the copy; the pages that follow carry the sequence of the first one.
    """

    partitions: Annotated[list[Partition], Meta(max_length=_PARTITIONS_MAX)]
    sequence: Stored
    after_row: Annotated[int, Meta(ge=-1, le=_SIGNED)]
    rows_max: Limit


class Freeze(Message, tag=27):
    """From destination to source: answer for the partitions of that move no more. Answer: Frozen, when that is durable.
    409: the move does not stand (any more)."""

    move: str


class Scan(Message, tag=4):
    """A page of keys that start with `prefix` and sort after `after`, in byte order, at most `limit` of them.

    `wanted`: of these partitions only (see `Page.owned`); empty: of all. `until`: none beyond this one, if it is given.
    `bytes_max`: the page ends with the item that reaches it; 0: `page_bytes_max`, which holds in any case.
    `value_bytes_max`: of larger values only the sizes are brought, and count as so many bytes; 0: all values are.
    """

    prefix: str
    after: str
    limit: Limit
    values: bool = False
    wanted: PartitionSet = b""
    until: str = ""
    bytes_max: int = 0
    value_bytes_max: Annotated[int, Meta(ge=0, le=_SIGNED)] = 0


class Count(Message, tag=5):
    """How many keys start with `prefix`. Answer: Page without items, its `count` set."""

    prefix: str
    wanted: PartitionSet = b""


class Explain(Message, tag=6):
    """All that the shard knows of a key, for people."""

    key: str


class Stats(Message, tag=7):
    """What the shard counts about itself: see `metrics.ShardStats`.

    `live_max`: list so many of the locks held and of the attempts that hold keys, too (see `store.live`).
    """

    live_max: int = 0


class Names(Message, tag=28):
    """The last strike that the sender's map has.
    What comes behind it is meant for a shard that follows the same one, and is answered 421 by others. It has no
    answer itself."""

    strike: int = 0


class ForStore(Message, tag=29):
    """What comes behind it on this connection is meant for the store with that id, until another one is named.
    Until the first one that is the store of the hello. It has no answer itself."""

    store_id: Annotated[str, Meta(max_length=64)]


Request = (
    Get | Put | Delete | Scan | Count | Explain | Stats | Acquire | Renew | Release | CancelWait | GetLock | ScanLeases
    | Transact | Prepare | DecideCommit | ApplyIntents | Abort | ResolveTxn | GetTxn | ReadLock | ReadUnlock | Forget
    | Follow | Receive | Pull | Freeze | Names | ForStore
)  # fmt: skip
WRITES = frozenset(
    {Put, Delete, Acquire, Renew, Release, Transact, Prepare, DecideCommit, ApplyIntents, Abort, ResolveTxn}
)


class Answer(Message, tag=101):
    """The answer to a request on one key. `problem` is that of an error (see `errors`), else None.

    `left_out_bytes`: the size of a value that is not brought, since the get takes no such.
    """

    status: int
    version: int = 0
    value: bytes | None = None
    ttl_left_ms: int = 0
    problem: dict[str, Any] | None = None
    left_out_bytes: int = 0


class Page(Message, tag=102):
    """Items in key order: (key, version, value or None, ttl_left_ms or 0). `more`: the page ended
    before the keys did, and goes on after `last`.

    `owned`: a bit for each partition, that of partition p being bit p % 8 of byte p // 8: it was wanted, and owned by
    the shard from before the page was read until after. Only those are shown, and they are shown wholly.

    `left_out`: the sizes of values that were not brought, by key.
    """

    owned: bytes
    more: bool
    last: str
    items: list[tuple[str, int, bytes | None, int]]
    count: int = 0
    left_out: dict[str, int] = {}


class Info(Message, tag=103):
    """A document without a fixed shape for the hot path: the answer to Explain and Stats."""

    epoch: int
    facts: dict[str, Any]


class Vote(Message, tag=104):
    """The attempt is prepared here. `vote`: the clock's step; `holds`: all conditions did. `reads`: of the gets of
    `then`, then of those of `otherwise`, in order. `locked_then`, `locked_otherwise`: the problem, where the branch
    writes to what another client has leased.
    """

    vote: int
    holds: bool
    reads: list[Read]
    locked_then: dict[str, Any] | None = None
    locked_otherwise: dict[str, Any] | None = None


class Outcome(Message, tag=105):
    """What became of an attempt.

    `state`: committed; aborted (it never will be committed); gone (so long ago, or stamped so low, that nothing can be
    known of it); pending; repeated (what an earlier attempt with the same Idempotency-Key was answered with: it is
    `attempt`). `version` 0: nothing was written. `reads`: those of the branch that ran, of this store. `floor`: of this
    store; stamps should be above it.
    """

    state: Literal["committed", "aborted", "gone", "pending", "repeated"]
    attempt: str = ""
    version: int = 0
    succeeded: bool = False
    decided_ms: int = 0
    reads: list[Read] = []
    floor: int = 0


class Reads(Message, tag=106):
    """What was found under shared locks; `lock` goes back with ReadUnlock."""

    reads: list[Read]
    lock: LockShown


class Progress(Message, tag=107):
    """How far a move is. `step`: copy, tail, freeze (the source may have stopped to answer for the partitions), done
    (all is here, compared and durable: it may be committed) or failed (`detail`; it must be voided). While it waits for
    the source `detail` says so."""

    step: str
    rows_done: int
    rows_total: int
    bytes_done: int
    detail: str = ""


# kind, key, partition, version, expires_at_ms, body, intent, checksum: see `storage.rows.Row`
MovedRow = tuple[str, str, Partition, Stored, Stored, bytes | None, bytes | None, Checksum]


class Rows(Message, tag=108):
    """A page of a Pull. `more`: there is another one.
    Where it goes on: after `sequence`; in a copy, without the first `done` partitions, which are complete, and
    behind `after_row`.

    `floor`: tombstones up to that sequence have been trimmed. `total`: how many rows these partitions have, in the
    first page of a copy. `busy`: others than moves are at work in this store.
    """

    rows: list[MovedRow]
    more: bool
    sequence: Stored
    after_row: int
    done: int
    floor: int
    total: int
    busy: bool


class Frozen(Message, tag=109):
    """The source's version clock and floor of attempts as of the freeze, or later; how many rows the partitions have,
    and their digest, without tombstones."""

    version: Stored
    attempts_floor: Stored
    rows: int
    digest: tuple[int, int]


Reply = Answer | Page | Info | Vote | Outcome | Reads | Progress | Rows | Frozen

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(list[Request])
_replies = msgspec.msgpack.Decoder(list[Reply])


def encode_frame(messages: list[Any]) -> bytes:
    """One frame: a msgpack array of messages."""
    return _encoder.encode(messages)


def decode_requests(frame: bytes) -> list[Request]:
    """The messages of a frame. Raises msgspec.DecodeError for a frame of another shape."""
    try:
        return _requests.decode(frame)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from None


def decode_replies(frame: bytes) -> list[Reply]:
    """The messages of a frame. Raises msgspec.DecodeError for a frame of another shape."""
    try:
        return _replies.decode(frame)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from None
