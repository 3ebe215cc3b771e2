"""Locks over HTTP, through real processes: documents, statuses, bad input, the fence, fairness, waiters who leave."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from pathlib import Path

import msgspec
import pytest

from kvstore.client import Client
from kvstore.errors import Locked, LockLost
from tests.cluster.calls import Calls, calling, code, unique, until
from tests.cluster.clusters import Cluster, running, write_config

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def name() -> str:
    return unique("locks-http")


# --- documents and statuses -------------------------------------------------------------------------------------------


async def test_acquire_renew_inspect_and_release(calls: Calls, name: str):
    granted = await calls.acquire(name, {"ttl": 20, "owner": "wörker 7"})
    token = granted.json["token"]
    assert granted.status == 201
    assert granted.json == {"name": name, "token": token, "owner": "wörker 7", "ttl": 20}
    assert granted.headers["lock-token"] == str(token)
    seen = await calls.inspect(name)
    assert seen.status == 200
    left = seen.json["ttl_left"]
    assert seen.json == {"name": name, "owner": "wörker 7", "token": token, "ttl_left": left, "waiting": 0}
    assert 15 < left <= 20
    renewed = await calls.renew(name, token)
    assert (renewed.status, renewed.json) == (200, granted.json)
    released = await calls.release(name, token)
    assert (released.status, released.body) == (204, b"")
    assert code(await calls.inspect(name)) == (404, "not-found")


@pytest.mark.parametrize("body", [None, b"", b"{}", b"  \n"])
async def test_all_fields_may_be_left_out(calls: Calls, name: str, body: bytes | None):
    reply = await calls.ask("POST", f"/v1/locks/{name}", body)
    assert reply.status == 201
    assert (reply.json["owner"], reply.json["ttl"]) == ("", 30)


async def test_a_held_lock_answers_423_with_its_owner_and_when_to_come_again(calls: Calls, name: str):
    await calls.granted(name, 20, owner="me")
    began = time.monotonic()
    for reply in (await calls.acquire(name), await calls.put(name, b"v"), await calls.delete(name)):
        assert code(reply) == (423, "locked")
        assert reply.json["owner"] == "me"
        assert 10 < reply.json["ttl_left"] <= 20
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.json["retry_after_ms"] > 0
    assert time.monotonic() - began < 15


async def test_names_are_keys_of_any_kind(calls: Calls):
    for name in ("ä/ö ü?#%", "x" * 1024, "..", "a//b", "\n", "🔒"):
        path = f"/v1/locks/{name}" if name == "x" * 1024 else "/v1/locks/" + "".join(f"%{b:02X}" for b in name.encode())
        granted = await calls.ask("POST", path)
        assert (granted.status, granted.json["name"]) == (201, name)
        lines = [("Lock-Token", str(granted.json["token"]))]
        assert (await calls.ask("GET", path)).json["name"] == name
        assert (await calls.ask("DELETE", path, None, lines)).status == 204


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/locks/", (400, "key-empty")),
        ("/v1/locks/" + "x" * 1025, (400, "key-too-long")),
        ("/v1/locks/" + "%C3%A4" * 512 + "x", (400, "key-too-long")),
        ("/v1/locks/%FF", (400, "key-not-utf8")),
        ("/v1/locks/%4", (400, "key-not-utf8")),
        ("/v1/locks/x?ttl=5", (400, "bad-parameter")),
    ],
)
async def test_a_bad_name_is_refused_by_every_call(calls: Calls, path: str, expected: tuple[int, str]):
    for method in ("POST", "PUT", "DELETE", "GET"):
        assert code(await calls.ask(method, path, None, [("Lock-Token", "1")])) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"ttl":0}', "bad-ttl"),
        (b'{"ttl":-1}', "bad-ttl"),
        (b'{"ttl":0.0999}', "bad-ttl"),
        (b'{"ttl":86400.001}', "bad-ttl"),
        (b'{"ttl":86401}', "bad-ttl"),
        (b'{"ttl":1e300}', "bad-ttl"),
        (b'{"ttl":1e999}', "bad-body"),
        (b'{"ttl":NaN}', "bad-body"),
        (b'{"ttl":Infinity}', "bad-body"),
        (b'{"ttl":"NaN"}', "bad-body"),
        (b'{"ttl":"30"}', "bad-body"),
        (b'{"ttl":true}', "bad-body"),
        (b'{"ttl":null}', "bad-body"),
        (b'{"wait":61}', "bad-parameter"),
        (b'{"wait":60.001}', "bad-parameter"),
        (b'{"wait":-1}', "bad-parameter"),
        (b'{"wait":"1"}', "bad-body"),
        (b'{"owner":7}', "bad-body"),
        (b'{"owner":null}', "bad-body"),
        (b'{"owner":"%s"}' % (b"x" * 257), "bad-parameter"),
        (b'{"owner":"%s"}' % ("ä" * 129).encode(), "bad-parameter"),
        (b'{"owner":"\\ud800"}', "bad-body"),
        (b'{"owner":"\xff"}', "bad-body"),
        (b'{"tll":30}', "bad-body"),
        (b'{"ttl":30,"token":1}', "bad-body"),
        (b"[]", "bad-body"),
        (b"null", "bad-body"),
        (b"ttl=30", "bad-body"),
        (b'{"ttl":30', "bad-body"),
        (b'{"ttl":30}{}', "bad-body"),
        (b"[" * 4000, "bad-body"),
    ],
)
async def test_a_bad_body_is_refused_and_nothing_is_granted(calls: Calls, name: str, body: bytes, expected: str):
    assert code(await calls.ask("POST", f"/v1/locks/{name}", body)) == (400, expected)
    assert (await calls.inspect(name)).status == 404


async def test_the_limits_themselves_are_taken(calls: Calls, name: str):
    for number, body in enumerate(({"ttl": 0.1}, {"ttl": 86400}, {"wait": 60}, {"owner": "ä" * 128})):
        assert (await calls.acquire(f"{name}/{number}", body)).status == 201


async def test_a_body_beyond_all_fields_is_413(calls: Calls, name: str):
    reply = await calls.ask("POST", f"/v1/locks/{name}", b'{"ttl":30}' + b" " * 5000)
    assert code(reply) == (413, "body-too-large")


@pytest.mark.parametrize("token", [None, "", "abc", "-1", "1.0", "1e3", '"1"', "1, 1", str(2**53), "9" * 400, "0x10"])
async def test_what_is_no_token_is_refused_by_every_call(calls: Calls, name: str, token: str | None):
    held = await calls.granted(name)
    for reply in (await calls.renew(name, token), await calls.release(name, token)):
        assert code(reply) == (400, "bad-parameter")
    if token is not None:
        for reply in (await calls.put(name, b"v", lock_token=token), await calls.delete(name, lock_token=token)):
            assert code(reply) == (400, "bad-parameter")
    assert (await calls.get(name)).status == 404
    assert (await calls.release(name, held)).status == 204


async def test_a_token_given_twice_is_refused(calls: Calls, name: str):
    token = str(await calls.granted(name))
    reply = await calls.ask("PUT", f"/v1/locks/{name}", None, [("Lock-Token", token), ("Lock-Token", token)])
    assert reply.status == 400
    assert (await calls.inspect(name)).status == 200


async def test_renewing_and_releasing_take_no_body(calls: Calls, name: str):
    token = str(await calls.granted(name))
    for method in ("PUT", "DELETE"):
        reply = await calls.ask(method, f"/v1/locks/{name}", b'{"ttl":5}', [("Lock-Token", token)])
        assert code(reply) == (400, "bad-body")
    assert (await calls.inspect(name)).json["ttl_left"] > 30


async def test_other_methods_are_405_and_say_which_there_are(calls: Calls, name: str):
    for path, method, allowed in (
        (f"/v1/locks/{name}", "PATCH", {"GET", "HEAD", "POST", "PUT", "DELETE"}),
        ("/v1/locks", "POST", {"GET", "HEAD"}),
    ):
        reply = await calls.ask(method, path)
        assert code(reply) == (405, "method-not-allowed")
        assert set(reply.headers["allow"].split(", ")) == allowed


async def test_head_tells_whether_it_is_held(calls: Calls, name: str):
    assert (await calls.ask("HEAD", f"/v1/locks/{name}")).status == 404
    await calls.granted(name)
    reply = await calls.ask("HEAD", f"/v1/locks/{name}")
    assert (reply.status, reply.body) == (200, b"")


async def test_a_stranger_can_neither_release_nor_renew(calls: Calls, name: str):
    token = await calls.granted(name)
    for stranger in (0, token - 1, token + 1, 2**53 - 1):
        assert code(await calls.release(name, stranger)) == (412, "lock-lost")
        assert code(await calls.renew(name, stranger)) == (412, "lock-lost")
    assert (await calls.inspect(name)).json["token"] == token
    assert (await calls.release(name, token)).status == 204
    assert code(await calls.release(name, token)) == (412, "lock-lost")
    assert code(await calls.renew(name, token)) == (412, "lock-lost")


async def test_the_locks_that_are_held_are_listed_over_all_shards(calls: Calls):
    prefix = unique("list")
    names = sorted(f"{prefix}/{number:02}" for number in range(25))
    tokens = {each: await calls.granted(each, owner=f"of {each}") for each in names}
    await calls.release(names[3], tokens.pop(names[3]))
    seen, cursor = [], ""
    while cursor is not None:
        page = await calls.ask("GET", f"/v1/locks?prefix={prefix}&limit=7" + (f"&after={cursor}" if cursor else ""))
        assert page.status == 200
        seen += page.json["items"]
        assert len(page.json["items"]) <= 7
        cursor = page.json["next"]
    assert [(item["name"], item["token"], item["owner"]) for item in seen] == [
        (each, token, f"of {each}") for each, token in tokens.items()
    ]
    assert all(30 < item["ttl_left"] <= 60 for item in seen)
    for query in ("limit=0", "limit=10001", "values=true", "after=x", "prefix=a&prefix=b", "waiting=1"):
        assert (await calls.ask("GET", f"/v1/locks?{query}")).status == 400


# --- the fence --------------------------------------------------------------------------------------------------------


async def test_a_leased_key_is_written_with_its_token_only_and_read_by_all(calls: Calls, name: str):
    await calls.put(name, b"before")
    token = await calls.granted(name, owner="me")
    assert code(await calls.put(name, b"x")) == (423, "locked")
    assert code(await calls.delete(name)) == (423, "locked")
    assert (await calls.get(name)).body == b"before"
    assert (await calls.ask("HEAD", f"/v1/kv/{name}")).status == 200
    assert (await calls.put(name, b"mine", lock_token=token)).status == 204
    assert (await calls.get(name)).body == b"mine"
    assert (await calls.delete(name, lock_token=token)).status == 204
    await calls.release(name, token)
    assert (await calls.put(name, b"free")).status == 201


async def test_a_token_that_is_no_longer_the_holders_is_refused_however_late(calls: Calls, name: str):
    old = await calls.granted(name)
    await calls.release(name, old)
    other = await calls.granted(unique("another lock"))
    for token in (old, other, 0):
        assert code(await calls.put(name, b"late", lock_token=token)) == (412, "lock-lost")  # the lock is free
    new = await calls.granted(name)
    assert new > old
    for token in {old, other, new + 1} - {new}:  # tokens of different locks may be equal
        assert code(await calls.put(name, b"late", lock_token=token)) == (412, "lock-lost")
        assert code(await calls.delete(name, lock_token=token)) == (412, "lock-lost")
    assert (await calls.get(name)).status == 404


async def test_in_a_batch_the_write_to_a_leased_key_fails_alone(calls: Calls, name: str):
    await calls.put(name, b"before")
    await calls.granted(name, owner="me")
    ops = [
        {"op": "put", "key": f"{name}/other", "value": "1"},
        {"op": "put", "key": name, "value": "2"},
        {"op": "delete", "key": name},
        {"op": "get", "key": name},
    ]
    reply = await calls.ask("POST", "/v1/batch", msgspec.json.encode({"ops": ops}))
    results = reply.json["results"]
    assert [result["status"] for result in results] == [201, 423, 423, 200]
    assert [result.get("code") for result in results] == [None, "locked", "locked", None]
    assert results[3]["value"] == "before"
    for header in ("Lock-Token", "If-Match", "Idempotency-Key"):
        refused = await calls.ask("POST", "/v1/batch", msgspec.json.encode({"ops": ops}), [(header, "1")])
        assert refused.status == 400


async def test_a_lease_is_gone_half_a_second_after_its_ttl_at_most(calls: Calls, name: str):
    began = time.monotonic()
    first = await calls.granted(name, 0.5)
    waiter = asyncio.create_task(calls.acquire(name, {"wait": 30}))
    second = (await waiter).json["token"]
    took = time.monotonic() - began
    assert second > first
    assert 0.5 <= took < 25  # well before it has waited for long enough
    assert code(await calls.put(name, b"late", lock_token=first)) == (412, "lock-lost")


async def test_a_short_lease_after_a_long_one_ends_in_its_own_time(calls: Calls, name: str):
    await calls.release(name, await calls.granted(name, 3600))
    await calls.granted(name, 0.3)
    async with asyncio.timeout(60):
        assert (await calls.acquire(name, {"wait": 30})).status == 201


# --- waiting ----------------------------------------------------------------------------------------------------------


async def test_a_waiter_whose_time_is_over_is_answered_423(calls: Calls, name: str):
    await calls.granted(name, owner="me")
    began = time.monotonic()
    reply = await calls.acquire(name, {"wait": 0.5})
    assert code(reply) == (423, "locked")
    assert reply.json["owner"] == "me"
    assert 0.5 <= time.monotonic() - began < 15
    assert await calls.waiting(name) == 0


async def test_a_holders_calls_do_not_wait_behind_those_who_wait_for_its_lease(calls: Calls, name: str):
    token = await calls.granted(name)
    waiters = [asyncio.create_task(calls.acquire(name, {"wait": 60})) for _ in range(5)]
    await calls.until_waiting(name, 5)
    async with asyncio.timeout(40):
        assert (await calls.put(name, b"v", lock_token=token)).status == 201
        assert (await calls.renew(name, token)).status == 200
        assert (await calls.get(name)).body == b"v"
        assert (await calls.release(name, token)).status == 204
        for _ in waiters:
            (done,), waiters = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
            assert (await calls.release(name, done.result().json["token"])).status == 204


async def test_a_hundred_waiters_are_served_in_order_of_arrival(calls: Calls, name: str):
    holder = await calls.granted(name)
    waiters = []
    for count in range(1, 101):
        waiters.append(asyncio.create_task(calls.acquire(name, {"wait": 60, "owner": str(count)})))
        await calls.until_waiting(name, count)
    served = []
    while waiters:
        assert (await calls.release(name, holder)).status == 204
        (done,), rest = await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        waiters = list(rest)
        served.append(int(done.result().json["owner"]))
        assert done.result().json["token"] > holder
        holder = done.result().json["token"]
    assert served == list(range(1, 101))


class RawWaiter:
    """A waiter on a socket of its own, which can go away in two ways."""

    def __init__(self, cluster: Cluster, name: str, headers: str = "") -> None:
        self._socket = socket.create_connection(("127.0.0.1", cluster.port))
        body = '{"ttl":60,"wait":60}'
        self._socket.sendall(
            f"POST /v1/locks/{name} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
            f"{body}".encode()
        )

    def go(self, how: str) -> None:
        if how == "reset":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("headers", ["", "Idempotency-Key: {name}\r\n"])
async def test_a_waiter_that_goes_away_leaves_the_queue(
    cluster: Cluster, calls: Calls, name: str, how: str, headers: str
):
    token = await calls.granted(name)
    waiter = RawWaiter(cluster, name, headers.format(name=name))
    await calls.until_waiting(name, 1)
    stays = asyncio.create_task(calls.acquire(name, {"wait": 60}))
    await calls.until_waiting(name, 2)
    waiter.go(how)
    await calls.until_waiting(name, 1)
    await calls.release(name, token)
    assert (await stays).status == 201


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_what_was_granted_to_a_waiter_that_had_gone_is_given_back(
    cluster: Cluster, calls: Calls, name: str, how: str
):
    """The release comes right behind the going: the shard does not know yet that the waiter is gone."""
    for _ in range(5):
        token = await calls.granted(name)
        waiter = RawWaiter(cluster, name)
        await calls.until_waiting(name, 1)
        waiter.go(how)
        assert (await calls.release(name, token)).status == 204
        await until(lambda: is_free(calls, name), f"{name} is free again")


async def is_free(calls: Calls, name: str) -> bool:
    return (await calls.inspect(name)).status == 404


async def test_those_who_wait_for_a_lock_do_not_keep_others_from_being_served(tmp_path: Path):
    config = write_config(tmp_path, shards=1, limits={"requests_in_flight_max": 5, "lock_waiters_max": 8})
    with running(config) as own:
        async with calling(own.url) as calls:
            token = await calls.granted("k")
            waiters = [asyncio.create_task(calls.acquire("k", {"wait": 60})) for _ in range(8)]
            await calls.until_waiting("k", 8)
            assert (await calls.put("other", b"v")).status == 201
            assert (await calls.get("other")).status == 200
            assert code(await calls.acquire("k", {"wait": 60})) == (429, "too-many-requests")
            assert code(await calls.acquire("k")) == (423, "locked")
            assert (await calls.release("k", token)).status == 204
            for waiter in waiters:
                waiter.cancel()
            await asyncio.gather(*waiters, return_exceptions=True)


# --- the client -------------------------------------------------------------------------------------------------------


async def test_a_held_lock_renews_itself_past_its_ttl(cluster: Cluster, name: str):
    async with Client(cluster.url) as kv:
        async with kv.lock(name, ttl=4.0, owner="me") as lock:
            began = time.monotonic()
            while time.monotonic() - began < 4.5:
                await kv.put(name, b"still mine", token=lock.token)
                holder = await kv.holder(name)
                assert holder is not None
                assert (holder.token, holder.owner) == (lock.token, "me")
                await asyncio.sleep(0.1)
            with pytest.raises(Locked):
                async with kv.lock(name):
                    pytest.fail("two at once")
        assert await kv.holder(name) is None


async def test_a_block_is_cancelled_when_its_lease_is_ended_behind_its_back(cluster: Cluster, name: str):
    async def hold(kv: Client) -> None:
        async with kv.lock(name, ttl=1.0) as lock:
            await kv.release(name, lock.token)
            await asyncio.Event().wait()

    async with Client(cluster.url) as kv:
        with pytest.raises(LockLost):
            await asyncio.wait_for(hold(kv), 20)


async def test_no_two_tasks_are_ever_inside_the_same_lock(cluster: Cluster, name: str):
    inside: list[int] = []
    tokens: list[int] = []

    async def worker(kv: Client, number: int) -> None:
        for _ in range(3):
            async with kv.lock(name, ttl=10, wait=60) as lock:
                inside.append(number)
                item = await kv.get(name)
                await asyncio.sleep(0.005)
                assert inside == [number]
                await kv.put(name, b"%d" % (int(item.value if item else b"0") + 1), token=lock.token)
                tokens.append(lock.token)
                inside.remove(number)

    async with Client(cluster.url) as kv, Client(cluster.url) as other:
        await asyncio.gather(*(worker(kv if number % 2 else other, number) for number in range(10)))
        item = await kv.get(name)
        assert item is not None
        assert item.value == b"30"
    assert tokens == sorted(set(tokens))


async def test_the_holders_are_listed_page_by_page(cluster: Cluster, name: str):
    async with Client(cluster.url) as kv:
        names = sorted(f"{name}/{number}" for number in range(7))
        tokens = [await kv.acquire(each, owner=each) for each in names]
        holders = [holder async for holder in kv.holders(f"{name}/", page_size=3)]
        assert [(holder.name, holder.token, holder.owner) for holder in holders] == list(
            zip(names, tokens, names, strict=True)
        )


async def test_the_waiters_of_a_client_do_not_stand_before_its_holder(cluster: Cluster, name: str):
    """However few connections a client has: those who wait do not keep the holder from renewing, writing, releasing."""
    tokens: list[int] = []

    async def worker(kv: Client) -> None:
        async with kv.lock(name, ttl=5, wait=60) as lock:
            await kv.put(name, b"v", token=lock.token)
            tokens.append(lock.token)

    async with Client(cluster.url, connections_max=2) as kv:
        await asyncio.wait_for(asyncio.gather(*(worker(kv) for _ in range(10))), 30)
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 10
