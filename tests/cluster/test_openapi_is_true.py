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
from kvstore.router.operations import operations

OPERATIONS = [
    (o.route, method) for o in operations(Limits()) for method in (o.method, "HEAD")[: 1 + (o.method == "GET")]
]
KEY = "/v1/kv/{key}"
BREAKABLE = (KEY, "/v1/kv", "/v1/batch", "/v1/explain/{key}")  # they take a parameter or a body
METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS")
KEPT = {"openapi/kept": b"1", "openapi/kept for a while": b"2"}
KEYS = {"openapi/text": b"Ada", "openapi/bytes": b"\xff\x00", "openapi/empty": b"", "openapi/ü ?": b"{}"}
CONFIG = {
    "checks": {
        "positive_data_acceptance": {"expected-statuses": ["2xx", "304", "404", "412"]},
        "negative_data_rejection": {"expected-statuses": ["400", "404", "412", "414", "431"]},
    }
}


class Api(NamedTuple):
    """A running cluster's address and document, and the cursor of a page of its keys."""

    url: str
    document: dict[str, Any]
    session: requests.Session
    cursor: str


@pytest.fixture(scope="module")
def api(cluster: Any) -> Iterator[Api]:
    """A cluster that has some keys; those that the tests made are gone afterwards."""
    with requests.Session() as session:
        before = set(_keys(session, cluster.url))
        for key, value in {**KEPT, **KEYS}.items():
            ttl = {"ttl": "1000"} if key.endswith("while") else {}
            session.put(f"{cluster.url}/v1/kv/{requests.utils.quote(key)}", data=value, params=ttl).raise_for_status()
        page = session.get(f"{cluster.url}/v1/kv", params={"prefix": "openapi/", "limit": 1}).json()
        document = _closed(session.get(f"{cluster.url}/openapi.json").json())
        yield Api(cluster.url, document, session, page["next"])
        ops = [{"op": "delete", "key": key} for key in set(_keys(session, cluster.url)) - before]
        if ops:
            session.post(f"{cluster.url}/v1/batch", json={"ops": ops}).raise_for_status()


def _keys(session: requests.Session, url: str) -> Iterator[str]:
    parameters: dict[str, str] = {}
    while True:
        page = session.get(f"{url}/v1/kv", params=parameters).json()
        yield from (item["key"] for item in page["items"])
        if page["next"] is None:
            return
        parameters["after"] = page["next"]


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
    assert described.get("headers", {}).keys() <= answer.headers.keys()
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
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.data())
    def send(case: Case, data: st.DataObject) -> None:
        if mode is GenerationMode.POSITIVE:
            _make_possible(case, data, api)
        statuses.append(case.call_and_validate(base_url=api.url, session=api.session).status_code)

    send()
    return statuses


def _make_possible(case: Case, data: st.DataObject, api: Api) -> None:
    """What a schema cannot say: which keys exist and cursors were given out, a limit in bytes, what goes together."""
    if "key" in case.path_parameters:
        if data.draw(st.booleans()):
            case.path_parameters["key"] = data.draw(st.sampled_from(list(KEYS)))
        assume(len(case.path_parameters["key"].encode()) <= Limits().key_bytes_max)
    query = case.query or {}
    if "ttl" in query:
        query["ttl"] = f"{max(float(query['ttl']), 0.001):.3f}"  # in decimals: an exponent is refused
    if "after" in query:
        query["after"] = api.cursor
    if query.get("count") in (True, "true"):
        for other in query.keys() - {"count", "prefix"}:
            del query[other]


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
        ("PUT", "openapi/new", {}, 201),
        ("PUT", "openapi/new", {}, 204),
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
        ("PUT", KEY, "/v1/kv/openapi%2Fnone", {"If-None-Match": "*"}, b"1", 501, "not-implemented"),
        ("DELETE", KEY, "/v1/kv/openapi%2Fnone", {"Lock-Token": "1"}, b"", 501, "not-implemented"),
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


@pytest.mark.parametrize("path", sorted({path for path, _ in OPERATIONS}))
def test_a_method_that_is_not_documented_is_refused_with_those_that_are(api: Api, path: str) -> None:
    documented = {method for route, method in OPERATIONS if route == path}
    for method in set(METHODS) - documented:
        answer = api.session.request(method, api.url + path.format(key="openapi"), data=b"1")
        assert answer.status_code == 405, method
        assert set(answer.headers["Allow"].split(", ")) == documented
        _check_problem(api, answer, "method-not-allowed")


@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=str)
def test_an_unknown_parameter_is_refused(api: Api, path: str, method: str) -> None:
    answer = api.session.request(method, f"{api.url}{path.format(key='openapi')}?colour=red", data=b'{"ops":[]}')
    assert answer.status_code == 400
    assert method == "HEAD" or answer.json()["parameter"] == "colour"


def test_another_path_is_answered_as_documented(api: Api) -> None:
    _check_problem(api, api.session.get(f"{api.url}/v2/kv/k"), "no-such-route")
