"""The driver of chaos: sent once, told apart what was never sent, and what no router may answer is a complaint."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest.cluster.processes import free_ports
from loadtest.drivers.aio import Wire, drive, session
from loadtest.workloads import calls
from loadtest.workloads.answers import NEVER_SENT, NO_ANSWER, Answered, Got, Reply, contradiction
from loadtest.workloads.calls import Call, Pause, Steps


class Server:
    """Answers with these statuses, in turn, and counts the requests; 0: it closes the connection instead."""

    def __init__(self, *statuses: int) -> None:
        self.count = 0
        self._statuses: Iterator[int] = iter(statuses)

    async def answer(self, request: web.Request) -> web.Response:
        self.count += 1
        status = next(self._statuses)
        if not status:
            assert request.transport is not None
            request.transport.close()
        return web.Response(status=status or 200, headers={"ETag": '"7"'})


@asynccontextmanager
async def asking(server: Server, was_duplicated: bool = False) -> AsyncIterator[Wire]:
    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", server.answer)
    async with TestServer(application) as served, session() as http:
        yield Wire(http, [str(served.make_url("")).rstrip("/")], 1, None, lambda key: was_duplicated)


async def test_a_request_whose_connection_breaks_is_sent_once_and_unknown() -> None:
    server = Server(204, 0)
    async with asking(server) as wire:
        assert (await wire.send(calls.put("put", "a", b"1"))).version == 7
        lost = await wire.send(calls.put("put", "a", b"2"))
    assert (lost.status, lost.outcome, server.count) == (NO_ANSWER, "unknown", 2)
    assert wire.complaints == []


async def test_what_was_never_sent_is_refused() -> None:
    (port,) = free_ports(1)
    async with session() as http:
        reply = await Wire(http, [f"http://127.0.0.1:{port}"], 1).ask("GET", "/")
    assert (reply.status, reply.outcome) == (NEVER_SENT, "refused")


@pytest.mark.parametrize("status", [200, 500, 404, 412])
async def test_a_status_that_no_router_may_give_is_a_complaint(status: int) -> None:
    async with asking(Server(status)) as wire:
        await wire.send(calls.put("put", "a", b"1"))
    (sentence,) = wire.complaints
    assert sentence.startswith(f"put (PUT /v1/kv/a) was answered {status}")


@pytest.mark.parametrize("status", [204, 503, 504, 409, 423, 429, 507])
async def test_what_a_cluster_in_trouble_may_answer_is_no_complaint(status: int) -> None:
    async with asking(Server(status)) as wire:
        await wire.send(calls.put("put", "a", b"1"))
    assert wire.complaints == []


async def test_a_refusal_of_a_request_that_was_delivered_twice_is_unknown() -> None:
    call = calls.put("put", "a", b"1")._replace(headers={"Idempotency-Key": "k"})
    async with asking(Server(503, 503), was_duplicated=True) as wire:
        assert (await wire.send(call)).outcome == "unknown"
        assert (await wire.send(calls.put("put", "a", b"1"))).outcome == "refused"


async def test_steps_are_driven_to_their_end() -> None:
    seen: list[int] = []

    def steps() -> Steps[str]:
        reply = yield Call("one", "GET", "/a")
        seen.append(reply.status)
        reply = yield Pause(0.0)
        seen.append(reply.status)
        reply = yield Call("two", "GET", "/b", expected=frozenset({404}))
        seen.append(reply.status)
        return "end"

    async with asking(Server(200, 404)) as wire:
        assert await drive(wire, steps()) == "end"
    assert seen == [200, 200, 404]


BODY = {"if": [{"key": "a", "exists": True}], "then": [{"op": "put", "key": "a", "value": "1"}]}


@pytest.mark.parametrize(
    ("answered", "wrong"),
    [
        (Answered("t", True, 5, [Got("a", 5)]), None),
        (Answered("t", False, None, []), None),
        (Answered("t", True, 5, [Got("b", 5)]), "its results are not those of the branch that ran"),
        (Answered("t", True, 5, [Got("a", 6)]), "a key that it wrote has another version than the transaction"),
        (Answered("t", False, 5, []), "its version does not fit: null is for a branch that writes nothing"),
    ],
)
def test_an_answer_of_a_transaction_that_does_not_fit_its_request_is_told(
    answered: Answered, wrong: str | None
) -> None:
    assert contradiction(BODY, answered) == wrong
    found = calls.failure(calls.transaction("txn", BODY), Reply(200, msgspec.json.encode(answered)))
    assert found == (None if wrong is None else f"200 wrong answer: {wrong}")
