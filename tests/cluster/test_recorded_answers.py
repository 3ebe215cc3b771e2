"""Answers as clients know them: status, code, members and header fields of a fixed list of requests, compared with a
recording (`recorded_answers.json`).

Texts and numbers may change, the names and types may not. `KVSTORE_RECORD=1 pytest …` writes a new recording.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import yaml

from tests.cluster.clusters import Cluster, running, write_config

RECORDING = Path(__file__).with_name("recorded_answers.json")
SAME_VALUE = {"Content-Type", "Cache-Control", "X-Content-Type-Options", "Vary", "Connection", "X-Accel-Buffering"}
WHOLE = ("openapi", "owners", "map")  # documents that have tests of their own: the cluster map among them
KEPT_TEXT = {"code", "type", "status", "op", "parameter", "state", "kind"}


class Ask(NamedTuple):
    """`process`: "router", "controller" or "shard". In headers and paths `{token}` is that of the lock last granted."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = {}
    process: str = "router"


def _keys() -> Iterator[Ask]:
    key = "/v1/kv/recorded/a"
    yield Ask("PUT", key, b"1")
    yield Ask("PUT", f"{key}?ttl=60", b"\xff\x00", {"Idempotency-Key": "recorded"})
    yield Ask("PUT", f"{key}?ttl=60", b"other", {"Idempotency-Key": "recorded"})
    for method in ("GET", "HEAD", "POST", "PATCH", "OPTIONS"):
        yield Ask(method, key)
    yield Ask("GET", key, None, {"If-None-Match": "*"})
    yield Ask("GET", key, None, {"If-Match": '"1"'})
    yield Ask("GET", key, None, {"If-Match": "1"})
    yield Ask("PUT", key, b"2", {"If-None-Match": "*"})
    yield Ask("PUT", key, b"2", {"If-Match": "*", "Content-Encoding": "gzip"})
    yield Ask("PUT", key, b"2", {"Lock-Token": "1"})
    yield Ask("PUT", key, b"2", {"Lock-Token": "x"})
    for query in ("ttl=0", "ttl=x", "ttl=1&ttl=2", "tll=1", "ttl=%zz", "&&"):
        yield Ask("PUT", f"{key}?{query}", b"2")
    yield Ask("PUT", key, b"v" * (1024 * 1024 + 1))
    yield Ask("DELETE", key, b"ignored")
    yield Ask("DELETE", key)
    yield Ask("GET", key)
    yield Ask("HEAD", key)
    yield Ask("GET", f"{key}?x=1")
    for raw in ("", "%ff", "%zz", "k" * 1025, "%C3%9Cbung%201%3F"):
        yield Ask("GET", f"/v1/kv/{raw}")
        yield Ask("GET", f"/v1/explain/{raw}")
    yield Ask("GET", key, None, {"Host": "evil.example"})
    yield Ask("GET", key, None, {"Origin": "http://evil.example"})


def _many_keys() -> Iterator[Ask]:
    yield Ask("PUT", "/v1/kv/recorded/text", b"text")
    yield Ask("PUT", "/v1/kv/recorded/time?ttl=600", b"\xff")
    page = "/v1/kv?prefix=recorded/"
    for query in ("", "&values=true", "&count=true", "&limit=1", "&partial=true", "&count=true&partial=true",
                  "&count=true&limit=1", "&limit=0", "&limit=x", "&values=yes", "&after=%21", "&after=a3JlY29yZGVk",
                  "&prefix=b", "&x=1"):  # fmt: skip
        yield Ask("GET", page + query)
    yield Ask("HEAD", page)
    for method in ("PUT", "POST", "DELETE"):
        yield Ask(method, "/v1/kv")
    ops = [{"op": "put", "key": "recorded/b", "value": "1", "ttl": 60}, {"op": "get", "key": "recorded/b"},
           {"op": "get", "key": "recorded/time"}, {"op": "put", "key": "recorded/b", "value_base64": "/wA="},
           {"op": "delete", "key": "recorded/b"}, {"op": "get", "key": "recorded/b"}, {"op": "get", "key": ""},
           {"op": "put", "key": "k", "value": "", "ttl": 0}]  # fmt: skip
    yield Ask("POST", "/v1/batch", json.dumps({"ops": ops}).encode())
    for body in (b"", b"{", b"[]", b'{"ops":[]}', b'{"ops":[{"op":"cas"}]}', b'{"ops":[],"x":1}', b"\xff",
                 b'{"ops":[{"op":"put","key":"k"}]}'):  # fmt: skip
        yield Ask("POST", "/v1/batch", body)
    for header in ("If-Match", "If-None-Match", "Lock-Token", "Idempotency-Key"):
        yield Ask("POST", "/v1/batch", b'{"ops":[{"op":"get","key":"k"}]}', {header: "1"})
    yield Ask("POST", "/v1/batch?x=1", b'{"ops":[{"op":"get","key":"k"}]}')
    yield Ask("POST", "/v1/batch", None, {"Content-Length": "16777217"})
    yield Ask("GET", "/v1/batch")


def _locks() -> Iterator[Ask]:
    lock, key = "/v1/locks/recorded/lock", "/v1/kv/recorded/lock"
    yield Ask("GET", lock)
    yield Ask("POST", lock, b'{"ttl":600,"owner":"me"}')
    for method in ("GET", "HEAD"):
        yield Ask(method, lock)
    yield Ask("POST", lock, b'{"wait":0}')
    yield Ask("PUT", key, b"1")
    yield Ask("PUT", key, b"1", {"Lock-Token": "{token}"})
    yield Ask("GET", "/v1/explain/recorded/lock")
    batch = b'{"ops":[{"op":"put","key":"recorded/lock","value":"1"}]}'
    yield Ask("POST", "/v1/batch", batch)
    yield Ask("POST", "/v1/txn", b'{"then":[{"op":"put","key":"recorded/lock","value":"1"}]}')
    yield Ask("GET", "/v1/locks?prefix=recorded/")
    yield Ask("GET", "/v1/locks?prefix=recorded/&partial=true&limit=1")
    for query in ("limit=0", "count=true", "after=x"):
        yield Ask("GET", f"/v1/locks?{query}")
    yield Ask("PUT", lock, None, {"Lock-Token": "{token}"})
    yield Ask("PUT", lock)
    yield Ask("PUT", lock, b"{}", {"Lock-Token": "{token}"})
    yield Ask("PUT", f"{lock}?x=1", None, {"Lock-Token": "{token}"})
    yield Ask("PUT", lock, None, {"Lock-Token": "1", "If-Match": "*"})
    yield Ask("DELETE", lock)
    yield Ask("DELETE", lock, b"{}", {"Lock-Token": "{token}"})
    yield Ask("DELETE", f"{lock}?acquire=", None)
    yield Ask("DELETE", f"{lock}?acquire=a&x=1", None)
    yield Ask("DELETE", f"{lock}?acquire=a", None, {"Lock-Token": "1"})
    yield Ask("DELETE", f"{lock}?acquire=a", b"{}")
    yield Ask("DELETE", f"{lock}?acquire=never", None)
    yield Ask("DELETE", lock, None, {"Lock-Token": "{token}"})
    yield Ask("DELETE", lock, None, {"Lock-Token": "{token}"})
    for body in (b"{", b"[]", b'{"ttl":0}', b'{"ttl":1e9}', b'{"wait":-1}', b'{"wait":61}', b'{"tll":1}',
                 b'{"owner":"%s"}' % (b"o" * 257), b" " * 5000):  # fmt: skip
        yield Ask("POST", lock, body)
    yield Ask("POST", lock, b"", {"Lock-Token": "1"})
    yield Ask("POST", f"{lock}?wait=1", b"")
    for method in ("POST", "DELETE"):
        yield Ask(method, "/v1/locks")
    yield Ask("PATCH", lock)
    yield Ask("GET", "/v1/locks/")


def _transactions() -> Iterator[Ask]:
    keys = [f"recorded/t{n}" for n in range(4)]
    body = {"if": [{"key": keys[0], "exists": False}],
            "then": [{"op": "put", "key": keys[0], "value": "1"}, {"op": "put", "key": keys[1], "value_base64": "/w=="},
                     {"op": "get", "key": keys[2]}, {"op": "delete", "key": keys[3]}],
            "else": [{"op": "get", "key": key} for key in keys]}  # fmt: skip
    yield Ask("POST", "/v1/txn", json.dumps(body).encode(), {"Idempotency-Key": "recorded"})
    yield Ask("POST", "/v1/txn", json.dumps(body).encode())
    yield Ask("POST", "/v1/txn", b'{"then":[{"op":"get","key":"k"}]}', {"Idempotency-Key": "recorded"})
    for raw in (b"", b"{}", b'{"then":[]}', b'{"then":[{"op":"put","key":"k"}]}', b'{"then":[{"op":"get","key":""}]}',
                b'{"then":[{"op":"put","key":"k","value":"1","ttl":0}]}',
                b'{"if":[{}],"then":[{"op":"get","key":"k"}]}',
                b'{"then":[{"op":"put","key":"k","value":"%s"}]}' % (b"v" * (1024 * 1024 + 1))):  # fmt: skip
        yield Ask("POST", "/v1/txn", raw)
    for header in ("If-Match", "If-None-Match", "Lock-Token"):
        yield Ask("POST", "/v1/txn", b'{"then":[{"op":"get","key":"k"}]}', {header: "1"})
    yield Ask("POST", "/v1/txn?x=1", b'{"then":[{"op":"get","key":"k"}]}')
    yield Ask("GET", "/v1/txn")
    for txn_id in ("1-1-00000000", "", "%ff", "x" * 300, "1-1-00000000?x=1"):
        yield Ask("GET", f"/v1/txn/{txn_id}")
    yield Ask("HEAD", "/v1/txn/1-1-00000000")
    yield Ask("DELETE", "/v1/txn/1-1-00000000")


def _cluster() -> Iterator[Ask]:
    for path in ("/v1/cluster", "/v1/moves", "/v1/explain/recorded/text", "/healthz", "/readyz", "/metrics", "/",
                 "/openapi.json", "/page/app.js"):  # fmt: skip
        for method in ("GET", "HEAD", "POST", "PUT"):
            if (path, method) != ("/v1/moves", "POST"):
                yield Ask(method, path)
        yield Ask("GET", f"{path}?x=1")
    yield Ask("HEAD", "/v1/events")
    yield Ask("POST", "/v1/events")
    yield Ask("GET", "/v1/events?x=1")
    yield Ask("GET", "/", None, {"Accept": "text/html"})
    yield Ask("GET", "/page/app.js", None, {"If-None-Match": "*"})
    for path in ("/nowhere", "/v1", "/v1/", "/v1/kvs", "/v1/cluster/", "/page/", "/page/nothing", "/v1/shards/"):
        yield Ask("GET", path)
    shards = "/v1/shards"
    yield Ask("POST", f"{shards}?plan=true", b'{"id":"s9","url":"http://127.0.0.1:1","weight":1}')
    for body in (b"", b"{}", b'{"id":"S"}', b'{"id":"s1"}', b'{"id":"s9","x":1}', b" " * 5000):
        yield Ask("POST", f"{shards}?plan=true", body)
    yield Ask("POST", f"{shards}?plan=yes", b"{}")
    yield Ask("POST", shards, b"{}", {"If-Match": "*"})
    yield Ask("GET", shards)
    yield Ask("PATCH", f"{shards}/s1?plan=true", b'{"weight":2}')
    yield Ask("PATCH", f"{shards}/s9?plan=true", b'{"weight":2}')
    yield Ask("PATCH", f"{shards}/S1?plan=true", b'{"weight":2}')
    yield Ask("PATCH", f"{shards}/s1?plan=true", b'{"weight":0}')
    yield Ask("DELETE", f"{shards}/s1?plan=true")
    yield Ask("DELETE", f"{shards}/s1?plan=true", b"{}")
    yield Ask("DELETE", f"{shards}/s1?plan=true&lost=true")
    yield Ask("DELETE", f"{shards}/s1?confirm=s1")
    yield Ask("DELETE", f"{shards}/s1?lost=true")
    yield Ask("DELETE", f"{shards}/s9")
    yield Ask("GET", f"{shards}/s1")
    yield Ask("POST", f"{shards}/s1/accept-old", b'{"confirm":"s2"}')
    yield Ask("POST", f"{shards}/s9/accept-old", b'{"confirm":"s9"}')
    yield Ask("POST", f"{shards}/s1/accept-old?plan=true", b"{}")
    yield Ask("GET", f"{shards}/s1/accept-old")
    yield Ask("POST", "/v1/moves?plan=true")
    yield Ask("POST", "/v1/moves?plan=true", b"{}")
    yield Ask("POST", "/v1/moves?x=1")
    yield Ask("DELETE", "/v1/moves")
    yield Ask("DELETE", "/v1/moves?plan=true")
    yield Ask("PUT", "/v1/moves")


def _inner() -> Iterator[Ask]:
    def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> Ask:
        return Ask(method, path, body, headers, "controller")

    for path in ("/v1/map", "/v1/map?after=0", "/v1/map?after=-1", "/v1/map?after=x", "/v1/map?x=1", "/v1/launch",
                 "/v1/launch?running=s1,s2", "/v1/launch?running=S1", "/v1/launch?after=x", "/v1/moves", "/v1/recovery",
                 "/healthz", "/metrics", "/nowhere", "/", "/healthz?x=1", "/v1/moves?x=1"):  # fmt: skip
        yield ask("GET", path)
    for path in ("/v1/members", "/v1/told", "/v1/recovery", "/v1/shards", "/v1/shards?plan=true"):
        for body in (b"", b"{}", b"[]", b"\xff", b'{"x":1}'):
            yield ask("POST", path, body)
        yield ask("PUT", path, b"{}")
        yield ask("POST", f"{path}?x=1" if "?" not in path else f"{path}&plan=true", b"{}")
    yield ask("POST", "/v1/shards?plan=true", b'{"id":"s9","url":"http://127.0.0.1:1"}')
    yield ask("POST", "/v1/shards?plan=yes", b'{"id":"s9","url":"http://127.0.0.1:1"}')
    yield ask("PATCH", "/v1/shards/s1?plan=true", b'{"weight":2}')
    yield ask("PATCH", "/v1/shards/s9", b'{"weight":2}')
    yield ask("DELETE", "/v1/shards/s1?plan=true")
    yield ask("DELETE", "/v1/shards/s1?plan=true&lost=true")
    yield ask("DELETE", "/v1/shards/s1?lost=true")
    yield ask("POST", "/v1/shards/s1/accept-old", b'{"confirm":"s2"}')
    yield ask("POST", "/v1/moves?plan=true")
    yield ask("DELETE", "/v1/moves")
    yield ask("DELETE", "/v1/moves?plan=true")
    yield ask("POST", "/v1/members", b"x" * 100_000)
    yield ask("GET", "/healthz", Host="evil.example")
    yield ask("GET", "/healthz", Origin="http://evil.example")
    for method, path in (("GET", "/healthz"), ("HEAD", "/healthz"), ("GET", "/map"), ("GET", "/metrics"), ("GET", "/"),
                         ("GET", "/v1/kv/a"), ("GET", "/channel?shard=s9"),
                         ("GET", "/channel?shard=s1&store=other"), ("GET", "/copies?store=other"), ("POST", "/healthz"),
                         ("GET", "/healthz?x=1"), ("PUT", "/v1/kv/a")):  # fmt: skip
        yield Ask(method, path, None, {}, "shard")
    yield Ask("GET", "/healthz", None, {"Host": "evil.example"}, "shard")
    yield Ask("GET", "/channel?shard=s1", None, {"Origin": "http://127.0.0.1"}, "shard")


ASKS = {asks.__name__.strip("_"): list(asks()) for asks in (_keys, _many_keys, _locks, _transactions, _cluster, _inner)}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with running(write_config(tmp_path_factory.mktemp("recorded"), shards=2)) as cluster:
        addresses = addresses_of(cluster)
        until_s = time.monotonic() + 30
        while b"unverified" in requests.get(f"http://{addresses['shard']}/healthz").content:
            assert time.monotonic() < until_s
            time.sleep(0.05)
        yield addresses


def addresses_of(cluster: Cluster) -> dict[str, str]:
    config = yaml.safe_load((cluster.folder / "cluster.yaml").read_text())
    return {name: config[f"{name}s"][0]["listen"] for name in ("router", "controller", "shard")}


def record(addresses: dict[str, str], asks: list[Ask]) -> list[dict[str, Any]]:
    """What is answered to each, in their order."""
    recorded, token = [], "0"
    for ask in asks:
        connection = http.client.HTTPConnection(addresses[ask.process], timeout=60)
        headers = {"Content-Length": "0"} if ask.body is None and ask.method in ("POST", "PUT", "PATCH") else {}
        headers |= {name: value.replace("{token}", token) for name, value in ask.headers.items()}
        connection.request(ask.method, ask.path, ask.body, headers)
        answer = connection.getresponse()
        body = answer.read()
        fields = {name.title() if name.islower() else name: value for name, value in answer.getheaders()}
        fields.pop("Server", None)
        if answer.status >= 400:  # after a body that had not come yet
            fields.pop("Connection", None)
        token = fields.get("Lock-Token", token)
        recorded.append(
            {
                "request": " ".join(
                    [ask.process, ask.method, ask.path[:70], *sorted(ask.headers), str((ask.body or b"")[:40])[2:-1]]
                ),
                "status": answer.status,
                "headers": {name: _header(name, value) for name, value in sorted(fields.items())},
                "body": _shape(body, fields.get("Content-Type", "")),
            }
        )
        connection.close()
    return recorded


def _header(name: str, value: str) -> str:
    if name == "Allow":
        return ", ".join(sorted(value.split(", ")))
    return value if name in SAME_VALUE else "…"


def _shape(body: bytes, content_type: str) -> Any:
    if "json" not in content_type:
        return "" if not body else "bytes"
    document = json.loads(body or b"null")
    if isinstance(document, dict) and (name := next((name for name in WHOLE if name in document), None)):
        return f"a document with {name}"
    return _members(document, "")


def _members(part: Any, name: str) -> Any:
    """Names and types; of lists the distinct kinds of items; the text of some members."""
    if isinstance(part, dict):
        return {name: _members(value, name) for name, value in sorted(part.items())}
    if isinstance(part, list):
        kinds = [_members(item, "") for item in part]
        return [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    if name in KEPT_TEXT:
        return part
    return "number" if isinstance(part, float) or type(part) is int else type(part).__name__


@pytest.mark.parametrize("name", ASKS)
def test_what_is_answered_is_what_was_recorded(addresses: dict[str, str], name: str) -> None:
    found = record(addresses, ASKS[name])
    recording = json.loads(RECORDING.read_text()) if RECORDING.exists() else {}
    if "KVSTORE_RECORD" in os.environ:
        recording[name] = found
        lines = ",\n".join(
            f'"{name}": [\n' + ",\n".join(json.dumps(answer, ensure_ascii=False) for answer in answers) + "\n]"
            for name, answers in sorted(recording.items())
        )
        RECORDING.write_text(f"{{\n{lines}\n}}\n")
    assert [answer["request"] for answer in found] == [answer["request"] for answer in recording[name]]
    changed = [pair for pair in zip(recording[name], found, strict=True) if pair[0] != pair[1]]
    assert changed == []
