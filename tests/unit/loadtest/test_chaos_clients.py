"""loadtest.chaos: what is compared at the end of a phase, how calls are counted, what a change of shards comes to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loadtest.chaos import doubts
from loadtest.chaos.clients import compared
from loadtest.chaos.meter import Meter
from loadtest.chaos.reshard import Forward, Reshard, is_settled
from loadtest.drivers.aio import Wire
from loadtest.histories.history import Account, Balances, Count, Lists, Register
from loadtest.workloads.answers import Reply


def test_a_key_that_is_listed_otherwise_than_it_was_read_is_named() -> None:
    reads = [
        Register(client="closing", begin_s=0, end_s=1, outcome="done", key="r", action="read", value="v", version=7),
        Register(client="closing", begin_s=0, end_s=1, outcome="done", key="gone", action="read"),
        Count(client="closing", begin_s=0, end_s=1, outcome="done", key="c", action="read", value=3),
        Lists(client="closing", begin_s=0, end_s=1, outcome="done", reads=[("l", [1, 2]), ("empty", [])]),
        Balances(client="closing", begin_s=0, end_s=1, outcome="done", accounts={5: Account(100, 2)}, whole=True),
    ]
    stored = {"r": (b"v", 7), "c": (b"3", 9), "l": (b"[1,2]", 4), "p/bank/account/005": (b"100", 2)}
    assert compared(reads, stored, "p/") == []
    for key, other in {"r": (b"v", 8), "c": (b"2", 9), "l": (b"[1]", 4), "p/bank/account/005": (b"99", 2)}.items():
        (sentence,) = compared(reads, stored | {key: other}, "p/")
        assert sentence.startswith(f"{key}: listed as")
    assert len(compared(reads, stored | {"gone": (b"x", 1)}, "p/")) == 1
    assert len(compared(reads, {}, "p/")) == 4


# --- counting --------------------------------------------------------------------------------------------------------


def test_a_refusal_is_counted_by_its_code() -> None:
    body = msgspec.json.encode({"status": 503, "code": "unavailable"})
    assert Reply(503, body).code == "unavailable"
    assert Reply(503, b"no problem document").code == "503"
    assert {Reply(-1).code, Reply(0).code} == {"no answer", "not connected"}


async def test_a_second_becomes_a_point_and_the_next_one_begins_at_nothing() -> None:
    meter = Meter()
    meter.take("bank", Reply(200), 0.010)
    meter.take("bank", Reply(200), 0.030)
    meter.take("set", Reply(503, msgspec.json.encode({"status": 503, "code": "unavailable"})), 0.5)
    meter.take("set", Reply(-1), 5.0)
    running = asyncio.create_task(meter.run())
    while len(meter.points) < 2:
        await asyncio.sleep(0.02)
    running.cancel()
    first, second = meter.points
    assert set(first.per_s) == {"bank"}
    assert set(first.failed_per_s) == {"unavailable", "no answer"}
    assert first.p50_ms == pytest.approx(30)
    assert first.p99_ms == pytest.approx(500)  # what was never answered has no latency
    assert second.per_s == second.failed_per_s == {}
    assert second.p50_ms is None


# --- changes of shards -----------------------------------------------------------------------------------------------


class Cluster:
    """The few calls of a router that a change needs. `loses`: shards whose adding is answered 202 and forgotten;
    `lies`: shards whose adding is said to be done and is not; `cancels`: all changes are cancelled.
    """

    def __init__(
        self, loses: frozenset[str] = frozenset(), lies: frozenset[str] = frozenset(), *, cancels: bool = False
    ) -> None:
        self.weights = {"s1": 1, "s2": 1, "s3": 1}
        self.changes: list[dict[str, Any]] = []
        self._loses, self._lies, self._cancels = loses, lies, cancels

    async def answer(self, request: web.Request) -> web.Response:
        shard, kind = request.path.rpartition("/")[2], "weight"
        match request.method, request.path:
            case "GET", "/v1/cluster":
                shards = [
                    {"id": each, "weight": weight, "state": "up", "copies": []} for each, weight in self.weights.items()
                ]
                rest = {"replicas": 1, "nodes": shards, "moves": [], "ending": [], "wanted": []}
                return web.json_response({"shards": shards} | rest)
            case "GET", "/v1/changes":
                return web.json_response({"items": self.changes[::-1]})
            case "POST", "/v1/shards":
                new = await request.json()
                shard, kind = new["id"], "add"
                if shard not in self._loses | self._lies:
                    self.weights[shard] = new["weight"]
            case "DELETE", path if path.startswith("/v1/shards/"):
                kind = "remove"
                self.weights.pop(shard)
        number = f"{len(self.changes) + 1:04x}"
        if shard not in self._loses:
            state = "cancelled" if self._cancels else "done"
            self.changes.append({"id": number, "kind": kind, "shard": shard, "state": state})
        return web.json_response({}, status=202, headers={"Location": f"/v1/changes/{number}"})


async def after_changes(cluster: Cluster, *kinds: str) -> tuple[str, Mapping[str, int]]:
    application = web.Application()
    application.router.add_route("*", "/{tail:.*}", cluster.answer)
    async with TestServer(application) as server, aiohttp.ClientSession() as http:
        wire = Wire(http, [str(server.make_url("")).rstrip("/")], 1)
        reshard = Reshard(wire, 3)
        for number, kind in enumerate(kinds):
            await reshard.do(kind, random.Random(number))
        return await reshard.settle(5.0), cluster.weights


async def test_shards_come_and_go_and_their_number_stays_about_the_same() -> None:
    sentence, weights = await after_changes(Cluster(), *["add"] * 6, *["remove"] * 6, *["two at once"] * 5)
    assert sentence == ""
    assert 2 <= len(weights) <= 5


async def test_a_change_that_was_taken_down_and_not_done_is_told() -> None:
    sentence, _ = await after_changes(Cluster(loses=frozenset({"s4"})), "add")
    assert "add s4" in sentence


async def test_a_change_that_is_said_to_be_done_and_is_not_is_told() -> None:
    sentence, _ = await after_changes(Cluster(lies=frozenset({"s4"})), "add")
    assert "add s4 (done)" in sentence


async def test_a_change_may_be_cancelled_only_if_something_was() -> None:
    sentence, _ = await after_changes(Cluster(cancels=True), "weigh")
    assert "(cancelled)" in sentence
    sentence, _ = await after_changes(Cluster(cancels=True), "weigh", "cancel")
    assert sentence == ""


def test_while_the_controller_is_away_it_is_not_known_whether_anything_moves() -> None:
    shard = {"state": "up", "copies": [{"state": "in-sync"}]}
    at_rest = {"replicas": 2, "nodes": [{}, {}], "shards": [shard], "moves": [], "ending": [], "wanted": []}
    assert is_settled(at_rest)
    assert not is_settled(at_rest | {"ending": None})
    assert not is_settled(at_rest | {"wanted": ["s5"]})
    assert not is_settled(at_rest | {"shards": [shard | {"state": "down"}]})
    assert not is_settled(at_rest | {"shards": [shard | {"copies": []}]})
    assert not is_settled(at_rest | {"shards": [shard | {"copies": [{"state": "joining"}]}]})


def test_the_end_of_changes_is_waited_for_as_long_as_they_come_forward_but_not_for_ever() -> None:
    deadline = Forward(100.0, 10.0)
    assert [deadline.is_over(now, done) for now, done in ((109, 0), (110, 1), (119, 1), (120.5, 1))] == [
        False, False, False, True,
    ]  # fmt: skip
    deadline = Forward(100.0, 10.0)
    assert [deadline.is_over(100.0 + n, n) for n in (9, 18, 27, 36, 41)] == [False, False, False, False, True]


async def test_doubts_count_from_when_all_shards_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as long as there are fewer and fewer; what is seen to be in doubt for too long stays a fault."""
    now = iter(float(n) for n in range(1000))
    monkeypatch.setattr(doubts, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(doubts, "_POLL_S", 0.0)
    falls = [5, 5, 5, 4, 4, 4, 2, 2, 2, 1, 1, 1, 0]
    for seen, none_left in (
        ([-1] * 9 + [1, 1, 0], True), ([-1] * 9 + [1] * 9, False), ([-1] * 99, False), (falls, True),
    ):  # fmt: skip
        async with aiohttp.ClientSession() as session:
            found, looks = doubts.Doubts(session, []), iter(seen)

            async def look(found: doubts.Doubts = found, looks: Iterator[int] = looks) -> None:
                found.count = next(looks)

            monkeypatch.setattr(found, "look", look)
            assert await found.none_left(4.0) is none_left
