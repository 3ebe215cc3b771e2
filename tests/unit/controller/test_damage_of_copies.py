"""What the controller makes of damage that nodes tell of: from the first word to another copy in its place."""

from __future__ import annotations

from kvstore.config import Limits
from kvstore.controller.damage import DamageSeen, reported
from kvstore.controller.heard import Heard
from kvstore.replication.beats import Beat, CopyReport, Role
from kvstore.replication.configuration import Configuration, Primary, Replica

CONFIG = Configuration("s1", "store", 5, 2, Primary("n1", "a"), (Replica("n2", "b", "in-sync", 3),))


def told(node: str, role: Role = "damaged", copy_id: str = "", damage: str = "A bit.") -> Heard:
    heard = Heard("start", Limits(), 0.0)
    copy = CopyReport(shard="s1", store_id="store", role=role, copy_id=copy_id, damage=damage)
    heard.take(Beat(node=node, start="x", cluster_id="c", epoch=5, copies=[copy]), 1.0)
    return heard


def test_damage_is_told_of_once_and_again_when_another_copy_is_in_sync_in_its_place() -> None:
    seen = DamageSeen()
    damaged, whole = told("n2"), told("n2", role="filling", copy_id="new", damage="")
    assert reported([CONFIG], damaged) == {"s1": {"n2": "A bit."}}
    new, mended = seen.look([CONFIG], damaged, 10.0)
    assert [(each.node, each.copy_id, each.since) for each in new] == [("n2", "b", 10.0)]
    assert not mended
    assert seen.look([CONFIG], damaged, 11.0) == ([], [])
    out = CONFIG._replace(replicas=(Replica("n2", "b", "joining", 6),))
    assert seen.look([out], whole, 12.0) == ([], []), "its files change hands"
    joining = CONFIG._replace(replicas=(Replica("n2", "new", "joining", 7),))
    assert seen.look([joining], whole, 13.0) == ([], [])
    in_sync = CONFIG._replace(replicas=(Replica("n2", "new", "in-sync", 7),))
    assert seen.look([in_sync], whole, 14.0) == ([], new)
    assert seen.look([in_sync], whole, 15.0) == ([], [])


def test_a_primary_that_is_damaged_is_mended_when_the_map_names_another_copy_on_its_node() -> None:
    seen = DamageSeen()
    new, _ = seen.look([CONFIG], told("n1"), 1.0)
    assert [each.copy_id for each in new] == ["a"]
    replaced = CONFIG._replace(primary=Primary("n2", "b"), replicas=(Replica("n1", "a", "in-sync", 6),))
    assert seen.look([replaced], told("n1"), 2.0) == ([], [])
    assert seen.look([replaced], told("n1", role="filling", damage=""), 3.0) == ([], []), "the old one is still named"
    again = replaced._replace(replicas=(Replica("n1", "new", "in-sync", 8),))
    assert seen.look([again], told("n1", role="copy", damage=""), 4.0) == ([], new)
