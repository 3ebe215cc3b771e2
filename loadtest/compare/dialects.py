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

from loadtest.compare.http1 import Answer, Request


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

    def shows(self, body: bytes, value: bytes) -> bool:
        """Whether the answer to `get` carries that value."""
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
        return _post("/v1/txn", {"then": steps})

    def owner(self, answer: Answer) -> str | None:
        return answer.headers.get("kv-shard")


class Bare(Kvstore):
    """The handler that stores nothing is asked exactly as kvstore is."""

    name = "bare"

    def shows(self, body: bytes, value: bytes) -> bool:
        return len(body) == len(value)

    def owner(self, answer: Answer) -> str | None:
        return None


class Etcd(Dialect):
    """The JSON gateway of etcd 3.4: POST, keys and values in base64."""

    name = "etcd"

    def get(self, key: str) -> Request:
        return _post("/v3/kv/range", {"key": _base64(key.encode())})

    def put(self, key: str, value: bytes) -> Request:
        return _post("/v3/kv/put", _key_and_value(key, value))

    def put_all(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        steps = [{"request_put": _key_and_value(key, value)} for key, value in puts]
        return _post("/v3/kv/txn", {"success": steps})

    def shows(self, body: bytes, value: bytes) -> bool:
        return _base64(value).encode() in body


class Webdis(Dialect):
    """webdis in front of Redis: the command in the path, its last argument in the body; `.bin` asks for raw bytes."""

    name = "redis"

    def get(self, key: str) -> Request:
        return Request("GET", f"/GET/{key}.bin")

    def put(self, key: str, value: bytes) -> Request:
        return Request("PUT", f"/SET/{key}", value)

    def put_all(self, puts: Sequence[tuple[str, bytes]]) -> Request:
        words = [word for key, value in puts for word in (key, value.decode("ascii"))]
        return Request("POST", "/", "/".join(["MSET", *words]).encode())


def _post(target: str, document: object) -> Request:
    return Request("POST", target, json.dumps(document, separators=(",", ":")).encode())


def _key_and_value(key: str, value: bytes) -> dict[str, str]:
    return {"key": _base64(key.encode()), "value": _base64(value)}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
