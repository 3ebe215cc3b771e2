"""Following a change of the cluster: figures from one document to the next, its end, and whatever comes in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstore.cli import change
from kvstore.cli.change import Cancelled, Figures, Goal, Joins, Leaves, Settles, Tally, follow
from kvstore.cli.move_progress import MoveProgress, move_progress
from kvstore.client import Client
from kvstore.errors import Unavailable

Json = dict[str, Any]


def move(partitions: int, done: int = 0, total: int = 0, **more: Any) -> Json:
    return {
        "from": "s1", "to": "s5", "partitions": partitions, "step": "copy", "keys_done": done, "keys_total": total,
        "bytes_done": done * 100, "write_pause_ms": 0.0, "detail": "", **more,
    }  # fmt: skip


def last(partitions: int, keys: int, pause_ms: float = 0.0, seconds: float = 1.0) -> Json:
    return {
        "partitions": partitions, "keys": keys, "bytes": keys * 100, "groups": 1, "seconds": seconds,
        "write_pause_ms_max": pause_ms, "write_pause_ms_p99": pause_ms,
    }  # fmt: skip


def document(
    *moves: Json,
    last: Json | None = None,
    wanted: Sequence[str] | None = (),
    ending: Sequence[str] | None = (),
    epoch: int = 2,
    **states: str,
) -> Json:
    shards = [{"id": shard_id, "state": state, "weight": 1} for shard_id, state in states.items()]
    facts = {"epoch": epoch, "shards": shards, "moves": list(moves), "last_change": last}
    return {**facts, "wanted": wanted, "ending": ending}


BEFORE = document()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_what_is_done_is_what_was_committed_and_the_done_part_of_what_is_under_way() -> None:
    tally = Tally(BEFORE)
    figures = tally.take(document(move(10, 50, 100), move(20), last=last(30, 400, 31.5)))
    assert figures == Figures(35.0, 60, 450, 45_000, 31.5)
    assert tally.take(document(last=last(60, 900, 31.5))) == Figures(60, 60, 900, 90_000, 31.5)
    assert not tally.fell_short()


def test_an_earlier_change_is_not_counted() -> None:
    tally = Tally(document(last=last(100, 5000, 99.0)))
    assert tally.take(document(last=last(100, 5000, 99.0))) == Figures()
    assert tally.take(document(move(10), last=last(0, 0))).partitions_total == 10
    assert tally.take(document(last=last(10, 70))) == Figures(10, 10, 70, 7000, 0.0)


def test_what_was_counted_before_the_controller_was_restarted_is_kept() -> None:
    tally = Tally(BEFORE)
    tally.take(document(move(10), move(10), last=last(20, 200, 50.0, seconds=4.0)))
    tally.take(document(move(10), move(10), ending=None))
    assert tally.take(document(move(10), last=last(10, 90, 20.0))) == Figures(30, 40, 290, 29_000, 50.0)
    assert tally.take(document(last=last(20, 180, 20.0))) == Figures(40, 40, 380, 38_000, 50.0)
    assert not tally.fell_short()


def test_a_controller_that_was_restarted_while_nobody_looked_is_no_cancel() -> None:
    tally = Tally(BEFORE)
    tally.take(document(move(10), move(10), last=last(20, 200, seconds=4.0)))
    assert tally.take(document(last=last(20, 220, seconds=0.5))) == Figures(40, 40, 420, 42_000, 0.0)
    assert not tally.fell_short()
    tally.take(document(last=None))
    assert not tally.fell_short()


def test_moves_that_vanish_without_being_done_are_seen() -> None:
    tally = Tally(BEFORE)
    tally.take(document(move(10), move(10), last=last(20, 200)))
    tally.take(document(last=last(30, 300)))
    assert tally.fell_short()


# --- goals ------------------------------------------------------------------------------------------------------------


def judged(goal: Goal, *documents: Json) -> list[str]:
    return [goal.judge(each) for each in documents]


def test_a_shard_has_joined_when_it_is_up_and_nothing_moves() -> None:
    documents = [document(wanted=["s5"]), document(wanted=None), document(move(1), s5="joining"),
                 document(move(1), s5="up"), document(s5="down"), document(s5="up")]  # fmt: skip
    assert judged(Joins("s5"), *documents) == ["under way"] * 5 + ["done"]


def test_a_joining_shard_that_vanishes_or_leaves_was_cancelled() -> None:
    assert judged(Joins("s5"), document(s5="joining"), document()) == ["under way", "cancelled"]
    assert judged(Joins("s5"), document(wanted=["s5"]), document(wanted=["s6"])) == ["under way", "cancelled"]
    assert judged(Joins("s5"), document(move(1), s5="leaving")) == ["cancelled"]


def test_a_shard_has_left_when_it_is_no_member_and_its_process_has_ended() -> None:
    documents = [document(move(1), s2="leaving"), document(move(1), s2="down"), document(ending=None, s2="down"),
                 document(ending=["s2"]), document(ending=None)]  # fmt: skip
    assert judged(Leaves("s2"), *documents, document(ending=["s3"])) == ["under way"] * 5 + ["done"]


def test_a_leaving_shard_that_stays_was_cancelled() -> None:
    assert judged(Leaves("s2"), document(move(1), s2="leaving"), document(s2="up")) == ["under way", "cancelled"]
    assert judged(Leaves("s2"), document(move(1), s2="up"), document(s2="down")) == ["cancelled", "cancelled"]


def test_keys_have_settled_when_nothing_moves() -> None:
    assert judged(Settles(), document(move(1)), document(ending=None), document()) == ["under way", "under way", "done"]


# --- following --------------------------------------------------------------------------------------------------------

Answer = Json | web.Response


class Router:
    """Answers GET /v1/cluster with one document after the other, the last one for ever; PATCH as told."""

    def __init__(self, *answers: Json | int) -> None:
        self.answers = list(answers)

    async def cluster(self, request: web.Request) -> web.Response:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, int):
            problem = Unavailable("no map yet").problem()
            return web.json_response(problem, status=answer, content_type="application/problem+json")
        return web.json_response(answer)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        application = web.Application()
        application.router.add_get("/v1/cluster", self.cluster)
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
    monkeypatch.setattr(change, "_CANCELLED_S", 0.1)


async def followed(goal: Goal, *answers: Json | int, epoch: int = 2) -> tuple[Figures, list[str]]:
    said = Said()
    async with asyncio.timeout(20), Router(*answers).client() as kv:
        return await follow(kv, goal, said, BEFORE, epoch), said.lines


async def test_a_change_is_followed_to_its_end() -> None:
    figures, lines = await followed(
        Joins("s5"),
        document(move(10), last=last(0, 0), s5="joining"),
        document(move(10, 30, 60), last=last(0, 0), s5="joining"),
        document(last=last(10, 60, 12.5), s5="up"),
    )
    assert (figures, lines) == (Figures(10, 10, 60, 6000, 12.5), [])


async def test_a_map_of_before_the_change_tells_nothing() -> None:
    figures, _ = await followed(Settles(), document(epoch=1), document(epoch=1), document(last=last(9, 9), epoch=3))
    assert figures.keys == 9


async def test_what_a_move_waits_for_is_said_once_and_that_it_goes_on() -> None:
    waits = document(move(10, step="waiting", detail="shard s1 cannot be reached"), s5="joining")
    _, lines = await followed(Joins("s5"), waits, waits, document(move(10), s5="joining"), document(s5="up"), epoch=2)
    assert lines == ["waiting: s1 to s5: shard s1 cannot be reached", "going on"]


async def test_a_router_or_controller_that_is_away_for_a_moment_is_waited_for() -> None:
    _, lines = await followed(
        Leaves("s2"),
        503,
        503,
        document(move(1), s2="leaving"),
        document(ending=None),
        document(ending=None),
        document(),
    )
    assert lines == [
        "waiting: the router does not answer (no map yet)", "it answers again",
        "waiting: the controller does not answer", "it answers again",
    ]  # fmt: skip


async def test_a_router_that_stays_away_is_an_error_that_says_that_the_change_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(change, "_AWAY_S_MAX", 0.05)
    with pytest.raises(Unavailable) as refused:
        await followed(Settles(), 503)
    assert "The change goes on by itself" in refused.value.problem()["next_step"]


@pytest.mark.parametrize(
    ("goal", "answers"),
    [
        (lambda: Joins("s5"), [document(move(9), s5="joining"), document()]),
        (lambda: Joins("s5"), [document(move(9), last=last(0, 0), s5="joining"), document(last=last(4, 4), s5="up")]),
        (lambda: Leaves("s5"), [document(move(9), s5="leaving"), document(s5="up")]),
        (lambda: Settles(), [document(move(9), last=last(0, 0)), document(last=last(0, 0))]),
    ],
)
async def test_a_change_that_somebody_cancels_ends_as_such(goal: Callable[[], Goal], answers: list[Json]) -> None:
    with pytest.raises(Cancelled):
        await followed(goal(), *answers)


async def test_counts_that_are_told_a_moment_late_are_no_cancel() -> None:
    late = document(last=last(0, 0), s5="up")
    done = document(last=last(9, 9), s5="up")
    figures, _ = await followed(Joins("s5"), document(move(9), last=last(0, 0), s5="joining"), late, late, done)
    assert figures.keys == 9


async def test_a_shard_that_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change, "_STARTING_PATIENCE_S", -1.0)
    wanted = document(wanted=["s5"])
    _, lines = await followed(Joins("s5"), wanted, wanted, document(s5="up"))
    assert len(lines) == 1
    assert "s5 has not come yet; the log of `kvstore up` says why" in lines[0]


# --- how it looks -----------------------------------------------------------------------------------------------------


def test_a_line_has_share_keys_rate_bytes_time_left_and_the_longest_pause(capsys: pytest.CaptureFixture[str]) -> None:
    progress = MoveProgress("add s5")
    progress._printed_s = -10.0
    progress.show(Figures())
    progress._printed_s, progress._moving_since_s = -10.0, progress._printed_s - 10.0
    progress.show(Figures(25.0, 100, 5000, 500_000, 31.4))
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
        progress.show(Figures(25.0, 100, 5000, 500_000, 31.4))
        progress.say("waiting: s1 [bold] is down")
    out, err = capsys.readouterr()
    assert out == ""
    assert "waiting: s1 [bold] is down" in err
    assert "25%" in err


def test_a_shard_that_was_asked_for_before_is_waited_for() -> None:
    assert Joins("s5").under_way(document(s1="up", wanted=["s5"])) == "wanted"
    assert Joins("s5").under_way(document(s1="up", s5="joining")) == "joining"
    assert Joins("s5", 2).under_way(document(s1="up", s5="joining")) is None
    assert Joins("s5").under_way(document(s1="up")) is None
    assert Joins("s5").under_way(document(s1="up", s5="up", wanted=None)) is None
