"""Following a change of the cluster: its documents one after the other, its end, and whatever comes in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.cli import change
from kvstore.cli.change import follow
from kvstore.cli.move_progress import MoveProgress, move_progress
from kvstore.client import Client
from kvstore.errors import NotFound, Unavailable

Json = dict[str, Any]
ID = "6f1d0c3b9a8e4f27"


def document(done: int = 0, total: int = 0, state: str = "running", **more: Any) -> Json:
    return {
        "id": ID, "kind": "add", "shard": "s5", "weight": 1, "state": state, "detail": "", "waiting_for": None,
        "progress": done / total if total else None, "partitions_done": done, "partitions_total": total,
        "keys_done": done * 10, "keys_total": total * 10, "bytes_done": done * 1000, "groups_done": 1,
        "started_at": "2026-11-28T21:14:03.250Z", "ended_at": None, "seconds": 1.0, "write_pause_ms_max": 31.4,
        "write_pause_ms_p99": 31.4, **more,
    }  # fmt: skip


DONE = document(10, 10, "done")


class Router:
    """Answers GET /v1/changes/{id} with one document after the other, the last one for ever."""

    def __init__(self, *answers: Json | int) -> None:
        self.answers = list(answers)

    async def change(self, request: web.Request) -> web.Response:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, int):
            error = NotFound("there is no change") if answer == 404 else Unavailable("no map yet")
            return web.json_response(error.problem(), status=answer, content_type="application/problem+json")
        return web.json_response(answer)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        application = web.Application()
        application.router.add_get(f"/v1/changes/{ID}", self.change)
        async with TestServer(application) as server, Client(str(server.make_url("")), retries=0) as kv:
            yield kv


class Said(MoveProgress):
    def __init__(self) -> None:
        super().__init__("add s5")
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "_POLL_S", 0.01)
    monkeypatch.setattr(change, "_WAITING_PATIENCE_S", 0.0)


async def followed(*answers: Json | int) -> tuple[change.Document, list[str]]:
    said = Said()
    async with asyncio.timeout(20), Router(*answers).client() as kv:
        return await follow(kv, ID, said), said.lines


@pytest.mark.parametrize("state", ["done", "cancelled", "superseded"])
async def test_a_change_is_followed_until_it_runs_no_more(state: str) -> None:
    ended = document(10, 10, state)
    assert await followed(document(), document(5, 10), ended) == (ended, [])


async def test_what_it_waits_for_is_said_once_and_that_it_goes_on() -> None:
    waits = document(0, 10, waiting_for="s1 to s5: shard s1 cannot be reached")
    _, lines = await followed(waits, waits, waits, document(5, 10), DONE)
    assert lines == ["waiting: s1 to s5: shard s1 cannot be reached", "going on"]


async def test_what_it_waits_for_next_is_said_too() -> None:
    first, second = document(waiting_for="shard s5"), document(waiting_for="room on s5")
    _, lines = await followed(first, first, second, second, DONE)
    assert lines[:2] == ["waiting: shard s5", "waiting: room on s5"]


async def test_a_router_or_controller_that_is_away_for_a_moment_is_waited_for() -> None:
    _, lines = await followed(503, 503, document(1, 10), DONE)
    assert lines == ["waiting: no news of the change: no map yet", "it answers again"]


async def test_a_router_that_stays_away_is_an_error_that_says_that_the_change_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(change, "_AWAY_S_MAX", 0.05)
    with pytest.raises(Unavailable) as refused:
        await followed(503)
    assert "The change goes on by itself" in refused.value.problem()["next_step"]


async def test_a_change_that_is_not_known_is_not_waited_for() -> None:
    with pytest.raises(NotFound):
        await followed(document(), 404)


# --- how it looks -----------------------------------------------------------------------------------------------------


def test_a_line_has_share_keys_rate_bytes_time_left_and_the_longest_pause(capsys: pytest.CaptureFixture[str]) -> None:
    progress = MoveProgress("add s5")
    progress._printed_s = -10.0
    progress.show(document())
    progress.show(document(0, 2000))
    assert progress._moving_since_s is not None
    progress._printed_s, progress._moving_since_s = -10.0, progress._moving_since_s - 10.0
    progress.show(document(500, 2000))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "add s5: nothing has moved yet"
    shown = second.split(", ")
    assert shown[0] == "add s5: 25%"
    assert shown[1].startswith("5,000 keys at ")
    assert shown[2] == "500.0 kB"
    assert shown[3].endswith(" s left")
    assert shown[4] == "max pause 31 ms"


def test_a_bar_is_drawn_on_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    with move_progress("add s5", bar=True) as progress:
        progress.show(document(500, 2000))
        progress.say("waiting: s1 [bold] is down")
    out, err = capsys.readouterr()
    assert out == ""
    assert "waiting: s1 [bold] is down" in err
    assert "25%" in err


def test_a_change_of_copies_moves_nothing_and_shows_for_how_long_it_is_under_way() -> None:
    progress = MoveProgress("replicas 3")
    assert progress.parts(document(kind="replicas", seconds=7.2)) == ["under way for 7 s"]
    assert progress.parts(document(kind="promote", seconds=0.4)) == ["under way for 0 s"]
