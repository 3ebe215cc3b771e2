"""Requests that come while a term opens: kept for a moment, then begun or refused, each once."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from kvstore.config import Limits
from kvstore.environment import SYSTEM
from kvstore.protocol import Get, Request
from kvstore.shard.early import EarlyRequests
from kvstore.transport.channel import Connection

LIMITS = Limits(early_requests_max=8)


class Answers:
    """A connection, as far as refusals go."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, reply: Any) -> None:
        self.sent.append(reply)


def _come(early: EarlyRequests, answers: Answers, *numbers: int) -> None:
    for number in numbers:
        early.take(Get(number, "key"), cast("Connection", answers))


async def test_what_comes_while_a_term_opens_is_begun_in_order_once_it_is_open() -> None:
    early, answers, begun = EarlyRequests("s1", LIMITS, SYSTEM), Answers(), list[int]()
    early.opens = True
    _come(early, answers, 1, 2, 3)
    assert not answers.sent

    def handle(request: Request, connection: Connection) -> None:
        begun.append(request.id)

    early.begin(handle)
    early.begin(handle)
    assert begun == [1, 2, 3]
    assert not answers.sent


async def test_what_is_kept_for_too_long_is_refused_unexecuted() -> None:
    early, answers = EarlyRequests("s1", LIMITS, SYSTEM), Answers()
    early.opens = True
    _come(early, answers, 1, 2)
    async with asyncio.timeout(60):
        while len(answers.sent) < 2:
            await asyncio.sleep(0.01)
    assert [answer.status for answer in answers.sent] == [503, 503]
    early.begin(lambda request, connection: answers.send("begun"))
    assert "begun" not in answers.sent


async def test_where_no_term_opens_and_beyond_the_bound_it_is_refused_at_once() -> None:
    early, answers = EarlyRequests("s1", LIMITS, SYSTEM), Answers()
    _come(early, answers, 1)
    assert [(answer.id, answer.status) for answer in answers.sent] == [(1, 503)]
    early.opens = True
    _come(early, answers, *range(2, LIMITS.early_requests_max + 3))
    assert [answer.id for answer in answers.sent] == [1, LIMITS.early_requests_max + 2]
