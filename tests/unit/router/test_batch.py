"""POST /v1/batch: refused whole or done one by one, in order, with a bounded window of operations under way."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from kvstore.config import Limits
from kvstore.errors import BadBody, KvError, OutcomeUnknown, TooManyRequests, Unavailable, ValueTooLarge
from kvstore.protocol import Answer, Delete, Get, Put
from kvstore.router.batch import BatchBody, parse_batch, run_batch
from kvstore.router.json_ops import check_value_size, decode_value, encode_value
from kvstore.router.large_values import LargeValues
from kvstore.router.service import Routed, RouterService
from kvstore.transport.answers import LARGE_BYTES, AnswerAccount, Room
from tests.unit.router.calls import decoded
from tests.unit.router.fake_shards import all_follow, all_on, halves, key_of, shards, with_move

LIMITS = Limits(key_bytes_max=10, value_bytes_max=100, ttl_s_max=1000)


def parse(*ops: Any) -> Any:
    return parse_with(LIMITS, *ops)


def parse_with(limits: Limits, *ops: Any) -> Any:
    return parse_batch(decoded(BatchBody, json.dumps({"ops": ops}).encode()), limits)


# --- the body ---------------------------------------------------------------------------------------------------------


def test_each_operation_becomes_the_request_that_it_says() -> None:
    steps = parse(
        {"op": "put", "key": "a", "value": "ü"},
        {"op": "put", "key": "b", "value_base64": "/wA=", "ttl": 1.5},
        {"op": "put", "key": "c", "value": ""},
        {"op": "get", "key": "d"},
        {"op": "delete", "key": "e/🔑"},
    )
    assert [step.request for step in steps] == [
        Put(0, "a", "ü".encode()),
        Put(0, "b", b"\xff\x00", 1500),
        Put(0, "c", b""),
        Get(0, "d", LARGE_BYTES),
        Delete(0, "e/🔑"),
    ]
    assert [step.error for step in steps] == [None] * 5


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"ops":{}}',
        b'{"ops":[]}',
        b"{}",
        b'{"ops":[{"op":"get","key":"a"}],"opts":1}',
        b'{"ops":[{"op":"get","key":"a"}]} and more',
        b'{"ops":[{"op":"get","key":"a"},',
        b'\xef\xbb\xbf{"ops":[{"op":"get","key":"a"}]}',
        b'{"ops":[{"op":"get","key":"\xff"}]}',
        b'{"ops":[{"op":"get","key":"\\ud800"}]}',
        b'{"ops":[{"op":"get","key":"\\ud800\\u0041"}]}',
        b'{"ops":[' * 100_000,
        b"[" * 100_000,
    ],
)
def test_a_body_that_is_not_well_formed_is_refused_whole(body: bytes) -> None:
    with pytest.raises(BadBody):
        parse_batch(decoded(BatchBody, body), LIMITS)


@pytest.mark.parametrize(
    "op",
    [
        {"op": "put", "key": "a"},
        {"op": "put", "key": "a", "value": "x", "value_base64": "eA=="},
        {"op": "put", "key": "a", "value": None},
        {"op": "put", "key": "a", "value": 7},
        {"op": "put", "key": "a", "value": ["x"]},
        {"op": "put", "key": 7, "value": "x"},
        {"op": "put", "value": "x"},
        {"op": "put", "key": "a", "value": "x", "tll": 5},
        {"op": "put", "key": "a", "value": "x", "ttl": "5"},
        {"op": "put", "key": "a", "value": "x", "ttl": None},
        {"op": "put", "key": "a", "value": "x", "ttl": True},
        {"op": "put", "key": "a", "value_base64": "eA"},
        {"op": "put", "key": "a", "value_base64": "e A=="},
        {"op": "put", "key": "a", "value_base64": "____"},
        {"op": "put", "key": "a", "value_base64": "é==="},
        {"op": "get", "key": "a", "value": "x"},
        {"op": "delete", "key": "a", "ttl": 1},
        {"op": "swap", "key": "a"},
        {"op": "PUT", "key": "a", "value": "x"},
        {"key": "a"},
        {"op": "get"},
        "get a",
        None,
    ],
)
def test_one_operation_that_is_not_well_formed_refuses_all(op: Any) -> None:
    with pytest.raises(BadBody):
        parse({"op": "get", "key": "good"}, op)


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"1e400", b"-", b"0x5", b"05"])
def test_a_number_that_is_none_refuses_all(literal: bytes) -> None:
    with pytest.raises(BadBody):
        parse_batch(decoded(BatchBody, b'{"ops":[{"op":"put","key":"a","value":"x","ttl":' + literal + b"}]}"), LIMITS)


@pytest.mark.parametrize(
    ("op", "code"),
    [
        ({"op": "get", "key": ""}, "key-empty"),
        ({"op": "delete", "key": "k" * 11}, "key-too-long"),
        ({"op": "put", "key": "üüüüüü", "value": ""}, "key-too-long"),
        ({"op": "put", "key": "a", "value": "v" * 101}, "value-too-large"),
        ({"op": "put", "key": "a", "value": "ü" * 51}, "value-too-large"),
        ({"op": "put", "key": "a", "value": "x", "ttl": 0}, "bad-ttl"),
        ({"op": "put", "key": "a", "value": "x", "ttl": -1}, "bad-ttl"),
        ({"op": "put", "key": "a", "value": "x", "ttl": 1000.001}, "bad-ttl"),
        ({"op": "put", "key": "a", "value": "x", "ttl": 1e300}, "bad-ttl"),
    ],
)
def test_a_well_formed_operation_that_cannot_be_done_fails_alone(op: Any, code: str) -> None:
    first, bad, last = parse({"op": "get", "key": "a"}, op, {"op": "get", "key": "b"})
    assert (bad.request, bad.error.code, bad.key) == (None, code, op["key"])
    assert first.request == Get(0, "a", LARGE_BYTES)
    assert last.request == Get(0, "b", LARGE_BYTES)


@pytest.mark.parametrize(
    ("ttl", "ms"), [(0.0001, 1), (0.001, 1), (0.0011, 2), (1, 1000), (1.1, 1101), (1000, 1_000_000)]
)
def test_a_ttl_is_rounded_up_to_milliseconds_so_that_it_never_ends_early(ttl: float, ms: int) -> None:
    (step,) = parse({"op": "put", "key": "a", "value": "x", "ttl": ttl})
    assert ms - 1 <= step.request.ttl_ms <= ms
    assert step.request.ttl_ms >= ttl * 1000 - 1e-6


@given(st.binary(max_size=40))
def test_any_bytes_survive_their_way_through_json(value: bytes) -> None:
    document = json.loads(msgspec.json.encode(encode_value(value)))
    (name,) = document
    assert name == ("value" if _is_utf8(value) else "value_base64")
    (step,) = parse({"op": "put", "key": "a", **document})
    assert step.request.value == value


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


@given(st.binary(max_size=20))
def test_text_may_come_as_base64_too(value: bytes) -> None:
    assert decode_value(UNSET, base64.b64encode(value).decode(), "here") == value


def test_a_value_of_the_limit_is_not_too_large() -> None:
    check_value_size(100, LIMITS)
    with pytest.raises(ValueTooLarge) as refused:
        check_value_size(101, LIMITS)
    assert refused.value.members["bytes_max"] == 100


# --- doing it ---------------------------------------------------------------------------------------------------------


class FakeService:
    """Keys in a dictionary; answers come when the test says so, or at once. Counts what is under way."""

    def __init__(self, *, at_once: bool = True) -> None:
        self.data: dict[str, bytes] = {}
        self.begun: list[Any] = []
        self.at_once = at_once
        self.waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self.under_way = 0
        self.most_under_way = 0
        self.refuses: dict[str, KvError] = {}
        self.fails: dict[str, KvError] = {}
        self.problems: dict[str, KvError] = {}

    def begin(self, request: Any) -> Any:
        if request.key in self.refuses:
            raise self.refuses[request.key]
        self.begun.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, future))
        if self.at_once:
            asyncio.get_running_loop().call_soon(self.answer, len(self.waiting) - 1)
        return future, None, 0

    def answer(self, number: int) -> None:
        request, future = self.waiting[number]
        if request.key in self.fails:
            future.set_exception(self.fails[request.key])
        else:
            future.set_result(self._do(request))

    def _do(self, request: Any) -> Answer:
        if request.key in self.problems:
            error = self.problems[request.key]
            return Answer(request.id, error.status, problem=error.problem())
        if isinstance(request, Put):
            status = 204 if request.key in self.data else 201
            self.data[request.key] = request.value
            return Answer(request.id, status, 5)
        if isinstance(request, Delete):
            return Answer(request.id, 204 if self.data.pop(request.key, None) is not None else 404, 6)
        value = self.data.get(request.key)
        if value is not None and 0 < request.bytes_max < len(value):
            return Answer(request.id, 200, 7, left_out_bytes=len(value))
        return Answer(request.id, 404) if value is None else Answer(request.id, 200, 7, value, 1500)

    def is_moving(self, partition: int) -> bool:
        return False

    def is_owner(self, channel: Any, partition: int) -> bool:
        return True

    async def ask(self, request: Any) -> Routed:
        return await self.settle(request, *self.begin(request))

    async def settle(self, request: Any, future: asyncio.Future[Any], channel: Any, partition: int) -> Routed:
        try:
            return Routed(await future, "s1", partition)
        finally:
            self.under_way -= 1


async def run(service: FakeService, *ops: Any, **limits: Any) -> list[Any]:
    settings = Limits(**{"value_bytes_max": 100, **limits})
    steps = parse_with(settings, *ops)
    async with Room(AnswerAccount(settings)) as room:
        results = run_batch(service, steps, settings, room, LargeValues(service))  # type: ignore[arg-type]
        return [json.loads(result) async for result in results]


async def test_results_are_in_the_order_of_the_operations() -> None:
    service = FakeService()
    service.data = {"old": b"1", "bytes": b"\xff"}
    results = await run(
        service,
        {"op": "put", "key": "new", "value": "x"},
        {"op": "get", "key": "old"},
        {"op": "get", "key": ""},
        {"op": "get", "key": "bytes"},
        {"op": "delete", "key": "old"},
        {"op": "delete", "key": "never"},
    )
    assert results[0] == {"status": 201, "key": "new", "version": 5}
    assert results[1] == {"status": 200, "key": "old", "version": 7, "value": "1", "ttl": 1.5}
    assert (results[2]["status"], results[2]["code"], results[2]["key"]) == (400, "key-empty", "")
    assert results[3]["value_base64"] == "/w=="
    assert results[4] == {"status": 204, "key": "old", "version": 6}
    assert (results[5]["status"], results[5]["code"]) == (404, "not-found")
    assert "never" in results[5]["detail"]


async def test_an_operation_that_fails_fails_alone_wherever_it_does() -> None:
    service = FakeService()
    service.refuses = {"full": TooManyRequests("full", retry_after_ms=100)}
    service.fails = {"lost": OutcomeUnknown("lost"), "down": Unavailable("down", shard="s1", retry_after_ms=1000)}
    service.problems = {"large": ValueTooLarge("large", bytes_max=3)}
    keys = ["a", "full", "b", "lost", "down", "large", "c"]
    results = await run(service, *({"op": "put", "key": key, "value": ""} for key in keys))
    assert [result["status"] for result in results] == [201, 429, 201, 504, 503, 413, 201]
    assert [result["key"] for result in results] == keys
    assert (results[1]["code"], results[1]["retry_after_ms"]) == ("too-many-requests", 100)
    assert results[4]["shard"] == "s1"
    assert results[5]["bytes_max"] == 3


async def test_operations_are_begun_in_order_and_together() -> None:
    service = FakeService(at_once=False)
    doing = asyncio.create_task(run(service, *({"op": "get", "key": str(number)} for number in range(5))))
    while len(service.begun) < 5:
        await asyncio.sleep(0)
    assert [request.key for request in service.begun] == list("01234")
    for number in (4, 2, 0, 1, 3):
        service.answer(number)
    assert [result["key"] for result in await doing] == list("01234")


async def test_no_more_operations_are_under_way_than_the_window_takes() -> None:
    service = FakeService()
    results = await run(service, *({"op": "delete", "key": str(n)} for n in range(50)), batch_window_ops=7)
    assert len(results) == 50
    assert service.most_under_way == 7


async def test_no_more_bytes_are_under_way_than_the_window_takes_and_a_get_counts_as_a_large_value() -> None:
    service = FakeService()
    puts = ({"op": "put", "key": str(n), "value": "v" * 36} for n in range(20))
    await run(service, *puts, batch_window_bytes=500)
    assert service.most_under_way == 5
    service = FakeService()
    await run(service, *({"op": "get", "key": str(n)} for n in range(20)), batch_window_bytes=500)
    assert service.most_under_way == 5


async def test_an_operation_larger_than_the_window_is_done_alone() -> None:
    service = FakeService()
    results = await run(
        service, *({"op": "put", "key": str(n), "value": "v" * 90} for n in range(3)), batch_window_bytes=10
    )
    assert [result["status"] for result in results] == [201] * 3
    assert service.most_under_way == 1


async def test_a_batch_that_is_given_up_has_begun_no_more_than_its_window() -> None:
    service = FakeService()
    steps = parse_batch(
        decoded(BatchBody, json.dumps({"ops": [{"op": "get", "key": str(n)} for n in range(100)]}).encode()), Limits()
    )
    room = Room(AnswerAccount(Limits()))
    large = LargeValues(service)
    results = run_batch(service, steps, Limits(batch_window_ops=3), room, large)  # type: ignore[arg-type]
    await anext(results)
    await results.aclose()
    assert len(service.begun) <= 4


async def test_gets_wait_for_room_and_leave_it_as_their_values_are_known() -> None:
    service = FakeService(at_once=False)
    settings = Limits(value_bytes_max=100, answer_bytes_in_flight_max=250)
    steps = parse_batch(
        decoded(BatchBody, json.dumps({"ops": [{"op": "get", "key": str(n)} for n in range(4)]}).encode()), settings
    )
    account = AnswerAccount(settings)
    async with Room(account) as room:
        results = run_batch(service, steps, settings, room, LargeValues(service))  # type: ignore[arg-type]
        first = asyncio.create_task(anext(results))  # type: ignore[arg-type]
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(service.begun) == 2, "a third would not have room if its value were large"
        assert account.under_way_bytes == 200
        service.answer(0)
        service.answer(1)
        known = len(await first)
        await asyncio.sleep(0)
        assert account.under_way_bytes < 100 + known, "they are small"
        await results.aclose()
    assert account.under_way_bytes == 0


async def test_a_large_value_is_asked_for_when_its_result_is_due_and_has_room_for_what_its_json_takes() -> None:
    service = FakeService()
    service.data = {str(n): b"\xff" * LARGE_BYTES * 2 for n in range(3)}
    settings = Limits(answer_bytes_in_flight_max=4 * LARGE_BYTES)
    steps = parse_with(settings, *({"op": "get", "key": str(n)} for n in range(3)))
    account = AnswerAccount(settings)
    async with asyncio.timeout(60), Room(account) as room:
        results = run_batch(service, steps, settings, room, LargeValues(service))  # type: ignore[arg-type]
        for number in range(3):
            result = await anext(results)
            assert base64.b64decode(json.loads(result)["value_base64"]) == service.data[str(number)]
            whole = [request.key for request in service.begun if not request.bytes_max]
            assert whole == [str(n) for n in range(number + 1)], "each after the ones before were taken"
            assert len(result) <= account.under_way_bytes
            room.change(-len(result))
    assert account.under_way_bytes == 0


async def test_a_write_waits_for_the_gets_of_its_key_before_it_which_may_ask_again() -> None:
    service = FakeService()
    service.data = {"a": b"\xff" * LARGE_BYTES * 2, "b": b""}
    ops = [{"op": "get", "key": "a"}, {"op": "get", "key": "b"}, {"op": "put", "key": "a", "value": "new"}]
    results = await run(service, *ops, value_bytes_max=LARGE_BYTES * 4)
    assert "value_base64" in results[0], "not the value that was written after it"
    assert service.data["a"] == b"new"


async def test_a_get_waits_for_the_writes_of_its_key_before_it_which_no_reader_sees_until_they_are_durable() -> None:
    service = FakeService(at_once=False)
    ops = [{"op": "put", "key": "a", "value": "1"}, {"op": "get", "key": "b"}, {"op": "get", "key": "a"}]
    running = asyncio.create_task(run(service, *ops))
    await asyncio.sleep(0.01)
    assert [request.key for request in service.begun] == ["a", "b"]
    service.answer(0)
    async with asyncio.timeout(60):
        while len(service.begun) < 3:
            await asyncio.sleep(0)
    service.answer(1)
    service.answer(2)
    assert (await running)[2]["value"] == "1"


async def test_a_get_without_room_fails_alone() -> None:
    service = FakeService()
    settings = Limits(value_bytes_max=100, answer_bytes_in_flight_max=50, answer_wait_s=1.0)
    ops = [*({"op": "get", "key": str(n)} for n in range(20)), {"op": "put", "key": "b", "value": "x"}]
    steps = parse_with(settings, *ops)
    account = AnswerAccount(settings)
    account.charge(1)
    async with asyncio.timeout(10), Room(account) as room:  # they wait for room once, not each for itself
        done = run_batch(service, steps, settings, room, LargeValues(service))  # type: ignore[arg-type]
        results = [json.loads(result) async for result in done]
    assert [result["status"] for result in results] == [429] * 20 + [201]


# --- while partitions change hands ------------------------------------------------------------------------------------

KEY = key_of("s1")


def puts(count: int) -> list[Any]:
    return [{"op": "put", "key": KEY, "value": str(number)} for number in range(count)]


async def test_every_operation_of_a_batch_follows_its_key(service: RouterService) -> None:
    ops = [{"op": "put", "key": str(number), "value": "x"} for number in range(50)]
    shards["s1"].fence(*(op["key"] for op in ops))
    doing = asyncio.create_task(run(service, *ops))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    all_follow(service, all_on(2, "s2"))
    assert [result["status"] for result in await doing] == [201] * 50
    assert len(shards["s2"].data) == 50


@pytest.mark.parametrize("window", [1, 2, 3, 10])
@pytest.mark.parametrize("moves_before", range(8))
async def test_writes_to_one_key_are_done_in_their_order_while_it_moves(
    service: RouterService, window: int, moves_before: int
) -> None:
    """It leaves after so many operations have reached its owner; those that come later are bounced."""

    def moves() -> None:
        shards["s1"].map = all_on(2, "s2")
        asyncio.get_running_loop().call_soon(all_follow, service, all_on(2, "s2"))

    shards["s1"].before_answer = [lambda: None] * moves_before + [moves]
    await run(service, *puts(8), batch_window_ops=window)  # type: ignore[arg-type]
    order = [request.value for shard in shards.values() for request in shard.asked if isinstance(request, Put)]
    last = shards["s2"].data.get(KEY) or shards["s1"].data.get(KEY)
    assert last == b"7", order


async def test_while_its_partition_may_move_at_any_time_a_write_waits_for_the_one_before(
    service: RouterService,
) -> None:
    all_follow(service, with_move(halves(2), KEY))
    shards["s1"].before_answer = [lambda: shards["s1"].fence(KEY), shards["s1"].fenced.clear]
    results = await run(service, *puts(3), {"op": "put", "key": key_of("s2"), "value": "x"})  # type: ignore[arg-type]
    assert [result["status"] for result in results] == [201] * 4
    assert shards["s1"].data[KEY] == b"2"
