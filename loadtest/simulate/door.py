"""A router's front door in a simulation: a call of a workload in, the service's answer out, without HTTP.

Owns: which call of `loadtest.workloads` is which request of the services.
Promises: statuses, versions and documents are those of the real front door, made by the same code where it is no HTTP.
Leaves to others: what the calls do (`kvstore.router`), the way there (`network`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import xxhash

from kvstore.config import Limits
from kvstore.errors import KvError, from_problem
from kvstore.model import IdempotencyKey, Preconditions
from kvstore.protocol import Acquire, Answer, Delete, Get, Put, Release, Renew
from kvstore.router.coordinator import Coordinator
from kvstore.router.decode import decode_cursor, decode_ttl, encode_cursor
from kvstore.router.routes.txn import TxnBody, encode_result, parse_transaction
from kvstore.router.service import RouterService
from loadtest.workloads.calls import Call

Answered = tuple[int, bytes, int | None]

_KEYS, _LOCKS = "/v1/kv/", "/v1/locks/"


class Door:
    """That of one router's process."""

    def __init__(self, service: RouterService, coordinator: Coordinator, limits: Limits) -> None:
        self._service = service
        self._coordinator = coordinator
        self._limits = limits
        self._numbers = itertools.count(1)

    async def answer(self, call: Call) -> Answered:
        """Status, body and version."""
        try:
            return await self._answer(call)
        except KvError as error:
            return error.status, msgspec.json.encode(error.problem()), error.members.get("version")

    async def _answer(self, call: Call) -> Answered:
        if call.path.startswith(_KEYS):
            return await self._on_key(call, call.path.removeprefix(_KEYS))
        if call.path.startswith(_LOCKS):
            return await self._on_lock(call, call.path.removeprefix(_LOCKS))
        if call.path == "/v1/txn":
            transaction = parse_transaction(msgspec.json.decode(call.body or b"", type=TxnBody), self._limits)
            result = await self._coordinator.run(transaction, _once(call))
            return 200, encode_result(transaction, result), None
        return await self._list(dict(parse_qsl(call.path.partition("?")[2])))

    async def _on_key(self, call: Call, path: str) -> Answered:
        key, _, query = path.partition("?")
        if call.method == "GET":
            answer = await self._ask(Get(0, key))
            return answer.status, answer.value or b"", answer.version if answer.status == 200 else None
        if call.method == "PUT":
            ttl = dict(parse_qsl(query)).get("ttl")
            ttl_ms = 0 if ttl is None else decode_ttl(ttl, self._limits)
            answer = await self._ask(Put(0, key, call.body or b"", ttl_ms, _guard(call.headers), _once(call)))
        else:
            answer = await self._ask(Delete(0, key, _guard(call.headers), _once(call)))
        return answer.status, b"", answer.version

    async def _on_lock(self, call: Call, name: str) -> Answered:
        if call.method == "POST":
            body = msgspec.json.decode(call.body or b"{}")
            ttl_ms, wait_ms = int(body["ttl"] * 1000), int(body["wait"] * 1000)
            answer = await self._ask(Acquire(0, name, ttl_ms, wait_ms, body["owner"], _once(call)))
            return 201, msgspec.json.encode({"name": name, "token": answer.version}), None
        token = int(call.headers["Lock-Token"])
        if call.method == "PUT":
            await self._ask(Renew(0, name, token, _once(call)))
            return 200, b"", None
        await self._ask(Release(0, name, token, _once(call)))
        return 204, b"", None

    async def _list(self, parameters: Mapping[str, str]) -> Answered:
        values = parameters.get("values") == "true"
        after, limit = decode_cursor(parameters.get("after")), int(parameters["limit"])
        listing = await self._service.all_shards.page(parameters["prefix"], after, limit, values)
        items: list[dict[str, Any]] = [
            {"key": key, "version": version} | ({"value": (value or b"").decode()} if values else {})
            for key, version, value, _ in listing.items
        ]
        return 200, msgspec.json.encode({"items": items, "next": encode_cursor(listing.last)}), None

    async def _ask(self, request: Any) -> Answer:
        answer = (await self._service.ask(request)).answer
        if answer.problem is not None:
            raise from_problem(answer.problem)
        return answer


def _once(call: Call) -> IdempotencyKey | None:
    key = call.headers.get("Idempotency-Key")
    if key is None:
        return None
    return IdempotencyKey(key, xxhash.xxh3_128_hexdigest(f"{call.method} {call.path}\n".encode() + (call.body or b"")))


def _guard(headers: Mapping[str, str]) -> Preconditions | None:
    guard = Preconditions()
    if "If-Match" in headers:
        guard.versions = [int(headers["If-Match"].strip('"'))]
    if "If-None-Match" in headers:
        guard.absent = True
    if "Lock-Token" in headers:
        guard.token = int(headers["Lock-Token"])
    return guard if guard != Preconditions() else None
