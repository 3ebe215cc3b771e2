"""Requests to a running cluster that are refused or taken, after which the next one works."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from tests.cluster.actions import Reply
from tests.cluster.clusters import Cluster
from tests.cluster.wire import HEALTH, Wire, request, wire

VALUE_BYTES_MAX = 1024 * 1024
BODY_BYTES_MAX = 16 * 1024 * 1024
KEY = "/v1/kv/bad/key"


def assert_problem(answer: Reply, status: int, code: str) -> Any:
    """The document of a problem with that status and code, which says what happened and what to do."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json
    assert document["status"] == status
    assert document["code"] == code, document
    assert document["type"] == f"/problems/{code}"
    for member in ("title", "detail", "next_step"):
        assert isinstance(document[member], str)
        assert document[member].strip(": \n")
    return document


def assert_usable(cluster: Cluster, connection: Wire, answer: Reply) -> None:
    """The connection serves the next request, or the answer said that it closes; then another one does."""
    if answer.headers.get("connection") != "close":
        connection.send(HEALTH)
        assert connection.answer().status == 200
        return
    with wire(cluster) as another:
        another.send(HEALTH)
        assert another.answer().status == 200


def refused(cluster: Cluster, sent: bytes, status: int, code: str) -> Reply:
    """The answer, a problem as given, after which the next request works."""
    with wire(cluster) as connection:
        connection.send(sent)
        answer = connection.answer()
        assert_problem(answer, status, code)
        assert_usable(cluster, connection, answer)
    return answer


def accepted(cluster: Cluster, sent: bytes, *statuses: int) -> Reply:
    with wire(cluster) as connection:
        connection.send(sent)
        answer = connection.answer()
        assert answer.status in statuses, answer
        assert_usable(cluster, connection, answer)
    return answer


def listed(cluster: Cluster, prefix: str) -> list[str]:
    """The keys that begin with it."""
    answer = accepted(cluster, request("GET", f"/v1/kv?prefix={quote(prefix, safe='')}"), 200)
    return [item["key"] for item in answer.json["items"]]
