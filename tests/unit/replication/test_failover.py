"""The controller's rules: who is dead, who takes over, what is granted."""

from __future__ import annotations

import pytest

from kvstore.replication import failover
from kvstore.replication.configuration import Configuration, Primary, Replica, Request
from kvstore.replication.failover import Change, Damping, Report, Standing

SYNCED, JOINING = Replica("n2", "c2", "in-sync", 3), Replica("n3", "c3", "joining", 4)
CONFIG = Configuration("s1", "store", 7, 5, Primary("n1", "c1"), (SYNCED, JOINING))
ASKED = Request("in-sync", "s1", 5, "c1", "c3", 4)
OUT = Request("out", "s1", 5, "c1", "c2", 3)


def test_a_copy_that_is_named_joins_under_the_epoch_of_its_map() -> None:
    after = failover.named(CONFIG, "n4", "c4", 8)
    assert after is not None
    assert after.replicas == (SYNCED, JOINING, Replica("n4", "c4", "joining", 8))
    assert (after.epoch, after.term) == (8, 5)


def test_a_node_that_comes_with_another_copy_joins_again_whatever_its_first_one_was() -> None:
    after = failover.named(CONFIG, "n2", "emptied", 8)
    assert after is not None
    assert after.copy_on("n2") == Replica("n2", "emptied", "joining", 8)


def test_a_copy_that_is_there_and_the_primary_are_not_named_again() -> None:
    assert failover.named(CONFIG, "n2", "c2", 8) is None
    assert failover.named(CONFIG, "n1", "other", 8) is None


def test_in_sync_is_granted_to_the_copy_that_the_request_names() -> None:
    after = failover.in_sync(CONFIG, ASKED, 8)
    assert after is not None
    assert after.in_sync == (SYNCED, JOINING._replace(state="in-sync"))


def test_a_copy_taken_out_joins_again_under_a_higher_joining_number() -> None:
    after = failover.taken_out(CONFIG, OUT, 8)
    assert after is not None
    assert after.copy_on("n2") == Replica("n2", "c2", "joining", 8)
    assert not after.names("c2", 3)


@pytest.mark.parametrize(
    "other", [{"shard": "s2"}, {"term": 4}, {"primary": "c9"}, {"copy_id": "c9"}, {"joined": 2}, {"kind": "x"}]
)
def test_a_request_is_granted_only_if_all_that_it_names_still_stands(other: dict[str, object]) -> None:
    assert failover.in_sync(CONFIG, ASKED._replace(**other), 8) is None  # type: ignore[arg-type]
    assert failover.taken_out(CONFIG, OUT._replace(**other), 8) is None  # type: ignore[arg-type]


def test_a_joining_copy_that_its_primary_waits_for_is_taken_out_as_well() -> None:
    after = failover.taken_out(CONFIG, OUT._replace(copy_id="c3", joined=4), 8)
    assert after is not None
    assert after.copy_on("n3") == Replica("n3", "c3", "joining", 8)


def test_a_request_that_was_granted_already_changes_nothing() -> None:
    assert failover.in_sync(CONFIG, ASKED._replace(copy_id="c2", joined=3), 8) is None
    after = failover.taken_out(CONFIG, OUT, 8)
    assert after is not None
    assert failover.taken_out(after, OUT, 9) is None


def test_a_promotion_leaves_the_old_primary_in_the_set_as_in_sync() -> None:
    after = failover.promoted(CONFIG, "n2", "c2", 8)
    assert after is not None
    assert (after.term, after.primary) == (8, Primary("n2", "c2"))
    assert after.in_sync == (Replica("n1", "c1", "in-sync", 8),)
    assert after.copy_on("n3") == JOINING


@pytest.mark.parametrize(("node", "copy_id"), [("n3", "c3"), ("n2", "emptied"), ("n1", "c1"), ("n9", "c9")])
def test_only_a_copy_in_sync_under_its_own_id_is_promoted(node: str, copy_id: str) -> None:
    assert failover.promoted(CONFIG, node, copy_id, 8) is None


def test_a_promotion_with_loss_is_of_a_copy_that_is_not_in_sync_and_all_others_join_again() -> None:
    after = failover.promoted_with_loss(CONFIG, "n3", "c3", 8)
    assert after is not None
    assert (after.term, after.primary) == (8, Primary("n3", "c3"))
    assert after.replicas == (Replica("n1", "c1", "joining", 8), Replica("n2", "c2", "joining", 8))


@pytest.mark.parametrize(("node", "copy_id"), [("n2", "c2"), ("n3", "emptied"), ("n1", "c1"), ("n9", "c9")])
def test_no_other_one_is_promoted_with_loss(node: str, copy_id: str) -> None:
    assert failover.promoted_with_loss(CONFIG, node, copy_id, 8) is None


def test_a_primary_that_announces_itself_gets_a_new_term_and_another_copy_does_not() -> None:
    after = failover.reopened(CONFIG, "n1", "c1", 8)
    assert after == CONFIG._replace(epoch=8, term=8)
    assert failover.reopened(CONFIG, "n1", "emptied", 8) is None
    assert failover.reopened(CONFIG, "n2", "c2", 8) is None


# --- silence


def test_only_a_node_that_echoes_this_controllers_last_beats_is_heard() -> None:
    assert failover.is_echo(("me", 41), "me", 42, 3)
    assert not failover.is_echo(("before", 41), "me", 42, 3)
    assert not failover.is_echo(("me", 30), "me", 42, 3)
    assert not failover.is_echo(("me", 43), "me", 42, 3)


def test_silence_is_counted_from_the_controllers_own_start() -> None:
    assert not failover.silent(None, 100.0, 101.9, 2.0)
    assert failover.silent(None, 100.0, 102.0, 2.0)
    assert not failover.silent(90.0, 100.0, 101.9, 2.0)
    assert not failover.silent(101.0, 100.0, 102.9, 2.0)


def _report(**changes: object) -> Report:
    return Report("n2", "c2", at=11.5, silent_s=2.0, term=5, number=10)._replace(**changes)  # type: ignore[arg-type]


def _candidate(*reports: Report, config: Configuration = CONFIG) -> Report | None:
    return failover.candidate(config, reports, silent_since=10.0, now=12.0, failover_after_s=2.0)


def test_a_copy_in_sync_that_has_not_heard_its_primary_either_takes_over() -> None:
    assert _candidate(_report()) == _report()


@pytest.mark.parametrize(
    "changes",
    [
        {"silent_s": 0.1},
        {"at": 11.9, "silent_s": 1.95},
        {"at": 11.4},
        {"at": 9.9, "silent_s": 3.0},
        {"copy_id": "emptied"},
        {"node": "n3", "copy_id": "c3"},
        {"node": "n9"},
    ],
    ids=[
        "hears it",
        "has not told so yet",
        "told so more than two beats ago",
        "reported before the silence",
        "another copy",
        "joins",
        "has no copy",
    ],
)
def test_no_other_one_takes_over(changes: dict[str, object]) -> None:
    assert _candidate(_report(**changes)) is None


def test_a_controller_that_was_cut_off_promotes_no_copy_from_old_reports() -> None:
    report = _report(at=10.5)
    assert failover.candidate(CONFIG, [report], silent_since=10.0, now=12.6, failover_after_s=2.0) is None
    hears_it = _report(at=10.2, silent_s=0.19)
    assert failover.candidate(CONFIG, [hears_it], silent_since=10.0, now=12.05, failover_after_s=2.0) is None


def test_of_several_the_highest_term_and_then_the_highest_number_takes_over() -> None:
    both = CONFIG._replace(replicas=(SYNCED, JOINING._replace(state="in-sync")))
    first, second = _report(number=12), _report(node="n3", copy_id="c3", number=11)
    assert _candidate(first, second, config=both) == first
    newer = second._replace(term=6)
    assert _candidate(first, newer, config=both) == newer


def test_an_older_copy_that_ends_below_what_was_committed_never_takes_over() -> None:
    both = CONFIG._replace(replicas=(SYNCED, JOINING._replace(state="in-sync")))
    older, whole = _report(term=6, number=11), _report(node="n3", copy_id="c3", number=12)
    for reports, heir in (([older, whole], whole), ([older], None), ([whole], whole)):
        assert failover.candidate(both, reports, 10.0, 12.0, 2.0, committed=12) == heir
        assert failover.successor(both, reports, 12.0, 2.0, committed=12) == heir


def test_an_older_copy_that_counts_as_in_sync_is_gone_on_with_where_a_person_accepts_the_loss() -> None:
    after = failover.promoted_with_loss(CONFIG, "n2", "c2", 8, is_older=True)
    assert after is not None
    assert after.primary == Primary("n2", "c2")
    assert {copy.state for copy in after.replicas} == {"joining"}
    assert failover.promoted_with_loss(CONFIG, "n2", "emptied", 8, is_older=True) is None


def test_failovers_that_follow_soon_on_one_another_are_damped() -> None:
    damping, now, pauses = Damping(), 100.0, []
    for _ in range(6):
        assert failover.may_fail_over(damping, now)
        damping = failover.failed_over(damping, now, 2.0, 30.0)
        assert not failover.may_fail_over(damping, now + damping.pause_s - 0.1)
        now += damping.pause_s
        pauses.append(damping.pause_s)
    assert pauses == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert failover.failed_over(damping, now + 60.0, 2.0, 30.0).pause_s == 2.0


def _nodes(silent: int, n: int, hosts: list[str] | None = None) -> list[Standing]:
    return [Standing(f"n{i}", hosts[i] if hosts else None, i < silent) for i in range(n)]


@pytest.mark.parametrize(
    ("n", "replicas", "may"), [(1, 1, 0), (2, 2, 1), (3, 2, 1), (3, 3, 2), (4, 1, 1), (5, 2, 2), (6, 2, 2), (7, 2, 3)]
)
def test_no_more_nodes_may_be_silent_than_copies_but_one_or_less_than_half(n: int, replicas: int, may: int) -> None:
    assert not failover.too_many_silent(_nodes(may, n), replicas)
    assert failover.too_many_silent(_nodes(may + 1, n), replicas)


def test_the_nodes_of_one_host_count_as_one() -> None:
    hosts = ["a", "a", "a", "b", "b", "b", "c", "c", "c"]
    assert not failover.too_many_silent(_nodes(3, 9, hosts), 2)
    assert failover.too_many_silent(_nodes(4, 9, hosts), 2)


def test_given_up_nodes_count_neither_as_silent_nor_as_nodes() -> None:
    nodes = [*_nodes(1, 3), Standing("gone", None, silent=True, given_up=True)]
    assert not failover.too_many_silent(nodes, 2)


def test_a_dead_node_is_given_up_after_its_time_unless_a_shard_would_go_with_it() -> None:
    home = {"s1": "n1"}
    assert not failover.may_give_up("n2", 599.0, [CONFIG], home, 600.0)
    assert failover.may_give_up("n2", 600.0, [CONFIG], home, 600.0)
    assert not failover.may_give_up("n2", 9999.0, [CONFIG], home, 0.0)
    assert not failover.may_give_up("n1", 600.0, [CONFIG], home, 600.0)
    moved = failover.promoted(CONFIG, "n2", "c2", 8)
    assert moved is not None
    assert failover.may_give_up("n1", 600.0, [moved], home, 600.0)
    alone = moved._replace(replicas=())
    assert not failover.may_give_up("n2", 600.0, [alone], home, 600.0)


# --- planned changes


def test_a_planned_change_is_made_once_the_primary_of_that_term_gave_its_lease_back() -> None:
    change = failover.plan_change(CONFIG, "n2")
    assert change == Change("s1", 5, "n2", "c2")
    assert failover.changed(CONFIG, change, 5, 8) == failover.promoted(CONFIG, "n2", "c2", 8)
    assert failover.changed(CONFIG, change, 4, 8) is None
    assert failover.changed(CONFIG._replace(term=6), change, 5, 8) is None


def test_a_planned_change_needs_a_copy_in_sync() -> None:
    assert failover.plan_change(CONFIG, "n3") is None
    assert failover.plan_change(CONFIG, "n9") is None


def test_a_primary_goes_home_once_the_homes_copy_has_been_in_sync_for_a_while() -> None:
    assert not failover.goes_home(CONFIG, "n2", 100.0, 109.0, 10.0)
    assert failover.goes_home(CONFIG, "n2", 100.0, 110.0, 10.0)
    assert not failover.goes_home(CONFIG, "n3", 100.0, 110.0, 10.0)
    assert not failover.goes_home(CONFIG, "n1", 100.0, 110.0, 10.0)
    assert not failover.goes_home(CONFIG, "n2", None, 110.0, 10.0)


def test_a_request_to_take_out_holds_only_while_its_sender_is_heard() -> None:
    assert failover.hears_sender(10.0, 10.5, 11.0, 2.0)
    assert not failover.hears_sender(10.0, 9.5, 11.0, 2.0)
    assert not failover.hears_sender(10.0, 10.5, 12.5, 2.0)
