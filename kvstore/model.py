"""What every part of the system speaks of: conditions of writes, attempts of transactions and their operations.

Owns: plain values, and the numbers that bound them.
Promises: they know no connection and no file; both keep them as small arrays, in the order of their fields.
Leaves to others: messages (`protocol`), what lies in the file (`storage.rows`), the rules (`transactions`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

VERSION_MAX = 2**53 - 1  # every program can read it as a number of JSON
STAMP_MAX = 2**53 - 1  # in microseconds of Unix time: the year 2255


class Preconditions(msgspec.Struct, array_like=True, gc=False):
    """What must hold for a write to be done: RFC 9110, section 13.1, and the token of a lock.

    `token`: that of the lease on the key. `present`, `absent`: the key exists, or does not. `versions`: it exists and
    has one of these. `not_versions`: it has none of these. None and False mean: not asked.
    """

    token: int | None = None
    present: bool = False
    absent: bool = False
    versions: list[int] | None = None
    not_versions: list[int] | None = None


class IdempotencyKey(msgspec.Struct, array_like=True, gc=False):
    """An Idempotency-Key, and the digest of the request that it came with."""

    key: str
    digest: str


class Attempt(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One try of a transaction. `start`: microseconds of its first try, its age for wait-die; `stamp`: of this try;
    `router`: a random id of the router's process. A stamp is used once per process, so (stamp, router) is unique.
    `epoch`: of the map by which its router sends its first messages."""

    start: int
    stamp: int
    router: str
    epoch: int = 0

    @property
    def name(self) -> str:
        """Its stamp in hexadecimal digits, and its router: unique in the cluster."""
        return f"{self.stamp:x}-{self.router}"

    @property
    def age(self) -> tuple[int, str]:
        """For wait-die: the smaller is the older."""
        return self.start, self.router


def txn_id(attempt: Attempt, partition: int) -> str:
    """What a client is given: it names the anchor's partition, so that the attempt can be looked up."""
    return f"{partition:x}-{attempt.name}"


class Condition(msgspec.Struct, array_like=True, gc=False):
    """On a key or, with `token`, on the lock of that name. Exactly one of the others is given."""

    key: str
    version: int | None = None
    exists: bool | None = None
    token: int | None = None


class TxnOp(msgspec.Struct, array_like=True, gc=False):
    """An operation of a branch: put (`value` given), delete or get."""

    op: Literal["put", "delete", "get"]
    key: str
    value: bytes = b""
    ttl_ms: int = 0


class Read(msgspec.Struct, array_like=True, gc=False):
    """What a get found: `value` None means there is no such key."""

    version: int
    value: bytes | None
