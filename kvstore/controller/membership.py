"""Who belongs to the cluster: every decision about its members, as a function from one state to the next.

Owns: `ClusterState`, the document in the controller's store, and how it changes.
Promises: pure; a file that is empty or belongs to another cluster never becomes an owner; what is not known to be safe
is refused, with the mend; whatever changes members also plans the moves, in the same state, with epoch + 1.
Leaves to others: storing the state (`document`), measuring and asking shards (`shards`), driving moves (`mover`).

How a cluster is formed
-----------------------
The first members, named in cluster.yaml, each announce themselves with the random id of their file. Every
announcement is written down. The swap that writes the last missing one also creates the cluster: its id, and
epoch 1 with all partitions placed. That is one document, so there is no moment at which the cluster exists by
half: a crash before the swap leaves an announcement missing, which its shard repeats; a crash after it leaves
a whole cluster, of which the shards learn when they ask again. A shard whose file already belongs to a
cluster is refused while none is formed here: its controller's data were lost, and a new placement would hide
the keys it has. It goes on by its own map until then (see `recovery`).

How a shard joins later
-----------------------
It is named with its address; or it announces itself with `join`, or because it was `wanted` and a launcher has started
it. Its file must be new in each case: one that says it belongs to this cluster, but to no member, is that of a shard
which was removed, and what it holds is out of date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from kvstore.addresses import is_any_address
from kvstore.config import ID_PATTERN, PLACE_PATTERN, WEIGHT_MAX
from kvstore.controller.changes import Change
from kvstore.errors import BadBody, ChangeRefused, Conflict, ControllerBehind, ForeignData, NotFound, Unavailable
from kvstore.placement import moves
from kvstore.placement.cluster_map import ClusterMap, Home, Shard, at_home, first_map, with_node

_URL = re.compile(r"https?://[^\s/?#@]+/?")

Plan = Callable[[ClusterMap], ClusterMap]  # a map with the moves that its members ask for: `moves.planned`


class Announcement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a shard says of itself at its start. `store_id` and `cluster_id` stand in its file.

    `cluster_id` is None until the shard has seen a map. `join`: it wants to become a member if it is none; then
    `weight` counts. That of the first members is the one in cluster.yaml. `partitions`: of how many its file is.
    `epoch`: that of the map that it follows, 0 without one. `clock`: the highest version that it has given or seen.
    `copy_id`: that of its copy of the store; a program that knew none has left it out. `host`, `zone`: of its node.
    """

    id: str
    url: str
    store_id: str
    cluster_id: str | None = None
    weight: int = 1
    join: bool = False
    partitions: int | None = None
    epoch: int = 0
    clock: int = 0
    copy_id: str = ""
    host: str = ""
    zone: str = ""


class ClusterState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stored document. Before the cluster is formed: who has announced itself; afterwards: the map.

    `wanted`: weights by id of the shards that a launcher is to start; they are no members yet. `clock`: the highest
    version that a store has told, or nearly (see `lost`). `changes`: in the order in which they began; see `changes`.
    `preferred`: by shard, the node on which a person wants its primary, where that is not its home.
    """

    announced: dict[str, Announcement] = {}
    map: ClusterMap | None = None
    wanted: dict[str, int] = {}
    clock: int = 0
    changes: list[Change] = []
    preferred: dict[str, str] = {}


class FirstMembers(NamedTuple):
    """What cluster.yaml says about the cluster to form; `weights` by shard id, in the order of the file."""

    weights: dict[str, int]
    partitions: int
    replicas: int


# --- announcements ---------------------------------------------------------------------------------------------------


def check(announcement: Announcement) -> None:
    """Refuse an announcement with a field without sense. Raises BadBody."""
    check_id(announcement.id)
    check_url(announcement.url)
    if not announcement.store_id or announcement.cluster_id == "":
        raise BadBody("store_id and cluster_id must not be empty; leave cluster_id out while there is none.")
    check_weight(announcement.weight)
    for name, place in (("host", announcement.host), ("zone", announcement.zone)):
        if place and not PLACE_PATTERN.fullmatch(place):
            raise BadBody(f"{name} {place[:100]!r} is none: it must match {PLACE_PATTERN.pattern}.")


def check_id(shard_id: str) -> None:
    """Refuse what is no id of a shard. Raises BadBody."""
    if not ID_PATTERN.fullmatch(shard_id):
        raise BadBody(f"id {shard_id!r} is no shard id: it must match {ID_PATTERN.pattern}.")


def check_url(url: str) -> None:
    """Refuse an address that others cannot reach. Raises BadBody."""
    if not _URL.fullmatch(url) or (address := _address(url)) is None:
        raise BadBody(f"url {url!r} is no address such as http://127.0.0.1:9101.")
    host, port = address
    if is_any_address(host) or port == 0:
        raise BadBody(f"url {url!r} is where a shard listens, not where it is reached: name this host and its port.")


def _address(url: str) -> tuple[str, int | None] | None:
    try:
        parts = urlsplit(url)
        return (parts.hostname, parts.port) if parts.hostname else None
    except ValueError:
        return None


def check_weight(weight: int) -> None:
    """Refuse a weight out of its bounds. Raises BadBody."""
    if not 1 <= weight <= WEIGHT_MAX:
        raise BadBody(f"weight {weight} must be 1 to {WEIGHT_MAX}; 1 is the usual weight.")


def decide(
    state: ClusterState, announcement: Announcement, first: FirstMembers, new_cluster_id: str, plan: Plan
) -> ClusterState:
    """The state after the announcement; the same one if it changes nothing.

    Raises ForeignData for a file that is not the one the cluster knows (or knows under another id), Conflict for a
    shard that is no member and is not to become one, ControllerBehind for one of a cluster of which this controller
    knows nothing.
    """
    if state.map is not None:
        return _decide_formed(state, state.map, announcement, plan)
    if announcement.cluster_id is not None:
        raise ControllerBehind(
            f"the file of shard {announcement.id} belongs to cluster {announcement.cluster_id}, "
            "of which this controller knows nothing."
        )
    if announcement.id not in first.weights:
        raise _not_a_member(announcement.id)
    _check_partitions(announcement.id, announcement.partitions, first.partitions)
    for other in state.announced.values():
        if other.store_id == announcement.store_id and other.id != announcement.id:
            raise _copied_file(announcement.id, other.id)
    announced = {**state.announced, announcement.id: announcement}
    if waiting_for(announced, first):
        return msgspec.structs.replace(state, announced=announced)
    homes = [_home(announced[shard_id], weight) for shard_id, weight in first.weights.items()]
    formed = first_map(new_cluster_id, first.partitions, homes)
    return ClusterState(map=msgspec.structs.replace(formed, replicas=first.replicas))


def _decide_formed(
    state: ClusterState, cluster_map: ClusterMap, announcement: Announcement, plan: Plan
) -> ClusterState:
    if announcement.cluster_id not in (None, cluster_map.cluster_id):
        raise ForeignData(
            f"the file of shard {announcement.id} belongs to cluster {announcement.cluster_id}, "
            f"this controller to cluster {cluster_map.cluster_id}."
        )
    if cluster_map.is_struck(announcement.store_id):
        raise ForeignData(
            f"the file of shard {announcement.id} is that of a shard that was given up as lost, and is out of date: "
            "move it away. An empty one may join."
        )
    for other in cluster_map.shards:
        if other.store_id == announcement.store_id and other.id != announcement.id:
            raise _copied_file(announcement.id, other.id)
    _check_partitions(announcement.id, announcement.partitions, cluster_map.partitions)
    shard, node = cluster_map.shard(announcement.id), cluster_map.node(announcement.id)
    if shard is None and node is None:
        return _decide_newcomer(state, announcement, plan)
    if shard is not None:
        _check_copy(shard, announcement)
    if node is None:
        return state
    here = msgspec.structs.replace(node, url=announcement.url, host=announcement.host, zone=announcement.zone)
    return msgspec.structs.replace(state, map=with_node(cluster_map, here)) if here != node else state


def _check_copy(shard: Shard, announcement: Announcement) -> None:
    """Raises ForeignData unless the shard's home may start with that file.

    While there are other copies, or the primary is elsewhere, it may start with any: it serves only what the map names,
    and an empty or lost one is rebuilt.
    """
    if shard.replicas or shard.primary.node != announcement.id:
        return
    if shard.store_id != announcement.store_id:
        raise ForeignData(
            f"shard {announcement.id} has an empty or foreign file: the cluster knows it with "
            f"store id {shard.store_id}, not {announcement.store_id}."
        )
    if announcement.copy_id not in ("", shard.primary.copy_id):
        raise ForeignData(
            f"shard {announcement.id} has copy {announcement.copy_id} of its store, and the cluster knows copy "
            f"{shard.primary.copy_id}: put back the file shard-{announcement.id}.id that belongs to it."
        )


def _home(announcement: Announcement, weight: int) -> Home:
    store_id, copy_id = announcement.store_id, announcement.copy_id
    home = at_home(announcement.id, announcement.url, store_id, copy_id=copy_id, weight=weight, zone=announcement.zone)
    return home._replace(node=msgspec.structs.replace(home.node, host=announcement.host))


def _decide_newcomer(state: ClusterState, announcement: Announcement, plan: Plan) -> ClusterState:
    if announcement.cluster_id is not None:
        raise _was_removed(announcement.id)
    weight = state.wanted.get(announcement.id, announcement.weight if announcement.join else None)
    if weight is None:
        raise _not_a_member(announcement.id)
    return with_joining(state, _home(announcement, weight), plan)


def _not_a_member(shard_id: str) -> Conflict:
    return Conflict(f"shard {shard_id} is not a member of this cluster: add it first.", retry_after_ms=1000)


def _copied_file(shard_id: str, other_id: str) -> ForeignData:
    return ForeignData(f"the file of shard {shard_id} is a copy of that of shard {other_id}.")


def _check_partitions(shard_id: str, partitions: int | None, wanted: int) -> None:
    """Raises ForeignData."""
    if partitions not in (None, wanted):
        raise ForeignData(
            f"the file of shard {shard_id} is for {partitions} partitions, this cluster has {wanted}: start the shard "
            "with an empty data_dir.",
            partitions=wanted,
        )


def _was_removed(shard_id: str) -> ForeignData:
    return ForeignData(
        f"shard {shard_id} was removed from this cluster, or given up because its node was silent for too long, and "
        f"its files are out of date: all that it had is with the others; move shard-{shard_id}.* away (.db, .id, "
        ".log.*), or start it with an empty folder, to join again as a new shard."
    )


def waiting_for(announced: dict[str, Announcement], first: FirstMembers) -> list[str]:
    """The first members that have not announced themselves, in the order of the file."""
    return [shard_id for shard_id in first.weights if shard_id not in announced]


def joins(before: ClusterState, after: ClusterState) -> bool:
    """Whether the cluster is formed and has got another member."""
    members = [len(state.map.shards) if state.map is not None else 0 for state in (before, after)]
    return 0 < members[0] < members[1]


def may_join(state: ClusterState, announcement: Announcement) -> bool:
    """Whether the announcement, if nothing is wrong with it, makes a new member."""
    is_asked_for = announcement.join or announcement.id in state.wanted
    return state.map is not None and is_asked_for and state.map.shard(announcement.id) is None


# --- what people ask for ---------------------------------------------------------------------------------------------


def check_newcomer(
    state: ClusterState, shard_id: str, cluster_id: str | None = None, partitions: int | None = None
) -> None:
    """Check that the shard may join.

    Raises ChangeRefused if the id is taken, ForeignData if the file is not for this cluster, Unavailable.
    """
    cluster_map = formed_map(state)
    refuse_while_struck(cluster_map)
    shard = cluster_map.shard(shard_id)
    if shard is not None and shard.state == "leaving":
        raise ChangeRefused(
            f"shard {shard_id} is leaving: add it again when it has left, or keep it by cancelling the moves."
        )
    if shard is not None:
        raise ChangeRefused(f"shard {shard_id} exists already: choose another id, or change its weight.")
    if cluster_id == cluster_map.cluster_id:
        raise _was_removed(shard_id)
    if cluster_id is not None:
        raise ForeignData(
            f"the file of shard {shard_id} belongs to cluster {cluster_id}, not to this one: "
            "start the shard with an empty data_dir."
        )
    _check_partitions(shard_id, partitions, cluster_map.partitions)


def with_joining(state: ClusterState, newcomer: Home, plan: Plan) -> ClusterState:
    """The shard is a member and moves to it are planned. Raises ChangeRefused, ForeignData, Unavailable."""
    shard = newcomer.shard
    check_newcomer(state, shard.id)
    cluster_map = formed_map(state)
    for other in cluster_map.shards:
        if other.store_id == shard.store_id:
            raise _copied_file(shard.id, other.id)
    wanted = {shard_id: weight for shard_id, weight in state.wanted.items() if shard_id != shard.id}
    joined = plan(moves.with_new_shard(cluster_map, newcomer))
    return msgspec.structs.replace(state, map=_one_step(cluster_map, joined), wanted=wanted)


def with_wanted(state: ClusterState, shard_id: str, weight: int) -> ClusterState:
    """A launcher is to start the shard. Raises ChangeRefused if it exists or is wanted, Unavailable."""
    check_newcomer(state, shard_id)
    if shard_id in state.wanted:
        raise ChangeRefused(
            f"shard {shard_id} was asked for already and is being started: wait for it, or remove it to ask again."
        )
    return msgspec.structs.replace(state, wanted={**state.wanted, shard_id: weight})


def without(state: ClusterState, shard_id: str, plan: Plan) -> ClusterState:
    """The shard leaves, and the moves that empty it are planned; one that was only wanted is forgotten.

    Raises NotFound, ChangeRefused for the last one, Unavailable.
    """
    cluster_map = formed_map(state)
    if cluster_map.shard(shard_id) is None and shard_id in state.wanted:
        wanted = {other: weight for other, weight in state.wanted.items() if other != shard_id}
        return msgspec.structs.replace(state, wanted=wanted)
    checked_shard(cluster_map, shard_id)
    refuse_while_struck(cluster_map)
    try:
        leaving = moves.with_leaving(cluster_map, shard_id)
    except ValueError:
        raise ChangeRefused(
            f"shard {shard_id} is the last one that stays: its keys would have no place. Add another shard first."
        ) from None
    return msgspec.structs.replace(state, map=_one_step(cluster_map, plan(leaving)))


def lost(state: ClusterState, shard_id: str) -> ClusterState:
    """The shard and all that it has is given up. Raises NotFound, ChangeRefused for the last one, Unavailable."""
    cluster_map = formed_map(state)
    checked_shard(cluster_map, shard_id)
    try:
        return msgspec.structs.replace(state, map=moves.with_struck(cluster_map, shard_id))
    except ValueError:
        raise ChangeRefused(
            f"shard {shard_id} is the last one that stays: its keys would have no place. Add another shard first."
        ) from None


def refuse_while_struck(cluster_map: ClusterMap) -> None:
    """Until the partitions of a lost shard are open, members and moves stay as they are. Raises ChangeRefused."""
    if waiting := [strike.shard for strike in cluster_map.strikes if not strike.opened]:
        raise ChangeRefused(
            f"shard {', '.join(waiting)} is being given up, for which every other shard must be there: start those "
            "that are down (or give them up, too), then ask again."
        )


def reweighed(state: ClusterState, shard_id: str, weight: int, plan: Plan) -> ClusterState:
    """The shard gets another weight, and what that asks for is planned. Raises NotFound, ChangeRefused, Unavailable."""
    cluster_map = formed_map(state)
    if cluster_map.shard(shard_id) is None and shard_id in state.wanted:
        return msgspec.structs.replace(state, wanted={**state.wanted, shard_id: weight})
    refuse_while_struck(cluster_map)
    if checked_shard(cluster_map, shard_id).state == "leaving":
        raise ChangeRefused(f"shard {shard_id} is leaving: keep it by cancelling the moves, then change its weight.")
    weighed = moves.with_weight(cluster_map, shard_id, weight)
    return msgspec.structs.replace(state, map=_one_step(cluster_map, plan(weighed)))


def replanned(state: ClusterState, plan: Plan) -> ClusterState:
    """With the moves that the present members and weights ask for. Raises Unavailable."""
    cluster_map = formed_map(state)
    refuse_while_struck(cluster_map)
    return msgspec.structs.replace(state, map=_one_step(cluster_map, plan(cluster_map)))


def without_moves(state: ClusterState) -> ClusterState:
    """What is under way and not committed is given up: moves, joining, leaving, being started. Raises Unavailable."""
    cluster_map = formed_map(state)
    refuse_while_struck(cluster_map)
    return msgspec.structs.replace(state, map=moves.cancelled(cluster_map), wanted={})


def formed_map(state: ClusterState) -> ClusterMap:
    """The map. Raises Unavailable before the cluster is formed."""
    if state.map is None:
        raise Unavailable(
            "the cluster is not formed yet: its first shards have not all announced themselves.", retry_after_ms=1000
        )
    return state.map


def checked_shard(cluster_map: ClusterMap, shard_id: str) -> Shard:
    """The shard of that id. Raises NotFound."""
    shard = cluster_map.shard(shard_id)
    if shard is None:
        known = ", ".join(shard.id for shard in cluster_map.shards)
        raise NotFound(
            f"there is no shard {shard_id!r}: the members are {known}.",
            title="There is no such shard",
            next_step="Name one of the members; GET /v1/cluster shows them.",
        )
    return shard


def _one_step(before: ClusterMap, after: ClusterMap) -> ClusterMap:
    """Changes that are stored at once are one epoch."""
    return msgspec.structs.replace(after, epoch=min(after.epoch, before.epoch + 1))


# --- what to tell people ---------------------------------------------------------------------------------------------


def differences(first: FirstMembers, cluster_map: ClusterMap) -> list[str]:
    """In what cluster.yaml and the stored map differ, a sentence each."""
    found = []
    if first.partitions != cluster_map.partitions:
        found.append(f"partitions: the map has {cluster_map.partitions}, cluster.yaml {first.partitions}")
    if first.replicas != cluster_map.replicas:
        found.append(f"replicas: the map has {cluster_map.replicas}, cluster.yaml {first.replicas}")
    weights = {shard.id: shard.weight for shard in cluster_map.shards}
    found += _missing("cluster.yaml", first.weights, weights) + _missing("the map", weights, first.weights)
    for shard_id, weight in first.weights.items():
        if weights.get(shard_id, weight) != weight:
            found.append(f"shard {shard_id}: the map has weight {weights[shard_id]}, cluster.yaml {weight}")
    return found


def _missing(where: str, there: dict[str, int], elsewhere: dict[str, int]) -> list[str]:
    return [f"shard {shard_id} is in {where} only" for shard_id in there if shard_id not in elsewhere]
