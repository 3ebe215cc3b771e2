"""Transactions over HTTP, through real processes: branches, guards, leases, retries, bad input, large bodies.

What a transaction means must not depend on where its keys lie: most tests run with keys of one store, and of all.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import Any

import pytest

from tests.cluster.actions import Reply
from tests.cluster.calls import Calls, code, unique, until

pytestmark = pytest.mark.timeout(90)

MIB = 1024 * 1024
SHARDS = 4
Op = dict[str, Any]


@pytest.fixture(params=["one store", "all stores"])
async def keys(calls: Calls, request: pytest.FixtureRequest) -> list[str]:
    """Eight keys that do not exist, of one store, or in turn of each."""
    of_shard = await keys_by_owner(calls, 8)
    if request.param == "one store":
        return next(iter(of_shard.values()))
    return [key for row in zip(*of_shard.values(), strict=True) for key in row][:8]


async def keys_by_owner(calls: Calls, count: int) -> dict[str, list[str]]:
    """So many keys of each shard."""
    prefix = unique("txn")
    found: dict[str, list[str]] = {}
    for number in itertools.count():
        if len(found) == SHARDS and all(len(keys) >= count for keys in found.values()):
            return {owner: keys[:count] for owner, keys in found.items()}
        key = f"{prefix}/{number}"
        found.setdefault(await calls.owner(key), []).append(key)
    raise AssertionError


def put(key: str, value: str = "v", **more: Any) -> Op:
    return {"op": "put", "key": key, "value": value, **more}


def get(key: str) -> Op:
    return {"op": "get", "key": key}


def delete(key: str) -> Op:
    return {"op": "delete", "key": key}


async def done(calls: Calls, *then: Op, **headers: Any) -> Any:
    """The answer of a transaction without conditions, which must succeed."""
    reply = await calls.txn({"then": list(then)}, **headers)
    assert reply.status == 200, reply
    assert reply.json["succeeded"] is True
    return reply.json


async def version_of(calls: Calls, key: str) -> int | None:
    reply = await calls.get(key)
    return int(reply.headers["etag"].strip('"')) if reply.status == 200 else None


async def values_of(calls: Calls, keys: list[str]) -> list[bytes | None]:
    replies = [await calls.get(key) for key in keys]
    return [reply.body if reply.status == 200 else None for reply in replies]


async def assert_absent(calls: Calls, keys: list[str]) -> None:
    assert await values_of(calls, keys) == [None] * len(keys)


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


# --- locks ------------------------------------------------------------------------------------------------------------


async def test_a_key_leased_by_another_client_is_423_and_nothing_is_written(calls: Calls, keys: list[str]):
    a, b, leased = keys[:3]
    await calls.granted(leased, 20, owner="me")
    for write in (put(leased), delete(leased)):
        reply = await calls.txn({"then": [put(a), put(b), write]})
        assert code(reply) == (423, "locked")
        assert reply.json["owner"] == "me"
        assert 5 < reply.json["ttl_left"] <= 20
        assert reply.json["retry_after_ms"] > 0
        assert int(reply.headers["retry-after"]) >= 1
    await assert_absent(calls, [a, b, leased])
    assert (await calls.put(a, b"v")).status == 201  # no lock is left behind


async def test_a_lease_does_not_keep_others_from_reading_and_testing(calls: Calls, keys: list[str]):
    a, leased = keys[:2]
    version = (await done(calls, put(leased, "1")))["version"]
    await calls.granted(leased)
    reply = await calls.txn({"if": [{"key": leased, "version": version}], "then": [get(leased), put(a)]})
    assert reply.json["succeeded"] is True
    assert reply.json["results"][0] == {"key": leased, "value": "1", "version": version}
    assert (await done(calls, get(leased), get(a)))["results"][0]["value"] == "1"


async def test_the_guard_opens_the_key_of_its_name(calls: Calls, keys: list[str]):
    a, leased = keys[:2]
    token = await calls.granted(leased)
    reply = await calls.txn({"if": [{"lock": leased, "token": token}], "then": [put(leased, "mine"), put(a)]})
    assert (reply.status, reply.json["succeeded"]) == (200, True)
    assert await values_of(calls, [leased, a]) == [b"mine", b"v"]
    assert (await calls.inspect(leased)).json["token"] == token
    assert (await calls.renew(leased, token)).status == 200
    reply = await calls.txn({"if": [{"lock": leased, "token": token}], "then": [delete(leased)]})
    assert reply.json["succeeded"] is True
    await assert_absent(calls, [leased])


async def test_a_guard_opens_no_other_key(calls: Calls, keys: list[str]):
    mine, theirs = keys[:2]
    token = await calls.granted(mine)
    await calls.granted(theirs)
    reply = await calls.txn({"if": [{"lock": mine, "token": token}], "then": [put(mine), put(theirs)]})
    assert code(reply) == (423, "locked")
    await assert_absent(calls, [mine, theirs])


async def test_several_guards_open_their_keys(calls: Calls, keys: list[str]):
    guards = [{"lock": key, "token": await calls.granted(key)} for key in keys]
    reply = await calls.txn({"if": guards, "then": [put(key) for key in keys]})
    assert (reply.status, reply.json["succeeded"]) == (200, True)
    assert await values_of(calls, keys) == [b"v"] * len(keys)


async def test_a_stale_token_is_a_condition_that_fails(calls: Calls, keys: list[str]):
    name, a, b = keys[:3]
    token = await calls.granted(name)
    await calls.release(name, token)
    body = {"if": [{"lock": name, "token": token}], "then": [put(a), put(b)], "else": [put(b, "else")]}
    reply = await calls.txn(body)
    assert (reply.status, reply.json["succeeded"]) == (200, False)
    other = await calls.granted(name)
    assert other > token
    reply = await calls.txn(body)
    assert (reply.status, reply.json["succeeded"]) == (200, False)
    body["if"] = [{"lock": name, "token": 0}]
    assert (await calls.txn(body)).json["succeeded"] is False
    assert await values_of(calls, [a, b]) == [None, b"else"]
    body["if"] = [{"lock": name, "token": other}]
    assert (await calls.txn(body)).json["succeeded"] is True


async def test_a_token_of_another_lock_opens_nothing(calls: Calls, keys: list[str]):
    first, second = keys[:2]
    token = await calls.granted(first)
    while await calls.granted(second) == token:  # two stores' clocks may stand at the same step
        await calls.release(second, token)
    reply = await calls.txn({"if": [{"lock": second, "token": token}], "then": [put(first), put(second)]})
    assert (reply.status, reply.json["succeeded"]) == (200, False)
    await assert_absent(calls, [first, second])


async def test_only_the_branch_that_runs_meets_leases(calls: Calls, keys: list[str]):
    a, leased, other = keys[:3]
    await calls.granted(leased)
    guard = {"key": a, "exists": False}
    reply = await calls.txn({"if": [guard], "then": [put(a)], "else": [put(leased)]})
    assert (reply.status, reply.json["succeeded"]) == (200, True)
    reply = await calls.txn({"if": [guard], "then": [put(leased)], "else": [put(other)]})
    assert (reply.status, reply.json["succeeded"]) == (200, False)
    reply = await calls.txn({"if": [guard], "then": [put(other, "then")], "else": [put(leased)]})
    assert code(reply) == (423, "locked")
    assert await values_of(calls, [a, leased, other]) == [b"v", None, b"v"]


async def test_locks_are_free_again_after_a_transaction(calls: Calls, keys: list[str]):
    await done(calls, *map(put, keys))
    await asyncio.gather(*(calls.txn({"then": list(map(get, keys))}) for _ in range(5)))
    for key in keys:
        assert (await calls.put(key, b"w", if_match="*")).status == 204
        assert await calls.granted(key) > 0


# --- retrying ---------------------------------------------------------------------------------------------------------


async def test_a_repeat_gives_the_first_answer_and_writes_nothing(calls: Calls, keys: list[str]):
    a, b, c = keys[:3]
    await calls.put(c, b"old")
    body = {"if": [{"key": a, "exists": False}], "then": [put(a, "1"), get(c), put(b, "2")]}
    first = await calls.txn(body, idempotency_key="K")
    assert (first.status, first.json["succeeded"]) == (200, True)
    assert same(await calls.txn(body, idempotency_key="K"), first)
    assert await version_of(calls, a) == await version_of(calls, b) == first.json["version"]
    await calls.put(a, b"another client's")
    await calls.delete(b)
    await calls.put(c, b"new")
    assert same(await calls.txn(body, idempotency_key='"K"'), first)
    assert await values_of(calls, [a, b, c]) == [b"another client's", None, b"new"]
    assert (await calls.txn(body, idempotency_key="another")).json["succeeded"] is False


def same(first: Reply, second: Reply) -> bool:
    return (first.status, first.body) == (second.status, second.body)


async def test_the_answer_of_the_else_branch_is_kept_too(calls: Calls, keys: list[str]):
    a, b = keys[:2]
    body = {"if": [{"key": a, "exists": True}], "then": [put(b, "then")], "else": [get(a), put(b, "else")]}
    first = await calls.txn(body, idempotency_key="K")
    assert first.json["succeeded"] is False
    await done(calls, put(a), delete(b))
    assert same(await calls.txn(body, idempotency_key="K"), first)
    await assert_absent(calls, [b])


async def test_a_repeat_of_reads_gives_what_was_read_first(calls: Calls, keys: list[str]):
    body = {"then": [get(keys[0]), get(keys[1])]}
    await done(calls, put(keys[0], "1"), put(keys[1], "\x00"))
    first = await calls.txn(body, idempotency_key="K")
    await done(calls, put(keys[0], "2"), delete(keys[1]))
    assert same(await calls.txn(body, idempotency_key="K"), first)
    assert not same(await calls.txn(body, idempotency_key="another"), first)


async def test_another_body_under_the_same_key_is_422(calls: Calls, keys: list[str]):
    a, b, c = keys[:3]
    first = await calls.txn({"then": [put(a), put(b)]}, idempotency_key="K")
    for other in (
        {"then": [put(a), put(b, "w")]},
        {"then": [put(a)]},
        {"then": [delete(a), put(b)]},
        {"then": [get(a)]},
        {"if": [{"key": a, "exists": True}], "then": [put(b)]},
        {"then": [put(a), put(b)], "else": []},
        {"then": [put(a), put(c)]},
    ):
        assert code(await calls.txn(other, idempotency_key="K")) == (422, "idempotency-key-reused"), other
    assert await version_of(calls, b) == first.json["version"]
    await assert_absent(calls, [c])
    assert same(await calls.txn({"then": [put(a), put(b)]}, idempotency_key="K"), first)
    # The first key named is its target: another first key, another Idempotency-Key.
    assert (await calls.txn({"then": [put(b), put(a)]}, idempotency_key="K")).status == 200


async def test_what_decided_nothing_is_not_kept(calls: Calls, keys: list[str]):
    token = await calls.granted(keys[1])
    body = {"then": [put(keys[0]), put(keys[1])]}
    assert (await calls.txn(body, idempotency_key="K")).status == 423
    await calls.release(keys[1], token)
    assert (await calls.txn(body, idempotency_key="K")).status == 200


async def test_twenty_duplicates_at_once_have_one_effect(calls: Calls, keys: list[str]):
    a, b = keys[:2]
    body = {"if": [{"key": a, "exists": False}], "then": [put(a), put(b)], "else": [delete(a)]}
    replies = await asyncio.gather(*(calls.txn(body, idempotency_key="K") for _ in range(20)))
    assert {reply.status for reply in replies} == {200}
    assert all(same(reply, replies[0]) for reply in replies)
    assert replies[0].json["succeeded"] is True
    assert await version_of(calls, a) == await version_of(calls, b) == replies[0].json["version"]


async def test_without_a_key_a_repeat_is_another_transaction(calls: Calls, keys: list[str]):
    body = {"then": [put(keys[0]), put(keys[1])]}
    first, second = await calls.txn(body), await calls.txn(body)
    assert second.json["version"] > first.json["version"]
    assert second.json["id"] != first.json["id"]


# --- GET /v1/txn/{id} -------------------------------------------------------------------------------------------------


async def look(calls: Calls, txn_id: str, method: str = "GET") -> Reply:
    return await calls.ask(method, f"/v1/txn/{txn_id}")


async def test_a_transaction_with_an_idempotency_key_can_be_looked_up(calls: Calls, keys: list[str]):
    for number, body in enumerate(
        (
            {"then": [put(keys[0]), put(keys[1])]},
            {"then": [get(keys[0]), get(keys[1])]},
            {"if": [{"key": keys[0], "exists": False}], "then": [put(keys[2])], "else": [put(keys[3])]},
            {"if": [{"key": keys[0], "exists": False}], "then": [put(keys[2])], "else": [get(keys[1]), get(keys[3])]},
        )
    ):
        reply = await calls.txn(body, idempotency_key=f"K{number}")
        found = await look(calls, reply.json["id"])
        assert (found.status, found.json) == (200, {"status": "committed", "succeeded": number < 2}), body
        again = await calls.txn(body, idempotency_key=f"K{number}")
        assert again.json["id"] == reply.json["id"]
        head = await look(calls, reply.json["id"], "HEAD")
        assert (head.status, head.body) == (200, b"")


async def test_one_without_a_key_is_committed_or_unknown_but_never_aborted(calls: Calls, keys: list[str]):
    answer = await done(calls, put(keys[0]), put(keys[1]))
    found = await look(calls, answer["id"])
    assert found.status in (200, 404)
    if found.status == 200:
        assert found.json == {"status": "committed", "succeeded": True}
    else:
        assert code(found) == (404, "not-found")
        assert "may have been committed" in found.json["detail"]


async def test_an_unknown_transaction_is_404(calls: Calls, keys: list[str]):
    answer = await done(calls, put(keys[0]), idempotency_key="K")
    partition, stamp, router = answer["id"].split("-")
    for unknown in (
        f"{partition}-{int(stamp, 16) + 10**9:x}-{router}",
        f"{partition}-1-{router}",
        f"{partition}-{stamp}-{'0' * len(router)}",
    ):
        assert code(await look(calls, unknown)) == (404, "not-found"), unknown


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "%20",
        "x",
        "-",
        "--",
        "1-2",
        "g-1-2",
        "1-g-2",
        "1--2",
        "ffffffff-1-2",
        "1-2-3-4",
        "%FF",
        "%",
        "a/b",
        "1" * 300,
    ],
)
async def test_a_malformed_id_is_400(calls: Calls, malformed: str):
    assert code(await look(calls, malformed)) == (400, "bad-parameter")


# --- sizes ------------------------------------------------------------------------------------------------------------


async def test_twenty_thousand_operations_are_one_transaction(calls: Calls):
    prefix = unique("txn-many")
    keys = [f"{prefix}/{number}" for number in range(20_000)]
    answer = await done(calls, *map(put, keys))
    assert [result["key"] for result in answer["results"]] == keys
    assert {result["version"] for result in answer["results"]} == {answer["version"]}
    assert (await calls.ask("GET", f"/v1/kv?prefix={prefix}&count=true")).json == {"count": len(keys)}
    guards = [{"key": key, "version": answer["version"]} for key in keys]
    reply = await calls.txn({"if": guards, "then": list(map(delete, keys)), "else": [get(keys[0])]})
    assert (reply.status, reply.json["succeeded"]) == (200, True)
    assert (await calls.ask("GET", f"/v1/kv?prefix={prefix}&count=true")).json == {"count": 0}


async def test_values_of_the_largest_size_are_taken_and_given(calls: Calls, keys: list[str]):
    await done(calls, *(put(key, "v" * MIB) for key in keys))
    answer = await done(calls, *map(get, keys))
    assert [len(result["value"]) for result in answer["results"]] == [MIB] * len(keys)
    await done(calls, *map(delete, keys))


async def test_a_body_of_the_largest_size_is_taken_and_one_byte_more_is_413(calls: Calls, keys: list[str]):
    body = b'{"then":[{"op":"put","key":"%s","value":"v"}]}' % keys[0].encode()
    body += b" " * (16 * MIB - len(body))
    reply = await calls.txn(body)
    assert reply.status == 200
    assert code(await calls.txn(body + b" ")) == (413, "body-too-large")
    assert await version_of(calls, keys[0]) == reply.json["version"]


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    (b"", 400, "bad-body"),
    (b"nonsense", 400, "bad-body"),
    (b"[]", 400, "bad-body"),
    (b"null", 400, "bad-body"),
    (b"{}", 400, "bad-body"),
    (b'{"then":[GOOD],', 400, "bad-body"),
    (b'{"then":[GOOD]}{}', 400, "bad-body"),
    (b"[" * 100_000, 400, "bad-body"),
    (b'{"then":[]}', 400, "bad-body"),
    (b'{"then":null}', 400, "bad-body"),
    (b'{"else":[GOOD]}', 400, "bad-body"),
    (b'{"then":[GOOD],"esle":[]}', 400, "bad-body"),
    (b'{"then":[GOOD],"if":null}', 400, "bad-body"),
    (b'{"then":[GOOD],"else":null}', 400, "bad-body"),
    (b'{"ops":[GOOD]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"cas","key":"k"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","value_base64":"MQ=="}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value_base64":"MQ"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":1}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","tll":1}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","ttl":"1"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"get"}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"get","key":7}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"get","key":"\xff"}]}', 400, "bad-body"),
    (b'{"then":[GOOD],"else":[{"op":"delete","key":"k","ttl":1}]}', 400, "bad-body"),
    (b'{"then":[GOOD,GOOD]}', 400, "bad-body"),
    (b'{"then":[GOOD],"else":[{"op":"delete","key":"k"},{"op":"put","key":"k","value":""}]}', 400, "bad-body"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","ttl":0}]}', 400, "bad-ttl"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","ttl":-1}]}', 400, "bad-ttl"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"1","ttl":315360001}]}', 400, "bad-ttl"),
    (b'{"then":[GOOD,{"op":"get","key":""}]}', 400, "key-empty"),
    (b'{"then":[GOOD,{"op":"get","key":"%s"}]}' % (b"k" * 1025), 400, "key-too-long"),
    (b'{"then":[GOOD],"else":[{"op":"delete","key":"%s"}]}' % ("ä" * 513).encode(), 400, "key-too-long"),
    (b'{"then":[GOOD,{"op":"put","key":"k","value":"%s"}]}' % (b"v" * (MIB + 1)), 413, "value-too-large"),
    (b'{"then":[GOOD],"else":[{"op":"put","key":"k","value":"%s"}]}' % (b"v" * (MIB + 1)), 413, "value-too-large"),
    (b'{"if":[{"key":"","exists":false}],"then":[GOOD]}', 400, "key-empty"),
    (b'{"if":[{"lock":"%s","token":1}],"then":[GOOD]}' % (b"k" * 1025), 400, "key-too-long"),
    (b'{"if":[{}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k"}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","version":0}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","version":9007199254740992}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","version":"1"}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","version":1,"exists":true}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","exists":1}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","token":1}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"lock":"k"}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"lock":"k","token":-1}],"then":[GOOD]}', 400, "bad-body"),
    (b'{"if":[{"key":"k","value":"1"}],"then":[GOOD]}', 400, "bad-body"),
]


@pytest.mark.parametrize(("body", "status", "named"), BAD, ids=lambda part: str(part)[:60])
async def test_a_bad_body_is_refused_whole_and_nothing_is_written(calls: Calls, body: bytes, status: int, named: str):
    key = unique("txn-bad")
    body = body.replace(b"GOOD", b'{"op":"put","key":"%s","value":"good"}' % key.encode())
    assert code(await calls.txn(body)) == (status, named)
    await assert_absent(calls, [key])


async def test_a_key_written_twice_is_named(calls: Calls, keys: list[str]):
    reply = await calls.txn({"then": [put(keys[0]), put(keys[1]), delete(keys[0])]})
    assert code(reply) == (400, "bad-body")
    assert repr(keys[0]) in reply.json["detail"]


@pytest.mark.parametrize(
    "header", [{"if_match": "*"}, {"if_none_match": "*"}, {"lock_token": "1"}, {"idempotency_key": '""'}]
)
async def test_headers_that_are_not_heeded_are_refused(calls: Calls, header: dict[str, str]):
    key = unique("txn-bad")
    assert code(await calls.txn({"then": [put(key)]}, **header)) == (400, "bad-parameter")
    await assert_absent(calls, [key])


async def test_unknown_and_repeated_parameters_are_refused(calls: Calls):
    key = unique("txn-bad")
    body = b'{"then":[{"op":"put","key":"%s","value":""}]}' % key.encode()
    assert code(await calls.ask("POST", "/v1/txn?ttl=5", body)) == (400, "bad-parameter")
    assert code(await calls.ask("GET", "/v1/txn/1-2-3?wait=1")) == (400, "bad-parameter")
    lines = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    assert (await calls.ask("POST", "/v1/txn", body, lines)).status == 400
    await assert_absent(calls, [key])


async def test_any_content_type_is_taken_but_no_content_encoding(calls: Calls):
    key = unique("txn-type")
    body = b'{"then":[{"op":"put","key":"%s","value":""}]}' % key.encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=latin-1"):
        assert (await calls.ask("POST", "/v1/txn", body, [("Content-Type", kind)])).status == 200
    reply = await calls.ask("POST", "/v1/txn", body, [("Content-Encoding", "gzip")])
    assert code(reply) == (415, "content-encoding-refused")


@pytest.mark.parametrize(
    ("path", "method", "allowed"),
    [
        *(("/v1/txn", method, {"POST"}) for method in ("GET", "PUT", "DELETE", "PATCH")),
        *(("/v1/txn/1-2-3", method, {"GET", "HEAD"}) for method in ("POST", "PUT", "DELETE")),
    ],
)
async def test_another_method_is_405(calls: Calls, path: str, method: str, allowed: set[str]):
    reply = await calls.ask(method, path, b"{}")
    assert code(reply) == (405, "method-not-allowed")
    assert set(reply.headers["allow"].split(", ")) == allowed
