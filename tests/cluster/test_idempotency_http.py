"""Idempotency-Key on writes and lock calls, through real processes: the same answer again, also after a crash."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest

from tests.cluster.actions import Reply, kill_and_wait
from tests.cluster.calls import Calls, calling, code, unique, until
from tests.cluster.clusters import Cluster, running, write_config

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def key() -> str:
    return unique("idempotency")


def same(first: Reply, second: Reply) -> bool:
    """Status, body and version are the same."""
    return (first.status, first.body, first.headers.get("etag"), first.headers.get("lock-token")) == (
        second.status,
        second.body,
        second.headers.get("etag"),
        second.headers.get("lock-token"),
    )


async def test_a_repeated_put_gives_the_first_answer_and_writes_nothing(calls: Calls, key: str):
    first = await calls.put(key, b"v", idempotency_key="K")
    assert first.status == 201
    assert same(await calls.put(key, b"v", idempotency_key="K"), first)
    assert (await calls.get(key)).headers["etag"] == first.headers["etag"]
    await calls.put(key, b"another client's")
    assert same(await calls.put(key, b"v", idempotency_key="K"), first)
    assert (await calls.get(key)).body == b"another client's"


async def test_a_repeated_delete_gives_the_first_answer(calls: Calls, key: str):
    gone = await calls.delete(key, idempotency_key="none")
    assert gone.status == 404
    await calls.put(key, b"v")
    first = await calls.delete(key, idempotency_key="K")
    await calls.put(key, b"new")
    assert first.status == 204
    assert same(await calls.delete(key, idempotency_key="K"), first)
    assert same(await calls.delete(key, idempotency_key="none"), gone)
    assert (await calls.get(key)).body == b"new"


async def test_a_refusal_that_decided_something_is_given_again(calls: Calls, key: str):
    version = (await calls.put(key, b"v")).headers["etag"]
    first = await calls.put(key, b"w", if_none_match="*", idempotency_key="K")
    assert code(first) == (412, "precondition-failed")
    await calls.delete(key)
    again = await calls.put(key, b"w", if_none_match="*", idempotency_key="K")
    assert same(again, first)
    assert again.headers["etag"] == version
    assert (await calls.get(key)).status == 404


async def test_a_repeated_acquire_renews_what_still_stands_and_is_lock_lost_after(calls: Calls, key: str):
    body = {"ttl": 60, "owner": "me"}
    first = await calls.acquire(key, body, idempotency_key="K")
    assert first.status == 201
    assert same(await calls.acquire(key, body, idempotency_key="K"), first)
    assert code(await calls.acquire(key, body, idempotency_key="another")) == (423, "locked")
    assert code(await calls.acquire(key, {"ttl": 61, "owner": "me"}, idempotency_key="K"))[0] == 422
    await calls.release(key, first.json["token"])
    for _ in range(2):
        assert code(await calls.acquire(key, body, idempotency_key="K")) == (412, "lock-lost")
    assert (await calls.inspect(key)).status == 404


async def test_a_repeated_acquire_begins_the_ttl_again(calls: Calls, key: str):
    body = {"ttl": 60}
    first = await calls.acquire(key, body, idempotency_key="K")
    for _ in range(2):
        await asyncio.sleep(0.5)
        asked_s = time.monotonic()
        assert same(await calls.acquire(key, body, idempotency_key="K"), first)
        lease = (await calls.inspect(key)).json
        assert lease["ttl_left"] >= 60 - (time.monotonic() - asked_s) - 0.01
        assert lease["token"] == first.json["token"]


async def test_repeated_renewals_and_releases_give_the_first_answer(calls: Calls, key: str):
    token = await calls.granted(key, owner="me")
    renewed = await calls.renew(key, token, idempotency_key="K")
    assert renewed.status == 200
    assert same(await calls.renew(key, token, idempotency_key="K"), renewed)
    released = await calls.release(key, token, idempotency_key="K")
    assert released.status == 204
    next_token = await calls.granted(key)
    assert same(await calls.release(key, token, idempotency_key="K"), released)
    assert same(await calls.renew(key, token, idempotency_key="K"), renewed)
    assert (await calls.inspect(key)).json["token"] == next_token


async def test_another_request_under_the_same_key_is_422(calls: Calls, key: str):
    first = await calls.put(key, b"v", idempotency_key="K")
    for other in (
        calls.put(key, b"w", idempotency_key="K"),
        calls.put(key, b"v", idempotency_key="K", if_match="*"),
        calls.put(key, b"v", idempotency_key="K", lock_token=1),
        calls.ask("PUT", f"/v1/kv/{key}?ttl=60", b"v", [("Idempotency-Key", "K")]),
    ):
        assert code(await other) == (422, "idempotency-key-reused")
    assert same(await calls.put(key, b"v", idempotency_key="K"), first)
    assert (await calls.put(f"{key}/other", b"w", idempotency_key="K")).status == 201
    assert (await calls.delete(key, idempotency_key="K")).status == 204


async def test_what_decided_nothing_is_not_kept(calls: Calls, key: str):
    token = await calls.granted(key)
    assert (await calls.put(key, b"v", idempotency_key="K")).status == 423
    assert (await calls.acquire(key, idempotency_key="K")).status == 423
    assert (await calls.acquire(key, {"wait": 0.1}, idempotency_key="W")).status == 423
    await calls.release(key, token)
    assert (await calls.put(key, b"v", idempotency_key="K")).status == 201
    granted = await calls.acquire(key, idempotency_key="K")
    assert granted.status == 201
    await calls.release(key, granted.json["token"])
    assert (await calls.acquire(key, {"wait": 0.1}, idempotency_key="W")).status == 201


@pytest.mark.parametrize(
    ("field", "taken"),
    [
        ("x" * 255, True),
        ('"' + "x" * 255 + '"', True),
        ("x" * 256, False),
        ('"' + "x" * 256 + '"', False),
        ("", False),
        ('""', False),
    ],
)
async def test_a_key_has_1_to_255_characters_without_its_quotes(calls: Calls, key: str, field: str, taken: bool):
    reply = await calls.put(key, b"v", idempotency_key=field)
    if taken:
        assert same(await calls.put(key, b"v", idempotency_key="x" * 255), reply)
        assert reply.status == 201
    else:
        assert code(reply) == (400, "bad-parameter")
        assert code(await calls.acquire(key, idempotency_key=field)) == (400, "bad-parameter")
        assert (await calls.get(key)).status == 404


async def test_a_key_given_twice_is_refused(calls: Calls, key: str):
    lines = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    assert (await calls.ask("PUT", f"/v1/kv/{key}", b"v", lines)).status == 400
    assert (await calls.get(key)).status == 404


async def test_twenty_duplicates_at_once_have_one_effect(calls: Calls, key: str):
    replies = await asyncio.gather(*(calls.put(key, b"v", if_none_match="*", idempotency_key="K") for _ in range(20)))
    assert all(same(reply, replies[0]) for reply in replies)
    assert replies[0].status == 201
    version = (await calls.get(key)).headers["etag"]
    assert version == replies[0].headers["etag"]
    replies = await asyncio.gather(*(calls.delete(key, idempotency_key="K") for _ in range(20)))
    assert {reply.status for reply in replies} == {204}
    grants = await asyncio.gather(*(calls.acquire(key, idempotency_key="K") for _ in range(20)))
    assert all(same(reply, grants[0]) for reply in grants)
    assert grants[0].status == 201


async def test_a_duplicate_that_waits_in_the_queue_gets_the_first_ones_grant(calls: Calls, key: str):
    holder = await calls.granted(key)
    body = {"ttl": 60, "wait": 60}
    waiters = [asyncio.create_task(calls.acquire(key, body, idempotency_key="K")) for _ in range(3)]
    await calls.until_waiting(key, 3)
    other = asyncio.create_task(calls.acquire(key, body))
    await calls.until_waiting(key, 4)
    await calls.release(key, holder)
    replies = await asyncio.gather(*waiters)
    assert replies[0].status == 201
    assert all(same(reply, replies[0]) for reply in replies)
    assert await calls.waiting(key) == 1
    await calls.release(key, replies[0].json["token"])
    assert (await other).status == 201


# --- crashes and time -------------------------------------------------------------------------------------------------


async def settled(calls: Calls, ask: str, key: str, **fields: object) -> Reply:
    """Ask again and again with the same Idempotency-Key until the answer says what became of the first."""
    while True:
        try:
            reply = await getattr(calls, ask)(key, **fields)
        except (aiohttp.ClientError, ConnectionError):
            continue
        if reply.status not in (429, 503, 504):
            return reply
        await asyncio.sleep(0.05)


async def test_replies_survive_kill_9_of_the_shard(tmp_path: Path):
    with running(write_config(tmp_path, shards=1)) as own:
        async with calling(own.url) as calls:
            put = await calls.put("a", b"v", idempotency_key="K")
            await calls.put("gone", b"v")
            deleted = await calls.delete("gone", idempotency_key="K")
            granted = await calls.acquire("lock", {"ttl": 60}, idempotency_key="K")
            await asyncio.to_thread(kill_and_wait, own, "shard-s1")
            assert same(await settled(calls, "put", "a", value=b"v", idempotency_key="K"), put)
            assert same(await settled(calls, "delete", "gone", idempotency_key="K"), deleted)
            again = await settled(calls, "acquire", "lock", body={"ttl": 60}, idempotency_key="K")
            assert same(again, granted)
            assert code(await calls.put("a", b"other", idempotency_key="K"))[0] == 422


async def test_replies_go_when_their_time_is_over_and_their_keys_are_free_again(tmp_path: Path):
    config = write_config(tmp_path, shards=1, limits={"idempotency_kept_s": 1.0, "expiry_sweep_s": 0.2})
    with running(config) as own:
        async with calling(own.url) as calls:
            assert (await calls.put("a", b"v", idempotency_key="K")).status == 201
            await until(lambda: replies_are_tombstones(own), "the sweep has expired the reply")
            assert (await calls.put("a", b"other", idempotency_key="K")).status == 204
            assert (await calls.get("a")).body == b"other"


async def replies_are_tombstones(cluster: Cluster) -> bool:
    with closing(sqlite3.connect(f"file:{cluster.data_dir / 'shard-s1.db'}?mode=ro", uri=True)) as file:
        rows = file.execute("SELECT body IS NULL FROM rows WHERE kind = 'reply'").fetchall()
    return bool(rows == [(1,)])  # none before the batch is applied to the file


@pytest.mark.parametrize("point", ["batch-before-commit", "batch-after-commit"])
async def test_a_write_whose_shard_died_at_its_commit_is_done_once(tmp_path: Path, point: str):
    """The first answer is lost in both cases; asking again makes it so, or finds it so."""
    config = write_config(tmp_path, shards=1)
    env = {**os.environ, "KVSTORE_FAILPOINTS": f"{point}=kill@2"}
    with running(config, env) as own:
        async with calling(own.url) as calls:
            first = await settled(calls, "put", "warm-up", value=b"v")
            assert first.status == 201
            lost = await calls.put("k", b"v", if_none_match="*", idempotency_key="K")
            assert code(lost) == (504, "outcome-unknown")
            # The new process dies at its second batch, too: this is its first one, and no other follows.
            reply = await settled(calls, "put", "k", value=b"v", if_none_match="*", idempotency_key="K")
            assert reply.status == 201


async def test_a_stopped_shard_costs_a_504_and_the_repeat_finds_the_first_effect(tmp_path: Path):
    config = write_config(tmp_path, shards=1, limits={"request_timeout_s": 1.0})
    with running(config) as own:
        async with calling(own.url) as calls:
            await calls.put("k", b"0")
            pid = own.pid("shard-s1")
            os.kill(pid, signal.SIGSTOP)
            try:
                unknown = await calls.put("k", b"1", idempotency_key="K")
                assert code(unknown) == (504, "outcome-unknown")
            finally:
                os.kill(pid, signal.SIGCONT)
            reply = await settled(calls, "put", "k", value=b"1", idempotency_key="K")
            assert reply.status == 204
            assert (await calls.get("k")).headers["etag"] == reply.headers["etag"]
