"""The Python client against a real cluster; and what it concludes when a connection breaks, against sockets that do."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from kvstore.client import Client, Delete, Get, Item, Put
from kvstore.errors import (
    BadBody,
    BadCursor,
    BadParameter,
    BadTtl,
    IdempotencyKeyReused,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    KvError,
    Locked,
    NotFound,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    ValueTooLarge,
)
from kvstore.txn import TxnItem, delete, get, if_exists, if_locked, if_version, put

if TYPE_CHECKING:
    from tests.cluster.clusters import Cluster

MIB = 1024 * 1024
STRANGE_KEYS = [
    "a/b", "/", "//", "a//b/", ".", "..", "a/../b", "./a", "a?b=c&d", "#f", "%", "%41", "%2F", "a%2Fb", "%zz",
    " ", "a b", "+", "a+b", "\x00", "\n", "\x7f", '"', "\\", "é", "e\u0301", "😀", "\u202e", "\ufeff", "ﷺ" * 100,
]  # fmt: skip


@pytest.fixture
async def kv(cluster: Cluster) -> AsyncIterator[Client]:
    async with Client(cluster.url) as client:
        yield client


@pytest.fixture
async def prefix(kv: Client) -> AsyncIterator[str]:
    """A prefix of the test's own; its keys are deleted at the end."""
    prefix = f"client-{uuid.uuid4().hex}/"
    yield prefix
    for key in [item.key async for item in kv.list(prefix)]:
        await kv.delete(key)


# --- keys and values -----------------------------------------------------------------------------------------


async def test_a_value_comes_back_with_the_version_of_its_put(kv: Client, prefix: str) -> None:
    version = await kv.put(prefix + "a", b"one")
    assert await kv.get(prefix + "a") == Item(b"one", version)
    later = await kv.put(prefix + "a", b"two")
    assert later > version
    assert await kv.get(prefix + "a") == Item(b"two", later)


@pytest.mark.parametrize("value", [b"", b"\x00", bytes(range(256)) * 16, b"\r\n\r\n", b"x" * MIB], ids=len)
async def test_any_bytes_survive(kv: Client, prefix: str, value: bytes) -> None:
    await kv.put(prefix + "a", value)
    item = await kv.get(prefix + "a")
    assert item is not None
    assert item.value == value


@pytest.mark.parametrize("key", STRANGE_KEYS, ids=ascii)
async def test_a_strange_key_is_that_key_and_no_other(kv: Client, key: str) -> None:
    try:
        await kv.put(key, key.encode())
        item = await kv.get(key)
        assert item is not None
        assert item.value == key.encode()
        assert key in [listed.key async for listed in kv.list(key)]
        (result,) = await kv.batch([Get(key)])
        assert (result.key, result.value) == (key, key.encode())
        assert (await kv.explain(key))["key"] == key
    finally:
        assert await kv.delete(key)
    assert await kv.get(key) is None


async def test_delete_says_whether_there_was_one(kv: Client, prefix: str) -> None:
    await kv.put(prefix + "a", b"")
    assert await kv.delete(prefix + "a") is True
    assert await kv.delete(prefix + "a") is False
    assert await kv.get(prefix + "a") is None


async def test_a_ttl_is_kept_and_a_later_put_clears_it(kv: Client, prefix: str) -> None:
    await kv.put(prefix + "a", b"", ttl=100)
    item = await kv.get(prefix + "a")
    assert item is not None
    assert item.ttl is not None
    assert 90 < item.ttl <= 100
    await kv.put(prefix + "a", b"")
    item = await kv.get(prefix + "a")
    assert item is not None
    assert item.ttl is None


async def test_a_tiny_ttl_is_sent_as_a_decimal_and_expires(kv: Client, prefix: str) -> None:
    await kv.put(prefix + "a", b"", ttl=0.00001)
    async with asyncio.timeout(60):
        while await kv.get(prefix + "a") is not None:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("page_size", [1, 3, 1000])
async def test_a_listing_has_all_keys_once_in_byte_order(kv: Client, prefix: str, page_size: int) -> None:
    keys = [prefix + name for name in ("", "a", "a\x00", "b", "é", "ﷺ", "😀", "~")]
    for key in keys:
        await kv.put(key, key.encode())
    listed = [item async for item in kv.list(prefix, page_size=page_size)]
    assert [item.key for item in listed] == sorted(keys, key=str.encode)
    assert {item.value for item in listed} == {None}
    assert await kv.count(prefix) == len(keys)


async def test_a_listing_with_values_has_values_versions_and_ttls(kv: Client, prefix: str) -> None:
    first = await kv.put(prefix + "a", b"\xff\x00")
    second = await kv.put(prefix + "b", b"text", ttl=100)
    a, b = [item async for item in kv.list(prefix, values=True)]
    assert (a.value, a.version, a.ttl) == (b"\xff\x00", first, None)
    assert (b.value, b.version) == (b"text", second)
    assert b.ttl is not None
    assert 90 < b.ttl <= 100


async def test_a_listing_can_be_taken_up_after_any_page(kv: Client, prefix: str) -> None:
    for n in range(5):
        await kv.put(f"{prefix}{n}", b"")
    pages = [page async for page in kv.pages(prefix, page_size=2)]
    assert pages[-1].next is None
    rest = [item.key async for page in kv.pages(prefix, page_size=2, after=pages[0].next) for item in page.items]
    assert rest == [f"{prefix}{n}" for n in range(2, 5)]


async def test_an_invented_cursor_is_refused(kv: Client) -> None:
    with pytest.raises(BadCursor):
        [page async for page in kv.pages(after="nonsense")]


async def test_a_batch_answers_in_order_and_each_operation_for_itself(kv: Client, prefix: str) -> None:
    await kv.put(prefix + "there", b"\xff")
    results = await kv.batch(
        [
            Put(prefix + "new", b"\x00\xfe", ttl=100),
            Get(prefix + "there"),
            Get(prefix + "absent"),
            Put(prefix + "x" * 2000, b""),
            Put(prefix + "large", b"x" * (MIB + 1)),
            Delete(prefix + "there"),
            Delete(prefix + "absent"),
        ]
    )
    assert [result.status for result in results] == [201, 200, 404, 400, 413, 204, 404]
    assert [type(result.error) for result in results] == [
        type(None), type(None), NotFound, KeyTooLong, ValueTooLarge, type(None), NotFound,
    ]  # fmt: skip
    assert results[1].value == b"\xff"
    item = await kv.get(prefix + "new")
    assert item is not None
    assert (item.value, item.version) == (b"\x00\xfe", results[0].version)
    assert item.ttl is not None
    assert await kv.get(prefix + "there") is None


async def test_an_empty_batch_asks_no_shard() -> None:
    async with Client("http://127.0.0.1:1") as kv:
        assert await kv.batch([]) == []


# --- transactions --------------------------------------------------------------------------------------------


async def test_a_transaction_runs_then_or_otherwise(kv: Client, prefix: str) -> None:
    a, b, c = (prefix + name for name in "abc")
    first = await kv.txn([put(a, b"\xff\x00"), put(b, b"2", ttl=100)], conditions=[if_exists(a, False)])
    assert first.succeeded
    assert first.version is not None
    assert first.results == [TxnItem(a, first.version), TxnItem(b, first.version)]
    assert await kv.get(a) == Item(b"\xff\x00", first.version)
    item = await kv.get(b)
    assert item is not None
    assert item.ttl is not None
    guards = [if_version(a, first.version), if_exists(b)]
    second = await kv.txn([delete(a), get(a), get(c)], conditions=guards, otherwise=[get(b)])
    assert second.succeeded
    assert second.results == [TxnItem(a, second.version), TxnItem(a, first.version, b"\xff\x00"), TxnItem(c)]
    third = await kv.txn([delete(a), get(a), get(c)], conditions=guards, otherwise=[get(b)])
    assert (third.succeeded, third.version) == (False, None)
    assert third.results == [TxnItem(b, first.version, b"2")]


async def test_a_transaction_is_fenced_by_a_lock_and_repeated_safely(kv: Client, prefix: str) -> None:
    a, b, lock = (prefix + name for name in ("a", "b", "lock"))
    async with kv.lock(lock) as held:
        writes = [put(a, b"1"), put(b, b"1"), put(lock, b"1")]
        first = await kv.txn(writes, conditions=[if_locked(lock, held.token)], idempotency_key="K")
        assert first.succeeded
    await kv.put(a, b"2")
    again = await kv.txn(writes, conditions=[if_locked(lock, held.token)], idempotency_key="K")
    assert again == first
    assert await kv.txn_status(first.id) == "committed"
    late = await kv.txn(writes, conditions=[if_locked(lock, held.token)])
    assert not late.succeeded
    with pytest.raises(IdempotencyKeyReused):
        await kv.txn([*writes, put(prefix + "c", b"")], conditions=[if_locked(lock, held.token)], idempotency_key="K")
    item = await kv.get(a)
    assert item is not None
    assert item.value == b"2"


async def test_what_refuses_a_transaction_is_raised(cluster: Cluster, kv: Client, prefix: str) -> None:
    with pytest.raises(BadBody, match="second time"):
        await kv.txn([put(prefix + "a", b"1"), delete(prefix + "a")])
    with pytest.raises(BadBody):
        await kv.txn([])
    with pytest.raises(ValueTooLarge):
        await kv.txn([put(prefix + "a", bytes(MIB + 1))])
    with pytest.raises(KeyEmpty):
        await kv.txn([get("")])
    with pytest.raises(BadParameter):
        await kv.txn_status("nonsense")
    assert await kv.txn_status("7-1-00000000") is None
    await kv.acquire(prefix + "lock", ttl=60)
    async with Client(cluster.url, retries=0) as once:
        with pytest.raises(Locked):
            await once.txn([put(prefix + "a", b"1"), put(prefix + "lock", b"1")])
    assert await kv.get(prefix + "a") is None


async def test_a_transaction_of_the_largest_size_goes_through(kv: Client, prefix: str) -> None:
    keys = [f"{prefix}{number}" for number in range(15)]
    result = await kv.txn([put(key, b"v" * MIB) for key in keys])
    assert {item.version for item in result.results} == {result.version}
    found = await kv.txn([get(key) for key in keys])
    assert {item.value for item in found.results} == {b"v" * MIB}


# --- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda kv: kv.put("", b""), KeyEmpty),
        (lambda kv: kv.get(""), KeyEmpty),
        (lambda kv: kv.put("x" * 1025, b""), KeyTooLong),
        (lambda kv: kv.put("é" * 513, b""), KeyTooLong),
        (lambda kv: kv.put("\ud800", b""), KeyNotUtf8),
        (lambda kv: kv.batch([Get("\ud800")]), KeyNotUtf8),
        (lambda kv: kv.put("refused", b"x" * (MIB + 1)), ValueTooLarge),
        (lambda kv: kv.put("refused", bytes(64 * MIB)), ValueTooLarge),
        (lambda kv: kv.put("refused", b"", ttl=0), BadTtl),
        (lambda kv: kv.put("refused", b"", ttl=-1), BadTtl),
        (lambda kv: kv.put("refused", b"", ttl=float("nan")), BadTtl),
        (lambda kv: kv.put("refused", b"", ttl=float("inf")), BadTtl),
        (lambda kv: kv.put("refused", b"", ttl=1e12), BadTtl),
        (lambda kv: kv.batch([Put("refused", b"", ttl=float("nan"))]), BadTtl),
        (lambda kv: kv.put("refused", "text"), TypeError),
        (lambda kv: kv.batch([Put("refused", "text")]), TypeError),  # type: ignore[arg-type]
    ],
)
async def test_a_refusal_is_the_exception_of_its_code(
    kv: Client, call: Callable[[Client], Awaitable[object]], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await call(kv)
    assert await kv.get("refused") is None


@pytest.mark.parametrize("url", ["", "127.0.0.1:8080", "ftp://h", "http://", "http://h/?q=1", "http://h/#f"])
def test_what_is_no_address_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|query"):
        Client(url)


async def test_a_client_that_is_not_open_says_how_to_open_it(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Client(cluster.url).get("a")


# --- the cluster ---------------------------------------------------------------------------------------------


async def test_the_cluster_tells_its_shards_and_the_way_of_a_key(kv: Client) -> None:
    document = await kv.cluster()
    shards = {shard["id"]: shard for shard in document["shards"]}
    assert list(shards) == ["s1", "s2", "s3", "s4"]
    assert sum(shard["partitions"] for shard in shards.values()) == document["partitions"] == 4096
    assert (await kv.explain("a"))["owner"] in shards


async def test_ready_is_true_for_a_cluster_and_false_where_no_process_listens(kv: Client) -> None:
    assert await kv.ready() is True
    async with Client("http://127.0.0.1:1") as unbound:
        assert await unbound.ready() is False


# --- connections that break ----------------------------------------------------------------------------------


class Faults:
    """A socket that reads requests and does with the n-th what `script` says: answer with bytes, or hang up (None).

    A body that is announced (Expect: 100-continue) is not asked for: the answer comes first.
    """

    def __init__(self, script: list[bytes | None]) -> None:
        self.script = script
        self.requests: list[str] = []
        self.body_bytes = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                fields = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:-1])
                if "expect" not in fields:
                    body = await reader.readexactly(int(fields.get("content-length", 0)))
                    self.body_bytes += len(body)
                self.requests.append(head.splitlines()[0])
                answer = self.script[len(self.requests) - 1]
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
                if answer is CUT_SHORT:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def answer(status: str, body: str = "", **headers: str) -> bytes:
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, f"Content-Length: {len(body)}", "", body]).encode()


def problem(error: KvError, **headers: str) -> bytes:
    body = "".join(f'"{name}":{value!r},' for name, value in error.members.items())
    return answer(
        f"{error.status} x", f'{{{body}"code":"{error.code}"}}', Content_Type="application/problem+json", **headers
    )


STORED = answer("201 Created", ETag='"7"')
FOUND = answer("200 OK", "v", ETag='"7"')
CUT_SHORT = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"
SILENCE = b""
BAD_GATEWAY = answer("502 Bad Gateway", "<html>", Content_Type="text/html")


@asynccontextmanager
async def faulty(
    *script: bytes | None, retries: int = 3, timeout_s: float = 30.0
) -> AsyncIterator[tuple[Client, Faults]]:
    faults = Faults(list(script))
    server = await asyncio.start_server(faults.serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        async with Client(f"http://127.0.0.1:{port}", retries=retries, timeout_s=timeout_s) as kv:
            yield kv, faults
    finally:
        server.close()
        await server.wait_closed()


WRITES: list[Callable[[Client], Awaitable[object]]] = [
    lambda kv: kv.put("a", b"v"),
    lambda kv: kv.delete("a"),
    lambda kv: kv.batch([Get("a"), Put("a", b"v")]),
    lambda kv: kv.txn([Get("a"), Put("a", b"v")]),
    lambda kv: kv.txn([Get("a")], otherwise=[Delete("a")], idempotency_key="K"),
]


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_whose_connection_breaks_is_sent_once_and_its_outcome_unknown(
    write: Callable[[Client], Awaitable[object]],
) -> None:
    async with faulty(None, STORED) as (kv, faults):
        with pytest.raises(OutcomeUnknown):
            await write(kv)
        assert len(faults.requests) == 1


@pytest.mark.parametrize("write", WRITES)
async def test_also_a_write_on_a_kept_connection_is_never_sent_twice(
    write: Callable[[Client], Awaitable[object]],
) -> None:
    # aiohttp's own repeat of PUT and DELETE comes into play only on a connection that has served before.
    async with faulty(FOUND, None, STORED) as (kv, faults):
        await kv.get("a")
        with pytest.raises(OutcomeUnknown):
            await write(kv)
        assert len(faults.requests) == 2


async def test_a_write_whose_answer_is_cut_short_is_unknown() -> None:
    async with faulty(CUT_SHORT, STORED) as (kv, faults):
        with pytest.raises(OutcomeUnknown):
            await kv.batch([Put("a", b"")])
        assert len(faults.requests) == 1


async def test_a_write_that_is_not_answered_in_time_is_unknown() -> None:
    async with faulty(SILENCE, STORED, timeout_s=0.2) as (kv, faults):
        with pytest.raises(OutcomeUnknown, match="too long"):
            await kv.put("a", b"v")
        assert len(faults.requests) == 1


async def test_a_read_whose_connection_breaks_is_repeated() -> None:
    async with faulty(None, None, FOUND) as (kv, faults):
        assert await kv.get("a") == Item(b"v", 7)
        assert len(faults.requests) == 3


async def test_a_read_that_never_succeeds_is_unavailable_after_bounded_repeats() -> None:
    async with faulty(None, None, None, FOUND, retries=2) as (kv, faults):
        with pytest.raises(Unavailable):
            await kv.get("a")
        assert len(faults.requests) == 3


@pytest.mark.parametrize("call", [*WRITES, lambda kv: kv.get("a")])
async def test_a_refused_connection_is_unavailable_for_nothing_was_sent(
    call: Callable[[Client], Awaitable[object]],
) -> None:
    async with Client("http://127.0.0.1:1") as kv:
        with pytest.raises(Unavailable, match="Connection refused"):
            await call(kv)


async def test_what_was_surely_not_done_is_repeated_after_the_wait_that_is_named() -> None:
    busy = problem(TooManyRequests(retry_after_ms=50))
    async with faulty(busy, busy, STORED) as (kv, faults):
        began_s = asyncio.get_running_loop().time()
        assert await kv.put("a", b"v") == 7
        assert len(faults.requests) == 3
        assert asyncio.get_running_loop().time() - began_s >= 0.1


async def test_without_retries_the_first_answer_counts() -> None:
    async with faulty(problem(Unavailable(retry_after_ms=1)), STORED, retries=0) as (kv, faults):
        with pytest.raises(Unavailable):
            await kv.put("a", b"v")
        assert len(faults.requests) == 1


async def test_a_long_wait_is_left_to_the_caller() -> None:
    async with faulty(problem(Unavailable(), Retry_After="60"), STORED) as (kv, faults):
        with pytest.raises(Unavailable) as caught:
            await kv.put("a", b"v")
        assert caught.value.members["retry_after_ms"] == 60_000
        assert len(faults.requests) == 1


async def test_an_unknown_outcome_is_never_repeated() -> None:
    async with faulty(problem(OutcomeUnknown(retry_after_ms=1)), STORED) as (kv, faults):
        with pytest.raises(OutcomeUnknown):
            await kv.put("a", b"v")
        assert len(faults.requests) == 1


async def test_a_proxys_502_says_nothing_about_a_write() -> None:
    async with faulty(BAD_GATEWAY) as (kv, _):
        with pytest.raises(OutcomeUnknown, match="502"):
            await kv.put("a", b"v")


async def test_a_large_value_is_refused_before_it_is_sent() -> None:
    refusal = problem(ValueTooLarge(), Connection="close")
    async with faulty(refusal) as (kv, faults):
        with pytest.raises(ValueTooLarge):
            await kv.put("a", bytes(8 * MIB))
        assert (len(faults.requests), faults.body_bytes) == (1, 0)


@pytest.mark.parametrize(
    ("key", "path"),
    [("..", "%2E%2E"), (".", "%2E"), ("a/../b", "a%2F..%2Fb"), ("%2e", "%252e"), ("a b?é", "a%20b%3F%C3%A9")],
)
async def test_no_key_looks_like_syntax_to_a_proxy(key: str, path: str) -> None:
    async with faulty(FOUND) as (kv, faults):
        await kv.get(key)
        assert faults.requests == [f"GET /v1/kv/{path} HTTP/1.1"]


async def test_some_other_servers_404_is_not_an_absent_key() -> None:
    async with faulty(answer("404 Not Found", "<html>", Content_Type="text/html")) as (kv, _):
        with pytest.raises(KvError, match="that is no router of kvstore"):
            await kv.get("a")


@pytest.mark.parametrize("body", ["", "[]", "<html>"])
async def test_an_answer_that_is_not_json_is_an_error_not_a_crash(body: str) -> None:
    async with faulty(answer("200 OK", body)) as (kv, _):
        with pytest.raises(KvError, match="that is no router of kvstore"):
            await kv.cluster()


async def test_a_batch_that_is_refused_whole_raises() -> None:
    async with faulty(problem(BadBody())) as (kv, _):
        with pytest.raises(BadBody):
            await kv.batch([Get("a")])
