"""loadtest.compare: requests with slots, the file that the scripts read, and what the systems' answers mean."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from loadtest.bench.conditions import CONDITIONS, Conditions, fill, split
from loadtest.bench.dialects import Kvstore
from loadtest.bench.drive import run_wrk
from loadtest.bench.http1 import Answer, Request
from loadtest.bench.stateful import Cas, HotCas, LockCycles, Talk, Template, write_sections

KVSTORE, ETCD = CONDITIONS["kvstore"], CONDITIONS["etcd"]


def reply(status: int, document: object = None, **headers: str) -> Answer:
    body = b"" if document is None else json.dumps(document).encode()
    return Answer(status, body, {name.replace("_", "-"): text for name, text in headers.items()})


# --- slots -----------------------------------------------------------------------------------------------------------


def test_what_goes_into_a_slot_never_changes_the_length_of_a_request() -> None:
    for conditions in CONDITIONS.values():
        request = conditions.cas("key-1", b"value")
        filled = fill(request, "123")
        assert len(filled.render("h:1")) == len(request.render("h:1"))
        assert b"@" not in filled.render("h:1")


def test_a_request_is_split_into_texts_and_the_widths_of_its_slots() -> None:
    texts, widths = split(Request("PUT", "/k", b"@" * 12, ("If-Match: " + "@" * 24,)).render("h:1"))
    assert widths == [24, 12]
    assert b"".join([texts[0], b"T" * 24, texts[1], b"V" * 12, texts[2]]).endswith(b"Length: 12\r\n\r\n" + b"V" * 12)


def test_etcd_is_asked_in_json_that_stays_json_when_it_is_filled() -> None:
    cas = json.loads(fill(ETCD.cas("key-1", b"value"), "17").body)
    assert cas["compare"][0]["mod_revision"] == 17
    assert base64.b64decode(cas["success"][0]["request_put"]["value"]) == b"value"
    counter = json.loads(fill(ETCD.cas_counter("key-1"), "17", ETCD.counter(42)).body)
    assert base64.b64decode(counter["success"][0]["request_put"]["value"]) == b"000000000042"
    assert json.loads(fill(ETCD.acquire("lock-1"), "7587862094").body)["lease"] == 7587862094
    assert json.loads(fill(ETCD.release("lock-1"), '"YWJj"').body) == {"key": "YWJj"}


def test_the_file_holds_each_connections_templates_where_its_table_says() -> None:
    sections = [
        [Template(Request("GET", "/a"))],
        [Template(KVSTORE.cas("b", b"1"), '"7"'), Template(Request("GET", "/c"))],
    ]
    content = write_sections(sections, "h:1")
    table = [tuple(map(int, content[place : place + 26].split())) for place in (0, 26)]
    before = b"PUT /v1/kv/b HTTP/1.1\r\nHost: h:1\r\nIf-Match: "
    after = b"\r\nContent-Length: 1\r\n\r\n1"
    get_a, get_c = (Request("GET", target).render("h:1") for target in ("/a", "/c"))
    assert [content[offset : offset + length] for offset, length in table] == [
        b"- %d\n%b" % (len(get_a), get_a),
        b'"7" %d 24 %d\n%b%b- %d\n%b' % (len(before), len(after), before, after, len(get_c), get_c),
    ]
    assert table[0][0] == 52


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "done", "refused"),
    [
        (KVSTORE, reply(204, ETag='"8"'), reply(412, {"code": "precondition-failed"})),
        (ETCD, reply(200, {"succeeded": True}), reply(200, {"header": {}})),
    ],
)
def test_a_comparison_is_done_or_refused_and_anything_else_is_an_error(
    conditions: Conditions, done: Answer, refused: Answer
) -> None:
    assert conditions.was_set(done) is True
    assert conditions.was_set(refused) is False
    with pytest.raises(RuntimeError, match="not expected: 503"):
        conditions.was_set(reply(503, {}))


def test_versions_are_listed_in_the_form_that_the_slot_takes() -> None:
    page = KVSTORE.listed(reply(200, {"items": [{"key": "a", "version": 7}], "next": "C"}), "a")
    assert page.versions == {"a": '"7"'}
    assert page.next is not None
    assert page.next.target.endswith("&after=C")
    range_ = ETCD.listed(reply(200, {"kvs": [{"key": "YQ==", "mod_revision": "7"}]}), "a")
    assert range_ == ({"a": "7"}, None)


def test_a_grant_tells_what_releasing_needs() -> None:
    assert KVSTORE.token(reply(201, {}, Lock_Token="12")) == "12"
    assert KVSTORE.token(reply(423, {})) is None
    assert ETCD.token(reply(200, {"key": "YWJj"})) == '"YWJj"'


# --- the scripts, against a store in this process --------------------------------------------------------------------


class SmallStore:
    """Keys with versions, and locks, as kvstore answers them; `generous` forgets to compare and to exclude."""

    def __init__(self, generous: bool = False) -> None:
        self.generous = generous
        self.versions: dict[str, int] = {}
        self.values: dict[str, bytes] = {}
        self.locks: dict[str, int] = {}
        self.counted = 0

    async def answer(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        _, _, kind, name = (request.path + "//").split("/")[:4]
        handler = self._lock if kind == "locks" else self._key
        return handler(request, name, body)

    def _key(self, request: web.BaseRequest, key: str, body: bytes) -> web.Response:
        if not key:
            items = [{"key": key, "version": version} for key, version in self.versions.items()]
            return web.json_response({"items": items, "next": None})
        tag = f'"{self.versions.get(key, 0)}"'
        if request.method == "GET":
            return web.Response(body=self.values[key], headers={"ETag": tag})
        if request.headers.get("If-Match", tag) != tag and not self.generous:
            return web.Response(status=412, headers={"ETag": tag})
        self.counted += 1
        self.versions[key], self.values[key] = self.counted, body
        return web.Response(status=204, headers={"ETag": f'"{self.counted}"'})

    def _lock(self, request: web.BaseRequest, name: str, _: bytes) -> web.Response:
        if request.method == "GET":
            return web.json_response({"items": [{"name": name, "token": token} for name, token in self.locks.items()]})
        if request.method == "POST":
            if name in self.locks and not self.generous:
                return web.Response(status=423)
            self.counted += 1
            self.locks[name] = self.counted
            return web.Response(status=201, headers={"Lock-Token": str(self.counted)})
        if self.locks.get(name) != int(request.headers["Lock-Token"]):
            return web.Response(status=412)
        del self.locks[name]
        return web.Response(status=204)


@asynccontextmanager
async def talking(store: SmallStore) -> AsyncIterator[Talk]:
    server = web.Server(store.answer, access_log=None)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with Talk(f"http://127.0.0.1:{port}", Kvstore(), KVSTORE) as talk:
        yield talk
    listener.close()
    await server.shutdown(1.0)


KEYS = [f"key-{number}" for number in range(8)]
VALUES = [b"value"] * 8


def stored() -> SmallStore:
    store = SmallStore()
    store.versions = {key: number for number, key in enumerate(KEYS)}
    store.values = dict(zip(KEYS, VALUES, strict=True))
    return store


async def test_a_store_that_does_not_compare_is_not_measured() -> None:
    store = stored()
    async with talking(store) as talk:
        await Cas().check(talk, KEYS)
        store.generous = True
        with pytest.raises(RuntimeError, match="overwrites a key that has changed"):
            await Cas().check(talk, KEYS)


async def test_a_store_that_grants_a_lock_twice_is_not_measured() -> None:
    store = stored()
    async with talking(store) as talk:
        await LockCycles().check(talk, KEYS)
        store.locks.clear()
        store.generous = True
        with pytest.raises(RuntimeError, match="to two at a time"):
            await LockCycles().check(talk, KEYS)


async def test_a_counter_that_lost_an_acknowledged_increment_is_an_error() -> None:
    store = stored()
    async with talking(store) as talk:
        store.values["hot-counter"] = b"000000000099"
        await HotCas().verify(talk, operations=99, connections=4)
        await HotCas().verify(talk, operations=95, connections=4)
        for operations in (100, 94):
            with pytest.raises(RuntimeError, match="holds 99"):
                await HotCas().verify(talk, operations, connections=4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    if shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")
    return tmp_path / "file"


@pytest.mark.parametrize("workload", [Cas(), HotCas(), LockCycles()], ids=lambda workload: workload.script.stem)
async def test_a_script_counts_exactly_what_the_store_did(workload: Cas | HotCas | LockCycles, file: Path) -> None:
    store = stored()
    async with talking(store) as talk:
        file.write_bytes(write_sections(await workload.sections(talk, KEYS, VALUES, 3), talk.url.partition("//")[2]))
        before = store.counted
        result = await run_wrk(talk.url, workload.script, 3, 1, [str(file), "1", "kvstore"], threads=3)
        done = store.counted - before
        await workload.verify(talk, result["operations"], 3)
    # What was done but not yet acknowledged when wrk stopped: one for each connection at the most.
    assert 0 < result["operations"] <= done <= result["operations"] + 3
    assert result["status"] == result["timeout"] == 0
    assert (result["refused"] > 0) == isinstance(workload, HotCas)
