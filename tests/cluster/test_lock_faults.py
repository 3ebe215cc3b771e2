"""Locks and compare-and-set while processes are killed and stopped: no increment lost, never two who can write."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from kvstore.client import Client
from kvstore.errors import KvError, LockLost, OutcomeUnknown, PreconditionFailed
from tests.cluster.actions import kill_and_wait, stopped
from tests.cluster.calls import Calls, calling, code, unique, until
from tests.cluster.clusters import REPOSITORY, Cluster, running, write_config

pytestmark = pytest.mark.timeout(120)

CLIENTS = 32
KILLS = 3


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two shards that the tests of this file may kill."""
    with running(write_config(tmp_path_factory.mktemp("lock-faults"), shards=2)) as cluster:
        yield cluster


@pytest.fixture
async def calls(own: Cluster) -> AsyncIterator[Calls]:
    async with calling(own.url) as calls:
        yield calls


@pytest.fixture
def name() -> str:
    return unique("faults")


async def owner(calls: Calls, key: str) -> str:
    """The process that owns the key, as pid files name it."""
    return f"shard-{(await calls.ask('GET', f'/v1/explain/{key}')).json['owner']}"


# --- compare-and-set --------------------------------------------------------------------------------------------------


class Tally:
    """What the clients know of their increments."""

    def __init__(self) -> None:
        self.acknowledged = 0
        self.unknown = 0
        self.stop = False


async def settle(kv: Client, key: str, value: bytes, version: int | None, once: str, tally: Tally) -> bool:
    """Whether this compare-and-set was done, asked with its Idempotency-Key until that is known."""
    first = True
    while True:
        try:
            await kv.put(key, value, if_version=version, if_absent=version is None, idempotency_key=once)
            return True
        except PreconditionFailed:
            return False
        except OutcomeUnknown:
            tally.unknown += first
            first = False
        except KvError as error:
            if not error.retryable:
                raise
        await asyncio.sleep(0.05)


async def count_up(kv: Client, key: str, tally: Tally) -> None:
    while not tally.stop:
        try:
            item = await kv.get(key)
        except KvError as error:
            if not error.retryable:
                raise
            await asyncio.sleep(0.05)
            continue
        value = b"%d" % (int(item.value if item else b"0") + 1)
        version = None if item is None else item.version
        if await settle(kv, key, value, version, unique("increment"), tally):
            tally.acknowledged += 1


async def test_every_acknowledged_increment_counts_once_while_the_shard_is_killed_again_and_again(
    own: Cluster, calls: Calls, name: str
):
    shard = await owner(calls, name)
    tally = Tally()
    async with Client(own.url, connections_max=CLIENTS, retries=0) as kv:
        clients = [asyncio.create_task(count_up(kv, name, tally)) for _ in range(CLIENTS)]
        for _ in range(KILLS):
            before = tally.acknowledged
            await until(lambda b=before: _more_than(tally, b + 20), "the clients count on")
            await asyncio.to_thread(kill_and_wait, own, shard)
        before = tally.acknowledged
        await until(lambda: _more_than(tally, before + 20), "the clients count on")
        tally.stop = True
        await asyncio.wait_for(asyncio.gather(*clients), 60)
        item = await kv.get(name)
    assert item is not None
    assert int(item.value) == tally.acknowledged
    assert tally.unknown > 0, "no kill hit a write: this showed nothing"


async def _more_than(tally: Tally, count: int) -> bool:
    return tally.acknowledged > count


# --- holders that stand still -----------------------------------------------------------------------------------------

WORKER = """
import asyncio, sys
from kvstore.client import Client
from kvstore.errors import KvError

async def main(url, name):
    async with Client(url) as kv:
        token = await kv.acquire(name, ttl=1.0, owner="worker")
        print(token, flush=True)
        sys.stdin.readline()              # the critical section: it looked, and goes on to write
        try:
            await kv.put(name, b"late", token=token)
            print("written", flush=True)
        except KvError as error:
            print(error.status, error.code, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""

HOLDER = """
import asyncio, sys
from kvstore.client import Client
from kvstore.errors import KvError, LockLost

async def main(url, name):
    async with Client(url) as kv:
        try:
            async with kv.lock(name, ttl=1.0) as lock:
                print(lock.token, flush=True)
                number = 0
                while True:
                    number += 1
                    await kv.put(name, b"%d" % number, token=lock.token)
                    await asyncio.sleep(0.01)
        except LockLost as error:
            print(error.status, error.code, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def worker(script: str, cluster: Cluster, name: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, cluster.url, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), 30)).strip()


async def test_the_late_write_of_a_worker_that_was_paused_longer_than_its_lease_is_refused(
    own: Cluster, calls: Calls, name: str
):
    with worker(WORKER, own, name) as process:
        paused = int(await line(process))
        with stopped(process.pid):
            token = await calls.granted(name, 60, wait=30)
            assert token > paused
            assert (await calls.put(name, b"mine", lock_token=token)).status == 201
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert await line(process) == "412 lock-lost"
        assert (await calls.get(name)).body == b"mine"
        await calls.release(name, token)
        for stale in (paused, token):
            assert code(await calls.put(name, b"later still", lock_token=stale)) == (412, "lock-lost")


async def test_a_block_under_a_lock_ends_after_a_pause_longer_than_its_lease(own: Cluster, calls: Calls, name: str):
    with worker(HOLDER, own, name) as process:
        paused = int(await line(process))
        with stopped(process.pid):
            token = await calls.granted(name, 60, wait=30)
            assert token > paused
            assert (await calls.put(name, b"mine", lock_token=token)).status in (201, 204)
        assert await line(process) == "412 lock-lost"
        await asyncio.to_thread(process.wait, 30)
        assert (await calls.get(name)).body == b"mine"


async def test_after_a_pause_of_the_shard_longer_than_the_lease_no_two_holders_can_both_write(
    own: Cluster, calls: Calls, name: str
):
    """Its holder's write, its renewal and the next one's acquire all lie before the shard when it goes on."""
    first = await calls.granted(name, 1.0)
    waiter = asyncio.create_task(calls.acquire(name, {"ttl": 60, "wait": 60}))
    await calls.until_waiting(name, 1)
    with stopped(own.pid(await owner(calls, name))):
        late = [
            asyncio.create_task(calls.put(name, b"late", lock_token=first)),
            asyncio.create_task(calls.renew(name, first)),
        ]
        await asyncio.sleep(2.0)
    second = (await waiter).json["token"]
    assert second > first
    assert [code(reply) for reply in await asyncio.gather(*late)] == [(412, "lock-lost")] * 2
    assert (await calls.put(name, b"mine", lock_token=second)).status == 201
    assert code(await calls.put(name, b"late", lock_token=first)) == (412, "lock-lost")
    assert (await calls.get(name)).body == b"mine"


async def test_a_pause_of_the_shard_shorter_than_the_lease_costs_no_client_anything(
    own: Cluster, calls: Calls, name: str
):
    token = await calls.granted(name, 20)
    with stopped(own.pid(await owner(calls, name))):
        renewal = asyncio.create_task(calls.renew(name, token))
        await asyncio.sleep(0.5)
    assert (await renewal).status == 200
    assert (await calls.put(name, b"mine", lock_token=token)).status == 201


# --- a shard that dies ------------------------------------------------------------------------------------------------


async def lease_row(cluster: Cluster, shard: str, name: str) -> tuple[int, bool] | None:
    """Version of the lease's row in the file, and whether it is a tombstone."""
    with closing(sqlite3.connect(f"file:{cluster.data_dir / f'{shard}.db'}?mode=ro", uri=True)) as file:
        query = "SELECT version, body IS NULL FROM rows WHERE kind = 'lease' AND key = ?"
        return file.execute(query, (name,)).fetchone()


async def is_gone(cluster: Cluster, shard: str, name: str, token: int) -> bool:
    """A tombstone, or less: what came and went between two applications never touches the file."""
    version, deleted = await lease_row(cluster, shard, name) or (token + 1, True)
    return deleted and version > token


async def test_a_lease_survives_kill_9_with_its_token_and_all_of_its_time(own: Cluster, calls: Calls, name: str):
    shard = await owner(calls, name)
    asked_s = time.monotonic()
    token = await calls.granted(name, 6.0, owner="me")

    async def is_in_the_file() -> bool:
        return await lease_row(own, shard, name) == (token, False)

    await until(is_in_the_file, "the file has followed the log")
    await asyncio.sleep(1.5)
    await asyncio.to_thread(kill_and_wait, own, shard)
    await until(lambda: answers(calls, name), "the shard answers again")
    held = (await calls.inspect(name)).json
    assert (held["token"], held["owner"]) == (token, "me")
    assert 6.0 - (time.monotonic() - asked_s) + 1.4 < held["ttl_left"] <= 6.0
    assert (await calls.put(name, b"mine", lock_token=token)).status == 201
    assert code(await calls.put(name, b"not mine")) == (423, "locked")
    ended = asyncio.create_task(calls.acquire(name, {"wait": 30}))  # it is not renewed: it ends by itself
    assert (await ended).json["token"] > token
    assert code(await calls.put(name, b"late", lock_token=token)) == (412, "lock-lost")


async def answers(calls: Calls, name: str) -> bool:
    return (await calls.inspect(name)).status in (200, 404)


async def test_tokens_rise_across_kill_9_also_when_nothing_is_left_of_the_lease(own: Cluster, calls: Calls, name: str):
    shard = await owner(calls, name)
    tokens = []
    for _ in range(2):
        tokens.append(await calls.granted(name, 60))
        await calls.release(name, tokens[-1])
        await until(lambda: is_gone(own, shard, name, tokens[-1]), "nothing is left of the lease in the file")
        await asyncio.to_thread(kill_and_wait, own, shard)
        await until(lambda: answers(calls, name), "the shard answers again")
        assert code(await calls.put(name, b"late", lock_token=tokens[-1])) == (412, "lock-lost")
    tokens.append(await calls.granted(name, 60))
    assert tokens == sorted(set(tokens))


async def test_a_waiter_whose_shard_died_learns_that_and_can_ask_again(own: Cluster, calls: Calls, name: str):
    token = await calls.granted(name, 60)
    body = {"ttl": 60, "wait": 60}
    waiters = [asyncio.create_task(calls.acquire(name, body, idempotency_key=f"K{number}")) for number in range(3)]
    await calls.until_waiting(name, 3)
    await asyncio.to_thread(kill_and_wait, own, await owner(calls, name))
    for reply in await asyncio.gather(*waiters):
        assert code(reply) in ((504, "outcome-unknown"), (503, "unavailable"))
    await until(lambda: answers(calls, name), "the shard answers again")
    assert await calls.waiting(name) == 0
    again = asyncio.create_task(calls.acquire(name, body, idempotency_key="K0"))
    await calls.until_waiting(name, 1)
    assert (await calls.release(name, token)).status == 204
    assert (await again).json["token"] > token


async def test_waiters_of_a_router_that_died_are_granted_nothing(own: Cluster, calls: Calls, name: str):
    token = await calls.granted(name, 60)
    waiters = [asyncio.create_task(calls.acquire(name, {"ttl": 60, "wait": 60})) for _ in range(3)]
    await calls.until_waiting(name, 3)
    await asyncio.to_thread(kill_and_wait, own, "router-0")
    for result in await asyncio.gather(*waiters, return_exceptions=True):
        assert isinstance(result, Exception)
    async with calling(own.url) as again:
        await until(lambda: listens(again, name), "the router is back")
        assert (await again.release(name, token)).status == 204
        assert (await again.acquire(name)).status == 201


async def listens(calls: Calls, name: str) -> bool:
    try:
        return await answers(calls, name)
    except OSError:
        return False


async def test_a_held_lock_outlives_the_death_of_its_shard(own: Cluster, calls: Calls, name: str):
    shard = await owner(calls, name)
    async with Client(own.url) as kv, kv.lock(name, ttl=30.0) as lock:
        await asyncio.to_thread(kill_and_wait, own, shard)
        await until(lambda: answers(calls, name), "the shard answers again")
        await kv.put(name, b"mine", token=lock.token)
        assert not lock.lost


async def test_a_block_is_cancelled_by_its_ttl_when_the_shard_stands_still(own: Cluster, calls: Calls, name: str):
    shard = await owner(calls, name)

    async def hold(kv: Client) -> None:
        async with kv.lock(name, ttl=1.0):
            with stopped(own.pid(shard)):
                await asyncio.sleep(20)

    async with Client(own.url) as kv:
        began = time.monotonic()
        with pytest.raises(LockLost):
            await hold(kv)
        assert time.monotonic() - began < 10


async def test_a_cluster_with_waiters_stops_cleanly_in_time(tmp_path: Path):
    config = write_config(tmp_path, shards=1)
    with running(config) as cluster:
        async with calling(cluster.url) as calls:
            await calls.granted("k")
            waiters = [asyncio.create_task(calls.acquire("k", {"wait": 60})) for _ in range(3)]
            await calls.until_waiting("k", 3)
            began = time.monotonic()
            os.kill(cluster.up.pid, signal.SIGTERM)
            assert await asyncio.to_thread(cluster.up.wait, 30) == 0
            assert time.monotonic() - began < 10
            await asyncio.gather(*waiters, return_exceptions=True)
    assert "Traceback" not in cluster.log
