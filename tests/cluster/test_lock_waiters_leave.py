"""Those who stop to wait for a lock, in real processes: nothing is left granted to a client that is gone.

Also behind a proxy that keeps its connection to the router open when its client has gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from kvstore.client import Client
from kvstore.errors import LockLost
from tests.cluster.calls import Calls, code, unique, until
from tests.cluster.clusters import REPOSITORY, Cluster

pytestmark = pytest.mark.timeout(120)

WAIT_S = 30.0
ROUNDS = 5


@pytest.fixture
def name() -> str:
    return unique("lock-waiters")


class Proxy:
    """Hands bytes on, a connection to the router for each client's; that stays open when the client has gone."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_router, to_router = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, to_router]
        back = asyncio.create_task(self._pump(from_router, writer))
        await self._pump(reader, to_router)
        await back

    async def _pump(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65_536):
                to.write(data)
                await to.drain()
        except OSError:
            await asyncio.gather(source.read(), return_exceptions=True)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def proxied(cluster: Cluster) -> AsyncIterator[str]:
    """The address of such a proxy."""
    proxy = Proxy(cluster.port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        proxy.close()
        server.close()


async def is_free(calls: Calls, name: str) -> bool:
    return (await calls.inspect(name)).status == 404


async def free(calls: Calls, name: str) -> None:
    """It becomes free, long before any ttl ends (60 s here)."""
    await until(lambda: is_free(calls, name), f"{name} is free")


# --- by HTTP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "half-close"])
@pytest.mark.parametrize("headers", ["", "Idempotency-Key: {name}\r\n"])
async def test_what_is_granted_while_its_waiter_leaves_is_given_back(
    cluster: Cluster, calls: Calls, name: str, headers: str, how: str
) -> None:
    for number in range(ROUNDS):
        token = await calls.granted(name)
        with socket.create_connection(("127.0.0.1", cluster.port)) as waiter:
            body = '{"ttl":60,"wait":60}'
            lines = f"Host: localhost\r\n{headers.format(name=f'{name}-{number}')}Content-Length: {len(body)}\r\n"
            waiter.sendall(f"POST /v1/locks/{name} HTTP/1.1\r\n{lines}\r\n{body}".encode())
            await calls.until_waiting(name, 1)
            waiter.shutdown(socket.SHUT_WR)
            if how == "close":
                waiter.close()
            assert (await calls.release(name, token)).status == 204
            await free(calls, name)


async def test_an_acquire_can_be_withdrawn_by_its_idempotency_key(calls: Calls, name: str) -> None:
    token = await calls.granted(name)
    waiter = asyncio.create_task(calls.acquire(name, {"wait": 60}, idempotency_key="K 1"))
    await calls.until_waiting(name, 1)
    assert (await calls.ask("DELETE", f"/v1/locks/{name}?acquire=K%201")).status == 204
    assert code(await waiter) == (412, "lock-lost")
    assert await calls.waiting(name) == 0
    assert (await calls.release(name, token)).status == 204
    granted = await calls.acquire(name, {"ttl": 60}, idempotency_key="K2")
    assert granted.status == 201
    assert (await calls.ask("DELETE", f"/v1/locks/{name}?acquire=K2")).status == 204
    assert await is_free(calls, name)
    assert code(await calls.acquire(name, {"ttl": 60}, idempotency_key="K2")) == (412, "lock-lost")


@pytest.mark.parametrize("query", ["acquire=", "acquire=%0A", "token=1", "acquire=" + "k" * 256, "acquire=a&acquire=b"])
async def test_what_names_no_acquire_withdraws_nothing(calls: Calls, name: str, query: str) -> None:
    assert code(await calls.ask("DELETE", f"/v1/locks/{name}?{query}")) == (400, "bad-parameter")


async def test_an_acquire_is_withdrawn_without_a_token_or_body(calls: Calls, name: str) -> None:
    path = f"/v1/locks/{name}?acquire=K"
    assert code(await calls.ask("DELETE", path, None, [("Lock-Token", "1")])) == (400, "bad-parameter")
    assert code(await calls.ask("DELETE", path, b"{}")) == (400, "bad-body")


# --- the client -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_proxy", [False, True])
@pytest.mark.parametrize("first", ["release", "cancel"])
async def test_a_lock_that_is_cancelled_while_its_holder_releases_is_free(
    cluster: Cluster, calls: Calls, name: str, first: str, through_proxy: bool
) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(proxied(cluster)) if through_proxy else cluster.url
        kv = await stack.enter_async_context(Client(url))
        for _ in range(ROUNDS):
            token = await calls.granted(name)
            waiter = asyncio.create_task(kv.lock(name, ttl=60, wait=60).__aenter__())
            await calls.until_waiting(name, 1)
            if first == "cancel":
                waiter.cancel()
                assert (await calls.release(name, token)).status == 204
            else:
                release = asyncio.create_task(calls.release(name, token))
                await asyncio.sleep(0.001)
                waiter.cancel()
                assert (await release).status == 204
            try:
                lock = await waiter  # it may have been granted before
            except asyncio.CancelledError:
                await free(calls, name)
            else:
                await lock.__aexit__(None, None, None)


async def test_a_plain_acquire_that_is_cancelled_leaves_nothing_either(
    cluster: Cluster, calls: Calls, name: str
) -> None:
    async with proxied(cluster) as url, Client(url) as kv:
        token = await calls.granted(name)
        waiter = asyncio.create_task(kv.acquire(name, ttl=60, wait=60))
        await calls.until_waiting(name, 1)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert await calls.waiting(name) == 0
        assert (await calls.release(name, token)).status == 204
        assert await is_free(calls, name)


async def test_with_a_key_of_its_own_the_caller_withdraws(cluster: Cluster, calls: Calls, name: str) -> None:
    async with Client(cluster.url) as kv:
        token = await kv.acquire(name, ttl=60, idempotency_key="mine")
        assert await kv.acquire(name, ttl=60, idempotency_key="mine") == token
        await kv.withdraw(name, "mine")
        assert await is_free(calls, name)
        with pytest.raises(LockLost):
            await kv.acquire(name, ttl=60, idempotency_key="mine")


# --- the command ------------------------------------------------------------------------------------------------------


def start(url: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvstore", "lock", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "KVSTORE_URL": url},
        cwd=REPOSITORY,
        start_new_session=True,
    )


@asynccontextmanager
async def command(url: str, *arguments: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    process = start(url, *arguments)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


async def ended(process: subprocess.Popen[bytes]) -> int:
    return await asyncio.to_thread(process.wait, WAIT_S)


async def test_holder_and_waiters_that_are_stopped_together_leave_the_lock_free(
    cluster: Cluster, calls: Calls, name: str
) -> None:
    sleeps = ("--ttl", "60", "--wait", "60", "--", "sleep", "60")
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(command(cluster.url, name, *sleeps))
        await until(lambda: is_held(calls, name), f"{name} is held")
        waiters = [await stack.enter_async_context(command(cluster.url, name, *sleeps)) for _ in range(2)]
        await calls.until_waiting(name, 2)
        for process in (holder, *waiters):
            process.send_signal(signal.SIGTERM)
        assert await ended(holder) == 143
        # 143: the lock was granted in between, and the command has had the signal.
        assert {await ended(waiter) for waiter in waiters} <= {-signal.SIGTERM, 143}
        await free(calls, name)


async def is_held(calls: Calls, name: str) -> bool:
    return not await is_free(calls, name)


async def test_a_signal_ends_a_waiting_command_which_leaves_the_queue_also_behind_a_proxy(
    cluster: Cluster, calls: Calls, name: str
) -> None:
    token = await calls.granted(name)
    async with proxied(cluster) as url, command(url, name, "--wait", "60", "--", "true") as waiter:
        await calls.until_waiting(name, 1)
        waiter.send_signal(signal.SIGTERM)
        assert await ended(waiter) == -signal.SIGTERM
        assert await calls.waiting(name) == 0
    assert (await calls.release(name, token)).status == 204
    assert await is_free(calls, name)


async def test_a_command_may_wait_for_more_than_a_minute(cluster: Cluster, calls: Calls, name: str) -> None:
    token = await calls.granted(name)
    async with command(cluster.url, name, "--wait", "600", "--", "sh", "-c", "exit 7") as waiter:
        await calls.until_waiting(name, 1)
        assert (await calls.release(name, token)).status == 204
        assert await ended(waiter) == 7
