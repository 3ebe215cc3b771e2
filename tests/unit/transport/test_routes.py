"""The route table: what an entry says is what is found, decoded and refused; and no call is without right and keys."""

from __future__ import annotations

from typing import Annotated, Any, cast

import msgspec
import pytest
from aiohttp import web

from kvstore.config import Limits
from kvstore.controller import routes as of_controller
from kvstore.errors import BadBody, BadParameter, MethodNotAllowed, NoSuchRoute
from kvstore.router.routes.table import DEMO_ROUTES, PUBLIC_ROUTES
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import Head
from kvstore.transport.http.responses import Response
from kvstore.transport.http.routes import (
    NO_BODY,
    Body,
    Call,
    Content,
    Keys,
    Parameter,
    Right,
    Route,
    RouteTable,
    Success,
    Touches,
    example,
    flag,
    text,
)
from kvstore.transport.http.schema import about, fill, schemas_of

CONTROLLER_ROUTES = (*of_controller.MEMBER_ROUTES, *of_controller.CHANGE_ROUTES)
ALL_ROUTES = [*PUBLIC_ROUTES, *DEMO_ROUTES, *CONTROLLER_ROUTES]
by_name = {"ids": lambda route: f"{route.tag}: {route.method} {route.path}"}


@pytest.mark.parametrize("route", ALL_ROUTES, **by_name)
def test_a_call_says_which_right_it_needs_on_which_keys(route: Route) -> None:
    right, keys = route.touches
    assert isinstance(right, Right)
    assert isinstance(keys, Keys)
    if keys is Keys.PATH:
        assert [parameter.name for parameter in route.named("path")]
    if keys is Keys.PREFIX:
        assert "prefix" in [parameter.name for parameter in route.named("query")]
    if keys is Keys.BODY:
        assert route.body is not None
        assert route.body.content is not None
    if right is Right.NONE:
        assert keys is Keys.NONE


@pytest.mark.parametrize("route", ALL_ROUTES, **by_name)
def test_what_only_reads_needs_no_right_to_write_and_what_changes_something_needs_one(route: Route) -> None:
    changes = {Right.WRITE, Right.ADMIN, Right.PEER}
    if route.path == "/v1/recovery":
        assert route.touches.right is Right.ADMIN  # it shows the map of a whole cluster
    elif route.method == "GET":
        assert route.touches.right not in changes - {Right.PEER}
    else:
        assert route.touches.right in changes


@pytest.mark.parametrize("routes", [PUBLIC_ROUTES + DEMO_ROUTES, CONTROLLER_ROUTES], ids=["router", "controller"])
def test_no_call_is_listed_twice_and_each_has_a_name_of_its_own(routes: tuple[Route, ...]) -> None:
    assert len({(route.method, route.path) for route in routes}) == len(routes) == len({route.id for route in routes})


@pytest.mark.parametrize("route", ALL_ROUTES, **by_name)
def test_a_path_has_one_parameter_at_most_and_it_is_described(route: Route) -> None:
    named = [parameter.name for parameter in route.named("path")]
    assert named == [part.partition("}")[0] for part in route.path.split("{")[1:]]
    assert len(named) <= 1


# --- a small table ----------------------------------------------------------------------------------------------------


class Order(msgspec.Struct, forbid_unknown_fields=True):
    """At most {list_keys_max:,} of a thing."""

    count: Annotated[int, about(maximum="{list_keys_max}")] = 1


class Shop:
    async def show(self, call: Call) -> Response:
        return Response(200, repr((call.argument, dict(call.parameters), call.get("all"), call.get("after"))).encode())

    async def order(self, call: Call) -> Response:
        return Response(201, repr((call.argument, call.body.count, call.raw)).encode())

    async def close(self, call: Call) -> Response:
        return Response(204)


THING = Parameter("name", "path", str, example("a"))
WORD = Parameter("Lock-Token", "header", str, example("1"))
SHOP = (
    Route("GET", "/things/{name}", Shop.show, Touches(Right.READ, Keys.PATH), "show", "shop", "Show it",
          (Success(200, "It."),), parameters=(THING, flag("all", "All of it."), text("after", str, "b"))),
    Route("POST", "/things/{name}/order", Shop.order, Touches(Right.WRITE, Keys.PATH), "order", "shop", "Order it",
          (Success(201, "Done."),), parameters=(THING, WORD), body=Body(Content(Order, {}), 20, required=False)),
    Route("DELETE", "/things", Shop.close, Touches(Right.ADMIN, Keys.ALL), "close", "shop", "Close",
          (Success(204, "Closed."),), body=NO_BODY),
)  # fmt: skip


class Sent(BodyReader):
    def __init__(self, body: bytes) -> None:
        super().__init__(Limits())
        self._body = body

    async def read(self, *_: Any) -> bytes:
        return self._body


async def call(method: str, target: str, body: bytes = b"", **fields: str) -> Response:
    table = RouteTable(Limits(), Sent(body))
    table.add(Shop(), SHOP)
    path, _, query = target.partition("?")
    head = Head(method, path, query, {name.replace("_", "-"): value for name, value in fields.items()})
    entry, argument = table.find(path)
    reply = await table.answer(entry.method(method), argument, cast(web.BaseRequest, None), head)
    assert isinstance(reply, Response)
    return reply


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("/things/a", ("a", {}, False, "")),
        ("/things/a/b", ("a/b", {}, False, "")),
        ("/things/a/orders", ("a/orders", {}, False, "")),
        ("/things/?all=true", ("", {"all": True}, True, "")),
        ("/things/a?after=%C3%BC&all=false", ("a", {"after": "ü", "all": False}, False, "ü")),
    ],
)
async def test_a_call_is_found_and_its_parameters_are_decoded(target: str, found: tuple[Any, ...]) -> None:
    assert (await call("GET", target)).body == (await call("HEAD", target)).body == repr(found).encode()


async def test_a_suffix_is_found_before_the_rest_of_a_path() -> None:
    assert (await call("POST", "/things/a/b/order", b'{"count":2}')).body == repr(("a/b", 2, b'{"count":2}')).encode()
    with pytest.raises(MethodNotAllowed) as refused:
        await call("GET", "/things/a/order")
    assert refused.value.members["allow"] == ["POST"]


async def test_a_body_that_may_be_left_out_is_one_without_members() -> None:
    assert (await call("POST", "/things/a/order", b" ")).body == repr(("a", 1, b" ")).encode()


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"count":"1"}', b'{"colour":1}', b"\xff", b"[" * 100_000])
async def test_a_body_of_another_form_is_refused(body: bytes) -> None:
    with pytest.raises(BadBody):
        await call("POST", "/things/a/order", body)


async def test_a_body_that_names_a_member_twice_is_refused_by_the_members_name() -> None:
    with pytest.raises(BadBody, match="an object has the member 'count' 2 times; send it once"):
        await call("POST", "/things/a/order", b'{"count":1,"count":2}')


async def test_a_body_that_is_not_taken_is_refused() -> None:
    assert (await call("DELETE", "/things", b"\r\n")).status == 204
    with pytest.raises(BadBody):
        await call("DELETE", "/things", b"{}")


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/things/a?colour=red"), ("GET", "/things/a?all=true&all=true"), ("GET", "/things/a?all=yes"),
     ("DELETE", "/things?all=true"), ("GET", "/things/a?after=%ff")],
)  # fmt: skip
async def test_a_parameter_that_the_entry_does_not_name_or_that_is_malformed_is_refused(
    method: str, target: str
) -> None:
    with pytest.raises(BadParameter):
        await call(method, target)


@pytest.mark.parametrize("name", ["if_match", "if_none_match", "lock_token", "idempotency_key"])
async def test_a_header_that_would_change_a_write_is_refused_where_it_is_not_heeded(name: str) -> None:
    assert (await call("GET", "/things/a", **{name: "1"})).status == 200
    with pytest.raises(BadParameter, match=name.replace("_", "-")):
        await call("DELETE", "/things", **{name: "1"})
    if name == "lock_token":
        assert (await call("POST", "/things/a/order", **{name: "1"})).status == 201
    else:
        with pytest.raises(BadParameter, match=name.replace("_", "-")):
            await call("POST", "/things/a/order", **{name: "1"})


@pytest.mark.parametrize(("method", "path", "error"), [
    ("GET", "/thing", NoSuchRoute), ("GET", "/", NoSuchRoute), ("POST", "/things/a", MethodNotAllowed),
    ("GET", "/things", MethodNotAllowed), ("HEAD", "/things", MethodNotAllowed), ("get", "/things/a", MethodNotAllowed),
])  # fmt: skip
async def test_another_path_or_method_is_refused(method: str, path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await call(method, path)


def test_the_table_lists_each_route_once() -> None:
    table = RouteTable(Limits(), Sent(b""))
    table.add(Shop(), SHOP)
    assert {route.id for route in table.routes} == {"show", "order", "close"}
    assert len(table.routes) == 3


# --- schemas ----------------------------------------------------------------------------------------------------------


def test_a_schema_has_the_limits_that_are_configured() -> None:
    _, components = schemas_of([Order], Limits(list_keys_max=7_777))
    order = components["Order"]
    assert order["description"] == "At most 7,777 of a thing."
    assert order["properties"]["count"] == {"type": "integer", "maximum": 7777, "default": 1}
    assert order["additionalProperties"] is False


def test_only_the_names_of_limits_are_filled_in() -> None:
    assert (
        fill("GET /v1/txn/{id}: {list_keys_max:,} {nothing_max}", Limits()) == "GET /v1/txn/{id}: 10,000 {nothing_max}"
    )
    assert fill("{list_keys_max}", Limits()) == 10_000
