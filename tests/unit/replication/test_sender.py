"""A primary's sender and its copies, over connections that can be cut and held up; real logs on simulated disks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from kvstore.environment import Environment
from kvstore.replication import messages, serving, shipping
from kvstore.replication.configuration import Configuration, Primary, Replica
from kvstore.replication.copy import StoreCopy
from kvstore.replication.copy_greeting import CopyGreeting
from kvstore.replication.copy_link import Surroundings
from kvstore.replication.files import make_copy
from kvstore.replication.places import Times
from kvstore.replication.sender import Sender
from kvstore.replication.serving import serve_copy
from kvstore.replication.session import Session
from kvstore.replication.wire import Refused, Wire, WireLost, WireRefused, fetch, greet
from kvstore.storage.engine import Identity
from kvstore.storage.log import Log, NotNext
from kvstore.storage.memory import MemoryEngine
from kvstore.storage.record import CommitRecord
from kvstore.storage.replay import replay
from kvstore.storage.rows import VALUE, Clock, Row
from kvstore.storage.segments import DATA_OFFSET, HEADER_BYTES
from loadtest.simulate.disk import SimulatedDisk
from tests.unit.replication.one_copy import FOLDER, STORE_ID, Node, rows_of
from tests.unit.waiting import WAIT_S, until

T = TypeVar("T")
SLACK_S = 0.05  # what a sync may take
TIMES = Times(lease_s=0.8, disk_stall_s=2.0, replica_timeout_s=0.2, failover_after_s=5.0)


def stand_still(seconds: float) -> None:
    """Block the loop."""
    time.sleep(seconds)


class Inline(Environment):
    """The machine, but without threads, since a simulated disk is for one."""

    def __init__(self) -> None:
        super().__init__()
        self.hops = 0

    async def in_thread(self, function: Callable[[], T]) -> T:
        self.hops += 1
        await asyncio.sleep(0)
        return function()


class QueueWire:
    """One end of a connection in memory; what is sent is encoded and decoded, as on a socket."""

    def __init__(self, decode: Callable[[bytes], Any]) -> None:
        self.inbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.other: QueueWire
        self.is_lost = False
        self.gate: asyncio.Event | None = None
        self._decode = decode

    async def send(self, message: Any) -> None:
        if self.is_lost:
            raise WireLost("it is cut")
        self.other.inbox.put_nowait(messages.encode(message))
        await asyncio.sleep(0)

    async def receive(self) -> Any:
        frame = await self.inbox.get()
        if self.gate is not None:
            await self.gate.wait()
        if frame is None or self.is_lost:
            self.is_lost = True
            raise WireLost("it is cut")
        return self._decode(frame)

    async def close(self) -> None:
        for end in (self, self.other):
            end.is_lost = True
            end.inbox.put_nowait(None)


class Cluster:
    """A primary's log and engine, its sender, and nodes with copies. `is_busy`: clients are at work on its node."""

    def __init__(
        self, *nodes: str, segment_bytes: int = 1 << 20, times: Times = TIMES, copy_times: Times | None = None
    ) -> None:
        """`copy_times`: of the copies, if they are others than the primary's."""
        self.environment = Inline()
        self._times = times
        self._copy_times = copy_times or times
        self.log = Log.create(SimulatedDisk(), FOLDER, "shard-s1", STORE_ID, segment_bytes=segment_bytes)
        self.engine = MemoryEngine(Identity(STORE_ID, None, "s1", 64))
        self.copies: dict[str, StoreCopy] = {}
        self.nodes = {name: Node() for name in nodes}
        self.wires: dict[str, list[QueueWire]] = {name: [] for name in nodes}
        self.is_down: set[str] = set()
        self.committed: list[int] = []
        self.news = 0
        self.is_busy = False
        self.syncs: frozenset[object] = frozenset()  # of other logs on its node
        self.config = Configuration("s1", STORE_ID, 1, 1, Primary("n1", "primary"))
        self.sender: Sender
        self._serving: list[asyncio.Task[None]] = []

    async def connect(self, node: str, session: Session) -> Wire:
        if node in self.is_down:
            raise WireLost("the node is down")
        ours, theirs = QueueWire(messages.decode_from_copy), QueueWire(messages.decode_from_primary)
        ours.other, theirs.other = theirs, ours
        self.wires[node] += [ours, theirs]
        copy_of = self.copies.get
        served = serve_copy(theirs, lambda session: copy_of(node), self.environment)
        self._serving.append(asyncio.create_task(served))
        return ours

    async def cut(self, node: str) -> None:
        for wire in self.wires[node]:
            await wire.close()
        self.wires[node].clear()

    def hold_up(self, node: str) -> asyncio.Event:
        """What the copy sends is held up from now on, until the event is set."""
        gate = asyncio.Event()
        for wire in self.wires[node]:
            if not wire.is_lost:
                wire.gate = gate
        return gate

    def replica(self, node: str, state: Any = "joining", joined: int = 1) -> Replica:
        return Replica(node, self.copies[node].following.copy_id, state, joined)

    def put(self, key: str, value: bytes = b"value", *, sync: bool = True) -> int:
        number = self.log.last.number + 1
        record = CommitRecord(Clock(number, number), [Row(VALUE, key, number % 64, number, number, 0, value)])
        self.log.append(record.encode(), self.config.term, frees=True)
        (entry,) = self.log.entries(number - 1)
        self.sender.appended(entry)
        if sync:
            self.log.sync()
            self.sender.synced(number)
        return number

    async def apply(self) -> None:
        await replay(self.engine, list(self.log.entries(self.engine.applied.position.number)))

    def follow(self, *replicas: Replica) -> None:
        """A newer map that names these copies is heard of, then a record carries it."""
        self.config = self.config._replace(epoch=self.config.epoch + 1, replicas=replicas)
        self.sender.hear(self.config)
        self.sender.follow(self.config, self.put("map"))

    def falls_out(self, node: str) -> Replica:
        """A newer map names its copy joining, under another number."""
        fallen = self.replica(node, joined=self.config.epoch + 1)
        self.follow(fallen)
        return fallen

    async def limps_and_falls_out(self, node: str) -> Replica:
        """Its copy is connected and does not answer; the request to take it out is granted."""
        gate = self.hold_up(node)
        self.put("held up")
        await until(lambda: [each.kind for each in self.sender.requests()] == ["out"])
        fallen = self.falls_out(node)
        gate.set()
        return fallen

    def _note_news(self) -> None:
        self.news += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Cluster]:
        for name, node in self.nodes.items():
            self.copies[name] = await make_copy(node.place, STORE_ID, self.environment, self._copy_times)
        opening = self.log.append(CommitRecord(Clock()).encode(), 1)
        self.log.sync()
        state = shipping.opened(self.config, "n1", "start", opening, opening)
        self.sender = Sender(
            state,
            Surroundings(
                self.log,
                self.engine,
                self.environment,
                self.connect,
                self._times,
                self.committed.append,
                self._note_news,
                lambda: self.is_busy,
                syncs=lambda: self.syncs,
            ),
        )
        works = [
            asyncio.create_task(work) for work in (self.sender.run(), *(c.applier.run() for c in self.copies.values()))
        ]
        try:
            yield self
        finally:
            await self.sender.close()
            for task in (*works, *self._serving):
                task.cancel()
            results = await asyncio.gather(*works, *self._serving, return_exceptions=True)
            wrong = [each for each in results if isinstance(each, Exception)]
            assert not wrong, wrong

    async def in_sync(self, *nodes: str) -> None:
        """These copies join, and a map says so."""
        joined = [self.replica(node, joined=self.config.epoch + 1) for node in nodes]
        self.follow(*joined)
        await until(lambda: {each.copy_id for each in self.sender.requests()} == {each.copy_id for each in joined})
        assert {each.kind for each in self.sender.requests()} == {"in-sync"}
        self.follow(*(each._replace(state="in-sync") for each in joined))
        assert self.sender.requests() == ()


async def test_a_copy_joins_by_records_and_from_then_on_nothing_is_committed_without_it() -> None:
    async with Cluster("n2").running() as cluster:
        for number in range(20):
            cluster.put(f"key-{number}")
        assert cluster.sender.shipping.committed == 21, "without copies the own sync is enough"
        await cluster.in_sync("n2")
        await until(lambda: cluster.copies["n2"].log.synced == cluster.log.last)
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        gate = cluster.hold_up("n2")
        number = cluster.put("held up")
        await asyncio.sleep(0.05)
        assert cluster.sender.shipping.committed == number - 1
        gate.set()
        await until(lambda: cluster.committed[-1] == number)
        await until(lambda: "held up" in rows_of(cluster.copies["n2"].engine))


async def test_a_copy_whose_node_takes_no_connection_is_tried_again_and_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster, tries = Cluster("n2"), list[str]()

    async def refuse(node: str, session: Session) -> Wire:
        tries.append(node)
        raise WireRefused("it is of another version. Start both with the same one.")

    cluster.connect = refuse  # type: ignore[method-assign]
    async with cluster.running():
        cluster.follow(cluster.replica("n2"))
        await until(lambda: len(tries) > 2)
    (record,) = (each for each in caplog.records if each.levelname == "ERROR")
    assert record.getMessage().endswith("on node n2: it is of another version. Start both with the same one.")


async def test_records_leave_before_the_own_sync() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        number = cluster.put("a", sync=False)
        await until(lambda: cluster.copies["n2"].log.synced.number == number)
        await until(lambda: cluster.sender.shipping.committed == number - 1)
        cluster.log.sync()
        cluster.sender.synced(number)
        await until(lambda: cluster.sender.shipping.committed == number)


async def test_a_copy_whose_records_are_kept_no_more_gets_a_snapshot_and_then_records() -> None:
    async with Cluster("n2", segment_bytes=8192).running() as cluster:
        for number in range(200):
            cluster.put(f"key-{number % 50}", b"%05d" % number * 20)
            cluster.log.prepare_segment()
        await cluster.apply()
        cluster.log.release(cluster.engine.applied.position.number)
        assert cluster.log.first > 1
        await cluster.in_sync("n2")
        last = cluster.put("afterwards")
        await until(lambda: cluster.sender.shipping.committed == last)
        await cluster.apply()
        copy = cluster.copies["n2"]
        await until(lambda: rows_of(copy.engine) == rows_of(cluster.engine))
        assert not copy.is_filling
        assert len(rows_of(copy.engine)) == 52
        assert cluster.sender.links.keeps is None


async def test_a_record_that_is_appended_when_the_term_is_over_holds_nothing_up() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.copies["n2"].log.synced == cluster.log.last)
        cluster.sender.hear(cluster.config._replace(epoch=9, term=9))
        began_s = cluster.environment.monotonic_s()
        number = cluster.put("late")
        await asyncio.sleep(0.05)
        assert cluster.environment.monotonic_s() - began_s < WAIT_S, "a link that turns in circles stops the loop"
        assert cluster.copies["n2"].log.last.number == number - 1


async def test_where_the_disk_of_a_copy_is_quick_no_record_takes_a_hop_to_a_thread() -> None:
    times = TIMES._replace(sync_inline_ms_max=1e6, apply_delay_s=WAIT_S)
    async with Cluster("n2", times=times).running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        hops = cluster.environment.hops
        for number in range(20):
            last = cluster.put(f"key-{number}")
            await until(lambda last=last: cluster.sender.shipping.committed == last)
        assert cluster.environment.hops == hops
        assert cluster.copies["n2"].log.synced == cluster.log.last


@pytest.mark.parametrize("sync_inline_ms_max", [0.0, 1e6], ids=["slow disks", "quick disks"])
async def test_after_a_lost_connection_the_session_begins_again_and_nothing_is_missing(
    sync_inline_ms_max: float,
) -> None:
    async with Cluster("n2", "n3", times=TIMES._replace(sync_inline_ms_max=sync_inline_ms_max)).running() as cluster:
        await cluster.in_sync("n2", "n3")
        generator = random.Random(5)
        for number in range(300):
            cluster.put(f"key-{number}")
            if generator.random() < 0.05:
                await cluster.cut(generator.choice(["n2", "n3"]))
            if generator.random() < 0.3:
                await asyncio.sleep(0.001)
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        assert cluster.committed == sorted(cluster.committed)
        for copy in cluster.copies.values():
            assert copy.log.synced == cluster.log.last
            await until(lambda copy=copy: len(rows_of(copy.engine)) == 301)


async def test_of_a_copy_whose_log_is_the_beginning_of_the_primarys_one_checksum_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each record further back would have to be read from the disk, and a new term is not open before."""
    asked: list[list[int]] = []
    checksums = CopyGreeting.checksums

    async def noted(greeting: CopyGreeting, numbers: Sequence[int]) -> dict[int, int]:
        asked.append(list(numbers))
        return await checksums(greeting, numbers)

    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        for number in range(50):
            cluster.put(f"key-{number}")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        last = cluster.log.last.number
        monkeypatch.setattr(CopyGreeting, "checksums", noted)
        await cluster.cut("n2")
        await until(lambda: bool(asked))
        cluster.put("more")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
    assert asked == [[last]]


async def test_a_copy_that_does_not_answer_is_asked_out_and_nothing_goes_on_until_a_map_says_so() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        cluster.is_down.add("n2")
        await cluster.cut("n2")
        news = cluster.news
        number = cluster.put("a")
        await until(lambda: [each.kind for each in cluster.sender.requests()] == ["out"])
        await until(lambda: cluster.news > news)
        assert cluster.sender.shipping.committed == number - 1
        cluster.follow()
        await until(lambda: cluster.committed[-1] == number + 1)
        assert cluster.sender.requests() == ()


async def test_a_request_is_taken_back_when_the_copy_answers() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        gate = cluster.hold_up("n2")
        number = cluster.put("a")
        await until(lambda: [each.kind for each in cluster.sender.requests()] == ["out"])
        gate.set()
        await until(lambda: cluster.sender.requests() == ())
        await until(lambda: cluster.sender.shipping.committed == number)


async def test_a_copy_whose_disk_is_full_is_asked_out_though_it_grants_the_lease_and_takes_the_record_later() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        copy = cluster.copies["n2"]
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        with pytest.MonkeyPatch.context() as full:
            full.setattr(copy.log, "room", lambda **_: 0)
            full.setattr(copy.log, "prepare_segment", lambda: False)
            number = cluster.put("a")
            await until(lambda: [each.kind for each in cluster.sender.requests()] == ["out"])
            await until(cluster.sender.may_answer)
            assert cluster.sender.shipping.committed == number - 1
        await until(lambda: cluster.sender.shipping.committed == number)
        assert cluster.sender.requests() == ()


async def test_while_the_own_sync_is_under_way_no_copy_is_asked_out_and_then_it_has_its_own_time() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        clock_s = cluster.environment.boottime_s
        cluster.hold_up("n2")
        began_s = clock_s()
        cluster.sender.stalls.sync_begins(began_s)
        number = cluster.put("a", sync=False)
        await asyncio.sleep(2 * TIMES.replica_timeout_s)
        assert cluster.sender.requests() == ()
        cluster.log.sync()
        cluster.sender.synced(number)
        ended_s = clock_s()
        assert cluster.sender.requests() == ()
        await until(lambda: [each.kind for each in cluster.sender.requests()] == ["out"])
        (link,) = cluster.sender.links.by_key.values()
        since_s = link.in_flight.patience.since
        assert since_s is not None
        owed_before_s = max(0.0, began_s - since_s) + SLACK_S
        assert clock_s() - ended_s >= TIMES.replica_timeout_s - owed_before_s


async def test_while_another_log_on_the_primarys_disk_waits_for_its_sync_no_copy_is_asked_out() -> None:
    """The own sync has returned just before the disk that all share stood still."""
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        cluster.hold_up("n2")
        cluster.put("a")
        cluster.syncs = frozenset({object()})
        news = cluster.news
        await asyncio.sleep(4 * TIMES.replica_timeout_s)
        assert (cluster.sender.requests(), cluster.news) == ((), news)
        cluster.syncs = frozenset()
        await until(lambda: [each.kind for each in cluster.sender.requests()] == ["out"])


async def test_while_other_logs_on_the_primarys_disk_are_synced_slowly_a_copy_that_does_not_answer_is_asked_out() -> (
    None
):
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        cluster.hold_up("n2")
        cluster.put("a")
        for _ in range(100):
            cluster.syncs = frozenset([*list(cluster.syncs)[:1], object()])  # of two, one returns
            await asyncio.sleep(TIMES.replica_timeout_s / 8)
            if cluster.sender.requests():
                break
        assert [each.kind for each in cluster.sender.requests()] == ["out"]


async def test_time_in_which_the_own_loop_stood_still_does_not_count_against_a_copy() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        cluster.hold_up("n2")
        cluster.put("a")
        (link,) = cluster.sender.links.by_key.values()
        await until(lambda: link.in_flight.patience.since is not None)
        stand_still(4 * TIMES.replica_timeout_s)
        assert cluster.sender.requests() == ()
        await until(lambda: [each.kind for each in cluster.sender.requests()] == ["out"])


async def test_a_copy_that_owed_answers_and_fell_out_is_tried_again_after_a_pause_that_doubles() -> None:
    async with Cluster("n2").running() as cluster:
        pauses = []
        for _ in range(3):
            await cluster.in_sync("n2")
            copy = await cluster.limps_and_falls_out("n2")
            retry = cluster.sender.links.retries["n2"]
            pauses.append(retry.pause_s)
            assert not cluster.sender.may_greet((copy.copy_id, copy.joined))
            cluster.sender.links.retries["n2"] = retry._replace(not_before=retry.not_before - retry.pause_s)
            await until(lambda: cluster.sender.may_greet((copy.copy_id, copy.joined)))  # noqa: B023 (called here)
        assert pauses == [1.0, 2.0, 4.0]


async def test_a_copy_that_answers_while_its_request_is_granted_fell_out_all_the_same() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        gate = cluster.hold_up("n2")
        cluster.put("a")
        await until(lambda: [each.kind for each in cluster.sender.requests()] == ["out"])
        gate.set()
        await until(lambda: cluster.sender.requests() == ())
        copy = cluster.falls_out("n2")
        assert not cluster.sender.may_greet((copy.copy_id, copy.joined))


async def test_a_copy_whose_node_was_gone_is_greeted_at_once_however_often_it_fell_out() -> None:
    async with Cluster("n2").running() as cluster:
        for _ in range(3):
            await cluster.in_sync("n2")
            cluster.is_down.add("n2")
            await cluster.cut("n2")
            await until(lambda: [each.kind for each in cluster.sender.requests()] == ["out"])
            copy = cluster.falls_out("n2")
            assert cluster.sender.may_greet((copy.copy_id, copy.joined))
            cluster.is_down.clear()


async def test_a_copy_that_owed_nothing_and_was_taken_out_is_greeted_at_once() -> None:
    """Its node is about to stop, and comes back."""
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        copy = cluster.falls_out("n2")
        assert cluster.sender.may_greet((copy.copy_id, copy.joined))


async def test_nothing_is_answered_without_the_lease_of_every_copy_that_is_waited_for() -> None:
    async with Cluster("n2", "n3").running() as cluster:
        assert cluster.sender.may_answer(), "without copies no lease is needed"
        await cluster.in_sync("n2", "n3")
        await until(cluster.sender.may_answer)
        gate = cluster.hold_up("n3")
        await until(lambda: not cluster.sender.may_answer())
        gate.set()
        await until(cluster.sender.may_answer)


async def test_a_copy_that_has_promised_a_higher_term_ends_the_primarys() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(cluster.sender.may_answer)
        named = cluster.copies["n2"].following.session
        assert named is not None
        await cluster.copies["n2"].greeting.hello(named._replace(term=7, start="another"))
        await until(lambda: cluster.sender.shipping.deposed)
        assert not cluster.sender.may_answer()
        number = cluster.put("a")
        await asyncio.sleep(0.05)
        assert cluster.sender.shipping.committed < number
        assert cluster.sender.requests() == ()
        assert cluster.news > 0


async def test_a_deposed_primary_that_has_more_records_than_its_copy_leaves_the_loop_to_others() -> None:
    """It may not send them; a loop that never waits would stop the whole node, which has other stores."""
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(lambda: cluster.sender.shipping.committed == cluster.log.last.number)
        cluster.put("a", sync=False)
        cluster.sender.hear_promise(7)
        turns = 0
        async with asyncio.timeout(WAIT_S):
            while turns < 100:
                await asyncio.sleep(0.001)
                turns += 1
        assert cluster.sender.shipping.deposed


async def test_once_the_lease_is_given_back_nothing_is_answered_and_the_copy_may_be_promoted() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(cluster.sender.may_answer)
        assert not cluster.copies["n2"].lease.may_be_promoted()
        cluster.sender.give_back()
        assert not cluster.sender.serves
        assert not cluster.sender.may_answer()
        await until(cluster.copies["n2"].lease.may_be_promoted)


async def test_a_copy_with_a_shorter_lease_is_not_promoted_while_its_primary_may_answer() -> None:
    """Its process was started with other settings than the primary's."""
    async with Cluster("n2", copy_times=TIMES._replace(lease_s=0.1)).running() as cluster:
        await cluster.in_sync("n2")
        await until(cluster.sender.may_answer)
        cluster.hold_up("n2")
        assert cluster.sender.may_answer()
        await until(cluster.copies["n2"].lease.may_be_promoted)
        assert not cluster.sender.may_answer()


async def test_a_primary_that_gave_its_lease_back_asks_for_none_any_more() -> None:
    """An answer would keep the copy that is to take over from it until that lease has run out."""
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        await until(cluster.sender.may_answer)
        assert cluster.sender.lease.may_ask(now := cluster.environment.boottime_s())
        cluster.sender.give_back()
        assert not cluster.sender.lease.may_ask(now)


async def test_a_primary_that_needs_the_controller_in_vain_lets_its_beacons_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Cluster("n2", "n3").running() as cluster:
        await cluster.in_sync("n2", "n3")
        await until(cluster.sender.may_answer)
        news = cluster.news
        cluster.is_down.add("n3")
        await cluster.cut("n3")
        await until(lambda: cluster.news > news)
        assert [each.kind for each in cluster.sender.requests()] == ["out"]
        assert cluster.sender.lease.may_ask(cluster.environment.boottime_s())
        later = cluster.environment.boottime_s() + TIMES.failover_after_s
        monkeypatch.setattr(cluster.environment, "boottime_s", lambda: later)
        assert not cluster.sender.lease.may_ask(later)
        cluster.sender.controller_heard()
        assert cluster.sender.lease.may_ask(later)


async def test_no_copy_is_waited_for_that_could_not_be_taken_out_since_the_controller_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may be gone again before the controller is back, and all writes would stand until then."""
    async with Cluster("n2").running() as cluster:
        later = cluster.environment.boottime_s() + 2 * TIMES.failover_after_s
        monkeypatch.setattr(cluster.environment, "boottime_s", lambda: later)
        cluster.follow(cluster.replica("n2"))
        await until(lambda: cluster.copies["n2"].log.last.number == cluster.log.last.number)
        number = cluster.put("a")
        await until(lambda: cluster.copies["n2"].log.last.number == number)
        cluster.hold_up("n2")
        assert cluster.sender.shipping.links[0].waited == 0
        assert cluster.put("b") == cluster.sender.shipping.committed
        cluster.sender.controller_heard()
        assert cluster.sender.shipping.links[0].waited > 0


async def test_a_copy_that_has_all_when_it_is_connected_again_is_waited_for_though_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It acknowledges nothing more by itself, and would be in sync only with the next write."""
    async with Cluster("n2").running() as cluster:
        with monkeypatch.context() as away:
            later = cluster.environment.boottime_s() + 2 * TIMES.failover_after_s
            away.setattr(cluster.environment, "boottime_s", lambda: later)
            joining = cluster.replica("n2", joined=cluster.config.epoch + 1)
            cluster.follow(joining)
            sender, key = cluster.sender, (joining.copy_id, joining.joined)
            await until(lambda: sender.shipping.links[0].acked == cluster.log.last.number)
            await cluster.cut("n2")
            await until(lambda: sender.shipping.links[0].session.round == 2 and sender.links.by_key[key].is_streaming)
            assert sender.shipping.links[0].waited == 0
            sender.controller_heard()
        await until(lambda: [each.kind for each in sender.requests()] == ["in-sync"])


async def test_a_copy_that_could_count_as_in_sync_while_the_controller_is_away_costs_the_primary_no_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is held up by it: all that are waited for answer."""
    async with Cluster("n2", "n3").running() as cluster:
        await cluster.in_sync("n2")
        cluster.follow(cluster.replica("n2", "in-sync", 2), cluster.replica("n3", joined=cluster.config.epoch + 1))
        await until(lambda: [each.kind for each in cluster.sender.requests()] == ["in-sync"])
        await until(cluster.sender.may_answer)
        later = cluster.environment.boottime_s() + 2 * TIMES.failover_after_s
        monkeypatch.setattr(cluster.environment, "boottime_s", lambda: later)
        assert cluster.sender.lease.may_ask(later)


async def test_an_opening_hears_where_a_copys_log_ends_and_fetches_what_it_lacks() -> None:
    async with Cluster("n2").running() as cluster:
        await cluster.in_sync("n2")
        for number in range(5):
            cluster.put(f"key-{number}")
        await until(lambda: cluster.copies["n2"].log.synced == cluster.log.last)
        session = Session(STORE_ID, 9, "other", cluster.copies["n2"].following.copy_id, 1)
        wire = await cluster.connect("n2", session)
        told = await greet(wire, session)
        assert told.position == cluster.log.last
        entries = list(await fetch(wire, 3))
        assert entries == list(cluster.log.entries(3))
        assert await fetch(wire, told.position.number) == []
        await until(lambda: cluster.sender.shipping.deposed)
        with pytest.raises(Refused) as refused:
            await greet(await cluster.connect("n2", session), session._replace(term=8))
        assert refused.value.promised == 9
        with pytest.raises(Refused) as foreign:
            await greet(await cluster.connect("n2", session), session._replace(copy_id="another"))
        assert foreign.value.promised == 0


async def test_nothing_is_sent_before_the_map_that_names_the_copy_is_durable() -> None:
    """Else this store, restarted without the controller, would serve alone beside a copy that may be promoted."""
    async with Cluster("n2").running() as cluster:
        cluster.config = cluster.config._replace(epoch=2, replicas=(cluster.replica("n2"),))
        number = cluster.put("map", sync=False)
        cluster.sender.follow(cluster.config, number)
        await asyncio.sleep(0.05)
        assert cluster.wires["n2"] == []
        cluster.log.sync()
        cluster.sender.synced(number)
        await until(lambda: cluster.copies["n2"].log.synced.number == number)


async def test_a_copy_that_needs_records_which_cannot_be_read_back_gets_a_snapshot() -> None:
    async with Cluster("n2").running() as cluster:
        for number in range(50):
            cluster.put(f"key-{number}", b"x" * 4000)
        await cluster.apply()
        disk = cluster.log._disk
        assert isinstance(disk, SimulatedDisk)
        segment = next(path for path in disk.files if path.name.endswith(".log.000001"))
        disk.flip(segment, 8 * (DATA_OFFSET + HEADER_BYTES + 1))  # the payload of the first record
        await cluster.in_sync("n2")
        last = cluster.put("afterwards")
        await until(lambda: cluster.sender.shipping.committed == last)
        await cluster.apply()
        await until(lambda: rows_of(cluster.copies["n2"].engine) == rows_of(cluster.engine))


async def test_a_row_of_a_snapshot_that_does_not_match_its_checksum_is_not_taken() -> None:
    copied = (VALUE, "key", 1, 5, 0, b"value", None, 12345)
    with pytest.raises(WireLost, match="checksum"):
        serving._row(copied)


async def test_a_record_that_does_not_match_its_checksum_or_its_predecessor_is_not_taken_from_an_opening() -> None:
    """Nor is anything that follows it."""
    primary = Cluster()
    async with primary.running():
        for number in range(3):
            primary.put(f"key-{number}")
        entries = list(primary.log.entries(0))
    node = Node()
    copy = await make_copy(node.place, STORE_ID, Inline(), TIMES)
    for wrong in (entries[1]._replace(payload=entries[2].payload), entries[1]._replace(previous=7)):
        with pytest.raises(NotNext):
            await copy.opening.extend([entries[0], wrong, *entries[2:]] if copy.log.last.number == 0 else [wrong])
        assert copy.log.last.number == 1
    assert (await copy.opening.extend(entries[1:])).number == entries[-1].number
