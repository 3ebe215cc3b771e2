"""The shared locks of a read-only transaction, which its router lets go: also where that is refused at first.

The channels are in-process fakes, the rules are real.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvstore.config import Limits
from kvstore.errors import Conflict, KvError, TooManyRequests, Unavailable
from kvstore.model import Read, TxnOp
from kvstore.protocol import Abort, Answer, ReadLock, Reads, ReadUnlock
from kvstore.router.coordinator import Coordinator
from kvstore.router.participants import Transaction
from kvstore.router.service import RouterService
from tests.unit.router.fake_shards import all_follow, halves, key_of, make_service, shards
from tests.unit.waiting import until

pytestmark = pytest.mark.usefixtures("fake_channels")

READ_BOTH = Transaction([], [TxnOp("get", key_of("s1")), TxnOp("get", key_of("s2"))], [])
REFUSALS = [Unavailable("not now"), TooManyRequests("too much")]


class Locks:
    """What a shard holds for readers; it refuses the first words that let go."""

    def __init__(self, refusals: list[KvError]) -> None:
        self.held: set[int] = set()
        self.count = 0
        self._refusals = refusals

    def answer(self, request: Any, *_: Any) -> Any:
        if isinstance(request, ReadUnlock):
            if self._refusals:
                return refused(request, self._refusals.pop())
            was_held = request.lock[1] in self.held
            self.held.discard(request.lock[1])
            return Answer(request.id, 200 if was_held else 409)
        assert isinstance(request, ReadLock)
        self.count += 1
        self.held.add(self.count)
        return Reads(request.id, [Read(0, None) for _ in request.keys], ("opening", self.count))


def refused(request: Any, error: KvError) -> Answer:
    return Answer(request.id, error.status, problem=error.problem())


@pytest.fixture
async def service() -> RouterService:
    made = make_service()
    all_follow(made, halves())
    return made


def locks_of(shard_id: str, *refusals: KvError) -> Locks:
    locks = Locks(list(refusals))
    shards[shard_id].answer = locks.answer  # type: ignore[method-assign]
    return locks


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_locks_whose_end_was_refused_are_let_go_later(service: RouterService, refusal: KvError) -> None:
    first, second = locks_of("s1", refusal, refusal), locks_of("s2")
    assert len((await Coordinator(service, Limits()).run(READ_BOTH, None)).reads) == 2
    assert first.count > 1, "the first attempt did not know whether its locks were held"
    await until(lambda: not first.held | second.held)


async def test_locks_are_let_go_later_where_too_much_is_under_way(service: RouterService) -> None:
    first, second = locks_of("s1"), locks_of("s2")
    channel: Any = service.table.channels["s1"]
    request, full = channel.request, [True, True]

    def ask(asked: Any, **options: Any) -> Any:
        if isinstance(asked, ReadUnlock) and full:
            full.pop()
            raise TooManyRequests("too many operations wait")
        return request(asked, **options)

    channel.request = ask
    await Coordinator(service, Limits()).run(READ_BOTH, None)
    await until(lambda: not first.held | second.held)
    assert not full


async def test_locks_beside_a_shard_that_refuses_are_let_go_later(service: RouterService) -> None:
    first = locks_of("s1", Unavailable("not now"))

    def answer(request: Any, *_: Any) -> Any:
        if isinstance(request, Abort):
            return Answer(request.id, 200)
        return refused(request, Conflict("another transaction is there", key=key_of("s2")))

    shards["s2"].answer = answer  # type: ignore[method-assign]
    with pytest.raises(Conflict):
        await Coordinator(service, Limits(txn_timeout_s=0.05)).run(READ_BOTH, None)
    assert first.count
    await until(lambda: not first.held)


async def test_an_abort_that_could_not_be_sent_is_sent_later(service: RouterService) -> None:
    channel: Any = service.table.channels["s1"]
    request, full, aborted = channel.request, [True], list[Abort]()

    def ask(asked: Any, **options: Any) -> Any:
        if isinstance(asked, Abort) and full:
            full.pop()
            raise TooManyRequests("too many operations wait")
        if isinstance(asked, Abort):
            aborted.append(asked)
        return request(asked, **options)

    channel.request = ask
    coordinator = Coordinator(service, Limits())
    attempt = coordinator._stamps.draw(1, epoch=1)
    coordinator._after.abort(attempt, [key_of("s1")], channel)
    assert not full
    await asyncio.wait_for(until(lambda: aborted), 60)
    assert [each.attempt for each in aborted] == [attempt]
