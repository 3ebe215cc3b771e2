"""What a copy promises, to primaries and to itself: durable before it is told, and never two at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.replication.copy_greeting import Deposed
from kvstore.replication.promise import read_identity, write_identity
from kvstore.replication.session import Session
from tests.unit.replication.one_copy import FOLDER, STORE, STORE_ID, Node, Primary, Threads, filling_copy, pages_of


async def test_a_promise_is_durable_before_the_hello_is_answered() -> None:
    node = Node()
    copy = await node.make()
    await Primary(term=7).greet(copy)
    again = await node.restart()
    with pytest.raises(Deposed) as error:
        await Primary(term=6).greet(again)
    assert error.value.promised == 7
    node.machine.now_s += 2.0  # until what it may have granted has run out
    assert await again.opening.promise(8)
    assert not await again.opening.promise(8)
    assert (await node.restart()).following.promised == 8


async def test_a_hello_to_another_copy_is_not_answered() -> None:
    copy = await Node().make()
    assert await copy.greeting.hello(Session(STORE_ID, 9, "first", "another", 1)) is None
    assert copy.following.promised == 0


async def test_a_promise_whose_connection_is_lost_is_kept_all_the_same() -> None:
    """Else the next one, of a term in between, would take the place of the higher one on the disk."""
    node, primary = Node(), Primary(term=7)
    node.machine = machine = Threads()
    copy = await node.make()
    machine.let_go.clear()
    greeting = asyncio.ensure_future(copy.greeting.hello(primary.session(copy)))
    await asyncio.sleep(0.01)
    greeting.cancel()
    machine.let_go.set()
    await asyncio.wait((greeting,))
    assert greeting.cancelled()
    assert not await copy.opening.promise(6)
    kept = read_identity(node.disk, FOLDER, STORE)
    assert kept is not None
    assert kept.promised == copy.following.promised == 7


async def test_a_copy_that_granted_takes_no_promotion_until_that_has_run_out() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.join(copy)
    assert copy.lease.may_be_promoted()
    assert copy.lease.beacon(primary.session(copy))
    assert not copy.lease.may_be_promoted()
    node.machine.now_s += 1.0
    assert not copy.lease.may_be_promoted()
    again = await node.restart()
    node.machine.now_s += 1.0
    assert not again.lease.may_be_promoted()
    node.machine.now_s += 0.1
    assert again.lease.may_be_promoted()
    assert again.lease.silent_s == pytest.approx(1.1)


async def test_a_copy_promises_nothing_to_itself_once_it_has_granted_after_it_was_asked() -> None:
    node, primary = Node(), Primary()
    copy = await node.make()
    await primary.join(copy)
    assert copy.lease.may_be_promoted()
    assert copy.lease.beacon(primary.session(copy))
    assert not await copy.opening.promise(8)
    node.machine.now_s += 2.0
    assert await copy.opening.promise(8)


async def test_a_copy_grants_nothing_while_a_promise_to_itself_is_written() -> None:
    """Its primary could answer reads while the copy opens a higher term."""
    node, primary = Node(), Primary()
    node.machine = machine = Threads()
    copy = await node.make()
    await primary.join(copy)
    machine.let_go.clear()
    promising = asyncio.ensure_future(copy.opening.promise(8))
    await asyncio.sleep(0.01)
    assert copy.following.promised < 8
    assert not copy.lease.beacon(primary.session(copy))
    machine.let_go.set()
    assert await promising


async def test_a_promise_made_while_the_file_is_noted_as_whole_is_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    node, primary = Node(), Primary()
    copy = await filling_copy(node, primary)
    named, of = primary.session(copy), primary.engine.applied
    assert await copy.filling.begins(named, of)
    for page in await pages_of(primary, 6):
        assert await copy.filling.page(named, of.position, page)
    in_thread, reached, goes_on = node.machine.in_thread, asyncio.Event(), asyncio.Event()

    async def slow(function: Callable[[], Any]) -> Any:
        if getattr(function, "func", None) is write_identity and not reached.is_set():
            reached.set()
            await goes_on.wait()
        return await in_thread(function)

    monkeypatch.setattr(node.machine, "in_thread", slow)
    ending = asyncio.ensure_future(copy.filling.ends(named, of.position, of.position.number))
    await reached.wait()
    greeting = asyncio.ensure_future(copy.greeting.hello(named._replace(term=7, start="second")))
    await asyncio.wait((greeting,), timeout=0.1)  # it may be answered at once, or has to wait
    goes_on.set()
    assert await ending
    assert await greeting is not None
    assert read_identity(node.disk, FOLDER, STORE) == copy.identity
    assert copy.identity.promised == copy.following.promised == 7
    assert not copy.is_filling
