"""When a cluster is said to be ready: asked of a router that is a few lines of HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvstore.readiness import copies_in, until_copied, until_ready


class Router:
    """Answers the given statuses and documents in turn, and the last of them for ever."""

    def __init__(self, *answers: tuple[int, dict[str, Any]]) -> None:
        self.answers = list(answers)
        self.listen = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        status, document = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        writer.write(f"HTTP/1.0 {status} x\r\n\r\n{json.dumps(document)}".encode())
        writer.close()


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    found = Router((200, {}))
    async with await asyncio.start_server(found.serve, "127.0.0.1", 0) as server:
        found.listen = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield found


def cluster(replicas: int, *states: str, nodes: int = 2) -> dict[str, Any]:
    shards = [{"copies": [{"state": state}] if state else []} for state in states]
    return {"replicas": replicas, "nodes": [{}] * nodes, "shards": shards}


async def test_ready_is_when_the_router_says_so(router: Router) -> None:
    router.answers = [(503, {"detail": "no map"}), (503, {"detail": "no map"}), (200, {})]
    await until_ready(router.listen, print)
    assert len(router.answers) == 1


async def test_copied_is_when_every_copy_that_can_be_is_in_sync(router: Router) -> None:
    router.answers = [
        (503, {"detail": "no map"}), (200, cluster(2, "", "")), (200, cluster(2, "in-sync", "joining")),
        (200, cluster(2, "in-sync", "in-sync")), (200, {}),
    ]  # fmt: skip
    await until_copied(router.listen, print)
    assert len(router.answers) == 1


async def test_copies_that_never_join_are_waited_for_no_longer_than_the_bound_and_told_of(router: Router) -> None:
    router.answers = [(200, cluster(2, "in-sync", "joining"))]
    said: list[str] = []
    await until_copied(router.listen, said.append, 1.5)
    assert "copies in sync: 1 of 2" in said
    assert said[-1] == "not all copies are in sync yet (1 of 2): `kvstore status` shows what they wait for"


def test_no_more_copies_are_waited_for_than_there_can_be_on_the_nodes_that_are_there() -> None:
    assert copies_in(json.dumps(cluster(3, "in-sync", "in-sync")).encode()) == (2, 2)
    assert copies_in(json.dumps(cluster(2, "", nodes=1)).encode()) == (0, 0)
