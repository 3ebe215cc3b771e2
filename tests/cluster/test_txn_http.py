"""Transactions over HTTP, through real processes: branches, results and reading.

What a transaction means must not depend on where its keys lie: most tests run with keys of one store, and of all.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.cluster.calls import Calls, unique, until
from tests.cluster.transactions import assert_absent, delete, done, get, put, values_of, version_of

pytestmark = pytest.mark.timeout(90)


# --- branches and results ---------------------------------------------------------------------------------------------


async def test_then_runs_whole_at_one_version(calls: Calls, keys: list[str]):
    a, b, c, d = keys[:4]
    before = [int((await calls.put(key, b"old")).headers["etag"].strip('"')) for key in (b, c)]
    reply = await calls.txn({"if": [], "then": [put(a, "1"), delete(b), get(c), get(d), put(d, "4")], "else": [get(a)]})
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    version = reply.json["version"]
    assert version > max(before)
    assert reply.json == {
        "id": reply.json["id"],
        "succeeded": True,
        "version": version,
        "results": [
            {"key": a, "version": version},
            {"key": b, "version": version},
            {"key": c, "value": "old", "version": before[1]},
            {"key": d, "exists": False},
            {"key": d, "version": version},
        ],
    }
    assert await values_of(calls, [a, b, c, d]) == [b"1", None, b"old", b"4"]
    assert [await version_of(calls, key) for key in (a, c, d)] == [version, before[1], version]


async def test_else_runs_if_one_condition_fails_and_nothing_of_then(calls: Calls, keys: list[str]):
    a, b, c = keys[:3]
    version = (await done(calls, put(a, "1"), put(b, "2")))["version"]
    reply = await calls.txn(
        {
            "if": [{"key": a, "version": version}, {"key": b, "exists": False}],
            "then": [put(a, "then"), delete(b)],
            "else": [get(a), get(b), put(c, "else")],
        }
    )
    assert reply.status == 200
    assert reply.json["succeeded"] is False
    assert reply.json["version"] > version
    assert reply.json["results"] == [
        {"key": a, "value": "1", "version": version},
        {"key": b, "value": "2", "version": version},
        {"key": c, "version": reply.json["version"]},
    ]
    assert await values_of(calls, [a, b, c]) == [b"1", b"2", b"else"]


async def test_an_else_that_is_left_out_or_only_reads_writes_nothing(calls: Calls, keys: list[str]):
    a, b = keys[:2]
    body = {"if": [{"key": a, "exists": True}], "then": [put(a), put(b)]}
    for otherwise, results in (([], []), ([get(b)], [{"key": b, "exists": False}])):
        reply = await calls.txn({**body, "else": otherwise})
        assert (reply.status, reply.json["succeeded"], reply.json["version"]) == (200, False, None)
        assert reply.json["results"] == results
    assert (await calls.txn(body)).json["results"] == []
    await assert_absent(calls, [a, b])


async def test_each_guard_on_a_key_holds_exactly_when_it_should(calls: Calls, keys: list[str]):
    present, absent, deleted = keys[:3]
    gone = (await done(calls, put(present), put(deleted)))["version"]
    await calls.delete(deleted)
    await calls.put(present, b"new")
    now = await version_of(calls, present)
    assert now is not None
    for condition, holds in (
        ({"key": present, "version": now}, True),
        ({"key": present, "version": gone}, False),
        ({"key": present, "version": now + 1}, False),
        ({"key": present, "version": 2**53 - 1}, False),
        ({"key": present, "exists": True}, True),
        ({"key": present, "exists": False}, False),
        ({"key": absent, "version": 1}, False),
        ({"key": absent, "exists": True}, False),
        ({"key": absent, "exists": False}, True),
        ({"key": deleted, "version": gone}, False),
        ({"key": deleted, "exists": True}, False),
        ({"key": deleted, "exists": False}, True),
    ):
        reply = await calls.txn({"if": [condition], "then": [get(keys[3]), put(keys[4])]})
        assert (reply.status, reply.json["succeeded"]) == (200, holds), condition


async def test_conditions_see_what_was_just_committed(calls: Calls, keys: list[str]):
    version = (await done(calls, *(put(key, "0") for key in keys)))["version"]
    for number in range(1, 6):
        guards = [{"key": key, "version": version} for key in keys]
        reply = await calls.txn({"if": guards, "then": [put(key, str(number)) for key in keys]})
        assert (reply.json["succeeded"], reply.json["version"] > version) == (True, True)
        stale = await calls.txn({"if": guards, "then": [put(keys[0], "stale")]})
        assert stale.json["succeeded"] is False
        version = reply.json["version"]
    assert await values_of(calls, keys) == [b"5"] * len(keys)


async def test_gets_see_the_state_before_the_writes_wherever_they_stand(calls: Calls, keys: list[str]):
    a, b, c = keys[:3]
    version = (await done(calls, put(a, "1"), put(b, "2")))["version"]
    answer = await done(calls, get(a), put(a, "new"), get(a), delete(b), get(b), put(c), get(c), get(c))
    assert [result for result in answer["results"] if result.get("version") != answer["version"]] == [
        {"key": a, "value": "1", "version": version},
        {"key": a, "value": "1", "version": version},
        {"key": b, "value": "2", "version": version},
        {"key": c, "exists": False},
        {"key": c, "exists": False},
    ]
    assert await values_of(calls, [a, b, c]) == [b"new", None, b"v"]


async def test_deleting_what_is_not_there_answers_as_any_delete_and_versions_rise(calls: Calls, keys: list[str]):
    a, b = keys[:2]
    answer = await done(calls, delete(a), put(b))
    assert answer["results"] == [{"key": a, "version": answer["version"]}, {"key": b, "version": answer["version"]}]
    again = await done(calls, delete(a), delete(b))
    assert again["version"] > answer["version"]
    await assert_absent(calls, [a, b])
    later = await calls.put(a, b"v")
    assert int(later.headers["etag"].strip('"')) > again["version"]


async def test_any_bytes_and_any_keys_come_back(calls: Calls):
    prefix = unique("txn-strange")
    strange = [f"{prefix}{end}" for end in ("/ä/ö ü?#%", "//", "\n\x00", "🔒", "é", "e\u0301", "x" * 500)]
    await done(calls, *({"op": "put", "key": key, "value_base64": "/wAKDQ=="} for key in strange))
    answer = await done(calls, *map(get, strange))
    assert [(result["key"], result["value_base64"]) for result in answer["results"]] == [
        (key, "/wAKDQ==") for key in strange
    ]
    await done(calls, *(put(key, "") for key in strange))
    answer = await done(calls, *map(get, strange))
    assert [result["value"] for result in answer["results"]] == [""] * len(strange)


async def test_a_ttl_is_kept_and_a_later_put_clears_it(calls: Calls, keys: list[str]):
    a, b, c = keys[:3]
    await done(calls, put(a, ttl=1000), put(b, ttl=0.5), put(c))
    assert 900 < float((await calls.get(a)).headers["kv-ttl"]) <= 1000
    assert "kv-ttl" not in (await calls.get(c)).headers
    await until(lambda: is_absent(calls, b), "the ttl is over")
    reply = await calls.txn({"if": [{"key": b, "exists": False}], "then": [put(a), get(b)]})
    assert reply.json["results"][1] == {"key": b, "exists": False}
    assert "kv-ttl" not in (await calls.get(a)).headers


async def is_absent(calls: Calls, key: str) -> bool:
    return (await calls.get(key)).status == 404


async def test_a_key_past_its_deadline_is_absent_for_conditions_and_gets(calls: Calls, keys: list[str]):
    a, b = keys[:2]
    answer = await done(calls, put(a, ttl=0.001), put(b))
    await asyncio.sleep(0.01)
    for condition in ({"key": a, "exists": True}, {"key": a, "version": answer["version"]}):
        reply = await calls.txn({"if": [condition], "then": [put(b)], "else": [get(a)]})
        assert (reply.json["succeeded"], reply.json["results"]) == (False, [{"key": a, "exists": False}])


async def test_listings_and_counts_have_what_a_transaction_wrote(calls: Calls, keys: list[str]):
    prefix = keys[0].rpartition("/")[0]
    await done(calls, *map(put, keys))
    listing = await calls.ask("GET", f"/v1/kv?prefix={prefix}")
    assert [item["key"] for item in listing.json["items"]] == sorted(keys)
    assert (await calls.ask("GET", f"/v1/kv?prefix={prefix}&count=true")).json == {"count": len(keys)}


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_a_transaction_that_only_reads_has_no_version(calls: Calls, keys: list[str]):
    version = (await done(calls, put(keys[0], "1"), put(keys[1], "2")))["version"]
    for headers in ({}, {"idempotency_key": "K"}):
        answer = await done(calls, get(keys[0]), get(keys[1]), get(keys[2]), get(keys[0]), **headers)
        assert answer["version"] is None
        assert answer["results"] == [
            {"key": keys[0], "value": "1", "version": version},
            {"key": keys[1], "value": "2", "version": version},
            {"key": keys[2], "exists": False},
            {"key": keys[0], "value": "1", "version": version},
        ]


async def test_a_transaction_that_only_reads_heeds_its_conditions(calls: Calls, keys: list[str]):
    await done(calls, put(keys[0], "1"))
    for exists, found in ((True, {"key": keys[0], "value": "1"}), (False, {"key": keys[1], "exists": False})):
        reply = await calls.txn(
            {"if": [{"key": keys[0], "exists": exists}], "then": [get(keys[0])], "else": [get(keys[1])]}
        )
        (result,) = reply.json["results"]
        assert reply.json["succeeded"] is exists
        assert reply.json["version"] is None
        assert result == result | found


async def test_no_reader_sees_half_of_a_transaction(calls: Calls, keys: list[str]):
    """Writers set all keys to one value; who reads them all finds one value and one version."""
    await done(calls, *(put(key, "0") for key in keys))
    stop = asyncio.Event()

    async def write(name: str) -> int:
        count = 0
        while not stop.is_set():
            count += 1
            order = random.Random(f"{name}{count}").sample(keys, len(keys))
            reply = await calls.txn({"then": [put(key, f"{name}{count}") for key in order]})
            assert reply.status in (200, 409), reply
        return count

    async def read() -> int:
        different = set()
        for _ in range(40):
            reply = await calls.txn({"then": list(map(get, keys))})
            assert reply.status in (200, 409), reply
            if reply.status == 200:
                (seen,) = {(result["value"], result["version"]) for result in reply.json["results"]}
                different.add(seen)
        return len(different)

    writers = [asyncio.create_task(write(name)) for name in "ab"]
    different = await asyncio.gather(read(), read())
    stop.set()
    assert min(await asyncio.gather(*writers)) > 1
    assert min(different) > 1


async def test_all_of_many_at_once_on_the_same_keys_are_done(calls: Calls, keys: list[str]):
    """Counters that every transaction raises by one, guarded by their version: none gets lost."""
    a, b = keys[:2]
    await done(calls, put(a, "0"), put(b, "0"))

    async def increase() -> None:
        while True:
            read = await calls.txn({"then": [get(a), get(b)]})
            if read.status == 409:
                continue
            guards = [{"key": result["key"], "version": result["version"]} for result in read.json["results"]]
            writes = [put(result["key"], str(int(result["value"]) + 1)) for result in read.json["results"]]
            reply = await calls.txn({"if": guards, "then": writes})
            assert reply.status in (200, 409), reply
            if reply.status == 200 and reply.json["succeeded"]:
                return

    await asyncio.gather(*(increase() for _ in range(12)))
    assert await values_of(calls, [a, b]) == [b"12", b"12"]
