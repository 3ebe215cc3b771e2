"""Transactions and processes that die or sleep at the worst moment: nothing half done, nothing in doubt for long.

`python -m loadtest.chaos --nemesis sweep` lets a process die at every step of a commit, under load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from loadtest.cluster.armed import ArmedCluster
from tests.cluster.actions import WAIT_S, Reply
from tests.cluster.calls import Calls, calling, until

pytestmark = pytest.mark.timeout(180)

TXN_TIMEOUT_S = 1.0


# --- two routers, two shards, one transaction ------------------------------------------------------------------------


class Scene:
    """Router 0 is the one that fares ill, router 1 stays awake. `a` is the anchor, on `a_shard`; `b` lies elsewhere."""

    def __init__(self, cluster: ArmedCluster, ill: Calls, well: Calls, keys: dict[str, str]) -> None:
        self.cluster = cluster
        self.ill = ill
        self.well = well
        self.a_shard, self.b_shard = keys
        self.a, self.b = keys.values()

    async def write_both(self, text: str) -> tuple[int, int]:
        """Their versions now."""
        reply = await patiently(lambda: self.well.txn({"then": [put(self.a, text), put(self.b, text)]}))
        assert reply.status == 200, reply
        return reply.json["version"], reply.json["version"]

    async def values(self) -> list[str]:
        """In one transaction, by the router that is well."""
        gets = [{"op": "get", "key": key} for key in (self.a, self.b)]
        reply = await patiently(lambda: self.well.txn({"then": gets}))
        assert reply.status == 200, reply
        return [result["value"] for result in reply.json["results"]]

    async def in_doubt(self) -> dict[str, Any]:
        """`in_doubt` of /v1/cluster."""
        return dict((await self.well.ask("GET", "/v1/cluster")).json["in_doubt"])

    async def explain(self, key: str) -> dict[str, Any]:
        """/v1/explain of it; `intent` is the transaction that is pending on it, or None."""
        return dict((await self.well.ask("GET", f"/v1/explain/{key}")).json)

    async def until_prepared(self) -> dict[str, Any]:
        """The shard of `b` has voted; its intent. (That of the anchor is asked last, and decides at once.)"""
        found: dict[str, Any] = {}

        async def held() -> bool:
            found.update((await self.explain(self.b))["intent"] or {})
            return bool(found)

        await until(held, "the other key carries an intent")
        return found

    async def until_in_doubt(self) -> dict[str, Any]:
        """A transaction is; the counts."""
        found: dict[str, Any] = {}

        async def doubted() -> bool:
            found.update(await self.in_doubt())
            return bool(found["count"])

        await until(doubted, "a transaction is in doubt")
        return found

    async def until_decided(self, version: int) -> None:
        """The shard of the anchor has written a version above that."""

        async def written() -> bool:
            return bool((await self.explain(self.a))["version"] > version)

        await until(written, "the anchor's shard has decided")

    async def until_nothing_in_doubt(self) -> None:
        """The router that began what is in doubt has no part in it: it is dead, or stands still."""

        async def none() -> bool:
            return bool((await self.in_doubt())["count"] == 0)

        await until(none, "nothing is in doubt")

    async def wake(self, slept: asyncio.Task[Reply]) -> Reply:
        """Let the router that stands still go on; its answer, which no client had before."""
        assert not slept.done()
        self.cluster.wake("router-0")
        return await slept


async def patiently(ask: Callable[[], Awaitable[Reply]]) -> Reply:
    """Asked again while the answer says that nothing was done."""
    began = time.monotonic()
    while True:
        reply = await ask()
        if reply.status not in (409, 503) or time.monotonic() - began > WAIT_S:
            return reply
        await asyncio.sleep(reply.json["retry_after_ms"] / 1000)


def put(key: str, value: str) -> dict[str, str]:
    return {"op": "put", "key": key, "value": value}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ArmedCluster]:
    limits = {"txn_timeout_s": TXN_TIMEOUT_S}
    async with ArmedCluster(tmp_path_factory.mktemp("pair"), shards=2, limits=limits, routers=2) as cluster:
        yield cluster


@asynccontextmanager
async def scene(cluster: ArmedCluster, failpoint: str) -> AsyncIterator[Scene]:
    """Router 0 is armed with that failpoint; afterwards it is not."""
    process = cluster.arm("router-0", failpoint)
    try:
        async with calling(cluster.urls[0]) as ill, calling(cluster.urls[1]) as well:
            keys: dict[str, str] = {}
            number = 0
            while len(keys) < 2:
                key = f"{failpoint.partition('=')[0]}/{number}"
                keys.setdefault((await well.ask("GET", f"/v1/explain/{key}")).json["owner"], key)
                number += 1
            yield Scene(cluster, ill, well, keys)
    finally:
        if cluster.pids().get("router-0") == process:
            cluster.kill("router-0")
        await asyncio.sleep(0.1)
        await cluster.wait_ready(30.0)


def guarded(scene: Scene, versions: tuple[int, int], text: str) -> dict[str, Any]:
    """Write both, if both are as they were."""
    conditions = [{"key": scene.a, "version": versions[0]}, {"key": scene.b, "version": versions[1]}]
    return {"if": conditions, "then": [put(scene.a, text), put(scene.b, text)]}


@pytest.mark.asyncio(loop_scope="module")
async def test_a_router_that_slept_before_its_decision_finds_that_others_went_on(pair: ArmedCluster) -> None:
    async with scene(pair, "txn-before-decide-sent=stop") as it:
        versions = await it.write_both("first")
        slept = asyncio.create_task(it.ill.txn(guarded(it, versions, "slept")))
        doubt, intent = await asyncio.gather(it.until_in_doubt(), it.until_prepared())
        assert doubt["count"] == 1
        assert doubt["oldest_s"] >= 0
        assert intent["anchor"] == it.a
        assert (await patiently(lambda: it.well.put(it.b, b"others"))).status == 204  # the attempt is aborted for it
        await it.until_nothing_in_doubt()
        reply = await it.wake(slept)
        assert (reply.status, reply.json.get("succeeded")) in [(200, False), (409, None)], reply
        assert await it.values() == ["first", "others"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_router_that_slept_behind_its_decision_has_committed_and_no_reader_sees_half(
    pair: ArmedCluster,
) -> None:
    async with scene(pair, "txn-after-decided=stop") as it:
        versions = await it.write_both("first")
        slept = asyncio.create_task(it.ill.txn(guarded(it, versions, "slept")))
        await it.until_decided(versions[0])
        assert (await it.explain(it.b))["intent"]["anchor"] == it.a
        assert (await it.well.get(it.a)).body == b"slept"
        assert (await it.well.get(it.b)).body == b"slept"  # waits until it is known
        assert await it.values() == ["slept", "slept"]
        await it.until_nothing_in_doubt()
        reply = await it.wake(slept)
        assert (reply.status, reply.json["succeeded"]) == (200, True)
        assert await it.values() == ["slept", "slept"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_router_stopped_across_its_decision_and_woken_does_no_harm(pair: ArmedCluster) -> None:
    """SIGSTOP for longer than a transaction may take, at any moment of many transactions."""
    async with scene(pair, "none=pause:1") as it:
        await it.write_both("0")
        for number in range(4):
            tasks = [
                asyncio.create_task(it.ill.txn({"then": [put(it.a, f"{number}-{n}"), put(it.b, f"{number}-{n}")]}))
                for n in range(8)
            ]
            await asyncio.sleep(0.004 * number)
            pair.pause("router-0")
            try:
                seen = await it.values()
                assert len(set(seen)) == 1
                written = await it.write_both(f"well {number}")
                assert await it.values() == [f"well {number}"] * 2
            finally:
                await asyncio.sleep(0.2)
                pair.wake("router-0")
            replies = await asyncio.gather(*tasks)
            assert {reply.status for reply in replies} <= {200, 409, 503, 504}
            values = await it.values()
            assert len(set(values)) == 1
            later = [n for n, reply in enumerate(replies) if reply.status == 200 and reply.json["version"] > written[0]]
            if not later and all(reply.status != 504 for reply in replies):
                assert values == [f"well {number}"] * 2
        await it.until_nothing_in_doubt()


@pytest.mark.asyncio(loop_scope="module")
async def test_the_intents_of_a_dead_router_go_as_soon_as_the_anchors_shard_answers(pair: ArmedCluster) -> None:
    async with scene(pair, "txn-before-decide-sent=stop") as it:
        versions = await it.write_both("first")
        # Before anything is prepared: behind that the intent would be gone within txn_timeout_s.
        pair.pause(f"shard-{it.a_shard}")
        try:
            lost = asyncio.create_task(it.ill.txn(guarded(it, versions, "lost")))
            await it.until_prepared()
            assert pair.kill("router-0") is not None
            with pytest.raises(aiohttp.ClientError):
                await lost
            await asyncio.sleep(TXN_TIMEOUT_S)
            intent = (await it.explain(it.b))["intent"]  # only the anchor's shard could tell
            assert intent["anchor"] == it.a
            assert intent["age_s"] >= TXN_TIMEOUT_S
            doubt = await it.in_doubt()
            assert doubt["count"] == 1
            assert doubt["oldest_s"] >= TXN_TIMEOUT_S
        finally:
            pair.wake(f"shard-{it.a_shard}")
        await it.until_nothing_in_doubt()
        assert [(await it.explain(key))["intent"] for key in (it.a, it.b)] == [None, None]
        assert await it.values() == ["first", "first"]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_id_in_a_504_tells_what_became_of_it(pair: ArmedCluster) -> None:
    """The anchor's shard dies behind the commit of the decision, before any other heard of it."""
    async with scene(pair, "none=pause:1") as it:
        versions = await it.write_both("first")
        pair.arm(f"shard-{it.a_shard}", "decide-after-commit=kill@1")
        reply = await it.ill.txn(guarded(it, versions, "second"), idempotency_key="the-id-in-a-504")
        assert reply.status in (200, 504), reply
        if reply.status == 504:

            async def committed() -> bool:
                looked = await it.well.ask("GET", f"/v1/txn/{reply.json['txn_id']}")
                return looked.status == 200 and looked.json["status"] == "committed"

            await until(committed, "the transaction is known to be committed")
        again = await it.well.txn(guarded(it, versions, "second"), idempotency_key="the-id-in-a-504")
        assert (again.status, again.json["succeeded"]) == (200, True)
        assert await it.values() == ["second", "second"]
