"""When a primary asks for a copy to be out, when not, and when that copy is greeted again."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.unit.replication.primary_with_copies import TIMES, Cluster
from tests.unit.waiting import until

SLACK_S = 0.05  # what a sync may take


def stand_still(seconds: float) -> None:
    """Block the loop."""
    time.sleep(seconds)


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
