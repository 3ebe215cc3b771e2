"""loadtest.compare: batches and pages, how they are asked for, and what is not measured or not counted."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web

from kvstore.router.decode import decode_cursor
from loadtest.bench import batches, dialects
from loadtest.bench.batches import OPERATIONS, PAGE_KEYS, SCRIPT, drawn
from loadtest.bench.data import Data, make_data
from loadtest.bench.dialects import Unsupported
from loadtest.bench.drive import run_wrk
from loadtest.bench.http1 import write_replay
from loadtest.bench.workloads import WORKLOADS
from tests.unit.loadtest.small_servers import serving

DATA = make_data(250, seed=1)
KVSTORE, ETCD, REDIS, BARE = dialects.Kvstore(), dialects.Etcd(), dialects.Webdis(), dialects.Bare()


def unpack(text: str) -> str:
    return base64.b64decode(text).decode()


# --- which keys ------------------------------------------------------------------------------------------------------


def test_the_keys_of_a_batch_are_distinct_and_the_batches_are_always_the_same() -> None:
    groups = drawn(DATA)
    assert groups == drawn(DATA)
    assert {len(set(numbers)) for numbers in groups} == {OPERATIONS}
    assert {number for numbers in groups for number in numbers} == set(range(len(DATA.keys)))


@pytest.mark.parametrize("work", ["batch100", "batch100-get", "list"])
def test_too_few_keys_are_an_error(work: str) -> None:
    make = WORKLOADS[work].requests
    assert make is not None
    with pytest.raises(RuntimeError, match="100 keys, and there are 99"):
        make(KVSTORE, make_data(99, seed=1))


def test_every_page_is_full() -> None:
    requests = batches.page_requests(KVSTORE, DATA)
    behind = [parse_qs(urlsplit(request.target).query)["after"][0] for request in requests]
    assert [decode_cursor(cursor) for cursor in behind] == DATA.keys[:-PAGE_KEYS]


# --- requests --------------------------------------------------------------------------------------------------------


def test_all_systems_are_asked_to_put_the_same_batches() -> None:
    groups = drawn(DATA)
    asked = [batches.put_requests(dialect, DATA) for dialect in (KVSTORE, ETCD, REDIS, BARE)]
    assert asked[0] == asked[3]
    for numbers, ours, theirs, third in zip(groups, *asked[:3], strict=True):
        puts = [(DATA.keys[number], DATA.written[number].decode()) for number in numbers]
        assert (ours.method, ours.target) == ("POST", "/v1/batch")
        assert json.loads(ours.body) == {"ops": [{"op": "put", "key": key, "value": value} for key, value in puts]}
        success = [step["request_put"] for step in json.loads(theirs.body)["success"]]
        assert [(unpack(step["key"]), unpack(step["value"])) for step in success] == puts
        assert third.body.decode().split("/") == ["MSET", *(word for put in puts for word in put)]


def test_all_systems_are_asked_to_get_the_same_batches() -> None:
    groups = drawn(DATA)
    asked = [batches.get_requests(dialect, DATA) for dialect in (KVSTORE, ETCD, REDIS)]
    for numbers, ours, theirs, third in zip(groups, *asked, strict=True):
        keys = [DATA.keys[number] for number in numbers]
        assert json.loads(ours.body) == {"ops": [{"op": "get", "key": key} for key in keys]}
        success = json.loads(theirs.body)["success"]
        assert [unpack(step["request_range"]["key"]) for step in success] == keys
        assert third.body.decode().split("/") == ["MGET", *keys]


def test_a_page_of_etcd_is_a_range_behind_the_key_with_a_limit() -> None:
    body = json.loads(batches.page_requests(ETCD, DATA)[5].body)
    assert (unpack(body["key"]), unpack(body["range_end"]), body["limit"]) == (DATA.keys[5] + "\0", "key.", PAGE_KEYS)


def test_who_has_no_such_operation_is_left_out() -> None:
    for dialect, make in (
        (REDIS, batches.page_requests),
        (BARE, batches.page_requests),
        (BARE, batches.get_requests),
    ):
        with pytest.raises(Unsupported):
            make(dialect, DATA)


def test_pages_are_read_alike() -> None:
    ours = json.dumps({"items": [{"key": "key-1", "value": "abc", "version": 7}], "next": None}).encode()
    theirs = json.dumps({"kvs": [{"key": "a2V5LTE=", "value": "YWJj", "mod_revision": "7"}]}).encode()
    assert KVSTORE.listed(ours) == ETCD.listed(theirs) == [("key-1", b"abc")]
    assert ETCD.listed(b"{}") == []


def test_rates_of_batches_are_told_per_operation_and_those_of_pages_per_page() -> None:
    assert [WORKLOADS[work].operations for work in ("batch100", "batch100-get", "list", "get")] == [100, 100, 1, 1]


# --- against a store in this process ---------------------------------------------------------------------------------


class SmallStore:
    """Batches and pages as kvstore answers them. `flaw` says what it does wrong."""

    def __init__(self, data: Data, flaw: str = "", partial_every: int = 0) -> None:
        self.values = dict(zip(data.keys, data.stored, strict=True))
        self.flaw = flaw
        self.partial_every = partial_every
        self.whole = self.partial = 0

    async def answer(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if self.flaw == "refuses" and (request.method == "POST" or request.query):
            return web.Response(status=503)
        if request.method == "POST":
            return web.json_response({"results": self._batch(json.loads(body)["ops"])})
        if request.query:
            return web.json_response({"items": self._page(decode_cursor(request.query["after"])), "next": None})
        return web.Response(body=self.values[request.path.rpartition("/")[2]])

    def _batch(self, ops: list[dict[str, str]]) -> list[dict[str, Any]]:
        results = [self._do(op) for op in (ops[:-1] if self.flaw == "forgets" else ops)]
        if self.partial_every and (self.whole + self.partial) % self.partial_every == 0:
            self.partial += 1
            results[7] = {"status": 503, "key": ops[7]["key"], "code": "shard-unavailable", "detail": "away"}
        else:
            self.whole += 1
        return results

    def _do(self, op: dict[str, str]) -> dict[str, Any]:
        if op["op"] == "put":
            self.values[op["key"]] = op["value"].encode()
            return {"status": 204, "key": op["key"], "version": 1}
        return {"status": 200, "key": op["key"], "version": 1, "value": self.values[op["key"]].decode()}

    def _page(self, after: str) -> list[dict[str, Any]]:
        keys = [key for key in sorted(self.values) if key > after][: PAGE_KEYS - (self.flaw == "forgets")]
        return [
            {"key": key, "value": "x" if self.flaw == "invents" else self.values[key].decode(), "version": 1}
            for key in keys
        ]


@pytest.mark.parametrize("check", [batches.check_puts, batches.check_gets, batches.check_pages])
async def test_a_store_that_does_what_is_asked_is_measured(check: Any) -> None:
    async with serving(SmallStore(DATA).answer) as url:
        await check(url, KVSTORE, DATA)


@pytest.mark.parametrize(
    ("check", "flaw", "complaint"),
    [
        (batches.check_puts, "forgets", "does not show what a batch wrote"),
        (batches.check_gets, "forgets", "in a batch of gets"),
        (batches.check_pages, "forgets", "does not list the 100 keys behind key-00000000"),
        (batches.check_pages, "invents", "a value of key-00000001 that no client wrote"),
        (batches.check_puts, "refuses", "/v1/batch: 503"),
        (batches.check_gets, "refuses", "/v1/batch: 503"),
        (batches.check_pages, "refuses", "/v1/kv: 503"),
    ],
)
async def test_a_store_that_does_not_is_not_measured(check: Any, flaw: str, complaint: str) -> None:
    async with serving(SmallStore(DATA, flaw).answer) as url:
        with pytest.raises(RuntimeError, match=complaint):
            await check(url, KVSTORE, DATA)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")
async def test_a_batch_of_which_an_operation_failed_is_an_error_and_not_counted(tmp_path: Path) -> None:
    store, file = SmallStore(DATA, partial_every=5), tmp_path / "file"
    async with serving(store.answer) as url:
        file.write_bytes(write_replay(batches.put_requests(KVSTORE, DATA), url))
        result = await run_wrk(url, SCRIPT, 3, 1, [str(file), "1", "kvstore"])
    # What was answered but not yet read when wrk stopped: one for each connection at the most.
    assert 0 < result["operations"] <= store.whole <= result["operations"] + 3
    assert 0 < result["partial"] <= store.partial <= result["partial"] + 3
    assert result["requests"] == result["operations"] + result["partial"]
    assert result["status"] == result["timeout"] == 0
