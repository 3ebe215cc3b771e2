"""What the controller makes of damage that nodes tell of: from the first word to another copy in its place."""

from __future__ import annotations

from kvstore.config import Limits
from kvstore.controller.damage import DamageSeen, reported
from kvstore.controller.heard import Heard
from kvstore.replication.beats import Beat, CopyReport, Role
from kvstore.replication.configuration import Configuration, Primary, Replica

CONFIG = Configuration("s1", "store", 5, 2, Primary("n1", "a"), (Replica("n2", "b", "in-sync", 3),))


def beat(node: str, role: Role = "damaged", copy_id: str = "", damage: str = "A bit.") -> Beat:
    copy = CopyReport(shard="s1", store_id="store", role=role, copy_id=copy_id, damage=damage)
    return Beat(node=node, start="x", cluster_id="c", epoch=5, copies=[copy])


def heard_last(beat: Beat) -> Heard:
    heard = Heard("start", Limits(), 0.0)
    heard.take(beat, 1.0)
    return heard


def test_damage_is_told_of_once_and_again_when_another_copy_is_in_sync_in_its_place() -> None:
    seen = DamageSeen()
    damaged, whole = heard_last(beat("n2")), heard_last(beat("n2", role="filling", copy_id="new", damage=""))
    assert reported([CONFIG], damaged) == {"s1": {"n2": "A bit."}}
    new = seen.hear([CONFIG], beat("n2"), 10.0)
    assert [(each.node, each.copy_id, each.since) for each in new] == [("n2", "b", 10.0)]
    assert seen.hear([CONFIG], beat("n2"), 11.0) == []
    assert seen.mended([CONFIG], damaged) == []
    out = CONFIG._replace(replicas=(Replica("n2", "b", "joining", 6),))
    assert seen.mended([out], whole) == [], "its files change hands"
    joining = CONFIG._replace(replicas=(Replica("n2", "new", "joining", 7),))
    assert seen.mended([joining], whole) == []
    in_sync = CONFIG._replace(replicas=(Replica("n2", "new", "in-sync", 7),))
    assert seen.mended([in_sync], damaged) == [], "it is damaged again"
    assert seen.mended([in_sync], whole) == new
    assert seen.mended([in_sync], whole) == []


def test_a_primary_that_is_damaged_is_mended_when_the_map_names_another_copy_on_its_node() -> None:
    seen = DamageSeen()
    new = seen.hear([CONFIG], beat("n1"), 1.0)
    assert [each.copy_id for each in new] == ["a"]
    replaced = CONFIG._replace(primary=Primary("n2", "b"), replicas=(Replica("n1", "a", "in-sync", 6),))
    assert seen.mended([replaced], heard_last(beat("n1"))) == []
    filling = heard_last(beat("n1", role="filling", damage=""))
    assert seen.mended([replaced], filling) == [], "the old one is still named"
    again = replaced._replace(replicas=(Replica("n1", "new", "in-sync", 8),))
    assert seen.mended([again], heard_last(beat("n1", role="copy", damage=""))) == new


def test_damage_to_a_copy_that_gets_another_place_or_whose_shard_leaves_is_forgotten_and_not_told_as_mended() -> None:
    for after in ([CONFIG._replace(replicas=())], []):
        seen = DamageSeen()
        new = seen.hear([CONFIG], beat("n2"), 1.0)
        assert seen.mended(after, Heard("start", Limits(), 0.0)) == []
        assert seen.hear([CONFIG], beat("n2"), 2.0) == [new[0]._replace(since=2.0)], "it was forgotten"


def test_a_copy_that_its_node_tells_whole_again_was_not_rebuilt() -> None:
    seen = DamageSeen()
    seen.hear([CONFIG], beat("n1", damage="Its folder is empty."), 1.0)
    own_folder_again = heard_last(beat("n1", role="opening", copy_id="a", damage=""))
    assert seen.mended([CONFIG], own_folder_again) == []
    assert seen.hear([CONFIG], beat("n1"), 2.0), "what is damaged later is told of again"
