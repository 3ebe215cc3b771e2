"""Transactions that are sent again, and looked up: the first answer, and no second effect."""

from __future__ import annotations

import asyncio

import pytest

from tests.cluster.actions import Reply
from tests.cluster.calls import Calls, code
from tests.cluster.transactions import assert_absent, delete, done, get, put, values_of, version_of

pytestmark = pytest.mark.timeout(90)


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
