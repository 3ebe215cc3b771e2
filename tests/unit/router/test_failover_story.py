"""A failover in words: each thing is told once, when it is seen, and it is over when all is as before."""

from __future__ import annotations

from typing import Any

import msgspec

from kvstore.placement.cluster_map import ClusterMap, Primary, Replica, at_home, first_map
from kvstore.router.failover_story import HOME_S, FailoverStory, Look

FORMED = first_map("c", 64, [at_home(name, f"http://{name}", name) for name in ("s1", "s2", "s3")])
NODES = ("s1", "s2", "s3")


def with_copies(epoch: int, *shards: tuple[str, str, str]) -> ClusterMap:
    """(primary, node of the copy, its state) of s1, s2, s3; the term of one that is not at home is the epoch."""
    changed = [
        msgspec.structs.replace(
            shard,
            primary=Primary(node=primary, copy_id=primary),
            term=epoch if primary != shard.id else 1,
            replicas=[Replica(node=copy, copy_id=copy, state=state, joined=epoch)],  # type: ignore[arg-type]
        )
        for shard, (primary, copy, state) in zip(FORMED.shards, shards, strict=True)
    ]
    return msgspec.structs.replace(FORMED, epoch=epoch, replicas=2, shards=changed)


S2, S3 = ("s2", "s3", "in-sync"), ("s3", "s1", "in-sync")
BEFORE = with_copies(1, ("s1", "s2", "in-sync"), S2, S3)
PROMOTED = with_copies(5, ("s2", "s1", "in-sync"), S2, ("s3", "s1", "joining"))
OUT = with_copies(6, ("s2", "s1", "joining"), S2, ("s3", "s1", "joining"))
TOGETHER = with_copies(8, ("s2", "s1", "in-sync"), S2, S3)
HOME = with_copies(9, ("s1", "s2", "in-sync"), S2, S3)


def position(node: str, role: str = "copy", silent_s: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"node": node, "role": role, "serves": role == "primary", "term": 1, "number": 40, "silent_s": silent_s,
            "told_s": 0.1} | more  # fmt: skip


def heard(*positions: dict[str, Any], silent_s: float | None = None) -> dict[str, Any]:
    return {"silent": {} if silent_s is None else {"s1": silent_s}, "positions": {"s1": list(positions)}}


def told(story: FailoverStory, at_ms: float, cluster_map: ClusterMap, facts: dict[str, Any] | None) -> list[str]:
    return [f"{step.kind} {step.shard or ''}".strip() for step in story.look(Look(at_ms, cluster_map, facts))]


def killed() -> FailoverStory:
    return FailoverStory("s1", BEFORE, 1000.0, lease_s=1.5)


def test_a_failover_is_told_from_the_kill_to_the_way_home() -> None:
    story = killed()
    assert (story.led, story.kept) == (["s1"], ["s3"])
    assert told(story, 1500, BEFORE, heard(position("s2", silent_s=0.5))) == []
    assert told(story, 2600, BEFORE, heard(position("s2", silent_s=1.5))) == ["lease s1"]
    assert told(story, 3000, BEFORE, heard(position("s2", silent_s=1.9), silent_s=2.0)) == ["silent"]
    assert told(story, 3100, PROMOTED, heard(position("s2"), silent_s=2.1)) == ["promoted s1", "out s3"]
    assert told(story, 3200, OUT, heard(position("s2", "primary"), silent_s=2.2)) == ["serves s1", "out s1"]
    assert told(story, 9000, OUT, heard(position("s2", "primary"), silent_s=8.0)) == []
    assert told(story, 14000, OUT, heard(position("s2", "primary"))) == ["back"]
    assert told(story, 14500, TOGETHER, heard(position("s2", "primary"))) == ["in-sync s1", "in-sync s3"]
    assert not story.is_over
    assert told(story, 24500, HOME, heard(position("s1", "opening"))) == ["home s1"]
    assert not story.is_over
    assert told(story, 24600, HOME, heard(position("s1", "primary"))) == []
    assert story.is_over
    assert story.is_home


def test_a_step_says_who_which_term_and_where_the_log_ends() -> None:
    story = killed()
    (lease,) = story.look(Look(2600, BEFORE, heard(position("s2", silent_s=1.5))))
    assert "Node s2 has not heard the primary of s1 for 1.6 s" in lease.says
    (promoted, _out) = story.look(Look(3100, PROMOTED, heard(position("s2"))))
    assert promoted.says == "Node s2 is the primary of s1 in the new term 5, its log ends at number 40."


def test_without_the_controller_what_the_map_shows_is_told_all_the_same() -> None:
    story = killed()
    assert told(story, 3100, PROMOTED, None) == ["lease s1", "promoted s1", "out s3"]
    assert told(story, 3200, OUT, None) == ["out s1"]
    assert told(story, 9000, TOGETHER, None) == ["back", "in-sync s1", "in-sync s3"]
    assert not story.is_over


def test_a_copy_that_was_only_being_opened_is_not_said_to_serve() -> None:
    story = killed()
    assert "lease s1" in told(story, 2600, BEFORE, heard(position("s2", silent_s=1.5)))
    assert "serves s1" not in told(story, 3100, PROMOTED, heard(position("s2", "opening", serves=False)))


def test_a_shard_that_does_not_go_home_does_not_keep_it_going_for_ever() -> None:
    story = killed()
    told(story, 3000, OUT, heard(position("s2", "primary"), silent_s=2.0))
    told(story, 9000, TOGETHER, heard(position("s2", "primary")))
    told(story, 9000 + HOME_S * 1000 - 1, TOGETHER, heard(position("s2", "primary")))
    assert not story.is_over
    told(story, 9000 + HOME_S * 1000, TOGETHER, heard(position("s2", "primary")))
    assert story.is_over
    assert not story.is_home


def test_a_node_that_led_nothing_is_over_with_when_its_copies_have_caught_up() -> None:
    before = with_copies(1, ("s2", "s1", "in-sync"), S2, S3)
    story = FailoverStory("s1", before, 0.0, lease_s=1.5)
    out = with_copies(2, ("s2", "s1", "joining"), S2, ("s3", "s1", "joining"))
    assert told(story, 900, out, heard(position("s2", "primary"))) == ["out s1", "out s3"]
    assert told(story, 2100, out, heard(position("s2", "primary"), silent_s=2.0)) == ["silent"]
    assert not story.is_over
    assert told(story, 9000, before, heard(position("s2", "primary"))) == ["back", "in-sync s1", "in-sync s3"]
    assert story.is_over
