"""If-Match and If-None-Match on writes, as RFC 9110 and api.md have them, through real processes."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from kvstore.client import Client
from kvstore.errors import PreconditionFailed
from tests.cluster.actions import Reply
from tests.cluster.calls import Calls, code, unique
from tests.cluster.clusters import Cluster

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def key() -> str:
    return unique("cas")


async def created(calls: Calls, key: str) -> int:
    """The version of a new value, b"v"."""
    reply = await calls.put(key, b"v")
    assert reply.status == 201
    return int(reply.headers["etag"].strip('"'))


def failed(reply: Reply, version: int | None) -> bool:
    """412 with the current version, in the problem and as ETag; with neither where the key is absent."""
    assert code(reply) == (412, "precondition-failed")
    assert reply.json.get("version") == version
    assert reply.headers.get("etag") == (None if version is None else f'"{version}"')
    return True


# --- a key that is there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("if_match", "if_none_match", "holds"),
    [
        ('"{v}"', None, True),
        ('"{other}"', None, False),
        ("*", None, True),
        ('"{other}", "{v}"', None, True),
        ('"{other}","x","{v}"', None, True),
        ('W/"{v}"', None, False),
        ('W/"{v}", "{v}"', None, True),
        ('"x"', None, False),
        ('""', None, False),
        ('"0{v}"', None, False),
        (f'"{2**53}"', None, False),
        ('"' + "9" * 300 + '"', None, False),
        (None, "*", False),
        (None, '"{v}"', False),
        (None, 'W/"{v}"', False),
        (None, '"{other}"', True),
        (None, '"{other}", "{v}"', False),
        ('"{v}"', "*", False),
        ('"{v}"', '"{other}"', True),
        ('"{v}"', '"{v}"', False),
        ('"{other}"', '"{other}"', False),
        ("*", "*", False),
    ],
)
async def test_conditions_on_a_key_that_exists(
    calls: Calls, key: str, if_match: str | None, if_none_match: str | None, holds: bool
):
    version = await created(calls, key)
    fields = {
        "if_match": if_match and if_match.format(v=version, other=version + 1),
        "if_none_match": if_none_match and if_none_match.format(v=version, other=version + 1),
    }
    if not holds:
        assert failed(await calls.put(key, b"w", **fields), version)
        assert failed(await calls.delete(key, **fields), version)
        assert (await calls.get(key)).body == b"v"
        return
    replaced = await calls.put(key, b"w", **fields)
    assert replaced.status == 204
    assert int(replaced.headers["etag"].strip('"')) > version
    other = f"{key}/delete"
    version = await created(calls, other)
    fields = {
        "if_match": if_match and if_match.format(v=version, other=version + 1),
        "if_none_match": if_none_match and if_none_match.format(v=version, other=version + 1),
    }
    assert (await calls.delete(other, **fields)).status == 204
    assert (await calls.get(other)).status == 404


# --- a key that is not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("if_match", "if_none_match", "holds"),
    [
        ('"1"', None, False),
        ("*", None, False),
        (None, "*", True),
        (None, '"1"', True),
        ('"1"', "*", False),
    ],
)
async def test_conditions_on_a_key_that_does_not_exist(
    calls: Calls, key: str, if_match: str | None, if_none_match: str | None, holds: bool
):
    fields = {"if_match": if_match, "if_none_match": if_none_match}
    if holds:
        assert code(await calls.delete(key, **fields)) == (404, "not-found")
        assert (await calls.put(key, b"v", **fields)).status == 201
    else:
        assert failed(await calls.delete(key, **fields), None)
        assert failed(await calls.put(key, b"v", **fields), None)
        assert (await calls.get(key)).status == 404


async def test_a_deleted_key_is_absent_and_an_old_version_of_it_is_no_version(calls: Calls, key: str):
    first = await created(calls, key)
    await calls.delete(key, if_match=f'"{first}"')
    assert failed(await calls.put(key, b"w", if_match=f'"{first}"'), None)
    second = int((await calls.put(key, b"v", if_none_match="*")).headers["etag"].strip('"'))
    assert second > first
    assert failed(await calls.put(key, b"w", if_match=f'"{first}"'), second)


async def test_a_key_past_its_deadline_is_absent(calls: Calls, key: str):
    reply = await calls.ask("PUT", f"/v1/kv/{key}?ttl=0.2", b"v")
    version = reply.headers["etag"]
    await asyncio.sleep(0.21)  # that is what is tested: no reader has looked since
    assert failed(await calls.put(key, b"w", if_match=version), None)
    await calls.ask("PUT", f"/v1/kv/{key}/2?ttl=0.2", b"v")
    await asyncio.sleep(0.21)
    assert (await calls.put(f"{key}/2", b"w", if_none_match="*")).status == 201


# --- malformed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", ["", "7", "abc", '"7', '7"', "*, *", '*, "7"', '"7" "8"', "W/7", 'w/"7"', '"a b"', "'7'", "**", ","]
)
async def test_a_malformed_condition_is_400_with_the_mend_and_nothing_is_done(calls: Calls, key: str, field: str):
    await created(calls, key)
    for name in ("If-Match", "If-None-Match"):
        for method, body in (("PUT", b"w"), ("DELETE", None)):
            reply = await calls.ask(method, f"/v1/kv/{key}", body, [(name, field)])
            assert code(reply) == (400, "bad-condition")
            assert 'If-Match: "42"' in reply.json["next_step"]
    assert (await calls.get(key)).body == b"v"


async def test_a_condition_on_several_lines_is_one_list(calls: Calls, key: str):
    version = await created(calls, key)
    lines = [("If-Match", '"1"'), ("If-Match", f'"{version}"'), ("If-Match", '"2"')]
    assert (await calls.ask("PUT", f"/v1/kv/{key}", b"w", lines)).status == 204
    assert failed(await calls.ask("PUT", f"/v1/kv/{key}", b"x", lines), version + 1)
    for lines in ([("If-Match", "*")] * 2, [("If-None-Match", "*"), ("If-None-Match", '"1"')]):
        assert code(await calls.ask("PUT", f"/v1/kv/{key}", b"x", lines)) == (400, "bad-condition")


# --- locks and many clients -------------------------------------------------------------------------------------------


async def test_behind_a_lease_a_compare_and_set_is_refused_at_once_whatever_its_condition(calls: Calls, key: str):
    version = await created(calls, key)
    token = await calls.granted(key)
    began = time.monotonic()
    for fields in ({"if_match": f'"{version}"'}, {"if_match": '"1"'}, {"if_match": "*"}, {"if_none_match": "*"}):
        assert code(await calls.put(key, b"w", **fields)) == (423, "locked")
        assert code(await calls.delete(key, **fields)) == (423, "locked")
    assert time.monotonic() - began < 15
    assert failed(await calls.put(key, b"w", lock_token=token, if_none_match="*"), version)
    assert (await calls.put(key, b"w", lock_token=token, if_match=f'"{version}"')).status == 204


async def test_of_many_that_create_at_once_one_succeeds(calls: Calls, key: str):
    replies = await asyncio.gather(*(calls.put(key, b"%d" % n, if_none_match="*") for n in range(50)))
    (winner,) = [number for number, reply in enumerate(replies) if reply.status == 201]
    etag = replies[winner].headers["etag"]
    assert all(reply.headers["etag"] == etag for reply in replies)
    assert (await calls.get(key)).body == b"%d" % winner


async def test_of_many_that_replace_one_version_at_once_one_succeeds(calls: Calls, key: str):
    etag = f'"{await created(calls, key)}"'
    for round_number in range(5):
        replies = await asyncio.gather(*(calls.put(key, b"%d" % n, if_match=etag) for n in range(32)))
        assert sorted(reply.status for reply in replies) == [204] + [412] * 31, round_number
        (etag,) = {reply.headers["etag"] for reply in replies}


async def test_updates_of_one_counter_by_many_clients_are_all_counted(cluster: Cluster, key: str):
    async with Client(cluster.url) as kv:

        async def increment() -> None:
            for _ in range(5):
                await kv.update(key, lambda value: b"%d" % (int(value or b"0") + 1), tries_max=1000)

        await asyncio.gather(*(increment() for _ in range(20)))
        item = await kv.get(key)
        assert item is not None
        assert item.value == b"100"


async def test_the_clients_conditions_say_no_with_the_current_version(cluster: Cluster, key: str):
    async with Client(cluster.url) as kv:
        version = await kv.put(key, b"v", if_absent=True)
        with pytest.raises(PreconditionFailed) as caught:
            await kv.put(key, b"w", if_absent=True)
        assert caught.value.members["version"] == version
        second = await kv.put(key, b"w", if_version=version)
        with pytest.raises(PreconditionFailed):
            await kv.delete(key, if_version=version)
        assert await kv.delete(key, if_version=second)
        with pytest.raises(PreconditionFailed) as caught:
            await kv.put(key, b"w", if_version=second)
        assert "version" not in caught.value.members


async def test_an_update_that_never_wins_gives_up_and_an_error_of_the_function_ends_it(cluster: Cluster, key: str):
    numbers = itertools.count()
    async with Client(cluster.url) as kv, Client(cluster.url) as rival:
        await kv.put(key, b"0")

        async def outrun(tries_max: int) -> None:
            tasks = []

            def change(value: bytes | None) -> bytes:
                tasks.append(None)
                return b"mine"

            original = kv.put

            async def late_put(*args, **kwargs):
                await rival.put(key, b"%d" % next(numbers))
                return await original(*args, **kwargs)

            kv.put = late_put  # type: ignore[method-assign]
            try:
                with pytest.raises(PreconditionFailed):
                    await kv.update(key, change, tries_max=tries_max)
            finally:
                kv.put = original  # type: ignore[method-assign]
            assert len(tasks) == tries_max

        await outrun(3)

        def fail(value: bytes | None) -> bytes:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await kv.update(key, fail)
        item = await kv.get(key)
        assert item is not None
        assert item.value == b"2"
