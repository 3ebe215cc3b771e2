"""loadtest.txn_clients against a store in memory: nothing is blamed on an honest one, and planted bugs are found."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest import txn_clients
from loadtest.histories import append, bank
from loadtest.histories.bank import Bank
from loadtest.histories.history import Account, Lists, Transfer
from loadtest.txn_clients import Appender, Auditor, Teller, Worker, opening_transaction
from loadtest.txn_wire import Answered, Got, Wire, contradiction, session

ACCOUNTS = 12
KEYS = ["lists/a", "lists/b", "lists/c"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs time to recover."""
    monkeypatch.setattr(txn_clients, "PAUSE_S", 0.001)


class TinyStore:
    """POST /v1/txn, GET and conditional PUT, one after the other. `bug` is what it does wrong, sometimes:

    halves: a transaction leaves out its last put; blind: conditions hold always; forgetful: it answers and does
    nothing; disobedient: it refuses and does it; torn: reads of several keys are not at one instant; stale: a read
    shows what was some writes ago; twice: an Idempotency-Key is not looked at; silent (no bug): answers get lost,
    but all that was asked for is done, or not, once.
    """

    def __init__(self) -> None:
        self.values: dict[str, tuple[str, int]] = {}
        self.before: deque[dict[str, tuple[str, int]]] = deque(maxlen=12)
        self.replies: dict[str, dict[str, Any]] = {}
        self.requests: Counter[str] = Counter()
        self.bug = ""
        self._clock = 0
        self._rng = random.Random(7)

    def buggy(self, *bugs: str) -> bool:
        return self.bug in bugs and self._rng.random() < 0.2

    async def transact(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        once = request.headers.get("Idempotency-Key", "")
        self.requests[once or "without key"] += 1
        writes = any(step["op"] == "put" for step in body["then"])
        await asyncio.sleep(0)
        if self.buggy("disobedient", "silent") and writes and (self.bug != "silent" or self._rng.random() < 0.5):
            self._run(body, once)
            return self._lost(request) if self.bug == "silent" else web.json_response({}, status=503)
        if self.buggy("silent", "twice") and writes:
            if self.bug == "twice":
                self._run(body, "")
            return self._lost(request)
        if self.bug == "torn" and not writes:
            return web.json_response(await self._torn(body))
        if once in self.replies and self.bug != "twice":
            return web.json_response(self.replies[once])
        return web.json_response(self._run(body, once))

    def _run(self, body: dict[str, Any], once: str) -> dict[str, Any]:
        if once in self.replies and self.bug != "twice":
            return self.replies[once]
        succeeded = self.bug == "blind" or all(map(self._holds, body.get("if", [])))
        steps = body["then"] if succeeded else body.get("else", [])
        writes = [step for step in steps if step["op"] == "put"]
        self._clock += 1
        stale = self.buggy("stale") and not writes
        results = [self._result(step, self.before[0] if stale else self.values) for step in steps]
        if writes:
            self.before.append(dict(self.values))
        done = [] if self.buggy("forgetful") else writes[: -1 if self.buggy("halves") else None]
        for step in done:
            self.values[step["key"]] = (step["value"], self._clock)
        answer = {
            "id": "1",
            "succeeded": succeeded,
            "version": self._clock if writes else None,
            "results": results,
        }
        if once:
            self.replies[once] = answer
        return answer

    def _holds(self, condition: dict[str, Any]) -> bool:
        held = self.values.get(condition["key"])
        if "exists" in condition:
            return bool((held is not None) == condition["exists"])
        return held is not None and bool(held[1] == condition["version"])

    def _result(self, step: dict[str, Any], values: dict[str, tuple[str, int]]) -> dict[str, Any]:
        if step["op"] == "put":
            return {"key": step["key"], "version": self._clock}
        if step["key"] not in values:
            return {"key": step["key"], "exists": False}
        value, version = values[step["key"]]
        return {"key": step["key"], "value": value, "version": version}

    async def _torn(self, body: dict[str, Any]) -> dict[str, Any]:
        results = []
        for step in body["then"]:
            results.append(self._result(step, self.values))
            await asyncio.sleep(0.0005)
        return {"id": "1", "succeeded": True, "version": None, "results": results}

    async def get(self, request: web.Request) -> web.Response:
        held = self.values.get(request.match_info["key"])
        if held is None:
            return web.Response(status=404)
        return web.Response(text=held[0], headers={"ETag": f'"{held[1]}"'})

    async def put(self, request: web.Request) -> web.Response:
        body, key = await request.text(), request.match_info["key"]
        held = self.values.get(key)
        tag = request.headers.get("If-Match")
        if (held is not None) if tag is None else (held is None or tag != f'"{held[1]}"'):
            return web.Response(status=412)
        self._clock += 1
        self.values[key] = (body, self._clock)
        return web.Response(status=201 if held is None else 204, headers={"ETag": f'"{self._clock}"'})

    @staticmethod
    def _lost(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response()


@asynccontextmanager
async def serving(store: TinyStore) -> AsyncIterator[tuple[Any, list[str]]]:
    app = web.Application()
    app.router.add_post("/v1/txn", store.transact)
    app.router.add_get("/v1/kv/{key:.*}", store.get)
    app.router.add_put("/v1/kv/{key:.*}", store.put)
    async with TestServer(app) as server, session() as http:
        yield http, [str(server.make_url("")).rstrip("/")]


async def work(worker: Worker, steps: int) -> None:
    for _ in range(steps):
        await worker.step()


async def judge(store: TinyStore, bug: str = "", steps: int = 40) -> tuple[set[str], list[Worker]]:
    """What is found after some clients have worked on it, all at once; and the clients."""
    async with serving(store) as (http, urls):
        setup = Wire(http, urls, seed=0)
        await setup.transact(opening_transaction(ACCOUNTS, 100))
        auditor = Auditor("auditor", Wire(http, urls, seed=1), ACCOUNTS)
        await auditor.audit()
        store.bug, opening = bug, auditor.last
        auditor.history.operations.clear()
        numbers: Counter[str] = Counter()
        tellers = [Teller(f"t{n}", Wire(http, urls, seed=10 + n), ACCOUNTS, patience_s=5.0) for n in range(4)]
        appenders = [Appender(f"a{n}", Wire(http, urls, seed=20 + n), numbers) for n in range(4)]
        for appender in appenders:
            appender.keys = KEYS
        workers: list[Worker] = [auditor, *tellers, *appenders]
        await asyncio.gather(*(work(worker, steps // 4 if worker is auditor else steps) for worker in workers))
    closing = Bank(
        {
            int(key[-4:]): Account(int(value), version)
            for key, (value, version) in store.values.items()
            if key.startswith("bank/account/")
        }
    )
    markers = {key: value for key, (value, _) in store.values.items() if key.startswith("t")}
    history = [operation for worker in workers for operation in worker.history.operations]
    lists = [operation for operation in history if isinstance(operation, Lists)]
    found = {
        str(v.kind) for v in bank.check(opening, [o for o in history if not isinstance(o, Lists)], closing, markers)
    }
    found |= {anomaly.kind for anomaly in append.check(lists)}
    found |= {sentence for worker in workers for sentence in worker.wire.complaints}
    return found, workers


def outcomes(workers: list[Worker]) -> Counter[str]:
    return sum((worker.wire.counts for worker in workers), Counter[str]())


async def test_nothing_is_blamed_on_an_honest_store() -> None:
    found, workers = await judge(TinyStore())
    assert found == set()
    counts = outcomes(workers)
    assert counts["done"] > 100
    assert counts["unmet"] > 3  # clients do meet
    assert counts["audits"] > 5
    assert not counts["unknown"]


async def test_nothing_is_blamed_on_an_honest_store_whose_answers_get_lost_and_nothing_is_sent_twice() -> None:
    store = TinyStore()
    found, workers = await judge(store, "silent")
    assert found == set()
    counts = outcomes(workers)
    assert counts["unknown"] > 10
    transfers = [o for worker in workers for o in worker.history.operations if isinstance(o, Transfer)]
    assert 0 < sum(transfer.outcome == "unknown" for transfer in transfers) < len(transfers)
    assert counts["repeats"] > 5
    assert store.requests["without key"] > 100
    with_key = sum(store.requests.values()) - store.requests["without key"]
    assert with_key == len(store.requests) - 1 + counts["repeats"]


@pytest.mark.parametrize(
    ("bug", "kinds"),
    [
        ("halves", {bank.Kind.TOTAL, bank.Kind.NOT_ONCE, bank.Kind.LOST}),
        ("blind", {bank.Kind.LOST_UPDATE, append.Kind.LOST}),
        ("forgetful", {bank.Kind.LOST, append.Kind.LOST}),
        ("disobedient", {bank.Kind.REFUSED, append.Kind.ABORTED_READ}),
        ("torn", {bank.Kind.TORN, "G-single"}),
        ("stale", {bank.Kind.STALE, "G-single-realtime"}),
        ("twice", {bank.Kind.REFUSED}),
    ],
)
async def test_a_planted_bug_is_found(bug: str, kinds: set[str]) -> None:
    found, _ = await judge(TinyStore(), bug)
    assert kinds <= found


# --- answers -------------------------------------------------------------------------------------------------------


BODY = {
    "if": [{"key": "a", "version": 1}],
    "then": [{"op": "put", "key": "a", "value": "1"}, {"op": "get", "key": "b"}],
    "else": [{"op": "get", "key": "a"}],
}


@pytest.mark.parametrize(
    ("answered", "wrong"),
    [
        (Answered("1", True, 7, [Got("a", 7), Got("b", 3, "x")]), None),
        (Answered("1", False, None, [Got("a", 3, "x")]), None),
        (Answered("1", True, 7, [Got("b", 3, "x"), Got("a", 7)]), "the branch that ran"),
        (Answered("1", False, None, [Got("a", 7), Got("b", 3, "x")]), "the branch that ran"),
        (Answered("1", True, 7, [Got("a", 8), Got("b", 3, "x")]), "another version"),
        (Answered("1", True, None, [Got("a", None), Got("b", 3, "x")]), "writes nothing"),
        (Answered("1", False, 7, [Got("a", 3, "x")]), "writes nothing"),
    ],
)
def test_a_200_that_does_not_fit_its_request_is_told(answered: Answered, wrong: str | None) -> None:
    found = contradiction(BODY, answered)
    assert (found is None) if wrong is None else (found is not None and wrong in found)


async def test_a_status_that_no_router_may_give_is_a_complaint_and_unknown() -> None:
    async def fail(request: web.Request) -> web.Response:
        return web.Response(status=500, text="oops")

    app = web.Application()
    app.router.add_post("/v1/txn", fail)
    async with TestServer(app) as server, session() as http:
        wire = Wire(http, [str(server.make_url("")).rstrip("/")], seed=0)
        reply, answered = await wire.transact(BODY)
    assert (reply.outcome, answered) == ("unknown", None)
    assert "answered 500: b'oops'" in wire.complaints[0]


async def test_what_was_never_sent_counts_as_refused() -> None:
    async with session() as http:
        reply, _ = await Wire(http, ["http://127.0.0.1:9"], seed=0).transact(BODY)
    assert reply.outcome == "refused"
