"""Transactions, as the client names them: what they are made of, and what comes of them.

    from kvstore.client import Client
    from kvstore.txn import delete, get, if_version, put

    result = await kv.txn([put("a", b"1"), delete("b"), get("c")], conditions=[if_version("a", 7)])
    if result.succeeded:
        print(result.version, result.results[2].value)

Owns: conditions, results, and their JSON.
Promises: nothing is sent that says something else than what was asked for.
Leaves to others: sending (`client`), operations (`operations`), what a transaction does (the router).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvstore.operations import Delete, Get, Operation, Put, checked_key, operation_members, value_of

TxnStatus = Literal["committed", "aborted", "pending"]


@dataclass(frozen=True, slots=True)
class IfVersion:
    """A condition: the key has this version."""

    key: str
    version: int


@dataclass(frozen=True, slots=True)
class IfExists:
    """A condition: there is such a key; with False: there is none."""

    key: str
    exists: bool = True


@dataclass(frozen=True, slots=True)
class IfLocked:
    """A condition: the lock is held with this token. It also opens the key of that name to the transaction."""

    name: str
    token: int


Condition = IfVersion | IfExists | IfLocked


@dataclass(frozen=True, slots=True)
class TxnItem:
    """What one operation did or found.

    Of a put or delete: `version` is the transaction's. Of a get: `value` and `version` as they were before it, both
    None if there was no such key.
    """

    key: str
    version: int | None = None
    value: bytes | None = None


@dataclass(frozen=True, slots=True)
class TxnResult:
    """What a transaction did. `succeeded`: whether all conditions held, so that `then` ran; otherwise `otherwise` did.

    `version` is that of every key that it wrote, None if it wrote none. `results`: one per operation of the branch that
    ran, in its order. `id`: see `Client.txn_status`.
    """

    id: str
    succeeded: bool
    version: int | None
    results: Sequence[TxnItem]


def put(key: str, value: bytes, *, ttl: float | None = None) -> Put:
    """Store the value; `ttl`: seconds until it expires."""
    return Put(key, value, ttl)


def get(key: str) -> Get:
    """Read the key as it is before the transaction writes."""
    return Get(key)


def delete(key: str) -> Delete:
    """Remove the key, if there is one."""
    return Delete(key)


def if_version(key: str, version: int | None) -> IfVersion | IfExists:
    """Only if the key has this version, as a `get` of it has found.
    None, which that finds for none: only if there is no such key."""
    return IfExists(key, False) if version is None else IfVersion(key, version)


def if_exists(key: str, exists: bool = True) -> IfExists:
    """Only if there is such a key; with False: only if there is none."""
    return IfExists(key, exists)


def if_locked(name: str, token: int) -> IfLocked:
    """Only if the lock is held with this token; the key of that name can then be written."""
    return IfLocked(name, token)


# --- forms on the wire ----------------------------------------------------------------------------------------------


def transaction_members(
    then: Iterable[Operation], conditions: Iterable[Condition], otherwise: Iterable[Operation]
) -> dict[str, Any]:
    """The body of POST /v1/txn. Raises as `operation_members`."""
    return {
        "if": [_condition_members(condition) for condition in conditions],
        "then": [operation_members(operation) for operation in then],
        "else": [operation_members(operation) for operation in otherwise],
    }


def _condition_members(condition: Condition) -> dict[str, Any]:
    if isinstance(condition, IfLocked):
        return {"lock": checked_key(condition.name), "token": condition.token}
    if isinstance(condition, IfVersion):
        return {"key": checked_key(condition.key), "version": condition.version}
    return {"key": checked_key(condition.key), "exists": condition.exists}


def result_of(document: Mapping[str, Any]) -> TxnResult:
    """The answer of POST /v1/txn."""
    items = [TxnItem(entry["key"], entry.get("version"), value_of(entry)) for entry in document["results"]]
    return TxnResult(document["id"], document["succeeded"], document["version"], items)
