"""HTTP as a hostile or clumsy client speaks it: decoded strictly, refused readably, answered always."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import quote, quote_from_bytes

import pytest
from aiohttp import web
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore.config import Limits
from kvstore.errors import (
    BadParameter,
    Foreign,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    KvError,
    Unavailable,
    ValueTooLarge,
)
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import HostGuard, check_key, decode_key, decode_query, read_head
from kvstore.transport.http.responses import BINARY, Response, json_response, problem_response
from kvstore.transport.http.server import Server, start_server

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


# --- keys -------------------------------------------------------------------------------------------------------------


@given(texts, st.sampled_from(["", "/", "!$&'()*+,;=:@-._~"]))
@example("..", "")
@example("a/../b", "/")
@example("nul\0inside", "")
@example("100% of 50%25", "")
def test_any_key_survives_its_percent_encoding(key: str, unescaped: str) -> None:
    assert decode_key(quote(key, safe=unescaped), 1024) == key


@given(texts)
def test_every_byte_may_be_encoded_and_case_does_not_matter(key: str) -> None:
    encoded = "".join(f"%{byte:02x}" for byte in key.encode())
    assert decode_key(encoded, 1024) == decode_key(encoded.upper(), 1024) == key


@given(texts)
def test_raw_bytes_that_are_utf8_are_the_key(key: str) -> None:
    raw = key.replace("%", "%25").encode().decode("utf-8", "surrogateescape")
    assert decode_key(raw, 1024) == key


@given(st.binary(min_size=1, max_size=8))
def test_bytes_are_a_key_exactly_if_they_are_utf8(raw: bytes) -> None:
    try:
        expected = raw.decode("utf-8")
    except UnicodeDecodeError:
        for encoded in (quote_from_bytes(raw, safe=""), raw.replace(b"%", b"%25").decode("utf-8", "surrogateescape")):
            with pytest.raises(KeyNotUtf8):
                decode_key(encoded, 1024)
    else:
        assert decode_key(quote_from_bytes(raw, safe=""), 1024) == expected


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ("a/b", "a/b"),
        ("a%2Fb", "a/b"),
        ("a%2fb", "a/b"),
        ("//", "//"),
        ("..", ".."),
        ("a/../b", "a/../b"),
        ("%2E%2e", ".."),
        ("a+b", "a+b"),
        ("a%20b", "a b"),
        ("%00", "\0"),
        ("%3F", "?"),
        ("%25zz", "%zz"),
        ("%F0%9F%94%91", "🔑"),
    ],
)
def test_each_way_to_write_a_key_means_one_key(raw: str, key: str) -> None:
    assert decode_key(raw, 1024) == key


@pytest.mark.parametrize("raw", ["%", "a%", "%z", "%zz", "%1", "%1g", "%%31", "%2", "a%2/b", "%\uff11\uff11"])
def test_a_broken_escape_is_refused(raw: str) -> None:
    with pytest.raises(KeyNotUtf8):
        decode_key(raw, 1024)


@pytest.mark.parametrize(
    "raw",
    ["%FF", "%C3", "%C0%80", "%ED%A0%80", "%F8%88%80%80%80", "%F4%90%80%80", "a%80b", "\udcff", "%C3("],
)
def test_bytes_that_are_not_utf8_are_refused_overlong_and_surrogate_forms_included(raw: str) -> None:
    with pytest.raises(KeyNotUtf8):
        decode_key(raw, 1024)


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(KeyEmpty):
        decode_key("", 1024)


@pytest.mark.parametrize("letter", ["a", "%61", "ü", "%C3%BC", "🔑"])
def test_a_key_is_measured_in_bytes_after_decoding(letter: str) -> None:
    size = {"a": 1, "%61": 1, "ü": 2, "%C3%BC": 2, "🔑": 4}[letter]
    assert len(decode_key(letter * (1024 // size), 1024).encode()) == 1024
    with pytest.raises(KeyTooLong) as refused:
        decode_key(letter * (1024 // size) + "b", 1024)
    assert refused.value.members["key_bytes_max"] == 1024
    assert "1025" in refused.value.detail


def test_a_key_that_came_as_text_obeys_the_same_rules() -> None:
    assert check_key("a/ü%zz", 1024) == "a/ü%zz"
    for key, error in (("", KeyEmpty), ("ü" * 513, KeyTooLong), ("a\ud800", KeyNotUtf8)):
        with pytest.raises(error):
            check_key(key, 1024)


# --- queries ----------------------------------------------------------------------------------------------------------

KNOWN = frozenset({"prefix", "limit", "after"})


@given(st.dictionaries(st.sampled_from(sorted(KNOWN)), texts))
def test_any_parameters_survive_their_encoding(parameters: dict[str, str]) -> None:
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
    assert decode_query(query, KNOWN) == parameters


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", {}),
        ("&&", {}),
        ("prefix=", {"prefix": ""}),
        ("prefix", {"prefix": ""}),
        ("prefix=a+b", {"prefix": "a b"}),
        ("prefix=a%2Bb", {"prefix": "a+b"}),
        ("prefix=a=b", {"prefix": "a=b"}),
        ("prefix=a%26limit%3D5", {"prefix": "a&limit=5"}),
        ("%70refix=a", {"prefix": "a"}),
        ("prefix=\udcc3\udcbc", {"prefix": "ü"}),
    ],
)
def test_a_query_is_decoded_as_forms_are(query: str, expected: dict[str, str]) -> None:
    assert decode_query(query, KNOWN) == expected


@pytest.mark.parametrize(
    "query",
    [
        "tll=5",
        "Prefix=a",
        "prefix=a&prefix=a",
        "prefix=a&%70refix=b",
        "=a",
        "prefix=%zz",
        "prefix=%",
        "prefix=%FF",
        "prefix=\udcff",
        "pre%FFfix=a",
        "prefix=a;limit=5&",
        "a;limit=5",
    ],
)
def test_unknown_repeated_and_broken_parameters_are_refused(query: str) -> None:
    if query == "prefix=a;limit=5&":
        assert decode_query(query, KNOWN) == {"prefix": "a;limit=5"}, "a semicolon separates nothing"
        return
    with pytest.raises(BadParameter):
        decode_query(query, KNOWN)


def test_a_refused_parameter_is_named_with_what_is_known() -> None:
    with pytest.raises(BadParameter) as refused:
        decode_query("tll=5", KNOWN)
    assert "'tll'" in refused.value.detail
    assert "after, limit, prefix" in refused.value.detail


# --- Host and Origin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8080", "LOCALHOST:1", "127.0.0.1:8080", "192.168.1.7", "[::1]:8080", "[::1]", "kv.lan:80"],
)
def test_names_of_this_router_and_addresses_are_let_in(host: str) -> None:
    guard = HostGuard(["kv.lan"])
    for _ in range(2):
        guard.check({"host": host})
        guard.check({"host": host, "origin": f"http://{host}"})


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "localhost@evil.example",
        "evil.example#127.0.0.1",
        "kv.lan.",
        "127.0.0.1:80:80x",
        "::1",
        "[::1].evil",
        "127.0.0.1, evil.example",
    ],
)
def test_names_of_others_are_refused_again_and_again(host: str) -> None:
    guard = HostGuard(["kv.lan"])
    for _ in range(2):
        with pytest.raises(Foreign):
            guard.check({"host": host})


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "http://localhost",
        "http://localhost:8081",
        "http://127.0.0.1:8080",
        "file://",
        "",
    ],
)
def test_pages_of_others_are_refused(origin: str) -> None:
    guard = HostGuard([])
    guard.check({"host": "localhost:8080"})
    with pytest.raises(Foreign):
        guard.check({"host": "localhost:8080", "origin": origin})


def test_the_routers_own_page_is_let_in() -> None:
    HostGuard([]).check({"host": "localhost:8080", "origin": "http://localhost:8080"})
    HostGuard(["kv.lan"]).check({"host": "kv.lan", "origin": "https://KV.lan"})


def test_the_memory_of_good_hosts_is_bounded() -> None:
    guard = HostGuard([])
    for number in range(3000):
        guard.check({"host": f"10.0.{number // 250}.{number % 250}"})
    assert len(guard._good) <= 1000


# --- a real server ----------------------------------------------------------------------------------------------------

HOST = b"Host: localhost\r\n"
VALUE_BYTES_MAX = 1000
LINE_BYTES_MAX = 4000


class Got(NamedTuple):
    """An answer taken apart; names of `fields` in lower case."""

    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.fields["content-type"] == "application/problem+json"
        document: dict[str, Any] = json.loads(self.body)
        assert document["status"] == self.status
        assert document["type"] == f"/problems/{document['code']}"
        assert document["next_step"]
        return document


class Wire:
    """A client that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    @property
    def was_answered(self) -> bool:
        return bool(self.reader._buffer)  # type: ignore[attr-defined]

    async def answer(self, *, head_only: bool = False) -> Got:
        async with asyncio.timeout(60):
            head = await self.reader.readuntil(b"\r\n\r\n")
            status_line, *lines = head.decode("latin-1").split("\r\n")[:-2]
            fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            status = int(status_line.split(" ")[1])
            size = 0 if head_only or status in (100, 204, 304) else int(fields["content-length"])
            return Got(status, fields, await self.reader.readexactly(size))

    async def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        async with asyncio.timeout(60):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""


class Site:
    """A server with a handler that shows what it was given."""

    def __init__(self, port: int, bodies: BodyReader, seen: list[str]) -> None:
        self.port = port
        self.bodies = bodies
        self.seen = seen
        self._wires: list[Wire] = []

    async def connect(self) -> Wire:
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        self._wires.append(wire)
        return wire

    async def close(self) -> None:
        """Hang up on all that are still connected."""
        for wire in self._wires:
            wire.writer.transport.abort()
        await asyncio.gather(*(wire.writer.wait_closed() for wire in self._wires), return_exceptions=True)

    async def ask(self, data: bytes) -> Got:
        """The answer to these bytes on a connection of their own."""
        wire = await self.connect()
        wire.send(data)
        return await wire.answer()


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    limits = Limits(
        connections_max=20,
        request_line_bytes_max=LINE_BYTES_MAX,
        header_bytes_max=LINE_BYTES_MAX,
        body_bytes_in_flight_max=4 * VALUE_BYTES_MAX,
    )
    bodies = BodyReader(limits)
    seen: list[str] = []

    async def handle(request: web.BaseRequest) -> Any:
        try:
            head = read_head(request)
            if head.path == "/fails":
                raise RuntimeError("a bug")
            if head.path == "/fails-midway":
                stream = web.StreamResponse()
                await stream.prepare(request)
                await stream.write(b"the beginning ")
                raise RuntimeError("a bug")
            if head.method == "PUT":
                value = await bodies.read(request, head, VALUE_BYTES_MAX, ValueTooLarge)
                seen.append(f"PUT {len(value)}")
                return Response(200, value, BINARY)
            seen.append(f"{head.method} {head.path}?{head.query}")
            if head.path == "/large":
                return Response(200, b"v" * 300_000, BINARY, head_only=head.method == "HEAD")
            if head.path == "/nothing":
                return Response(204, lines="X-Mine: 1\r\n")
            return json_response(200, {"path": head.path.encode("ascii", "backslashreplace").decode()})
        except KvError as error:
            return problem_response(error)

    runner = await start_server(Server(handle, limits), "127.0.0.1", 0)
    site = Site(runner.addresses[0][1], bodies, seen)
    yield site
    await site.close()
    await runner.cleanup()
    assert bodies.under_way_bytes == 0, "what was reserved was given back"


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


# --- bodies -----------------------------------------------------------------------------------------------------------


def put(*fields: bytes) -> bytes:
    return b"PUT /a HTTP/1.1\r\n" + HOST + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize("size", [0, 1, VALUE_BYTES_MAX])
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_body_up_to_the_limit_is_taken(site: Site, size: int, at_once: bool) -> None:
    wire = await site.connect()
    body = bytes(number % 256 for number in range(size))
    wire.send(put(b"Content-Length: %d" % size) + (body if at_once else b""))
    if not at_once:
        await wire.writer.drain()
        await asyncio.sleep(0.02)
        for part in (body[: size // 2], body[size // 2 :]):
            wire.send(part)
            await asyncio.sleep(0)
    assert (await wire.answer()).body == body


async def test_a_chunked_body_is_taken(site: Site) -> None:
    got = await site.ask(put(b"Transfer-Encoding: chunked") + chunks(b"ab", b"c") + b"0\r\n\r\n")
    assert got.body == b"abc"


async def test_a_body_announced_over_the_limit_is_refused_unread(site: Site) -> None:
    wire = await site.connect()
    wire.send(put(b"Content-Length: 1000000000000"))
    got = await wire.answer()
    assert (got.status, got.problem["code"]) == (413, "value-too-large")
    assert got.problem["bytes_max"] == VALUE_BYTES_MAX


async def test_a_chunked_body_is_refused_when_it_passes_the_limit_not_at_its_end(site: Site) -> None:
    wire = await site.connect()
    wire.send(put(b"Transfer-Encoding: chunked"))
    await asyncio.sleep(0.02)
    for _ in range(3):
        wire.send(chunks(b"v" * 600))
    assert (await wire.answer()).problem["code"] == "value-too-large"


async def test_a_chunked_body_over_the_limit_that_came_at_once_is_refused(site: Site) -> None:
    got = await site.ask(put(b"Transfer-Encoding: chunked") + chunks(b"v" * 1001) + b"0\r\n\r\n")
    assert got.problem["code"] == "value-too-large"


async def test_who_waits_for_permission_gets_it_before_the_body(site: Site) -> None:
    wire = await site.connect()
    wire.send(put(b"Content-Length: 3", b"Expect: 100-continue"))
    assert (await wire.answer()).status == 100
    wire.send(b"abc")
    assert (await wire.answer()).body == b"abc"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ((b"Content-Length: 9999", b"Expect: 100-continue"), 413),
        ((b"Content-Length: 3", b"Expect: 200-ok"), 417),
        ((b"Content-Length: 3", b"Expect: 100-continue", b"Content-Encoding: gzip"), 415),
        ((b"Content-Length: 3", b"Expect: 100-continue", b"Content-Range: bytes 0-2/3"), 400),
    ],
)
async def test_who_waits_for_permission_is_refused_before_sending(
    site: Site, fields: tuple[bytes, ...], status: int
) -> None:
    got = await site.ask(put(*fields))
    assert (got.status, got.problem["status"]) == (status, status)


async def test_a_client_of_http_1_0_is_sent_no_interim_answer(site: Site) -> None:
    wire = await site.connect()
    wire.send(b"PUT /a HTTP/1.0\r\n" + HOST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\nabc")
    assert (await wire.answer()).body == b"abc"


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"x", b"identity, gzip", b""])
async def test_an_encoded_body_is_refused(site: Site, encoding: bytes) -> None:
    got = await site.ask(put(b"Content-Length: 3", b"Content-Encoding: " + encoding) + b"abc")
    assert (got.status, got.problem["code"]) == (415, "content-encoding-refused")


async def test_a_body_encoded_as_itself_is_taken(site: Site) -> None:
    assert (await site.ask(put(b"Content-Length: 3", b"Content-Encoding: identity") + b"abc")).body == b"abc"


async def test_compressed_bytes_are_stored_as_sent(site: Site) -> None:
    gzipped = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03KLJ\x06\x00\xc2A$5\x03\x00\x00\x00"
    assert (await site.ask(put(b"Content-Length: %d" % len(gzipped)) + gzipped)).body == gzipped


async def test_bodies_under_way_are_bounded_together_and_the_bound_frees_itself(site: Site) -> None:
    slow = [await site.connect() for _ in range(4)]
    for wire in slow:
        wire.send(put(b"Content-Length: 1000") + b"begun")
    async with asyncio.timeout(60):
        while site.bodies.under_way_bytes < 4000:
            await asyncio.sleep(0.005)
    one_more = await site.connect()
    one_more.send(put(b"Content-Length: 1000"))
    got = await one_more.answer()
    assert (got.status, got.problem["code"], got.fields["retry-after"]) == (429, "too-many-requests", "1")
    small_ones_beside_it = await site.ask(put(b"Content-Length: 3") + b"abc")
    assert small_ones_beside_it.body == b"abc", "it came whole and need not be waited for"
    for wire in slow:
        wire.send(b"v" * 995)
        assert (await wire.answer()).status == 200


async def test_a_client_that_leaves_in_the_middle_of_its_body_has_stored_nothing_and_holds_nothing(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    wire = await site.connect()
    wire.send(put(b"Content-Length: 1000") + b"begun")
    async with asyncio.timeout(60):
        while not site.bodies.under_way_bytes:
            await asyncio.sleep(0.005)
        wire.writer.transport.abort()
        while site.bodies.under_way_bytes:
            await asyncio.sleep(0.005)
    assert site.seen == []
    await asyncio.sleep(0.02)
    assert caplog.records == [], "a client that leaves is no error of the router"


async def test_a_body_shorter_than_announced_is_not_stored(site: Site) -> None:
    wire = await site.connect()
    wire.send(put(b"Content-Length: 10") + b"short")
    wire.writer.write_eof()
    await wire.rest()
    assert site.seen == []


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


async def test_a_chunk_that_turns_out_broken_after_the_body_began_is_answered_and_not_stored(site: Site) -> None:
    wire = await site.connect()
    wire.send(put(b"Transfer-Encoding: chunked") + chunks(b"abc"))
    async with asyncio.timeout(60):
        while not site.bodies.under_way_bytes:
            await asyncio.sleep(0.005)
    wire.send(b"zz\r\nabc\r\n0\r\n\r\n")
    got = await wire.answer()
    assert (got.status, got.problem["code"]) == (400, "bad-request")
    await wire.rest()
    assert site.seen == []


async def test_what_follows_a_refused_body_is_never_taken_for_a_request(site: Site) -> None:
    wire = await site.connect()
    wire.send(put(b"Content-Length: 5000") + b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n")
    assert (await wire.answer()).status == 413
    wire.writer.write_eof()
    assert b"smuggled" not in await wire.rest()
    assert site.seen == []


async def test_who_leaves_when_its_body_was_refused_leaves_no_trace_in_the_log(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    wire = await site.connect()
    wire.send(put(b"Content-Length: 500000") + b"v" * 1000)
    assert (await wire.answer()).status == 413
    wire.writer.write_eof()
    await wire.rest()
    assert caplog.text == ""


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
