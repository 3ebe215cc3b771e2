"""The OpenAPI document is true: requests made from it, right and wrong ones, are answered as it says.

The document comes from the running cluster. Its schemas of answers are closed here, so that a member that it
does not know is found, too; a client must let it pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from kvstore.config import Limits
from kvstore.router.routes.table import PUBLIC_ROUTES

EVENTS = "/v1/events"  # its answer does not end: test_events_and_demo listens to it
OPERATIONS = [
    (route.path, method)
    for route in PUBLIC_ROUTES
    for method in (route.method, "HEAD")[: 1 + (route.method == "GET")]
    if (route.path, method) != (EVENTS, "GET")
]
KEY = "/v1/kv/{key}"
LOCK = "/v1/locks/{name}"
TXN = "/v1/txn"
TXN_ID = "/v1/txn/{id}"
SHARDS, SHARD, MOVES = "/v1/shards", "/v1/shards/{id}", "/v1/moves"
# They take a parameter or a body.
BREAKABLE = (KEY, "/v1/kv", "/v1/batch", LOCK, "/v1/locks", "/v1/explain/{key}", TXN, TXN_ID, SHARDS)
METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS")
KEPT = {"openapi/kept": b"1", "openapi/kept for a while": b"2"}
KEYS = {"openapi/text": b"Ada", "openapi/bytes": b"\xff\x00", "openapi/empty": b"", "openapi/ü ?": b"{}"}
HELD, USED = "openapi/held", "openapi/used"  # locks: one stays held, the token of the other is shown
LARGE_PUT = b'{"then":[{"op":"put","key":"k","value":"%s"}]}' % (b"v" * (1024 * 1024 + 1))
WAIT_S_MAX = 0.02  # what is waited for is not released here
CONFIG = {
    "checks": {
        "positive_data_acceptance": {"expected-statuses": ["2xx", "304", "404", "409", "412", "422", "423"]},
        "negative_data_rejection": {"expected-statuses": ["400", "403", "404", "414", "431"]},
    }
}


class Api(NamedTuple):
    """A running cluster's address and document, the cursor of a page of its keys, and the token of the lock `USED`."""

    url: str
    document: dict[str, Any]
    session: requests.Session
    cursor: str
    token: int


@pytest.fixture(scope="module")
def api(cluster: Any) -> Iterator[Api]:
    """A cluster that has some keys and locks; those that the tests made are gone afterwards."""
    with requests.Session() as session:
        before = {item["key"] for item in _items(session, f"{cluster.url}/v1/kv")}
        held_before = {item["token"] for item in _items(session, f"{cluster.url}/v1/locks")}
        for key, value in {**KEPT, **KEYS}.items():
            ttl = {"ttl": "1000"} if key.endswith("while") else {}
            session.put(f"{cluster.url}/v1/kv/{requests.utils.quote(key)}", data=value, params=ttl).raise_for_status()
        page = session.get(f"{cluster.url}/v1/kv", params={"prefix": "openapi/", "limit": 1}).json()
        document = _closed(session.get(f"{cluster.url}/openapi.json").json())
        tokens = {
            name: session.post(f"{cluster.url}/v1/locks/{name}", json={"ttl": 600}).json()["token"]
            for name in (HELD, USED)
        }
        yield Api(cluster.url, document, session, page["next"], tokens[USED])
        for lease in _items(session, f"{cluster.url}/v1/locks"):
            if lease["token"] not in held_before:
                _release(session, cluster.url, lease)
        keys = {item["key"] for item in _items(session, f"{cluster.url}/v1/kv")}
        ops = [{"op": "delete", "key": key} for key in keys - before]
        if ops:
            session.post(f"{cluster.url}/v1/batch", json={"ops": ops}).raise_for_status()


def _items(session: requests.Session, listing: str) -> Iterator[dict[str, Any]]:
    parameters: dict[str, str] = {}
    while True:
        page = session.get(listing, params=parameters).json()
        yield from page["items"]
        if page["next"] is None:
            return
        parameters["after"] = page["next"]


def _release(session: requests.Session, url: str, lease: dict[str, Any]) -> None:
    path = requests.utils.quote(lease["name"], safe="").replace(".", "%2E")
    answer = session.delete(f"{url}/v1/locks/{path}", headers={"Lock-Token": str(lease["token"])})
    assert answer.status_code in (204, 412), answer.text  # 412: its time was over


def _closed(part: Any) -> Any:
    if isinstance(part, list):
        return [_closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    members = {name: _closed(item) for name, item in part.items()}
    return members | {"additionalProperties": False} if {"type", "properties"} <= part.keys() else members


def _check_problem(api: Api, answer: requests.Response, response: str) -> None:
    """The answer is what the document says of that response, one of the components."""
    described = api.document["components"]["responses"][response]
    schema = described["content"]["application/problem+json"]["schema"]
    assert answer.headers["Content-Type"] == "application/problem+json"
    for name, header in described.get("headers", {}).items():
        component = api.document["components"]["headers"][header["$ref"].rpartition("/")[2]]
        assert name in answer.headers or not component["required"]
    if answer.request.method != "HEAD":
        jsonschema.validate(answer.json(), {**schema, "components": api.document["components"]})


def _drive(api: Api, path: str, method: str, mode: GenerationMode) -> list[int]:
    """Send requests made from the document, and compare each answer with it. Returns their statuses."""
    config = schemathesis.Config.from_dict(CONFIG)
    operation = schemathesis.openapi.from_dict(api.document, config=config)[path][method]
    statuses = []

    @settings(
        max_examples=15,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.data())
    def send(case: Case, data: st.DataObject) -> None:
        if mode is GenerationMode.POSITIVE:
            _make_possible(case, data, api)
        else:
            assume(_is_sent(case))
        statuses.append(case.call_and_validate(base_url=api.url, session=api.session).status_code)

    send()
    return statuses


def _is_sent(case: Case) -> bool:
    """The header field that was made wrong is still there: some that cannot travel are left out after that."""
    wrong = getattr(case.meta.phase.data, "parameter", None) if case.meta else None
    return wrong != "Idempotency-Key" or wrong in case.headers


def _make_possible(case: Case, data: st.DataObject, api: Api) -> None:
    """What a schema cannot say: which keys exist, what was given out, a limit in bytes, what goes together."""
    for name, known in (("key", [*KEYS, USED]), ("name", [USED])):
        if name in case.path_parameters:
            if data.draw(st.booleans()):
                case.path_parameters[name] = data.draw(st.sampled_from(known))
            assume(len(case.path_parameters[name].encode()) <= Limits().key_bytes_max)
    if "Lock-Token" in case.headers and data.draw(st.booleans()):
        case.headers["Lock-Token"] = str(api.token)
    if case.path == TXN_ID:
        case.path_parameters["id"] = f"7-{case.path_parameters['id'].partition('-')[2]}"
    if case.path in (SHARDS, SHARD, MOVES) and case.method not in ("GET", "HEAD"):
        _only_plan(case, data)
    if isinstance(case.body, dict) and "replicas" in case.body:
        case.body["replicas"] = 1  # the cluster is shared: it stays as it is
    if isinstance(case.body, dict) and "then" in case.body:
        _make_possible_transaction(case.body, data, api)
    query = case.query or {}
    if "ttl" in query:
        query["ttl"] = f"{max(float(query['ttl']), 0.001):.3f}"  # in decimals: an exponent is refused
    if "after" in query:
        query["after"] = api.cursor
    if case.path == LOCK and case.method == "DELETE":
        _only_one_way_to_release(case, query, api)
    if query.get("count") in (True, "true"):
        for other in query.keys() - {"count", "prefix"}:
            del query[other]
    if isinstance(case.body, dict) and "wait" in case.body:
        case.body["wait"] = min(case.body["wait"], WAIT_S_MAX)
    if isinstance(case.body, dict) and "owner" in case.body:
        assume(len(case.body["owner"].encode()) <= Limits().owner_bytes_max)


def _only_one_way_to_release(case: Case, query: dict[str, Any], api: Api) -> None:
    """A token, or the Idempotency-Key of the acquire that is withdrawn."""
    if "acquire" in query:
        assume(query["acquire"].isprintable())
        for header in ("Lock-Token", "Idempotency-Key"):
            case.headers.pop(header, None)
    elif "Lock-Token" not in case.headers:
        case.headers["Lock-Token"] = str(api.token)


def _only_plan(case: Case, data: st.DataObject) -> None:
    """The cluster is shared: it stays as it is. (That the changes themselves are as documented `test_shards_cli` sees.)

    A cancel changes nothing, for nothing moves here.
    """
    if case.path == SHARD and data.draw(st.booleans()):
        case.path_parameters["id"] = "s1"
    if case.method != "DELETE" or case.path == SHARD:
        case.query = {"plan": "true"}
    if isinstance(case.body, dict) and "url" in case.body:
        case.body["url"] = "http://127.0.0.1:1"
    if isinstance(case.body, dict) and "weight" in case.body:
        case.body["weight"] = int(case.body["weight"])  # 7.0 is an integer to JSON Schema, but not here


def _make_possible_transaction(body: dict[str, Any], data: st.DataObject, api: Api) -> None:
    """Keys of their own for what is written, keys that there are for what is read or tested; a ttl that can be."""
    known = st.sampled_from([*KEPT, *KEYS])
    for branch in ("then", "else"):
        for number, op in enumerate(body.get(branch, [])):
            op["key"] = data.draw(known) if op["op"] == "get" else f"openapi/{branch} {number}"
            if "ttl" in op:
                op["ttl"] = min(max(op["ttl"], 0.001), 1000)
    for condition in body.get("if", []):
        if "lock" in condition:
            condition.update(lock=USED, token=data.draw(st.sampled_from([api.token, 0])))
        else:
            condition["key"] = data.draw(known)
        if "version" in condition:
            condition["version"] = int(condition["version"])  # 7.0 is an integer to JSON Schema, but not here


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=str)
def test_a_request_as_documented_is_taken_and_answered_as_documented(api: Api, path: str, method: str) -> None:
    assert _drive(api, path, method, GenerationMode.POSITIVE)


@pytest.mark.parametrize(
    ("method", "key", "headers", "status"),
    [
        ("GET", "openapi/kept", {}, 200),
        ("HEAD", "openapi/kept", {}, 200),
        ("GET", "openapi/kept", {"If-Match": "*"}, 200),
        ("GET", "openapi/kept", {"If-None-Match": "*"}, 304),
        ("GET", "openapi/kept for a while", {}, 200),
        ("HEAD", "openapi/kept for a while", {"If-None-Match": "*"}, 304),
        ("PUT", "openapi/new", {"If-None-Match": "*"}, 201),
        ("PUT", "openapi/new", {"If-Match": "*", "Idempotency-Key": "openapi"}, 204),
        ("DELETE", "openapi/new", {}, 204),
    ],
)
def test_each_success_on_a_key_is_answered_as_documented(
    api: Api, method: str, key: str, headers: dict[str, str], status: int
) -> None:
    operation = schemathesis.openapi.from_dict(api.document)[KEY][method]
    case = operation.Case(path_parameters={"key": key}, headers=headers)
    answer = case.call_and_validate(base_url=api.url, session=api.session)
    assert answer.status_code == status
    assert ("kv-ttl" in answer.headers) == key.endswith("while")


def test_each_success_on_a_lock_and_its_key_is_answered_as_documented(api: Api) -> None:
    lock = "openapi/lock"

    def call(method: str, path: str, name: str, status: int, **more: Any) -> Any:
        operation = schemathesis.openapi.from_dict(api.document)[path][method]
        case = operation.Case(path_parameters={name: lock} if name else {}, **more)
        answer = case.call_and_validate(base_url=api.url, session=api.session)
        assert answer.status_code == status, (method, path)
        return answer

    call("GET", LOCK, "name", 404)
    body = {"ttl": 30.5, "wait": 1, "owner": "me"}
    granted = call("POST", LOCK, "name", 201, body=body, media_type="application/json").json()
    assert granted == {"name": lock, "token": granted["token"], "owner": "me", "ttl": 30.5}
    token = {"Lock-Token": str(granted["token"])}
    assert call("PUT", LOCK, "name", 200, headers=token).json() == granted
    assert call("GET", LOCK, "name", 200).json()["waiting"] == 0
    call("HEAD", LOCK, "name", 200)
    names = [item["name"] for item in call("GET", "/v1/locks", "", 200, query={"prefix": lock}).json()["items"]]
    assert names == [lock]
    assert call("GET", "/v1/explain/{key}", "key", 200).json()["lock"]["owner"] == "me"
    call("PUT", KEY, "key", 423, body=b"1", media_type="application/octet-stream")
    call("PUT", KEY, "key", 201, body=b"1", media_type="application/octet-stream", headers=token)
    assert call("GET", "/v1/explain/{key}", "key", 200).json()["lock"]["token"] == granted["token"]
    ops = [{"op": "put", "key": lock, "value": "2"}]
    (result,) = call("POST", "/v1/batch", "", 200, body={"ops": ops}, media_type="application/json").json()["results"]
    assert (result["status"], result["code"], result["owner"]) == (423, "locked", "me")
    call("DELETE", KEY, "key", 204, headers=token)
    call("DELETE", LOCK, "name", 204, headers=token)
    call("DELETE", LOCK, "name", 412, headers=token)
    assert call("GET", "/v1/explain/{key}", "key", 200).json()["lock"] is None


def test_each_success_of_a_transaction_is_answered_as_documented(api: Api) -> None:
    operation = schemathesis.openapi.from_dict(api.document)[TXN]["POST"]

    def run(body: Any, **headers: str) -> Any:
        case = operation.Case(body=body, headers=headers, media_type="application/json")
        answer = case.call_and_validate(base_url=api.url, session=api.session)
        assert answer.status_code == 200
        return answer.json()

    keys = ["openapi/txn a", "openapi/txn b", "openapi/txn lock"]
    token = api.session.post(f"{api.url}/v1/locks/{requests.utils.quote(keys[2], safe='')}").json()["token"]
    body: dict[str, Any] = {
        "if": [{"key": keys[0], "exists": False}, {"lock": keys[2], "token": token}],
        "then": [
            {"op": "put", "key": keys[0], "value": "Ada", "ttl": 60},
            {"op": "put", "key": keys[1], "value_base64": "/wA="},
            {"op": "put", "key": keys[2], "value": ""},
            {"op": "get", "key": keys[0]},
        ],
        "else": [{"op": "get", "key": key} for key in keys],
    }
    wrote = run(body, **{"Idempotency-Key": "openapi"})
    assert wrote["succeeded"] is True
    found = run(body)
    assert [item["version"] for item in found["results"]] == [wrote["version"]] * 3
    assert run({"if": [{"key": keys[0], "version": 1}], "then": [{"op": "get", "key": "k"}]})["results"] == []
    gone = run({"if": [{"key": keys[0], "version": wrote["version"]}], "then": [{"op": "delete", "key": keys[0]}]})
    assert gone["version"] > wrote["version"]
    look = schemathesis.openapi.from_dict(api.document)[TXN_ID]
    for method in ("GET", "HEAD"):
        case = look[method].Case(path_parameters={"id": wrote["id"]})
        assert case.call_and_validate(base_url=api.url, session=api.session).status_code == 200


@pytest.mark.parametrize(("path", "method"), [o for o in OPERATIONS if o[0] in BREAKABLE and o[1] != "HEAD"], ids=str)
def test_a_request_that_breaks_the_document_is_refused_as_documented(api: Api, path: str, method: str) -> None:
    statuses = _drive(api, path, method, GenerationMode.NEGATIVE)
    assert 400 in statuses


@pytest.mark.parametrize(
    ("method", "path", "actual_path", "headers", "body", "status", "code"),
    [
        ("GET", KEY, "/v1/kv/", {}, b"", 400, "key-empty"),
        ("GET", KEY, "/v1/kv/%FF", {}, b"", 400, "key-not-utf8"),
        ("GET", KEY, "/v1/kv/" + "k" * 1025, {}, b"", 400, "key-too-long"),
        ("GET", KEY, "/v1/kv/openapi%2Fkept", {"If-Match": "7"}, b"", 400, "bad-condition"),
        ("GET", KEY, "/v1/kv/k", {"Origin": "http://elsewhere.example"}, b"", 403, "foreign-origin"),
        ("GET", "/", "/", {"Host": "elsewhere.example"}, b"", 403, "foreign-origin"),
        ("GET", KEY, "/v1/kv/openapi%2Fnone", {}, b"", 404, "not-found"),
        ("GET", KEY, "/v1/kv/openapi%2Fkept", {"If-Match": '"0"'}, b"", 412, "precondition-failed"),
        ("GET", KEY, "/v1/kv/k?ttl=1", {}, b"", 400, "bad-parameter"),
        ("GET", KEY, "/v1/kv/" + "k" * 20_000, {}, b"", 414, "uri-too-long"),
        ("GET", "/", "/", {"X-Long": "x" * 20_000}, b"", 431, "headers-too-large"),
        ("PUT", KEY, "/v1/kv/openapi%2Fnone?ttl=0", {}, b"1", 400, "bad-ttl"),
        ("PUT", KEY, "/v1/kv/openapi%2Fnone", {"Content-Length": "1048577"}, b"", 413, "value-too-large"),
        ("PUT", KEY, "/v1/kv/openapi%2Fnone", {"Content-Encoding": "gzip"}, b"1", 415, "content-encoding-refused"),
        ("PUT", KEY, "/v1/kv/openapi%2Fnone", {"Content-Range": "bytes 0-0/1"}, b"1", 400, "bad-request"),
        ("PUT", KEY, "/v1/kv/openapi%2Fnone", {"Expect": "a-miracle"}, b"1", 417, "expectation-failed"),
        ("PUT", KEY, "/v1/kv/openapi%2Fnone", {"If-None-Match": "7"}, b"1", 400, "bad-condition"),
        ("PUT", KEY, "/v1/kv/openapi%2Fkept", {"If-None-Match": "*"}, b"1", 412, "precondition-failed"),
        ("PUT", KEY, "/v1/kv/openapi%2Fnone", {"Lock-Token": "one"}, b"1", 400, "bad-parameter"),
        ("PUT", KEY, "/v1/kv/openapi%2Fnone", {"Lock-Token": "1"}, b"1", 412, "lock-lost"),
        ("PUT", KEY, f"/v1/kv/{HELD}", {}, b"1", 423, "locked"),
        ("DELETE", KEY, "/v1/kv/openapi%2Fnone", {}, b"", 404, "not-found"),
        ("DELETE", KEY, "/v1/kv/openapi%2Fkept", {"If-Match": '"0"'}, b"", 412, "precondition-failed"),
        ("DELETE", KEY, f"/v1/kv/{HELD}", {}, b"", 423, "locked"),
        ("DELETE", KEY, "/v1/kv/openapi%2Fnone", {"Idempotency-Key": '""'}, b"", 400, "bad-parameter"),
        ("GET", LOCK, "/v1/locks/openapi%2Fnone", {}, b"", 404, "not-found"),
        ("POST", LOCK, f"/v1/locks/{HELD}", {}, b"", 423, "locked"),
        ("POST", LOCK, f"/v1/locks/{HELD}", {}, b'{"tll":1}', 400, "bad-body"),
        ("POST", LOCK, f"/v1/locks/{HELD}", {}, b'{"ttl":0}', 400, "bad-ttl"),
        ("POST", LOCK, f"/v1/locks/{HELD}", {}, b'{"wait":-1}', 400, "bad-parameter"),
        ("POST", LOCK, f"/v1/locks/{HELD}", {}, b" " * 5000, 413, "body-too-large"),
        ("PUT", LOCK, f"/v1/locks/{HELD}", {"Lock-Token": "1"}, b"", 412, "lock-lost"),
        ("PUT", LOCK, f"/v1/locks/{HELD}", {}, b"", 400, "bad-parameter"),
        ("DELETE", LOCK, f"/v1/locks/{HELD}", {"Lock-Token": "1"}, b"{}", 400, "bad-body"),
        ("GET", "/v1/locks", "/v1/locks?after=%21", {}, b"", 400, "bad-cursor"),
        ("POST", "/v1/batch", "/v1/batch", {"Lock-Token": "1"}, b'{"ops":[]}', 400, "bad-parameter"),
        ("POST", TXN, TXN, {}, b'{"then":[]}', 400, "bad-body"),
        ("POST", TXN, TXN, {}, b'{"then":[{"op":"get","key":""}]}', 400, "key-empty"),
        ("POST", TXN, TXN, {}, b'{"then":[{"op":"get","key":"%s"}]}' % (b"k" * 1025), 400, "key-too-long"),
        ("POST", TXN, TXN, {}, b'{"then":[{"op":"put","key":"k","value":"","ttl":0}]}', 400, "bad-ttl"),
        ("POST", TXN, TXN, {"If-Match": "*"}, b'{"then":[{"op":"get","key":"k"}]}', 400, "bad-parameter"),
        ("POST", TXN, TXN, {"Content-Length": "16777217"}, b"", 413, "body-too-large"),
        ("POST", TXN, TXN, {}, LARGE_PUT, 413, "value-too-large"),
        ("POST", TXN, TXN, {}, b'{"then":[{"op":"delete","key":"%s"}]}' % HELD.encode(), 423, "locked"),
        ("GET", TXN_ID, "/v1/txn/nonsense", {}, b"", 400, "bad-parameter"),
        ("GET", TXN_ID, "/v1/txn/0-1-00000000", {}, b"", 404, "not-found"),
        ("POST", SHARDS, SHARDS, {}, b'{"id":"s1"}', 409, "change-refused"),
        ("POST", SHARDS, SHARDS, {}, b'{"id":"s9","url":"http://127.0.0.1:1"}', 409, "change-refused"),
        ("POST", SHARDS, SHARDS, {}, b'{"id":"S1"}', 400, "bad-body"),
        ("POST", SHARDS, SHARDS, {}, b'{"id":"s9","wait":1}', 400, "bad-body"),
        ("POST", SHARDS, f"{SHARDS}?plan=yes", {}, b'{"id":"s9"}', 400, "bad-parameter"),
        ("POST", SHARDS, SHARDS, {}, b" " * 5000, 413, "body-too-large"),
        ("PATCH", SHARD, f"{SHARDS}/s9", {}, b'{"weight":1}', 404, "not-found"),
        ("PATCH", SHARD, f"{SHARDS}/s1", {}, b'{"weight":0}', 400, "bad-body"),
        ("PATCH", SHARD, f"{SHARDS}/s1", {"If-Match": "*"}, b'{"weight":1}', 400, "bad-parameter"),
        ("DELETE", SHARD, f"{SHARDS}/s9", {}, b"", 404, "not-found"),
        ("DELETE", SHARD, f"{SHARDS}/S1", {}, b"", 400, "bad-parameter"),
        ("DELETE", SHARD, f"{SHARDS}/s9", {}, b"{}", 400, "bad-body"),
        ("DELETE", MOVES, f"{MOVES}?plan=true", {}, b"", 400, "bad-parameter"),
        ("POST", MOVES, MOVES, {}, b"{}", 400, "bad-body"),
        ("GET", "/v1/kv", "/v1/kv?after=%21", {}, b"", 400, "bad-cursor"),
        ("GET", "/v1/kv", "/v1/kv?prefix=a&prefix=b", {}, b"", 400, "bad-parameter"),
        ("POST", "/v1/batch", "/v1/batch", {}, b'{"ops":[]}', 400, "bad-body"),
        ("POST", "/v1/batch", "/v1/batch", {"Content-Length": "16777217"}, b"", 413, "body-too-large"),
    ],
    ids=lambda part: part if isinstance(part, str) and len(part) < 60 else "",
)
def test_an_error_that_can_be_provoked_is_documented_with_its_code(
    api: Api, method: str, path: str, actual_path: str, headers: dict[str, str], body: bytes, status: int, code: str
) -> None:
    answer = api.session.request(method, api.url + actual_path, headers=headers, data=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    response = api.document["paths"][path][method.lower()]["responses"][str(status)]["$ref"]
    _check_problem(api, answer, response.rpartition("/")[2])


@pytest.mark.parametrize(
    ("path", "method"), [o for o in OPERATIONS if o[0] in (KEY, LOCK) and o[1] not in ("GET", "HEAD")], ids=str
)
def test_another_request_under_the_same_idempotency_key_is_refused_as_documented(
    api: Api, path: str, method: str
) -> None:
    url = api.url + path.format(key="openapi%2Fonce", name="openapi%2Fonce")
    tokens = [{}, {}] if method == "POST" else [{"Lock-Token": "1"}, {"Lock-Token": "2"}]
    fields = [{"Idempotency-Key": "of two requests", **token} for token in tokens]
    bodies = [b'{"ttl":1}', b'{"ttl":2}'] if method == "POST" else [b"", b""]
    first, second = (
        api.session.request(method, url, headers=field, data=body) for field, body in zip(fields, bodies, strict=True)
    )
    assert first.status_code in (201, 412)
    assert (second.status_code, second.json()["code"]) == (422, "idempotency-key-reused")
    response = api.document["paths"][path][method.lower()]["responses"]["422"]["$ref"]
    _check_problem(api, second, response.rpartition("/")[2])


def test_another_transaction_under_the_same_idempotency_key_is_refused_as_documented(api: Api) -> None:
    bodies = [b'{"then":[{"op":"get","key":"openapi/once"}]%s}' % more for more in (b"", b',"else":[]')]
    first, second = (api.session.post(api.url + TXN, data=b, headers={"Idempotency-Key": "of two"}) for b in bodies)
    assert first.status_code == 200
    assert (second.status_code, second.json()["code"]) == (422, "idempotency-key-reused")
    _check_problem(api, second, "idempotency-key-reused")


@pytest.mark.parametrize("path", sorted({path for path, _ in OPERATIONS}))
def test_a_method_that_is_not_documented_is_refused_with_those_that_are(api: Api, path: str) -> None:
    documented = {method for route, method in OPERATIONS if route == path} | ({"GET"} if path == EVENTS else set())
    for method in set(METHODS) - documented:
        answer = api.session.request(
            method, api.url + path.format(key="openapi", name="openapi", id="7-1-00000000", file="app.js"), data=b"1"
        )
        assert answer.status_code == 405, method
        assert set(answer.headers["Allow"].split(", ")) == documented
        _check_problem(api, answer, "method-not-allowed")


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=str)
def test_an_unknown_parameter_is_refused(api: Api, path: str, method: str) -> None:
    its_id = "7" if path.startswith("/v1/changes") else "7-1-00000000"
    url = api.url + path.format(key="openapi", name="openapi", id=its_id, file="app.js")
    answer = api.session.request(method, f"{url}?colour=red", data=b'{"ops":[]}')
    assert answer.status_code == 400
    assert method == "HEAD" or answer.json()["parameter"] == "colour"


def test_another_path_is_answered_as_documented(api: Api) -> None:
    _check_problem(api, api.session.get(f"{api.url}/v2/kv/k"), "no-such-route")
