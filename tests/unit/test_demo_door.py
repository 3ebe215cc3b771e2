"""The door of `kvstore up --demo`: a node is killed for the one order that is right, and for nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from kvstore.demo import DemoDoor
from kvstore.supervisor import Supervisor

WAIT_S = 30.0


class FakeSupervisor:
    """Runs shard-s1; shard-s2 is away."""

    def __init__(self) -> None:
        self.killed: list[tuple[str, float]] = []

    def kill_for(self, name: str, away_s: float) -> int:
        if name == "shard-s2":
            raise ValueError
        if name != "shard-s1":
            raise KeyError(name)
        self.killed.append((name, away_s))
        return 4711


@pytest.fixture
def supervisor() -> FakeSupervisor:
    return FakeSupervisor()


@pytest.fixture
async def door(supervisor: FakeSupervisor) -> AsyncIterator[DemoDoor]:
    door = DemoDoor()
    serving = asyncio.create_task(door.serve(cast(Supervisor, supervisor)))
    yield door
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


async def said(door: DemoDoor, line: bytes) -> bytes:
    """Its answer to that line, empty if it just hangs up."""
    host, port = door.place.partition("/")[0].split(":")
    async with asyncio.timeout(WAIT_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(line + b"\n")
        try:
            answer = await reader.read()
        except ConnectionError:  # it does not read what follows the line
            answer = b""
        writer.close()
        return answer


def order(door: DemoDoor, **members: Any) -> bytes:
    return json.dumps({"word": door.place.partition("/")[2], "kill": "s1", "away_s": 12} | members).encode()


async def test_a_node_is_killed_for_as_long_as_is_asked(door: DemoDoor, supervisor: FakeSupervisor) -> None:
    assert json.loads(await said(door, order(door))) == {"pid": 4711}
    assert supervisor.killed == [("shard-s1", 12)]
    assert "does not run now" in json.loads(await said(door, order(door, kill="s2")))["detail"]
    assert "does not run node s9" in json.loads(await said(door, order(door, kill="s9")))["detail"]


async def test_what_does_not_know_the_word_or_is_no_order_is_not_answered(
    door: DemoDoor, supervisor: FakeSupervisor
) -> None:
    wrong = [
        order(door, word="0" * 32), order(door, word=None), order(door, kill=1), order(door, away_s=0),
        order(door, away_s=61), order(door, away_s="1"), b"[]", b"{", b"x" * 5000,
        b"POST / HTTP/1.1", b"\xff",
    ]  # fmt: skip
    for line in wrong:
        assert await said(door, line) == b"", line
    assert supervisor.killed == []
