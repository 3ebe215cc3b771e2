"""What people ask for about copies: how many there are to be, and which one is the primary.

Owns: both rules, from one state to the next.
Promises: pure; what cannot be done as things are is refused, with the mend.
Leaves to others: doing it (`replicas`), storing what was asked for (`planning`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kvstore.config import REPLICAS_MAX
from kvstore.controller.membership import ClusterState, checked_shard, formed_map, refuse_while_struck
from kvstore.errors import BadBody, ChangeRefused
from kvstore.replication.configuration import configuration_of
from kvstore.replication.failover import plan_change


def check_replicas(replicas: int) -> None:
    """Refuse a number of copies out of its bounds. Raises BadBody."""
    if not 1 <= replicas <= REPLICAS_MAX:
        raise BadBody(f"replicas {replicas} must be 1 to {REPLICAS_MAX}; 2 survives the loss of any one disk.")


def with_replicas(state: ClusterState, replicas: int, unserved: Sequence[str]) -> ClusterState:
    """The state in which so many copies of every key are to be.

    `unserved`: the shards whose primary does not answer. Raises BadBody, ChangeRefused, Unavailable.
    """
    check_replicas(replicas)
    cluster_map = formed_map(state)
    refuse_while_struck(cluster_map)
    if replicas < cluster_map.replicas and unserved:
        raise ChangeRefused(
            f"shard {', '.join(unserved)} has no primary that answers, and its copies may be needed: wait until "
            "another copy has taken over, or start its node, then ask again."
        )
    if replicas == cluster_map.replicas:
        return state
    changed = msgspec.structs.replace(cluster_map, epoch=cluster_map.epoch + 1, replicas=replicas)
    preferred = state.preferred if replicas > 1 else {}  # the only copy lies at home
    return msgspec.structs.replace(state, map=changed, preferred=preferred)


def with_primary(state: ClusterState, shard_id: str, to: str, is_dead: Callable[[str], bool]) -> ClusterState:
    """The state in which a person wants the shard's primary on that node.

    `is_dead`: whether a node is silent. Raises NotFound, ChangeRefused, Unavailable.
    """
    cluster_map = formed_map(state)
    shard = checked_shard(cluster_map, shard_id)
    present = configuration_of(cluster_map, shard_id)
    assert present is not None
    others = [copy.node for copy in present.in_sync if not is_dead(copy.node)]
    synced = ", ".join(others) or "none"
    if cluster_map.node(to) is None:
        known = ", ".join(node.id for node in cluster_map.nodes)
        raise ChangeRefused(
            f"there is no node {to!r}: the nodes are {known}. With a copy of shard {shard_id} in sync: {synced}.",
            in_sync=others,
        )
    if to != shard.primary.node and plan_change(present, to) is not None and is_dead(to):
        raise ChangeRefused(
            f"node {to}, which has a copy of shard {shard_id} in sync, is silent: start it, or name another node "
            f"(in sync: {synced}).",
            in_sync=others,
        )
    if to != shard.primary.node and plan_change(present, to) is None:
        raise ChangeRefused(
            f"node {to} has no copy of shard {shard_id} that is in sync (in sync: {synced}): wait until it is, or name "
            "another node. If the disks of the others are lost, accept_loss goes on with an older copy.",
            in_sync=others,
        )
    preferred = {name: node for name, node in state.preferred.items() if name != shard_id}
    if to != shard_id:
        preferred[shard_id] = to
    return msgspec.structs.replace(state, preferred=preferred)
