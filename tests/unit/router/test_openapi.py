"""The OpenAPI document: valid, and the same routes, parameters, codes and limits as the code beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import aiohttp
import jsonschema
import msgspec
import openapi_spec_validator
import pytest

from kvstore.config import Limits, default_config
from kvstore.errors import BadRequest, ValueTooLarge, all_errors
from kvstore.router.app import RouterApp
from kvstore.router.batch import BatchBody, parse_batch
from kvstore.router.controller_client import Controller
from kvstore.router.decode import decode_once, decode_tags
from kvstore.router.openapi import openapi_json
from kvstore.router.routes.batch import OPERATION_ERRORS
from kvstore.router.routes.locks import AcquireBody, check_acquire
from kvstore.router.routes.table import DEMO_ROUTES, PUBLIC_ROUTES
from kvstore.router.routes.txn import TxnBody, parse_transaction
from kvstore.router.service import RouterService
from kvstore.transport.http.requests import Head
from tests.unit.router.calls import decoded

KEY_ROUTE, LOCK_ROUTE = "/v1/kv/{key}", "/v1/locks/{name}"
LIMITS = Limits(
    key_bytes_max=77, value_bytes_max=7_777, body_bytes_max=77_777, ttl_s_max=777_777, list_keys_max=777,
    owner_bytes_max=7, lock_ttl_s_max=7_770, lock_wait_s_max=70, idempotency_kept_s=770.5,
)  # fmt: skip
DOCUMENT: dict[str, Any] = json.loads(openapi_json(LIMITS, PUBLIC_ROUTES))
METHODS = {"get", "head", "put", "post", "delete", "options", "patch", "trace"}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for method in METHODS & item.keys():
            yield path, method.upper(), item[method]


def resolve(part: dict[str, Any]) -> dict[str, Any]:
    found = part
    for step in part.get("$ref", "#")[1:].split("/")[1:]:
        found = DOCUMENT[step] if found is part else found[step]
    return found


def refusals() -> Iterator[tuple[str, dict[str, Any]]]:
    """Status and response of every error: those of operations but HEAD, of other methods, of other paths."""
    yield "405", DOCUMENT["components"]["responses"]["method-not-allowed"]
    yield "404", DOCUMENT["components"]["responses"]["no-such-route"]
    for _, method, operation in operations():
        for status, response in operation["responses"].items():
            if status >= "400" and method != "HEAD":
                yield status, resolve(response)


def codes_of(response: dict[str, Any]) -> list[str]:
    return cast(
        "list[str]", response["content"]["application/problem+json"]["schema"]["allOf"][1]["properties"]["code"]["enum"]
    )


def routes() -> set[tuple[str, str]]:
    """What a router takes: its table, and HEAD wherever there is GET."""
    app = RouterApp(
        "0",
        RouterService(default_config().limits, cast(aiohttp.ClientSession, None)),
        default_config(),
        cast(Controller, None),
    )
    taken = {(route.path, route.method) for route in app.table.routes}
    return taken | {(path, "HEAD") for path, method in taken if method == "GET"}


def parameters(route: str, method: str, place: str) -> set[str]:
    found = map(resolve, DOCUMENT["paths"][route][method].get("parameters", []))
    return {parameter["name"] for parameter in found if parameter["in"] == place}


def schema(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **DOCUMENT})


def matches(parameter: dict[str, Any], field: str) -> bool:
    return jsonschema.Draft202012Validator(resolve(parameter)["schema"]).is_valid(field)


def is_taken(decode: Callable[[], object]) -> bool:
    try:
        decode()
    except (BadRequest, ValueTooLarge):
        return False
    return True


def test_the_document_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(cast(Any, DOCUMENT))


def test_every_route_and_method_of_the_router_is_documented_and_nothing_else_is() -> None:
    assert {(path, method) for path, method, _ in operations()} == routes()


def test_every_operation_has_an_id_of_its_own_a_summary_and_a_success() -> None:
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(ids)) == len(ids)
    for _, _, operation in operations():
        assert operation["summary"]
        assert min(operation["responses"]) in ("200", "201", "202", "204")


def test_the_parameters_that_change_a_write_are_those_that_its_handler_reads() -> None:
    conditions, token, once = {"If-Match", "If-None-Match"}, {"Lock-Token"}, {"Idempotency-Key"}
    read = {
        (KEY_ROUTE, "PUT"): conditions | token | once,
        (KEY_ROUTE, "DELETE"): conditions | token | once,
        (LOCK_ROUTE, "POST"): once,
        (LOCK_ROUTE, "PUT"): token | once,
        (LOCK_ROUTE, "DELETE"): token | once,
        ("/v1/txn", "POST"): once,
    }
    for path, method, _ in operations():
        if method not in ("GET", "HEAD"):
            assert parameters(path, method.lower(), "header") == read.get((path, method), set()), (path, method)


def test_the_calls_of_a_demo_are_documented_where_they_exist() -> None:
    document = json.loads(openapi_json(LIMITS, (*PUBLIC_ROUTES, *DEMO_ROUTES)))
    openapi_spec_validator.validate(document)
    assert set(document["paths"]) - set(DOCUMENT["paths"]) == {route.path for route in DEMO_ROUTES}


def test_every_problem_code_of_an_answer_is_an_error_with_its_status() -> None:
    status_of = {error.code: str(error.status) for error in all_errors()}
    for status, response in refusals():
        assert codes_of(response)
        assert {status_of[code] for code in codes_of(response)} == {status}


def test_every_error_is_documented_or_known_to_stay_inside() -> None:
    inside = {"wrong-owner", "config-error", "data-in-use", "log-damaged", "other-protocol", "store-behind"}
    shown = {code for _, response in refusals() for code in codes_of(response)}
    assert shown == {error.code for error in all_errors()} - inside
    assert set(DOCUMENT["components"]["schemas"]["Problem"]["properties"]["code"]["enum"]) == shown | inside


def test_head_answers_as_get_does_but_without_any_body() -> None:
    for path, method, head in operations():
        if method == "HEAD":
            get = DOCUMENT["paths"][path]["get"]
            assert head["responses"].keys() == get["responses"].keys()
            for status, response in head["responses"].items():
                assert "content" not in resolve(response)
                assert resolve(response).get("headers") == resolve(get["responses"][status]).get("headers")


def test_an_error_after_which_a_client_may_repeat_says_when() -> None:
    retryable = {error.code for error in all_errors() if error.retryable}
    for _, response in refusals():
        assert ("Retry-After" in response.get("headers", {})) == bool(retryable & set(codes_of(response)))


@pytest.mark.parametrize("name", ["key_bytes_max", "value_bytes_max", "body_bytes_max", "ttl_s_max", "list_keys_max"])
def test_a_limit_appears_as_it_is_configured(name: str) -> None:
    limit, ours = getattr(Limits(), name), getattr(LIMITS, name)
    components = {name: part for name, part in DOCUMENT["components"].items() if name != "examples"}
    text = json.dumps(DOCUMENT | {"components": components})
    assert f" {ours:,}" in text or f": {ours}" in text
    assert f"{limit:,}" not in text
    assert f": {limit}," not in text


def test_the_limits_of_locks_and_idempotency_keys_appear_as_they_are_configured() -> None:
    acquire = DOCUMENT["components"]["schemas"]["AcquireBody"]["properties"]
    assert acquire["ttl"] == acquire["ttl"] | {"minimum": 0.1, "maximum": 7_770, "default": 30}
    assert acquire["wait"] == acquire["wait"] | {"minimum": 0, "maximum": 70, "default": 0}
    assert resolve(acquire["owner"])["maxLength"] == 7
    assert " 7 bytes" in resolve(acquire["owner"])["description"]
    assert " 770.5 s" in DOCUMENT["components"]["parameters"]["IdempotencyKey"]["description"]


def test_every_example_fits_its_schema() -> None:
    contents = [
        content
        for _, _, operation in operations()
        for part in [operation.get("requestBody", {}), *map(resolve, operation["responses"].values())]
        for content in part.get("content", {}).values()
    ]
    for content in contents:
        validator = jsonschema.Draft202012Validator({**content["schema"], "components": DOCUMENT["components"]})
        for example in content["examples"].values():
            validator.validate(resolve(example)["value"])
    assert len(contents) > 10


def test_the_documented_errors_of_an_operation_of_a_batch_are_errors_of_the_system() -> None:
    failed = DOCUMENT["components"]["schemas"]["FailedResult"]["properties"]
    assert set(failed["code"]["enum"]) == {error.code for error in OPERATION_ERRORS}
    assert set(failed["status"]["enum"]) == {error.status for error in OPERATION_ERRORS}


@pytest.mark.parametrize(
    "op",
    [
        {"op": "put", "key": "k", "value": ""},
        {"op": "put", "key": "k", "value_base64": "/wA="},
        {"op": "put", "key": "k", "value": "1", "ttl": 0.5},
        {"op": "get", "key": "k"},
        {"op": "delete", "key": "k"},
        {"op": "put", "key": "k"},
        {"op": "put", "key": "k", "value": "1", "value_base64": "MQ=="},
        {"op": "put", "key": "k", "value_base64": "MQ"},
        {"op": "put", "key": "k", "value": None},
        {"op": "put", "key": "k", "value": "1", "ttl": "60"},
        {"op": "put", "key": "k", "value": "1", "tll": 60},
        {"op": "get", "key": "k", "value": "1"},
        {"op": "get"},
        {"op": "cas", "key": "k"},
        {"key": "k"},
        7,
    ],
)
def test_the_schema_of_a_batch_and_the_router_agree_on_what_is_well_formed(op: Any) -> None:
    body = {"ops": [op]}
    assert schema("BatchBody").is_valid(body) == is_taken(
        lambda: parse_batch(decoded(BatchBody, msgspec.json.encode(body)), LIMITS)
    )


def test_a_batch_without_operations_is_not_well_formed() -> None:
    assert not schema("BatchBody").is_valid({"ops": []})


@pytest.mark.parametrize(
    "body",
    [
        {"then": [{"op": "get", "key": "k"}]},
        {"if": [], "then": [{"op": "delete", "key": "k"}], "else": []},
        {"if": [{"key": "k", "version": 1}], "then": [{"op": "put", "key": "k", "value_base64": "/wA=", "ttl": 60}]},
        {"if": [{"key": "k", "version": 2**53 - 1}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "exists": False}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"lock": "k", "token": 0}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "version": 0}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "version": 2**53}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "version": 1.5}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "version": "1"}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "version": 1, "exists": True}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "exists": None}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "exists": 1}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k"}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"lock": "k"}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"lock": "k", "token": -1}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"lock": "k", "token": 2**53}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"key": "k", "token": 1}], "then": [{"op": "get", "key": "k"}]},
        {"if": [{"lock": "k", "token": 1, "owner": "me"}], "then": [{"op": "get", "key": "k"}]},
        {"if": {"key": "k", "version": 1}, "then": [{"op": "get", "key": "k"}]},
        {"if": None, "then": [{"op": "get", "key": "k"}]},
        {"then": [{"op": "get", "key": "k"}], "else": None},
        {"then": [{"op": "get", "key": "k"}], "else": [{"op": "cas", "key": "k"}]},
        {"then": [{"op": "get", "key": "k"}], "esle": []},
        {"then": [{"op": "put", "key": "k"}]},
        {"then": []},
        {"then": {}},
        {"else": [{"op": "get", "key": "k"}]},
        {},
        [],
        None,
    ],
)
def test_the_schema_of_a_transaction_and_the_router_agree_on_what_is_well_formed(body: Any) -> None:
    taken = is_taken(lambda: parse_transaction(decoded(TxnBody, msgspec.json.encode(body)), LIMITS))
    assert schema("TxnBody").is_valid(body) == taken


def test_the_schema_of_a_transaction_names_the_limits() -> None:
    about = DOCUMENT["components"]["schemas"]["TxnBody"]["description"]
    assert all(limit in about for limit in (" 77 bytes", " 777,777 s", " 7,777 bytes"))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"ttl": 30, "wait": 10, "owner": "me"},
        {"ttl": 0.1},
        {"ttl": 7_770.0},
        {"wait": 70},
        {"owner": "1234567"},
        {"ttl": 0.0999},
        {"ttl": 7_770.1},
        {"ttl": "30"},
        {"ttl": None},
        {"ttl": True},
        {"wait": -1},
        {"wait": 71},
        {"owner": "12345678"},
        {"owner": 7},
        {"tll": 30},
        [],
        None,
    ],
)
def test_the_schema_of_an_acquire_and_the_router_agree_on_what_is_taken(body: Any) -> None:
    taken = is_taken(lambda: check_acquire(decoded(AcquireBody, msgspec.json.encode(body)), LIMITS))
    assert schema("AcquireBody").is_valid(body) == taken


@pytest.mark.parametrize(
    "field",
    ["*", '"41"', 'W/"41"', '"41","42"', '"41", W/"42"', '""', '"a,b"', "", "41", '"41', '*, "1"', '"a b"', "W/41"],
)
def test_the_pattern_of_a_condition_and_the_router_agree_on_what_is_one(field: str) -> None:
    for parameter in DOCUMENT["paths"][KEY_ROUTE]["put"]["parameters"]:
        if resolve(parameter)["name"] in ("If-Match", "If-None-Match"):
            assert matches(parameter, field) == is_taken(lambda: decode_tags(field, weak=True))


@pytest.mark.parametrize("field", ["a", '"a"', "a b", "a" * 255, f'"{"a" * 255}"', "", '""', "a" * 256, "\t", "\x7f"])
def test_the_pattern_of_an_idempotency_key_and_the_router_agree_on_what_is_one(field: str) -> None:
    head = Head("PUT", "/v1/kv/k", "", {"idempotency-key": field})
    parameter = DOCUMENT["components"]["parameters"]["IdempotencyKey"]
    assert matches(parameter, field) == is_taken(lambda: decode_once(head, b""))
