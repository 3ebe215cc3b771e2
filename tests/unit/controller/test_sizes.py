"""What a plan needs on the disks of its destinations."""

from __future__ import annotations

import msgspec
import pytest

from kvstore.controller.shards import Size
from kvstore.controller.sizes import check_room
from kvstore.errors import ChangeRefused
from kvstore.placement.cluster_map import Move, at_home, map_of

MEMBERS = [at_home(name, f"http://{name}", name) for name in ("s1", "s2", "s3")]
BEFORE = map_of(MEMBERS, cluster_id="c", epoch=1, partitions=64, owners=[0] * 32 + [1] * 32)
STANDING = Move(id="old", source="s1", to="s3", partitions=list(range(16)))
NEW = [
    Move(id="a", source="s1", to="s3", partitions=list(range(16, 24))),
    Move(id="b", source="s2", to="s3", partitions=list(range(32, 40))),
]
MOVING = msgspec.structs.replace(BEFORE, moves=[STANDING])
AFTER = msgspec.structs.replace(BEFORE, moves=[STANDING, *NEW])


def sizes(spare_bytes: int | None) -> dict[str, Size]:
    return {"s1": Size(10, 4000), "s2": Size(10, 8000), "s3": Size(0, 0, disk_spare_bytes=spare_bytes)}


def test_a_plan_that_fits_beside_the_reserve_is_taken() -> None:
    check_room(MOVING, AFTER, sizes(3000))


def test_a_plan_that_does_not_fit_is_refused_with_the_bytes_needed_and_free() -> None:
    with pytest.raises(ChangeRefused, match="s3 needs 3,000 bytes and has 2,999 free") as refused:
        check_room(MOVING, AFTER, sizes(2999))
    assert refused.value.members["bytes_needed"] == {"s3": 3000}
    assert refused.value.members["bytes_free"] == {"s3": 2999}


def test_moves_that_stand_already_are_not_counted_again() -> None:
    check_room(AFTER, AFTER, sizes(0))
    with pytest.raises(ChangeRefused):
        check_room(None, AFTER, sizes(4999))
    check_room(None, AFTER, sizes(5000))


def test_a_shard_that_does_not_say_what_it_has_room_for_is_no_reason_to_refuse() -> None:
    check_room(MOVING, AFTER, sizes(None))
    check_room(MOVING, AFTER, {})
