"""Transactions beside leases: who is kept out, what a guard opens, and what a stale token does."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster.calls import Calls, code
from tests.cluster.transactions import assert_absent, delete, done, get, put, values_of

pytestmark = pytest.mark.timeout(90)


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
