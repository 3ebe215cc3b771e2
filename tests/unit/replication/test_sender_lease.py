"""A primary's lease, granted by its copies: how it ends, is given back, and is lost to a higher term."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.replication.primary_with_copies import TIMES, Cluster
from tests.unit.waiting import WAIT_S, until


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
        cluster.sender.controller_heard(decides=False)
        assert cluster.sender.shipping.links[0].waited == 0, "its record is an old copy, so it takes none out either"
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
