"""Which answers wait for room, which are refused, and how pages are made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import aiohttp
import pytest

from kvstore.config import Limits, default_config
from kvstore.errors import Unavailable
from kvstore.protocol import Get
from kvstore.router.app import RouterApp
from kvstore.router.controller_client import Controller
from kvstore.router.large_values import LargeValues
from kvstore.router.listing import Listing
from kvstore.router.page_json import encode_page
from kvstore.router.routes.keys import KEY_ROUTES, KeyRoutes
from kvstore.router.service import Routed, RouterService
from kvstore.transport.answers import LARGE_BYTES, AnswerAccount, Turns
from kvstore.transport.http.requests import Head
from kvstore.transport.http.responses import BINARY, Response
from tests.unit.router import calls
from tests.unit.router.fake_shards import all_follow, all_on, make_service, shards
from tests.unit.store.harness import turns_counted

SIZE = 100_000


def make_app(**limits: Any) -> RouterApp:
    config = default_config()
    settings = Limits(**limits)
    app = RouterApp(
        "0", RouterService(config.limits, cast(aiohttp.ClientSession, None)), config, cast(Controller, None)
    )
    app.answers.__init__(settings)  # type: ignore[misc]
    return app


@pytest.mark.parametrize(("has_to_go", "status"), [(True, 200), (False, 429)])
async def test_an_answer_without_room_may_be_refused_only_if_nothing_was_written(has_to_go: bool, status: int) -> None:
    app = make_app(answer_bytes_in_flight_max=SIZE, answer_wait_s=0.05)
    assert app.answers.try_reserve(SIZE)
    response = Response(200, bytes(SIZE), BINARY)
    response.has_to_go = has_to_go
    admitted = await app._admit_answer(response)
    assert admitted.status == status
    assert app.answers.under_way_bytes == SIZE + admitted.reserved == (2 * SIZE if has_to_go else SIZE)


async def test_an_answer_waits_for_room() -> None:
    app = make_app(answer_bytes_in_flight_max=SIZE, answer_wait_s=60.0)
    assert app.answers.try_reserve(SIZE)
    waiting = asyncio.create_task(app._admit_answer(Response(200, bytes(SIZE), BINARY)))
    await asyncio.sleep(0)
    assert not waiting.done()
    app.answers.release(SIZE)
    assert (await asyncio.wait_for(waiting, 60)).reserved == SIZE


class Counted(LargeValues):
    """Knows how many large values of pages were on their way at once, and does `before` each."""

    def __init__(self, service: RouterService) -> None:
        super().__init__(service)
        self.under_way = self.most = 0
        self.before: Callable[[], None] = lambda: None

    async def bring(self, key: str, shard_id: str) -> Routed:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.before()
        try:
            await asyncio.sleep(0.001)
            return await super().bring(key, shard_id)
        finally:
            self.under_way -= 1


async def _as_it_is(response: Response) -> Response:
    return response


class Values:
    """Large values of one shard, and `GET`s of them that count how often they are brought."""

    def __init__(self, room_bytes: int) -> None:
        self.service = make_service()
        all_follow(self.service, all_on(1, "s1"))
        limits = Limits(answer_bytes_in_flight_max=room_bytes, answer_wait_s=60.0)
        self.account = AnswerAccount(limits)
        self.large = Counted(self.service)
        self._routes = KeyRoutes(self.service, AnswerAccount(Limits()), self.account, _as_it_is, self.large)
        shards["s1"].data |= {f"k{number}": bytes(SIZE) for number in range(8)}

    @property
    def brought(self) -> list[str]:
        """The keys whose values were asked for whatever their size."""
        return [ask.key for ask in shards["s1"].asked if isinstance(ask, Get) and not ask.bytes_max]

    def get(self, key: str, **fields: str) -> asyncio.Task[Any]:
        head = Head("GET", f"/v1/kv/{key}", "", fields)
        return asyncio.create_task(calls.answer(self._routes, KEY_ROUTES, head, limits=Limits()))

    async def page(self, query: str) -> dict[str, Any]:
        response = await calls.answer(
            self._routes, KEY_ROUTES, Head("GET", "/v1/kv", f"values=true&{query}", {}), limits=Limits()
        )
        document: dict[str, Any] = json.loads(bytes(response.body))
        return document


@pytest.mark.usefixtures("fake_channels")
async def test_large_values_of_pages_are_brought_one_at_a_time_and_smaller_ones_with_their_page() -> None:
    values = Values(room_bytes=100 * SIZE)
    shards["s1"].data["k2"] = b"small"
    pages = await asyncio.wait_for(asyncio.gather(*(values.page("prefix=k") for _ in range(3))), 60)
    for page in pages:
        assert [(item["key"], len(item["value"])) for item in page["items"]] == [
            (f"k{number}", 5 if number == 2 else SIZE) for number in range(8)
        ]
    assert "k2" not in values.brought
    assert values.large.most == 1


@pytest.mark.usefixtures("fake_channels")
async def test_a_large_value_of_a_page_is_as_it_is_when_it_is_brought_and_left_out_when_it_is_gone() -> None:
    values = Values(room_bytes=100 * SIZE)

    def change() -> None:
        shards["s1"].data["k1"] = b"another"
        shards["s1"].data.pop("k3", None)

    values.large.before = change
    items = (await values.page("prefix=k"))["items"]
    assert [item["key"] for item in items] == ["k0", "k1", "k2", "k4", "k5", "k6", "k7"]
    assert items[1]["value"] == "another"


@pytest.mark.usefixtures("fake_channels")
async def test_a_partial_page_names_the_partition_of_a_large_value_whose_shard_went_down_meanwhile() -> None:
    values = Values(room_bytes=100 * SIZE)

    def go_down() -> None:
        values.service.table.channels["s1"].error = Unavailable("away")  # type: ignore[attr-defined]

    values.large.before = go_down
    page = await values.page("prefix=k&partial=true")
    assert page["items"] == []
    assert page["missing"] == sorted({values.service.table.partition_of(f"k{number}") for number in range(8)})
    values.service.table.channels["s1"].error = None  # type: ignore[attr-defined]
    with pytest.raises(Unavailable):
        await values.page("prefix=k")


@pytest.mark.usefixtures("fake_channels")
async def test_a_large_value_is_brought_once_there_is_room_for_its_answer_which_has_it_until_it_is_written() -> None:
    values = Values(room_bytes=SIZE)
    assert LARGE_BYTES < SIZE
    assert values.account.try_reserve(1)
    getting = values.get("k0")
    await asyncio.sleep(0.05)
    assert not values.brought
    values.account.release(1)
    response = await asyncio.wait_for(getting, 60)
    assert (response.status, response.body, response.reserved) == (200, bytes(SIZE), SIZE)
    assert values.account.under_way_bytes == SIZE


@pytest.mark.usefixtures("fake_channels")
async def test_of_many_large_values_few_are_on_their_way_at_once() -> None:
    values = Values(room_bytes=100 * SIZE)
    most = 0

    def note() -> None:
        nonlocal most
        most = max(most, len(values.brought) - sum(task.done() for task in getting))

    shards["s1"].before_answer = [note] * 16
    getting = [values.get(f"k{number}") for number in range(8)]
    responses = await asyncio.wait_for(asyncio.gather(*getting), 60)
    assert [response.body for response in responses] == [bytes(SIZE)] * 8
    assert 0 < most <= 2 + 1  # one that was answered may not have noticed


@pytest.mark.usefixtures("fake_channels")
async def test_a_large_value_that_is_gone_when_it_is_brought_is_not_found_and_leaves_nothing_reserved() -> None:
    values = Values(room_bytes=SIZE)
    shards["s1"].before_answer = [lambda: None, lambda: shards["s1"].data.clear()]
    response = await values.get("k0")
    assert (response.status, values.account.under_way_bytes) == (404, response.reserved)
    assert response.reserved < SIZE


async def test_the_answer_to_a_head_request_takes_no_room() -> None:
    app = make_app()
    response = Response(200, bytes(SIZE), BINARY, head_only=True)
    assert (await app._admit_answer(response)).reserved == 0


async def test_others_have_their_turn_while_a_large_page_is_made() -> None:
    page = Listing([(f"k{number:03}", number, bytes(100_000), 0) for number in range(40)], "k039")
    async with turns_counted() as turns:
        document = json.loads(bytes(await encode_page(page, values=True, partial=False, turns=Turns())))
    assert len(turns) >= 40
    assert [item["key"] for item in document["items"]] == [item[0] for item in page.items]


async def test_a_page_has_what_was_asked_for() -> None:
    page = Listing([("a", 1, b"text", 1500), ("b", 2, b"\xff", 0)], None)
    assert json.loads(bytes(await encode_page(page, values=True, partial=False, turns=Turns()))) == {
        "items": [
            {"key": "a", "version": 1, "value": "text", "ttl": 1.5},
            {"key": "b", "version": 2, "value_base64": "/w=="},
        ],
        "next": None,
    }
    empty = await encode_page(Listing([], None), values=False, partial=False, turns=Turns())
    assert json.loads(bytes(empty)) == {"items": [], "next": None}
    gaps = await encode_page(Listing([], "b", 0b101), values=False, partial=True, turns=Turns())
    assert {name: value for name, value in json.loads(bytes(gaps)).items() if name != "next"} == {
        "items": [],
        "missing": [0, 2],
    }


def test_a_page_is_cut_at_its_bytes_and_goes_on_behind_its_last_key() -> None:
    page = Listing([(key, 1, bytes(10), 0) for key in "abcd"], None)
    assert page.cut(22) == (Listing(page.items[:2], "b"), 22)
    assert page.cut(23) == (Listing(page.items[:3], "c"), 33)
    assert page.cut(44) == (page, 44)
    assert page._replace(missing=5).cut(22)[0].missing == 5
