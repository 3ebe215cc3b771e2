"""The events of a real cluster, and the play-through of `kvstore up --demo`: real shards, a real second router."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests

from kvstore.router.routes.events import EVENTS
from tests.cluster.clusters import Cluster, running, write_config

WAIT_S = 30


@contextmanager
def listening(url: str, last_id: str = "") -> Iterator[Iterator[tuple[str, str, Any]]]:
    """Events as (id, kind, document)."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with closing(requests.get(f"{url}/v1/events", stream=True, timeout=WAIT_S, headers=headers)) as answer:
        answer.raise_for_status()

        def read() -> Iterator[tuple[str, str, Any]]:
            fields: dict[str, str] = {}
            for raw in answer.iter_lines(chunk_size=1, decode_unicode=False):
                name, _, value = raw.decode().partition(": ")
                if name:
                    fields[name] = value
                elif "data" in fields:
                    yield fields["id"], fields["event"], json.loads(fields["data"])
                    fields = {}

        yield read()


def until(events: Iterator[tuple[str, str, Any]], kind: str, is_it: Any) -> Any:
    """The first document of that kind of which it holds, be it in a snapshot."""
    for _, event, document in events:
        found = document.get(kind) if event == "snapshot" else document if event == kind else None
        if found is not None and is_it(found):
            return found
    raise AssertionError("the stream has ended")


def test_every_event_has_the_shape_that_the_document_says(cluster: Cluster) -> None:
    components = requests.get(f"{cluster.url}/openapi.json", timeout=WAIT_S).json()["components"]
    url = f"{cluster.url}/v1/locks/events%2Fheld"
    token = 0
    seen: set[str] = set()
    with listening(cluster.url) as events:
        for _, kind, document in events:
            name = "Snapshot" if kind == "snapshot" else EVENTS[kind].__name__
            jsonschema.validate(document, {"$ref": f"#/components/schemas/{name}", "components": components})
            if kind == "snapshot":
                assert not document.keys() - {"router", "history", *EVENTS}
                assert {"map", "cluster", "locks", "transactions"} <= document.keys()
                token = requests.post(url, json={"ttl": 60}, timeout=WAIT_S).json()["token"]
            seen.add(kind)
            if {"snapshot", "rates", "locks"} <= seen:
                break
    requests.delete(url, headers={"Lock-Token": str(token)}, timeout=WAIT_S).raise_for_status()


def test_a_lock_that_is_taken_and_let_go_is_seen(cluster: Cluster) -> None:
    def held(document: Any) -> list[Any]:
        return [lock for lock in document["items"] if lock["name"] == "events/lock"]

    url = f"{cluster.url}/v1/locks/events%2Flock"
    with listening(cluster.url) as events:
        next(events)
        token = requests.post(url, json={"ttl": 60, "owner": "<b>me</b>\u202e"}, timeout=WAIT_S).json()["token"]
        (lock,) = held(until(events, "locks", held))
        assert (lock["owner"], lock["token"], lock["waiting"]) == ("<b>me</b>\u202e", token, 0)
        assert 50 < lock["ttl_left"] <= 60
        requests.delete(url, headers={"Lock-Token": str(token)}, timeout=WAIT_S).raise_for_status()
        until(events, "locks", lambda document: not held(document))


def test_what_is_answered_is_seen_in_the_rates(cluster: Cluster) -> None:
    with listening(cluster.url) as events:
        next(events)
        for _ in range(20):
            requests.get(f"{cluster.url}/v1/kv/events%2Fnone", timeout=WAIT_S)
        found = until(events, "rates", lambda document: document["reads"] > 0)
        assert found["refused"] > 0
        assert found["read_p99_ms"] >= found["read_p50_ms"] > 0


def test_a_listener_goes_on_after_its_last_event(cluster: Cluster) -> None:
    with listening(cluster.url) as kept:  # so that the router goes on looking
        with listening(cluster.url) as events:
            until(events, "rates", bool)
            last_id, _, _ = next(events)
        with listening(cluster.url, last_id) as events:
            assert next(events)[1] != "snapshot"
        next(kept)


def test_without_demo_there_is_nothing_to_play(cluster: Cluster) -> None:
    for path in ("/v1/demo/transfer", "/v1/demo/coordinate", "/v1/demo/kill"):
        assert requests.post(f"{cluster.url}{path}", json={}, timeout=WAIT_S).status_code == 404
        assert path not in requests.get(f"{cluster.url}/openapi.json", timeout=WAIT_S).json()["paths"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(write_config(tmp_path_factory.mktemp("demo"), shards=2), options=["--demo"]) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("stop", "state", "kinds"),
    [
        ("never", "committed", ["sent", "answered", "sent", "answered", "sent", "result", "answered"]),
        ("before-decision", "aborted", ["sent", "answered", "killed", "intent", "resolved"]),
        ("after-decision", "committed", ["sent", "answered", "sent", "answered", "killed", "intent", "resolved"]),
    ],
)
def test_a_transfer_is_played_to_its_end_wherever_its_coordinator_dies(
    demo: Cluster, stop: str, state: str, kinds: list[str]
) -> None:
    components = requests.get(f"{demo.url}/openapi.json", timeout=WAIT_S).json()["components"]
    with listening(demo.url) as events:
        assert next(events)[2]["demo"] is True
        begun = requests.post(f"{demo.url}/v1/demo/transfer", json={"amount": 7, "stop": stop}, timeout=WAIT_S)
        assert begun.status_code == 202
        number = begun.json()["play"]
        play = until(
            events,
            "play",
            lambda found: found["number"] == number and found["state"] not in ("running", "recovering"),
        )
    jsonschema.validate(play, {"$ref": "#/components/schemas/PlayEvent", "components": components})
    assert play["state"] == state, play
    told = [step["kind"] for step in play["steps"]]
    assert sorted(told) == sorted(kinds)
    assert told[:2] == ["sent", "answered"]
    assert next(step["message"] for step in play["steps"] if step["kind"] == "sent") == "prepare"
    balances = [account["balance"] for account in play["accounts"]]
    assert sum(balances) == 200
    stored = [
        int(requests.get(f"{demo.url}/v1/kv/{requests.utils.quote(account['key'], safe='')}", timeout=WAIT_S).content)
        for account in play["accounts"]
    ]
    assert stored == balances
    assert {account["shard"] for account in play["accounts"]} == {"s1", "s2"}


@pytest.mark.parametrize(
    ("body", "status"),
    [(b'{"amount":0}', 400), (b'{"amount":101}', 400), (b'{"stop":"now"}', 400), (b'{"x":1}', 400), (b"[", 400)],
)
def test_a_play_that_cannot_be_is_refused(demo: Cluster, body: bytes, status: int) -> None:
    answer = requests.post(f"{demo.url}/v1/demo/transfer", data=body, timeout=WAIT_S)
    assert (answer.status_code, answer.json()["code"]) == (status, "bad-body")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"node": "s1"}, 409, "change-refused"),  # there is one copy of everything
        ({"node": "s9"}, 404, "not-found"),
        ({"node": "s1", "away_s": 1}, 400, "bad-body"),
        ({"node": "s1", "away_s": 3600}, 400, "bad-body"),
        ({}, 400, "bad-body"),
    ],
)
def test_a_node_that_none_could_take_over_from_is_not_killed(
    demo: Cluster, body: dict[str, Any], status: int, code: str
) -> None:
    pid = demo.pid("shard-s1")
    answer = requests.post(f"{demo.url}/v1/demo/kill", json=body, timeout=WAIT_S)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert demo.pid("shard-s1") == pid


@pytest.mark.parametrize("path", ["/v1/demo/transfer", "/v1/demo/kill"])
def test_a_foreign_page_cannot_begin_a_play(demo: Cluster, path: str) -> None:
    foreign = {"Origin": "http://elsewhere.example"}
    answer = requests.post(f"{demo.url}{path}", json={"node": "s1"}, headers=foreign, timeout=WAIT_S)
    assert answer.status_code == 403


def test_a_shard_that_stands_still_is_down_in_the_events_and_up_when_it_goes_on(demo: Cluster) -> None:
    def states(document: Any) -> dict[str, str]:
        return {shard["id"]: shard["state"] for shard in document["shards"]}

    with listening(demo.url) as events:
        until(events, "cluster", lambda document: states(document) == {"s1": "up", "s2": "up"})
        os.kill(demo.pid("shard-s2"), signal.SIGSTOP)
        try:
            found = until(events, "cluster", lambda document: states(document)["s2"] == "down")
            assert found["advice"]["level"] == "warning"
            assert "s2" in found["advice"]["sentence"]
        finally:
            os.kill(demo.pid("shard-s2"), signal.SIGCONT)
        until(events, "cluster", lambda document: states(document)["s2"] == "up")


def test_a_demo_is_refused_where_others_could_reach_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, shards=1)
    text = config.read_text()
    first = text[text.index("routers:") :]
    config.write_text(text.replace(first, first.replace("127.0.0.1", "0.0.0.0", 1)))
    with pytest.raises(AssertionError, match="demo is for this machine only"), running(config, options=["--demo"]):
        pass
