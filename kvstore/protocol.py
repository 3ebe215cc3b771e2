"""The messages between router and shard: msgpack arrays, many to a frame.

Owns: the shape of every message of the channel, and their encoding.
Promises: a message is a small array with a tag, so that encoding and decoding cost well under a microsecond each.
Leaves to others: batching, order and loss (`transport.channel`), meaning (`shard.service`).

Requests carry an `id`, unique per connection, and every request gets exactly one answer with that id, or the connection
ends. `status` of an answer is the HTTP status that the router gives to its client, 421 excepted.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, array_like=True, gc=False):
    id: int


class Get(Message, tag=1):
    key: str


class Guard(msgspec.Struct, array_like=True, gc=False):
    """What must hold for a write to be done.

    `token`: that of the lease on the key. `present`, `absent`: the key exists, or does not. `versions`: it exists and
    has one of these. `not_versions`: it has none of these. None and False mean: not asked.
    """

    token: int | None = None
    present: bool = False
    absent: bool = False
    versions: list[int] | None = None
    not_versions: list[int] | None = None


class Once(msgspec.Struct, array_like=True, gc=False):
    """An Idempotency-Key, and the digest of the request that it came with."""

    key: str
    digest: str


class Put(Message, tag=2):
    """`ttl_ms` 0 means: never expires. The shard that executes it counts from its own clock."""

    key: str
    value: bytes
    ttl_ms: int = 0
    guard: Guard | None = None
    once: Once | None = None


class Delete(Message, tag=3):
    key: str
    guard: Guard | None = None
    once: Once | None = None


class Acquire(Message, tag=8):
    """Ask for a lease on the name `key`; `wait_ms` 0 means: now or not at all."""

    key: str
    ttl_ms: int
    wait_ms: int
    owner: str
    once: Once | None = None


class Renew(Message, tag=9):
    key: str
    token: int
    once: Once | None = None


class Release(Message, tag=10):
    key: str
    token: int
    once: Once | None = None


class Leave(Message, tag=11):
    """Whoever sent the Acquire with the id `acquire` over this connection waits no longer."""

    key: str
    acquire: int


class Inspect(Message, tag=12):
    """Who holds the name `key`."""

    key: str


class ScanLeases(Message, tag=13):
    """A page of leases, in order of their names."""

    prefix: str
    after: str
    limit: int


class Scan(Message, tag=4):
    """A page of keys that start with `prefix` and sort after `after`, in byte order, at most `limit` of them."""

    prefix: str
    after: str
    limit: int
    values: bool = False


class Count(Message, tag=5):
    prefix: str


class Explain(Message, tag=6):
    """All that the shard knows of a key, for people."""

    key: str


class Stats(Message, tag=7):
    """What the shard counts about itself: see `metrics.ShardStats`."""


Request = Get | Put | Delete | Scan | Count | Explain | Stats | Acquire | Renew | Release | Leave | Inspect | ScanLeases
WRITES = (Put, Delete, Acquire, Renew, Release)


class Answer(Message, tag=101):
    """The answer to a request on one key. `problem` is that of an error (see `errors`), else None."""

    status: int
    version: int = 0
    value: bytes | None = None
    ttl_left_ms: int = 0
    problem: dict[str, Any] | None = None


class Page(Message, tag=102):
    """Items in key order: (key, version, value or None, ttl_left_ms or 0). `more`: the page ended
    before the keys did, and goes on after `last`.

    Only partitions that the shard owned at `epoch` are shown.
    """

    epoch: int
    more: bool
    last: str
    items: list[tuple[str, int, bytes | None, int]]


class Facts(Message, tag=103):
    """A document without a fixed shape for the hot path: the answer to Count, Explain and Stats."""

    epoch: int
    facts: dict[str, Any]


Reply = Answer | Page | Facts

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(list[Request])
_replies = msgspec.msgpack.Decoder(list[Reply])


def encode_frame(messages: list[Any]) -> bytes:
    """One frame: a msgpack array of messages."""
    return _encoder.encode(messages)


def decode_requests(frame: bytes) -> list[Request]:
    """Raises msgspec.DecodeError for a frame of another shape."""
    try:
        return _requests.decode(frame)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from None


def decode_replies(frame: bytes) -> list[Reply]:
    """Raises msgspec.DecodeError for a frame of another shape."""
    try:
        return _replies.decode(frame)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(str(error)) from None
