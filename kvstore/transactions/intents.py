"""Intents: what a prepared attempt leaves on each of its keys, and which attempts hold which keys of a store.

Owns: the intent and its form in the key's row; the rule by which it is applied; the table of attempts that hold keys.
Promises: pure and in memory; the table is rebuilt from the rows. It changes with the batches, in the thread that
commits; other threads may look at copies of its lists.
Leaves to others: locks (`locks`), rows (`store.participant`), what becomes of an attempt (`decisions`).

An intent is a lock that survives: it says that its attempt has voted, that no operation changes or reads the key until
the attempt is decided, and what is to be done then, in either branch. Keys that a transaction only reads or compares
have one, too: what it saw must still hold at the commit.

The rule of application. A decision gives the transaction the version 1 + the highest vote, so every intent that was
voted on carries a smaller vote. A prepare that the network repeats *after* its intent was applied takes a new vote
from a clock that has seen the version: not a smaller one. So an intent is applied at a version only if its own vote
is below; otherwise it is a late duplicate's, and is dropped. Without this, it would undo whatever was written since.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from kvstore.model import Attempt, TxnOp
from kvstore.transactions.locks import Identity
from kvstore.transactions.undo import Undo, put_back


class Intent(msgspec.Struct, omit_defaults=True):
    """The column `intent` of a key's row, as JSON. `then`, `otherwise`: the write of each branch, if it has one.

    `once`: the transaction's Idempotency-Key. `prepared_ms`: Unix time, for people.
    """

    attempt: Attempt
    anchor: str
    vote: int
    prepared_ms: int
    then: TxnOp | None = None
    otherwise: TxnOp | None = None
    once: str | None = None

    def step(self, succeeded: bool) -> TxnOp | None:
        """What the branch that ran does to the key."""
        return self.then if succeeded else self.otherwise

    def encode(self) -> bytes:
        """What the column holds."""
        return msgspec.json.encode(self)


def decode_intent(body: bytes) -> Intent:
    """The intent of a row's column. Raises msgspec.DecodeError."""
    return msgspec.json.decode(body, type=Intent)


def applies(vote: int, version: int) -> bool:
    """Whether an intent with that vote is one of those that the decision counted."""
    return vote < version


class State(msgspec.Struct, frozen=True, gc=False):
    """What a row says: `body` None is a tombstone, `expires_at_ms` 0 never. `has_intent`: a transaction that may be
    committed any moment will change it, or not.

    One object serves the batch that makes it, the lock table and the cache. The garbage collector does not track it:
    to walk a full cache again and again took a quarter of a shard's time.
    """

    version: int
    expires_at_ms: int
    body: bytes | None
    has_intent: bool = False

    @property
    def live(self) -> bool:
        """There is a value."""
        return self.body is not None

    @property
    def size(self) -> int:
        """That of the body."""
        return len(self.body or b"")


ABSENT = State(0, 0, None)


class PreparedKey(NamedTuple):
    """A key that carries an intent: its lock, the intent, and the value as it stays until that is applied."""

    identity: Identity
    intent: Intent
    state: State


class PreparedTxn:
    """What an attempt holds in this store, by key.

    `since_s`: monotonic, of its first intent here. `closed`: no router that could still decide it soon is known to be
    there, so that it counts as old at once: the connection that it came by has ended, or the store was reopened.
    """

    __slots__ = ("_sink", "anchor", "attempt", "intents", "since_s")

    def __init__(self, attempt: Attempt, anchor: str, since_s: float, sink: Any) -> None:
        self.attempt = attempt
        self.anchor = anchor
        self.since_s = since_s
        self.intents: dict[str, PreparedKey] = {}
        self._sink = sink

    @property
    def closed(self) -> bool:
        """Whether no router that could still decide it soon is known to be there."""
        return self._sink is None or bool(self._sink.closed)

    @property
    def once(self) -> str | None:
        """The transaction's Idempotency-Key."""
        return next((held.intent.once for held in self.intents.values()), None)

    def vote_on(self, key: str) -> int:
        """That of its intent on the key, 0 without one."""
        held = self.intents.get(key)
        return held.intent.vote if held else 0


_Before = tuple[PreparedTxn | None, PreparedKey | None, PreparedTxn | None]
"""What an attempt, it on the key, and the key had."""


class ReadHold:
    """The shared locks of a read-only transaction; they end with its connection, or when they are too old.

    `refused`: the router was not told of them, and will not let them go.
    """

    __slots__ = ("keys", "refused", "since_s", "sink")

    def __init__(self, keys: dict[str, Identity], since_s: float, sink: Any) -> None:
        self.keys = keys
        self.since_s = since_s
        self.sink = sink
        self.refused = False

    def is_over(self, since_s: float) -> bool:
        """Taken by that time, or by a router that does not let them go."""
        return self.refused or self.since_s <= since_s or bool(self.sink.closed)


class PreparedTxns:
    """The attempts that hold keys of a store; the read-only transactions that do, by a number of their own.

    `decided`: the attempts whose decision is kept here, by name, each with its anchor's partition, so that the
    file need not be read for it.
    """

    def __init__(self) -> None:
        self._of_attempt: dict[Attempt, PreparedTxn] = {}
        self._on_key: dict[str, PreparedTxn] = {}
        self.readers: dict[int, ReadHold] = {}
        self.decided: dict[str, tuple[Attempt, int]] = {}
        self.undo = Undo()

    def __len__(self) -> int:
        return len(self._of_attempt)

    def all(self) -> list[PreparedTxn]:
        """A copy, so that another thread than the one that commits may look."""
        return list(self._of_attempt.values())

    def of(self, attempt: Attempt) -> PreparedTxn | None:
        """What the attempt holds here, or None."""
        return self._of_attempt.get(attempt)

    def on(self, key: str) -> PreparedTxn | None:
        """The attempt whose intent the key carries."""
        return self._on_key.get(key)

    def add(self, key: str, held: PreparedKey, since_s: float, sink: Any) -> None:
        """The key carries that intent now. `sink` None: it was found when the store was opened."""
        attempt = held.intent.attempt
        hold = self._of_attempt.get(attempt)
        before = hold.intents.get(key) if hold is not None else None
        self.undo.note((self._put_back, attempt, key, (hold, before, self._on_key.get(key))))
        if hold is None:
            hold = self._of_attempt[attempt] = PreparedTxn(attempt, held.intent.anchor, since_s, sink)
        hold.intents[key] = held
        self._on_key[key] = hold

    def take(self, attempt: Attempt, key: str) -> PreparedKey | None:
        """Remove and return the key's intent, if it is that attempt's; else None."""
        hold = self._of_attempt.get(attempt)
        held = hold.intents.get(key) if hold else None
        if hold is not None and held is not None:
            self.undo.note((self._put_back, attempt, key, (hold, held, self._on_key[key])))
            del hold.intents[key]
            del self._on_key[key]
            if not hold.intents:
                del self._of_attempt[attempt]
        return held

    def _put_back(self, attempt: Attempt, key: str, before: _Before) -> None:
        hold, held, on_key = before
        if hold is not None:
            put_back(hold.intents, key, held)
        put_back(self._of_attempt, attempt, hold)
        put_back(self._on_key, key, on_key)
