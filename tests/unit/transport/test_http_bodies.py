"""Bodies of requests: taken up to their bounds, refused in time, and never taken for something else."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.transport.raw_http import HOST, VALUE_BYTES_MAX, Site, chunks, put


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
