"""HTTP as a hostile or clumsy client speaks it to a real server: refused readably, answered always."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvstore.errors import KvError, Unavailable, ValueTooLarge
from kvstore.transport.http.responses import problem_response
from tests.unit.transport.raw_http import HOST, LINE_BYTES_MAX, Site, chunks, put

# --- requests and answers ---------------------------------------------------------------------------------------------


async def test_a_request_is_answered_and_the_connection_stays(site: Site) -> None:
    wire = await site.connect()
    for path in (b"/a", b"/b"):
        wire.send(b"GET " + path + b"?x=1 HTTP/1.1\r\n" + HOST + b"\r\n")
        got = await wire.answer()
        assert (got.status, json.loads(got.body)) == (200, {"path": path.decode()})
        assert got.fields["content-type"] == "application/json"
        assert got.fields["date"].endswith(" GMT")
        assert "connection" not in got.fields


async def test_requests_sent_ahead_are_answered_in_order(site: Site) -> None:
    wire = await site.connect()
    wire.send(b"".join(b"GET /%d HTTP/1.1\r\n" % number + HOST + b"\r\n" for number in range(50)))
    assert [json.loads((await wire.answer()).body)["path"] for _ in range(50)] == [f"/{number}" for number in range(50)]


async def test_a_head_request_gets_the_length_and_no_body(site: Site) -> None:
    wire = await site.connect()
    wire.send(b"HEAD /large HTTP/1.1\r\n" + HOST + b"\r\n" + b"GET /next HTTP/1.1\r\n" + HOST + b"\r\n")
    got = await wire.answer(head_only=True)
    assert (got.status, got.fields["content-length"]) == (200, "300000")
    assert json.loads((await wire.answer()).body) == {"path": "/next"}


async def test_a_large_answer_arrives_whole(site: Site) -> None:
    assert (await site.ask(b"GET /large HTTP/1.1\r\n" + HOST + b"\r\n")).body == b"v" * 300_000


async def test_an_answer_without_content_has_no_length(site: Site) -> None:
    got = await site.ask(b"GET /nothing HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (got.status, got.fields["x-mine"]) == (204, "1")
    assert "content-length" not in got.fields
    assert "content-type" not in got.fields


@pytest.mark.parametrize(
    ("version", "field", "stays"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: close\r\n", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", True),
    ],
)
async def test_the_connection_stays_as_the_client_asked(site: Site, version: bytes, field: bytes, stays: bool) -> None:
    wire = await site.connect()
    wire.send(b"GET /a HTTP/" + version + b"\r\n" + HOST + field + b"\r\n")
    got = await wire.answer()
    if stays:
        assert got.fields.get("connection") in (None, "keep-alive")
        wire.send(b"GET /b HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await wire.answer()).status == 200
    else:
        assert got.fields["connection"] == "close"
        assert await wire.rest() == b""


async def test_a_target_that_names_the_host_is_the_same_target(site: Site) -> None:
    got = await site.ask(b"GET http://localhost/a/b HTTP/1.1\r\n" + HOST + b"\r\n")
    assert json.loads(got.body) == {"path": "/a/b"}


# --- what is not HTTP, or too much of it ------------------------------------------------------------------------------

GET = b"GET /a HTTP/1.1\r\n" + HOST


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400),
        (b"\x00" * 100 + b"\r\n\r\n", 400),
        (b"G\xc3\x89T / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (GET + HOST + b"\r\n", 400),
        (GET + b"A: b\x00c\r\n\r\n", 400),
        (put(b"Content-Length: 3", b"Content-Length: 4") + b"abcd", 400),
        (put(b"Content-Length: -3") + b"abc", 400),
        (put(b"Content-Length: 0x3") + b"abc", 400),
        (put(b"Content-Length: " + b"9" * 30) + b"abc", 400),
        (put(b"Content-Length: 3", b"Transfer-Encoding: chunked") + chunks(b"abc") + b"0\r\n\r\n", 400),
        (put(b"Transfer-Encoding: chunked") + b"zz\r\nabc\r\n0\r\n\r\n", 400),
        (b"GET /" + b"a" * LINE_BYTES_MAX + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (b"GET /?prefix=" + b"url" * LINE_BYTES_MAX + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
        (GET + b"X-Mine: curl the url of the request line" + b"v" * LINE_BYTES_MAX + b"\r\n\r\n", 431),
        (GET + b"X-" + b"n" * LINE_BYTES_MAX + b": v\r\n\r\n", 431),
        (GET + b"".join(b"X-%d: v\r\n" % number for number in range(500)) + b"\r\n", 431),
    ],
)
@pytest.mark.parametrize("in_pieces", [False, True])
async def test_what_http_does_not_allow_is_answered_with_a_problem_and_the_connection_closed(
    site: Site, data: bytes, status: int, in_pieces: bool
) -> None:
    wire = await site.connect()
    step = len(data) // 3 + 1 if in_pieces else len(data)
    for start in range(0, len(data), step):
        if not wire.was_answered:
            wire.send(data[start : start + step])
            await asyncio.sleep(0.01 if in_pieces else 0)
            for _ in range(4):  # on a busy machine the time may be over before server and client have had their turns
                await asyncio.sleep(0)
    got = await wire.answer()
    assert (got.status, got.problem["status"]) == (status, status)
    assert got.fields["connection"] == "close"
    assert await wire.rest() == b""
    assert site.seen == []


async def test_a_bug_in_a_handler_is_a_problem_without_its_details(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    got = await site.ask(b"GET /fails HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (got.status, got.problem["code"]) == (500, "internal")
    assert b"a bug" not in got.body
    assert "a bug" in caplog.text, "they stand in the log"


async def test_a_bug_after_the_answer_has_begun_breaks_it_off_and_adds_no_second_one(site: Site) -> None:
    wire = await site.connect()
    wire.send(b"GET /fails-midway HTTP/1.1\r\n" + HOST + b"\r\n")
    answer = await wire.rest()
    assert b"the beginning" in answer
    assert answer.count(b"HTTP/1.1") == 1
    assert not answer.endswith(b"0\r\n\r\n"), "the client must see that it is not whole"


# --- more connections than are taken ----------------------------------------------------------------------------------


async def test_one_connection_too_many_is_told_so_and_the_others_go_on(site: Site) -> None:
    wires = [await site.connect() for _ in range(20)]
    for wire in wires:
        wire.send(b"GET /a HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await wire.answer()).status == 200
    refused = await site.connect()
    got = await refused.answer()
    assert (got.status, got.problem["code"], got.fields["retry-after"]) == (503, "unavailable", "1")
    assert got.fields["connection"] == "close"
    assert await refused.rest() == b""
    wires[0].send(b"GET /b HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (await wires[0].answer()).status == 200
    wires[1].writer.close()
    await eventually_served(site)


async def eventually_served(site: Site) -> None:
    async with asyncio.timeout(60):
        while True:
            wire = await site.connect()
            wire.send(b"GET /c HTTP/1.1\r\n" + HOST + b"\r\n")
            status = (await wire.answer()).status
            wire.writer.close()
            if status == 200:
                return
            await asyncio.sleep(0.01)


async def test_a_refused_connection_that_speaks_on_disturbs_no_other(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    wires = [await site.connect() for _ in range(20)]
    wires[0].send(b"GET /a HTTP/1.1\r\n" + HOST + b"\r\n")
    await wires[0].answer()
    for _ in range(10):
        refused = await site.connect()
        refused.send(GET + b"\r\n" + b"garbage" * 1000)
        await refused.rest()
    wires[0].send(b"GET /b HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (await wires[0].answer()).status == 200
    assert caplog.records == []


# --- responses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("retry_after_ms", "seconds"), [(1, "1"), (999, "1"), (1000, "1"), (1001, "2"), (0, "1")])
def test_retry_after_is_in_whole_seconds_and_never_too_early(retry_after_ms: int, seconds: str) -> None:
    response = problem_response(Unavailable("away", retry_after_ms=retry_after_ms))
    assert f"Retry-After: {seconds}\r\n" in response.lines
    assert json.loads(response.body)["retry_after_ms"] == retry_after_ms


def test_a_problem_that_does_not_pass_by_itself_has_no_retry_after() -> None:
    assert "Retry-After" not in problem_response(ValueTooLarge("large")).lines


@pytest.mark.parametrize("error", list(KvError.__subclasses__()))
def test_every_error_can_be_sent(error: type[KvError]) -> None:
    response = problem_response(error("what happened"))
    document = json.loads(response.body)
    assert (response.status, document["status"], document["detail"]) == (error.status, error.status, "what happened")
