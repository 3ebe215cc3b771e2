"""How each system is asked to compare and set, and to lock.

Owns: the requests, with slots where something from an earlier answer goes, and how their answers are read in Python
(for the checks before and after a run; during a run stateful.lua reads the same answers).
Promises: the form that the system documents for it; the same keys, values and steps for all systems. Pure.
Leaves to others: sending them (stateful.py, cas.lua, cas_hot.lua, lock.lua).

Systems that are missing in CONDITIONS have no such operation that can be asked for by HTTP: webdis cannot hold a WATCH
between two requests, and the bare handler stores nothing.
"""

from __future__ import annotations

import base64
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from loadtest.bench.http1 import Answer, Request, base64_of, compact, post

COUNTER_DIGITS = 12
LOCK_TTL_S = 60
# Wide enough for what goes there, which is set flush right: a body's length is known before its contents are. 64-bit
# integers have up to 19 digits; etcd's key of a held lock is the name, a slash and up to 16 hex digits, in base64.
_INTEGER_WIDTH = 24
_LOCK_KEY_WIDTH = 64
_SLOT = re.compile(rb"@{8,}")


class Listed(NamedTuple):
    """Keys and what stands for their versions; `next` asks for the rest."""

    versions: dict[str, str]
    next: Request | None


class Conditions(ABC):
    """Texts that go into slots (`version`, `token`, …) are in the form that the request wants them in."""

    name: str

    # --- compare and set ----------------------------------------------------------------------------------------------

    @abstractmethod
    def versions(self, prefix: str) -> Request:
        """Ask for the versions of all keys with that prefix."""

    @abstractmethod
    def listed(self, answer: Answer, prefix: str) -> Listed: ...

    @abstractmethod
    def cas(self, key: str, value: bytes) -> Request:
        """Write if unchanged, and learn the version either way. Slot: the version."""

    @abstractmethod
    def cas_counter(self, key: str) -> Request:
        """The same for a counter's new value. Slots: the version, the value."""

    @abstractmethod
    def counter(self, number: int) -> str:
        """What goes into the slot for the value."""

    @abstractmethod
    def was_set(self, answer: Answer) -> bool:
        """Whether `cas` has written; False: the comparison failed. Raises RuntimeError for any other answer."""

    @abstractmethod
    def number(self, answer: Answer) -> int:
        """The counter that the answer to a `get` holds."""

    # --- locks --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def session(self) -> Request | None:
        """What a connection asks for once, before it takes locks; None: nothing."""

    def session_id(self, answer: Answer) -> str:
        """Of the session that `session` asked for."""
        return ""

    @abstractmethod
    def acquire(self, name: str) -> Request:
        """Slot: that of the session, if there is one."""

    @abstractmethod
    def token(self, answer: Answer) -> str | None:
        """What `release` needs; None: not granted."""

    @abstractmethod
    def release(self, name: str) -> Request:
        """Slot: the token."""

    @abstractmethod
    def held(self, prefix: str) -> Request:
        """Ask for what runs that were cut off have left behind."""

    @abstractmethod
    def free(self, answer: Answer) -> list[Request]:
        """The requests that let go of all that the answer to `held` lists."""


class KvstoreConditions(Conditions):
    name = "kvstore"

    def versions(self, prefix: str, after: str = "") -> Request:
        return Request("GET", f"/v1/kv?prefix={prefix}&limit=10000{after}")

    def listed(self, answer: Answer, prefix: str) -> Listed:
        cursor = answer.document["next"]
        more = self.versions(prefix, f"&after={cursor}") if cursor else None
        return Listed({item["key"]: f'"{item["version"]}"' for item in answer.document["items"]}, more)

    def cas(self, key: str, value: bytes) -> Request:
        return Request("PUT", f"/v1/kv/{key}", value, (f"If-Match: {_slot(_INTEGER_WIDTH)}",))

    def cas_counter(self, key: str) -> Request:
        return self.cas(key, _slot(COUNTER_DIGITS).encode())

    def counter(self, number: int) -> str:
        return f"{number:0{COUNTER_DIGITS}}"

    def was_set(self, answer: Answer) -> bool:
        return _told(answer, {201: True, 204: True, 412: False})

    def number(self, answer: Answer) -> int:
        return int(answer.body)

    def session(self) -> None:
        return None

    def acquire(self, name: str) -> Request:
        return Request("POST", f"/v1/locks/{name}", b'{"ttl":%d}' % LOCK_TTL_S)

    def token(self, answer: Answer) -> str | None:
        return answer.headers["Lock-Token"] if _told(answer, {201: True, 423: False}) else None

    def release(self, name: str) -> Request:
        return Request("DELETE", f"/v1/locks/{name}", headers=(f"Lock-Token: {_slot(_INTEGER_WIDTH)}",))

    def held(self, prefix: str) -> Request:
        return Request("GET", f"/v1/locks?prefix={prefix}&limit=10000")

    def free(self, answer: Answer) -> list[Request]:
        return [fill(self.release(item["name"]), str(item["token"])) for item in answer.document["items"]]


class EtcdConditions(Conditions):
    """`txn` with a comparison of the key's mod_revision; the lock service with one lease for each connection."""

    name = "etcd"

    def versions(self, prefix: str) -> Request:
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        return post("/v3/kv/range", {"key": base64_of(prefix), "range_end": base64_of(end), "keys_only": True})

    def listed(self, answer: Answer, prefix: str) -> Listed:
        items = answer.document.get("kvs", [])
        return Listed({base64.b64decode(item["key"]).decode(): item["mod_revision"] for item in items}, None)

    def cas(self, key: str, value: bytes) -> Request:
        ask_version = {"request_range": {"key": base64_of(key), "keys_only": True}}
        return self._txn(key, json.dumps(base64_of(value)), [ask_version])

    def cas_counter(self, key: str) -> Request:
        width = len(base64.b64encode(bytes(COUNTER_DIGITS))) + 2
        return self._txn(key, _slot(width), [])  # who loses reads the key again, as with every system

    @staticmethod
    def _txn(key: str, value: str, failure: list[object]) -> Request:
        compare = {"key": base64_of(key), "target": "MOD", "result": "EQUAL", "mod_revision": "VERSION"}
        success = {"request_put": {"key": base64_of(key), "value": "VALUE"}}
        body = compact({"compare": [compare], "success": [success], "failure": failure})
        body = body.replace('"VERSION"', _slot(_INTEGER_WIDTH)).replace('"VALUE"', value)
        return Request("POST", "/v3/kv/txn", body.encode())

    def counter(self, number: int) -> str:
        return json.dumps(base64_of(f"{number:0{COUNTER_DIGITS}}"))

    def was_set(self, answer: Answer) -> bool:
        return _told(answer, {200: bool(answer.document.get("succeeded"))})

    def number(self, answer: Answer) -> int:
        return int(base64.b64decode(answer.document["kvs"][0]["value"]))

    def session(self) -> Request:
        return post("/v3/lease/grant", {"TTL": LOCK_TTL_S})

    def session_id(self, answer: Answer) -> str:
        return str(answer.document["ID"])

    def acquire(self, name: str) -> Request:
        body = compact({"name": base64_of(name), "lease": "LEASE"}).replace('"LEASE"', _slot(_INTEGER_WIDTH))
        return Request("POST", "/v3/lock/lock", body.encode())

    def token(self, answer: Answer) -> str | None:
        return json.dumps(answer.document["key"]) if _told(answer, {200: True}) else None

    def release(self, name: str) -> Request:
        body = compact({"key": "KEY"}).replace('"KEY"', _slot(_LOCK_KEY_WIDTH))
        return Request("POST", "/v3/lock/unlock", body.encode())

    def held(self, prefix: str) -> Request:
        return post("/v3/lease/leases", {})

    def free(self, answer: Answer) -> list[Request]:
        return [post("/v3/lease/revoke", {"ID": lease["ID"]}) for lease in answer.document.get("leases", [])]


CONDITIONS: dict[str, Conditions] = {each.name: each for each in (KvstoreConditions(), EtcdConditions())}


# --- slots -----------------------------------------------------------------------------------------------------------


def split(rendered: bytes) -> tuple[list[bytes], list[int]]:
    """What stands around the slots of a request, and how wide each slot is."""
    return _SLOT.split(rendered), [len(slot) for slot in _SLOT.findall(rendered)]


def fill(request: Request, *texts: str) -> Request:
    """The request with texts, flush right, in its slots."""
    waiting = iter(texts)

    def filled(text: bytes) -> bytes:
        return _SLOT.sub(lambda slot: next(waiting).encode().rjust(len(slot[0])), text)

    headers = tuple(filled(header.encode()).decode() for header in request.headers)
    return request._replace(headers=headers, body=filled(request.body))


def _slot(width: int) -> str:
    return "@" * width


def _told(answer: Answer, meaning: Mapping[int, bool]) -> bool:
    if answer.status not in meaning:
        raise RuntimeError(f"an answer that was not expected: {answer.status} {answer.body[:300]!r}")
    return meaning[answer.status]
