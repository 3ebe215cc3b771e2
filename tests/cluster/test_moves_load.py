"""Shards come and go under a mixed load: four become five, six, and three. No client notices.

Every user here calls without any repetition, so a call that fails because something moves is seen, and fails the test.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.client import Client, Delete, Get, Put
from kvstore.errors import KvError, Locked
from kvstore.txn import get, if_version, put
from tests.cluster.clusters import Cluster, running, write_config

pytestmark = pytest.mark.timeout(280)

STILL = {f"still/{number:04}": b"%d" % number * 20 for number in range(3000)}
ACCOUNTS = [f"bank/{number:02}" for number in range(30)]
BALANCE = 100
COUNTERS = ["counter/a", "counter/b"]
LOCKS = ["lock/a", "lock/b", "lock/c"]
LONG_HELD = [f"long/{number}" for number in range(12)]
CHANGE_TIMEOUT_S = 90.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(write_config(tmp_path, shards=4)) as cluster:
        yield cluster


class Users:
    """All who use the cluster. `calls` counts what was done, by kind; `failed` are the calls that were not."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.calls: Counter[str] = Counter()
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self.counted: Counter[str] = Counter()
        self.tokens: dict[str, int] = {}
        self.own: dict[str, tuple[bytes, int]] = {}  # of the writers' keys: value and version
        self._answered: list[tuple[str, str, int]] = []  # writes that carried an Idempotency-Key
        self._chance = random.Random(11)
        self._tasks: list[asyncio.Task[None]] = []

    def all(self) -> list[Callable[[int], Awaitable[None]]]:
        kinds = (self.write, 6), (self.repeat, 2), (self.batch, 2), (self.count_up, 4), (self.transfer, 3)
        others = (
            (self.read_bank, 2),
            (self.lock, 6),
            (self.list_still, 3),
            (self.count_still, 1),
            (self.list_locks, 1),
            (self.read, 3),
        )
        return [kind for kind, number in (*kinds, *others) for _ in range(number)]

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._repeat(user, number)) for number, user in enumerate(self.all())]

    async def stop(self) -> None:
        """Let all finish what they do."""
        tasks, self._tasks = self._tasks, []
        await asyncio.gather(*tasks)

    async def _repeat(self, user: Callable[[int], Awaitable[None]], number: int) -> None:
        while self._tasks:
            try:
                await user(number)
                self.calls[user.__name__] += 1
            except KvError as error:
                self.failed.append(f"{user.__name__}: {type(error).__name__}: {error} {error.members}")
            await asyncio.sleep(self._chance.uniform(0, 0.02))

    def expect(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.wrong.append(sentence)

    # --- keys

    async def write(self, number: int) -> None:
        """Only this user writes its keys: versions rise, and what was written is read."""
        key = f"own/{number}/{self._chance.randrange(60)}"
        value = self._chance.randbytes(100)
        before = self.own.pop(key, None)
        version = await self.client.put(key, value, if_version=before and before[1], if_absent=before is None)
        self.expect(before is None or version > before[1], f"{key}: version {version} after {before and before[1]}")
        self.own[key] = value, version
        item = await self.client.get(key)
        self.expect(item is not None and (item.value, item.version) == (value, version), f"{key} reads {item}")
        if self._chance.random() < 0.2:
            del self.own[key]
            self.expect(await self.client.delete(key), f"{key} was not there to be deleted")
            self.expect(await self.client.get(key) is None, f"{key} is there after it was deleted")

    async def repeat(self, _: int) -> None:
        """A write that is repeated with its Idempotency-Key, however much later, is answered as at first."""
        if self._answered and self._chance.random() < 0.5:
            key, once, version = self._chance.choice(self._answered)
            again = await self.client.put(key, once.encode(), idempotency_key=once)
            self.expect(again == version, f"{key}: a repeated write has version {again}, at first {version}")
        else:
            key, once = f"once/{self._chance.randrange(300)}", str(uuid.uuid4())
            version = await self.client.put(key, once.encode(), idempotency_key=once)
            self._answered.append((key, once, version))

    async def batch(self, number: int) -> None:
        """The last of several writes to one key counts, whatever moves in between."""
        keys = [f"batch/{number}/{self._chance.randrange(100)}" for _ in range(20)]
        puts = [Put(key, b"%d" % turn) for turn in range(5) for key in keys]
        for results in (await self.client.batch(puts), await self.client.batch([Get(key) for key in keys])):
            self.failed += [f"batch: {result.error}" for result in results if result.error is not None]
        self.expect(all(result.value == b"4" for result in results), f"a batch found {results}")
        self.failed += [f"batch: {r.error}" for r in await self.client.batch([Delete(k) for k in set(keys)]) if r.error]

    async def read(self, _: int) -> None:
        key = self._chance.choice(list(STILL))
        item = await self.client.get(key)
        self.expect(item is not None and item.value == STILL[key], f"{key} reads {item}")

    async def count_up(self, _: int) -> None:
        key = self._chance.choice(COUNTERS)
        await self.client.update(key, lambda value: b"%d" % (int(value or b"0") + 1), tries_max=1000)
        self.counted[key] += 1

    # --- transactions

    async def transfer(self, _: int) -> None:
        source, target = self._chance.sample(ACCOUNTS, 2)
        found = (await self.client.txn([get(source), get(target)])).results
        balances = [int(item.value or b"0") for item in found]
        conditions = [if_version(item.key, item.version or 0) for item in found]
        then = [put(source, b"%d" % (balances[0] - 1)), put(target, b"%d" % (balances[1] + 1))]
        await self.client.txn(then, conditions=conditions, otherwise=[get(source)])

    async def read_bank(self, _: int) -> None:
        self.expect(await self.total() == BALANCE * len(ACCOUNTS), "the bank's total has changed")

    async def total(self) -> int:
        results = (await self.client.txn([get(account) for account in ACCOUNTS])).results
        return sum(int(item.value or b"0") for item in results)

    # --- locks

    async def lock(self, number: int) -> None:
        """Many want few locks, so most of them wait."""
        name = self._chance.choice(LOCKS)
        token = await self.client.acquire(name, ttl=20, wait=50, owner=str(number))
        self.expect(token > self.tokens.get(name, 0), f"{name}: token {token} after {self.tokens.get(name)}")
        self.tokens[name] = token
        await self.client.put(name, b"%d" % token, token=token)
        holder = await self.client.holder(name)
        self.expect(holder is not None and holder.token == token, f"{name} is held by {holder}, not with {token}")
        item = await self.client.get(name)
        self.expect(item is not None and item.value == b"%d" % token, f"{name} reads {item}")
        await self.client.release(name, token)

    async def list_locks(self, _: int) -> None:
        names = [holder.name async for holder in self.client.holders("long/", page_size=5)]
        self.expect(names == sorted(LONG_HELD), f"the locks that are held all the time are listed as {names}")

    # --- listings

    async def list_still(self, _: int) -> None:
        size = self._chance.choice([100, 400, 5000])
        items = [(item.key, item.value) async for item in self.client.list("still/", values=True, page_size=size)]
        keys = [key for key, _ in items]
        twice = [key for key, after in itertools.pairwise(keys) if key >= after]
        self.expect(not twice, f"listed twice or out of order: {twice[:3]}")
        missing = sorted(STILL.keys() - set(keys))
        self.expect(not missing, f"{len(missing)} keys are not listed, for example {missing[:3]}")
        self.expect(dict(items) == STILL or bool(missing), "a listed value is not what was stored")

    async def count_still(self, _: int) -> None:
        count = await self.client.count("still/")
        self.expect(count == len(STILL), f"counted {count} keys of {len(STILL)}")


async def prepare(client: Client) -> None:
    await client.batch([Put(key, value) for key, value in STILL.items()])
    await client.txn([put(account, b"%d" % BALANCE) for account in ACCOUNTS])


async def acquired(client: Client, name: str) -> int:
    """The lock, however long it is held: each wait lasts as long as one may, and no less."""
    while True:
        began_s = time.monotonic()
        try:
            return await client.acquire(name, ttl=600, wait=60, owner="next")
        except Locked:
            assert time.monotonic() - began_s >= 60


@asynccontextmanager
async def connected(url: str) -> Any:
    async with Client(url, retries=0, timeout_s=60) as client:
        yield client


async def changed(client: Client, shard_ids: set[str]) -> dict[str, Any]:
    """The cluster, once these are its members and nothing moves any more."""
    async with asyncio.timeout(CHANGE_TIMEOUT_S):
        while True:
            document = await client.cluster()
            states = {shard["id"]: shard["state"] for shard in document["shards"]}
            if states == dict.fromkeys(shard_ids, "up") and not document["moves"]:
                return document
            await asyncio.sleep(0.2)


async def test_four_shards_become_five_six_and_three_and_no_client_notices(cluster: Cluster) -> None:
    async with connected(cluster.url) as client, connected(cluster.url) as admin:
        await prepare(client)
        users = Users(client)
        held = {name: await client.acquire(name, ttl=600, owner="the test") for name in LONG_HELD}
        waiting = [asyncio.create_task(acquired(client, name)) for name in LONG_HELD]
        users.start()
        await asyncio.sleep(1)
        members = {"s1", "s2", "s3", "s4"}
        for shard_id in ("s5", "s6"):
            await admin.add_shard(shard_id)
            members.add(shard_id)
            await changed(admin, members)
            for name, token in held.items():
                await client.renew(name, token)
        for shard_id in ("s5", "s1", "s2"):
            await admin.remove_shard(shard_id)
            members.remove(shard_id)
        document = await changed(admin, members)
        assert not any(task.done() for task in waiting), "who waits for a lock that is held waits on"
        for name, token in held.items():
            await client.release(name, token)
        tokens = await asyncio.gather(*waiting)
        await asyncio.sleep(1)
        for name, token in zip(LONG_HELD, tokens, strict=True):
            assert token > held[name]
        await users.stop()

        assert users.failed == []
        assert users.wrong == []
        assert await users.total() == BALANCE * len(ACCOUNTS)
        for key, counted in users.counted.items():
            item = await client.get(key)
            assert item is not None
            assert int(item.value) == counted
        for key, (value, version) in users.own.items():
            item = await client.get(key)
            assert item is not None
            assert (item.value, item.version) == (value, version)
        assert {item.key async for item in client.list("own/")} == users.own.keys()
        await users.list_still(0)
        await users.count_still(0)
        assert users.wrong == []
        quiet = {kind for kind in {user.__name__ for user in users.all()} if users.calls[kind] < 3}
        assert not quiet, f"these have done next to nothing: {quiet} of {users.calls}"
        assert sorted(shard["id"] for shard in document["shards"]) == ["s3", "s4", "s6"]
        assert document["last_change"]["write_pause_ms_max"] > 0
