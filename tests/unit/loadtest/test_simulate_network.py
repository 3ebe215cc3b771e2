"""The simulated network: what is sent arrives in order, links are cut one way, the dead and the dark are told apart."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from loadtest.simulate.loop import Process, SimulatedLoop
from loadtest.simulate.network import UNTAKEN_MAX, End, Network, lost_by_none


@pytest.fixture
def loop() -> Iterator[SimulatedLoop]:
    loop = SimulatedLoop()
    yield loop
    loop.end()


class Pair:
    """A process at "a", and one at "b" to which it has a connection."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.loop = loop
        self.network = Network(loop, random.Random(1))
        self.accepted: list[End] = []
        for name in ("a", "b"):
            host = self.network.host(name)
            host.process = Process(name)
            host.accept = lambda _greeting, end: self.accepted.append(end)
        self.near = self.run(self.connect())
        (self.far,) = self.accepted

    def connect(self) -> Coroutine[Any, Any, End]:
        return self.network.connect(self.network.hosts["a"].process, "a", "b", "hello")

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def send(self, end: End, *messages: object) -> None:
        async def each() -> None:
            for message in messages:
                await end.send(message)

        self.run(each())

    def received(self, end: End, seconds: float = 1.0) -> list[object]:
        """What comes within that time; None at its end if the connection is over."""
        found: list[object] = []

        async def all_of_it() -> None:
            while not found or found[-1] is not None:
                found.append(await end.receive())

        async def bounded() -> None:
            await asyncio.wait([asyncio.ensure_future(all_of_it())], timeout=seconds)

        self.run(bounded())
        return found


@pytest.fixture
def pair(loop: SimulatedLoop) -> Pair:
    return Pair(loop)


def test_what_is_sent_arrives_in_order_and_then_the_end(pair: Pair) -> None:
    pair.send(pair.near, *range(50))
    pair.near.close()
    assert pair.received(pair.far) == [*range(50), None]


def test_connections_are_not_ordered_among_one_another(pair: Pair) -> None:
    seen: list[int] = []

    async def send_and_see(number: int) -> None:
        near = await pair.connect()
        await near.send(number)
        seen.append(await near.peer.receive())

    async def many() -> None:
        await asyncio.gather(*(send_and_see(number) for number in range(20)))

    pair.run(many())
    assert seen != sorted(seen)


def test_a_link_that_is_cut_one_way_carries_the_other_way_and_keeps_what_is_sent(pair: Pair) -> None:
    pair.network.cut_links([("a", "b")])
    pair.send(pair.near, 1, 2)
    pair.send(pair.far, 3)
    assert pair.received(pair.near) == [3]
    assert pair.received(pair.far) == []
    pair.network.heal_links([("a", "b")], reset_share=0.0)
    assert pair.received(pair.far) == [1, 2]


def test_what_is_under_way_when_a_link_is_cut_arrives_before_what_is_sent_into_the_cut(pair: Pair) -> None:
    pair.send(pair.near, 1, 2)
    pair.network.cut_links([("a", "b")])
    pair.send(pair.near, 3)
    assert pair.received(pair.far) == []
    pair.network.heal_links([("a", "b")], reset_share=0.0)
    assert pair.received(pair.far) == [1, 2, 3]


def test_a_lost_message_and_all_behind_it_come_late_and_other_connections_do_not(pair: Pair) -> None:
    network = pair.network
    network.loses = lambda end, message: message == "lost"
    pair.send(pair.near, "before", "lost", "behind")
    network.loses = lost_by_none
    other = pair.run(pair.connect())
    pair.send(other, "meanwhile")
    assert pair.received(other.peer) == ["meanwhile"]
    assert pair.received(pair.far) == ["before"]
    network.cut_links([("a", "b")])
    network.heal_links([("a", "b")], reset_share=1.0)
    process = network.hosts["a"].process
    assert process is not None
    process.kill()
    network.on_death(network.hosts["a"], process)
    assert pair.received(pair.far) == []
    network.end_lateness([pair.near])
    assert pair.received(pair.far) == ["lost", "behind", None]


def test_a_reset_loses_what_is_under_way_and_both_ends_hear_of_it(pair: Pair) -> None:
    pair.network.cut_links([("a", "b")])
    pair.send(pair.near, 1)
    pair.network.heal_links([("a", "b")], reset_share=1.0)
    assert pair.received(pair.far) == [None]
    assert pair.received(pair.near) == [None]
    with pytest.raises(ConnectionResetError):
        pair.send(pair.near, 2)


def test_the_kernel_of_a_killed_process_sends_what_it_has_and_closes(pair: Pair) -> None:
    pair.send(pair.near, 1)
    process = pair.network.hosts["a"].process
    assert process is not None
    process.kill()
    pair.network.on_death(pair.network.hosts["a"], process)
    assert pair.received(pair.far) == [1, None]


def test_a_host_without_power_says_nothing_until_it_is_back_and_is_sent_something(pair: Pair) -> None:
    host = pair.network.hosts["b"]
    assert host.process is not None
    host.has_power = False
    host.process.kill()
    pair.network.on_death(host, host.process)
    pair.send(pair.near, 1)
    assert pair.received(pair.near, seconds=100.0) == []
    host.has_power, host.process = True, Process("b")
    pair.send(pair.near, 2)
    assert pair.received(pair.near) == [None]


def test_where_nothing_listens_a_connection_is_refused_and_where_nothing_is_heard_it_times_out(pair: Pair) -> None:
    process = pair.network.hosts["b"].process
    assert process is not None
    process.kill()
    with pytest.raises(ConnectionRefusedError):
        pair.run(pair.connect())
    pair.network.cut_links([("b", "a")])
    with pytest.raises(TimeoutError):
        pair.run(pair.connect())


def test_a_sender_waits_while_its_peer_takes_nothing(pair: Pair) -> None:
    sent: list[int] = []

    async def send_many() -> None:
        for number in range(200):
            await pair.near.send(number)
            sent.append(number)

    async def for_a_while() -> None:
        await asyncio.wait([asyncio.ensure_future(send_many())], timeout=5.0)

    pair.run(for_a_while())
    assert len(sent) < 100
    assert pair.received(pair.far) == [*range(200)]


def test_all_tasks_that_wait_to_send_go_on_when_messages_are_taken(loop: SimulatedLoop) -> None:
    """A primary's records and its beacons leave by one connection."""
    pair = Pair(loop)

    async def both() -> None:
        for _ in range(UNTAKEN_MAX):
            await pair.near.send("full")
        senders = [asyncio.ensure_future(pair.near.send(name)) for name in ("records", "beacon")]
        await asyncio.wait(senders, timeout=1.0)
        assert not any(sender.done() for sender in senders)
        senders[1].cancel()  # one that is given up takes no other along
        senders[1] = asyncio.ensure_future(pair.near.send("another beacon"))
        for _ in range(UNTAKEN_MAX):
            await pair.far.receive()
        done, _ = await asyncio.wait(senders, timeout=1.0)
        assert len(done) == 2

    pair.run(both())
