"""How each system is asked for the same thing.

Owns: the translation of an operation into the HTTP request of each system.
Promises: the cheapest request that the system documents for it; all keys and values the same for all systems.
Leaves to others: which operations are run (workloads.py).

A new kind of operation is a new method here. A system that cannot do it inherits the default, which says so.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import ClassVar

from kvstore.router.decode import encode_cursor
from loadtest.bench.http1 import Answer, Request, base64_of, post


class Unsupported(Exception):
    """The system has no such operation; the table shows a dash."""


class Dialect:
    """Keys are ASCII letters, digits and `-`; values printable ASCII, so that no system has to escape anything."""

    name: ClassVar[str]

    def get(self, key: str) -> Request:
        raise Unsupported(f"{self.name}: get")

    def put(self, key: str, value: bytes) -> Request:
        raise Unsupported(f"{self.name}: put")

    def put_all(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        """All of these keys and values, or none."""
        raise Unsupported(f"{self.name}: put_all")

    def put_batch(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        """All of these keys, which are distinct, and values; that it is all or none is not asked for."""
        raise Unsupported(f"{self.name}: put_batch")

    def get_batch(self, keys: Sequence[str]) -> Request:
        """The values of all of these keys."""
        raise Unsupported(f"{self.name}: get_batch")

    def page(self, prefix: str, after: str, limit: int) -> Request:
        """The first `limit` keys with that prefix behind the key `after`, in key order, with their values."""
        raise Unsupported(f"{self.name}: page")

    def listed(self, body: bytes) -> list[tuple[str, bytes]]:
        """Keys and values that the answer to `page` has, in its order."""
        raise Unsupported(f"{self.name}: page")

    def shows(self, body: bytes, value: bytes) -> bool:
        """Whether the answer to `get` or `get_batch` carries that value."""
        return value in body

    def owner(self, answer: Answer) -> str | None:
        """The store that keeps a key, by the answer to its `get`; None when it does not tell."""
        return None


class Kvstore(Dialect):
    name = "kvstore"

    def get(self, key: str) -> Request:
        return Request("GET", f"/v1/kv/{key}")

    def put(self, key: str, value: bytes) -> Request:
        return Request("PUT", f"/v1/kv/{key}", value)

    def put_all(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        steps = [{"op": "put", "key": key, "value": value.decode("ascii")} for key, value in puts]
        return post("/v1/txn", {"then": steps})

    def put_batch(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        ops = [{"op": "put", "key": key, "value": value.decode("ascii")} for key, value in puts]
        return post("/v1/batch", {"ops": ops})

    def get_batch(self, keys: Sequence[str]) -> Request:
        return post("/v1/batch", {"ops": [{"op": "get", "key": key} for key in keys]})

    def page(self, prefix: str, after: str, limit: int) -> Request:
        return Request("GET", f"/v1/kv?prefix={prefix}&after={encode_cursor(after)}&limit={limit}&values=true")

    def listed(self, body: bytes) -> list[tuple[str, bytes]]:
        return [(item["key"], item["value"].encode("ascii")) for item in json.loads(body)["items"]]

    def owner(self, answer: Answer) -> str | None:
        return answer.headers.get("kv-shard")


class Bare(Kvstore):
    """The handler that stores nothing, asked as kvstore is.
    But for what it would need a store to answer."""

    name = "bare"

    def get_batch(self, keys: Sequence[str]) -> Request:
        raise Unsupported("bare: get_batch")

    def page(self, prefix: str, after: str, limit: int) -> Request:
        raise Unsupported("bare: page")

    def shows(self, body: bytes, value: bytes) -> bool:
        return len(body) == len(value)

    def owner(self, answer: Answer) -> str | None:
        return None


class Etcd(Dialect):
    """The JSON gateway of etcd 3.4: POST, keys and values in base64. Its only batch is a transaction (128 operations
    at the most, unless etcd is told otherwise); a page is a range with a limit."""

    name = "etcd"

    def get(self, key: str) -> Request:
        return post("/v3/kv/range", {"key": base64_of(key)})

    def put(self, key: str, value: bytes) -> Request:
        return post("/v3/kv/put", _key_and_value(key, value))

    def put_all(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        steps = [{"request_put": _key_and_value(key, value)} for key, value in puts]
        return post("/v3/kv/txn", {"success": steps})

    def put_batch(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        return self.put_all(puts)

    def get_batch(self, keys: Sequence[str]) -> Request:
        return post("/v3/kv/txn", {"success": [{"request_range": {"key": base64_of(key)}} for key in keys]})

    def page(self, prefix: str, after: str, limit: int) -> Request:
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        bounds = {"key": base64_of(after.encode() + b"\0"), "range_end": base64_of(end)}
        return post("/v3/kv/range", {**bounds, "limit": limit})

    def listed(self, body: bytes) -> list[tuple[str, bytes]]:
        items = json.loads(body).get("kvs", [])
        return [(base64.b64decode(item["key"]).decode(), base64.b64decode(item["value"])) for item in items]

    def shows(self, body: bytes, value: bytes) -> bool:
        return base64_of(value).encode() in body


class Webdis(Dialect):
    """webdis in front of Redis: the command in the path, its last argument in the body.
    `.bin` asks for raw bytes.

    A command that is too long for a path is the body of a POST. Redis does not keep keys in order: it has no pages.
    """

    name = "redis"

    def get(self, key: str) -> Request:
        return Request("GET", f"/GET/{key}.bin")

    def put(self, key: str, value: bytes) -> Request:
        return Request("PUT", f"/SET/{key}", value)

    def put_all(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        words = [word for key, value in puts for word in (key, value.decode("ascii"))]
        return Request("POST", "/", "/".join(["MSET", *words]).encode())

    def put_batch(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        return self.put_all(puts)

    def get_batch(self, keys: Sequence[str]) -> Request:
        return Request("POST", "/", "/".join(["MGET", *keys]).encode())


def _key_and_value(key: str, value: bytes) -> dict[str, str]:
    return {"key": base64_of(key), "value": base64_of(value)}
