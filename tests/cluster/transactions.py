"""Transactions over HTTP: their operations, what they left behind, and keys of each shard."""

from __future__ import annotations

import itertools
from typing import Any

from tests.cluster.calls import Calls, unique

MIB = 1024 * 1024
SHARDS = 4
Op = dict[str, Any]


async def keys_by_owner(calls: Calls, count: int) -> dict[str, list[str]]:
    """So many keys of each shard."""
    prefix = unique("txn")
    found: dict[str, list[str]] = {}
    for number in itertools.count():
        if len(found) == SHARDS and all(len(keys) >= count for keys in found.values()):
            return {owner: keys[:count] for owner, keys in found.items()}
        key = f"{prefix}/{number}"
        found.setdefault(await calls.owner(key), []).append(key)
    raise AssertionError


def put(key: str, value: str = "v", **more: Any) -> Op:
    return {"op": "put", "key": key, "value": value, **more}


def get(key: str) -> Op:
    return {"op": "get", "key": key}


def delete(key: str) -> Op:
    return {"op": "delete", "key": key}


async def done(calls: Calls, *then: Op, **headers: Any) -> Any:
    """The answer of a transaction without conditions, which must succeed."""
    reply = await calls.txn({"then": list(then)}, **headers)
    assert reply.status == 200, reply
    assert reply.json["succeeded"] is True
    return reply.json


async def version_of(calls: Calls, key: str) -> int | None:
    reply = await calls.get(key)
    return int(reply.headers["etag"].strip('"')) if reply.status == 200 else None


async def values_of(calls: Calls, keys: list[str]) -> list[bytes | None]:
    replies = [await calls.get(key) for key in keys]
    return [reply.body if reply.status == 200 else None for reply in replies]


async def assert_absent(calls: Calls, keys: list[str]) -> None:
    assert await values_of(calls, keys) == [None] * len(keys)
