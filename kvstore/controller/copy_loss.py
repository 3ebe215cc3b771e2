"""The disaster exit for a shard that only lost disks could serve.
A copy that is not in sync becomes its primary.

Owns: when that may be, what is said to be lost, the state after it.
Promises: pure. It is refused while the primary or a copy in sync is heard, unless the shard's id was typed again, and
for a copy that has nothing. Every other copy joins again, the old primary's included, so what only they have is cut off
when they return; versions go on above all that was told.
Leaves to others: forgetting what the store had told (`document`), storing, the opening on the node (shard).
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from kvstore.controller import change_steps
from kvstore.controller.changes import Change
from kvstore.controller.copy_places import Places
from kvstore.controller.map_store.interface import Told
from kvstore.controller.membership import ClusterState, checked_shard, formed_map, refuse_while_struck
from kvstore.errors import ChangeRefused
from kvstore.replication import failover
from kvstore.replication.configuration import Configuration, configuration_of, with_configuration


class Loss(NamedTuple):
    """What would be gone on with: the copy on node `to`, whose log ends with record `number`.
    `is_older`: it counts as in sync, and its files are older than what was committed."""

    shard: str
    store_id: str
    to: str
    copy_id: str
    number: int
    is_older: bool = False


def judged(places: Places, shard_id: str, to: str) -> Loss:
    """What going on with that copy would lose. Raises NotFound, ChangeRefused with what to do instead, Unavailable."""
    cluster_map = places.cluster_map
    checked_shard(cluster_map, shard_id)
    refuse_while_struck(cluster_map)
    config = configuration_of(cluster_map, shard_id)
    assert config is not None
    _refuse_while_served(config, places)
    copy = config.copy_on(to)
    if copy is None or places.copies.report(to, shard_id, copy.copy_id) is None:
        raise ChangeRefused(
            f"node {to} has no copy of shard {shard_id} that the cluster knows, or is silent: start it, or name "
            "another node."
        )
    if (report := places.copies.complete(config, copy)) is None:
        raise ChangeRefused(
            f"the copy of shard {shard_id} on node {to} was never complete, or is damaged: it cannot be gone on with. "
            f"`kvstore shard remove {shard_id} --lost` gives up the shard's keys."
        )
    is_older = places.copies.is_older(config, copy)
    return Loss(shard_id, config.store_id, to, copy.copy_id, report.number, is_older)


def _refuse_while_served(config: Configuration, places: Places) -> None:
    if not places.copies.has_no_primary(config):
        if places.copies.older(config) is not None:
            raise ChangeRefused(
                f"the primary of shard {config.shard} on node {config.primary.node} is heard, and is not opened, since "
                "what is here of it is older than what was committed: put the newer files back. If they are lost, "
                f"`kvstore shard accept-old {config.shard}` goes on with what is here."
            )
        raise ChangeRefused(
            f"the primary of shard {config.shard} on node {config.primary.node} is heard: nothing has to be lost. "
            "Leave out accept_loss, or wait until it answers."
        )
    if alive := places.copies.in_sync_here(config):
        raise ChangeRefused(
            f"the copy of shard {config.shard} on node {alive[0]} is in sync, and takes over by itself: nothing has to "
            "be lost."
        )


def check_confirmed(loss: Loss, confirmed: str | None, told: Told) -> None:
    """Refuse a loss unless the shard's id was typed again. Raises ChangeRefused, which says what is lost."""
    if confirmed == loss.shard:
        return
    raise ChangeRefused(
        f'{what_is_lost(loss, told)} If that is meant, give "confirm":"{loss.shard}" along with accept_loss.',
        number=loss.number,
        told=told.number,
    )


def what_is_lost(loss: Loss, told: Told) -> str:
    """For the person who decides it."""
    lacks = max(0, told.number - loss.number)
    least = f"at least the last {lacks} records that the shard had told of" if lacks else "what was written last"
    return (
        f"The copy of shard {loss.shard} on node {loss.to} ends with record {loss.number}, and lacks {least}: all that "
        "it lacks was acknowledged, and is lost for good, also when the other nodes return. Transactions of that time "
        "may be done in part, Idempotency-Keys run again, and locks end early. Be sure that no process of the other "
        "nodes runs any more: one that only the controller does not hear would go on serving."
    )


def with_loss(state: ClusterState, loss: Loss, clock_floor: int, change: Change, ended_max: int) -> ClusterState:
    """The state in which that copy is the primary; raises ChangeRefused if it is no such copy any more."""
    cluster_map = formed_map(state)
    config = configuration_of(cluster_map, loss.shard)
    epoch = cluster_map.epoch + 1
    after = None
    if config is not None:
        after = failover.promoted_with_loss(config, loss.to, loss.copy_id, epoch, is_older=loss.is_older)
    if after is None:
        raise ChangeRefused(f"the copies of shard {loss.shard} have changed: nothing was done. Look, and ask again.")
    following = with_configuration(cluster_map, after)
    shards = [
        msgspec.structs.replace(shard, clock_floor=max(shard.clock_floor, clock_floor))
        if shard.id == loss.shard
        else shard
        for shard in following.shards
    ]
    following = msgspec.structs.replace(following, shards=shards)
    return change_steps.taken(
        state, msgspec.structs.replace(state, map=following), change, lambda source, partitions: None, ended_max
    )
