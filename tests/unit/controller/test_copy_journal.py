"""What is told of decisions about copies: each failover and each damage once, and once more when it is over."""

from __future__ import annotations

import logging

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.controller.copy_journal import CopyJournal
from kvstore.controller.heard import Heard
from kvstore.controller.replicas import Step
from kvstore.placement.cluster_map import ClusterMap, at_home, first_map
from kvstore.replication.beats import Beat, CopyReport
from kvstore.replication.configuration import Configuration, Primary, Replica, with_configuration

BEFORE = Configuration("s1", "store-1", 1, 1, Primary("s1", "c1"), (Replica("s2", "c2", "in-sync", 1),))
AFTER = BEFORE._replace(term=2, primary=Primary("s2", "c2"), replicas=())
FAILOVER = Step("silent", BEFORE, AFTER, since=10.0, cause="was silent")


def map_with(config: Configuration) -> ClusterMap:
    homes = [at_home(f"s{n}", f"http://s{n}", f"store-{n}", copy_id=f"c{n}") for n in (1, 2)]
    return with_configuration(
        msgspec.structs.replace(first_map("k", 64, homes), epoch=config.epoch - 1, replicas=2), config
    )


def told(node: str, copy: CopyReport) -> Heard:
    heard = Heard("start", Limits(), 0.0, {"store-1": 9})
    heard.take(beat_of(node, copy), 1.0)
    return heard


def beat_of(node: str, copy: CopyReport) -> Beat:
    return Beat(node=node, start="x", cluster_id="k", epoch=1, copies=[copy])


def report(copy_id: str = "c2", **more: object) -> CopyReport:
    return CopyReport(shard="s1", store_id="store-1", copy_id=copy_id, **{"role": "copy", **more})  # type: ignore[arg-type]


def test_a_failover_is_over_once_when_the_new_primary_serves_in_its_term() -> None:
    journal, cluster_map = CopyJournal(), map_with(AFTER)
    journal.note(FAILOVER, 2, 12.0)
    assert journal.stats.failovers == 1
    promised = told("s2", report(role="primary", promised=1, serves=True))
    assert list(journal.ended(cluster_map, promised, 13.0)) == [], "it serves by its earlier term still"
    serves = told("s2", report(role="primary", promised=2, serves=True))
    (ended,) = journal.ended(cluster_map, serves, 14.0)
    assert (ended.kind, ended.shard, ended.to, ended.took_s) == ("failover", "s1", "s2", 4.0)
    assert ended.detail == "Node s1 was silent; node s2 took over and served after 4.0 s."
    change = ended.as_change("id", now_ms=20_000)
    assert (change.began_ms, change.ended_ms) == (16_000, 20_000)
    assert list(journal.ended(cluster_map, serves, 15.0)) == []


def test_a_failover_that_another_one_overtook_is_never_told_of_as_over() -> None:
    journal = CopyJournal()
    journal.note(FAILOVER, 2, 12.0)
    serves = told("s2", report(role="primary", promised=3, serves=True))
    assert list(journal.ended(map_with(AFTER._replace(term=3)), serves, 13.0)) == []
    assert list(journal.ended(map_with(AFTER), serves, 14.0)) == []


def test_a_damaged_copy_is_counted_once_and_its_rebuilding_is_a_change() -> None:
    journal, damaged = CopyJournal(), report(role="damaged", damage="A bit.")
    for now in (10.0, 11.0):
        journal.note_damage(beat_of("s2", damaged), map_with(BEFORE), now)
        assert list(journal.ended(map_with(BEFORE), told("s2", damaged), now)) == []
    assert journal.stats.damaged == 1
    whole, again = told("s2", report("new")), BEFORE._replace(replicas=(Replica("s2", "new", "in-sync", 2),))
    (ended,) = journal.ended(map_with(again), whole, 15.0)
    assert (ended.kind, ended.to, ended.took_s) == ("rebuild", "s2", 5.0)
    assert ended.detail == "The copy on node s2 was damaged (A bit), and was rebuilt."
    assert journal.stats.rebuilt == 1


def test_that_files_are_too_old_is_said_once_and_again_after_it_was_mended(caplog: pytest.LogCaptureFixture) -> None:
    journal, older = CopyJournal(), report(number=7)
    heard = told("s2", older)
    with caplog.at_level(logging.ERROR):
        for found in ({"s1": older}, {"s1": older}, {}, {"s1": older}):
            journal.note_older(found, heard)
    assert len(caplog.messages) == 2
    assert "ends with record 7, and record 9 was committed" in caplog.messages[0]
