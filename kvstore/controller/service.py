"""The controller's rules and its state: forming the cluster, letting members announce themselves, new maps.

Owns: `ClusterState`, the document in the controller's store; this is the only writer of the cluster map.
Promises: the map changes by compare-and-swap only, each time with epoch + 1; a file that is empty or belongs
to another cluster never becomes an owner; what is not known to be safe is refused.
Leaves to others: HTTP (`app`), atomicity and durability (`store`), placement (`placement`).

How a cluster is formed
-----------------------
The first members, named in cluster.yaml, each announce themselves with the random id of their file. Every
announcement is written down. The swap that writes the last missing one also creates the cluster: its id, and
epoch 1 with all partitions placed. That is one document, so there is no moment at which the cluster exists by
half: a crash before the swap leaves an announcement missing, which its shard repeats; a crash after it leaves
a whole cluster, of which the shards learn when they ask again. A shard whose file already belongs to a
cluster is refused while none is formed here: its controller's data were lost, and a new placement would hide
the keys it has.

Two announcements at the same time read the same revision; one swap wins, the other reads again and decides
anew on what it finds. `decide` is pure, so deciding again costs nothing and forgets nothing.
"""

from __future__ import annotations

import logging
import re
import secrets
from typing import NamedTuple

import msgspec

from kvstore.config import ID_PATTERN, ClusterConfig
from kvstore.controller.store import MapStore
from kvstore.errors import BadBody, Conflict, ForeignData, Unavailable
from kvstore.placement.cluster_map import ClusterMap, Member, first_map, with_member_url

_URL = re.compile(r"https?://[^\s/?#@]+/?")
_log = logging.getLogger(__name__)


class Announcement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a shard says of itself at its start. `store_id` and `cluster_id` stand in its file.

    `cluster_id` is None until the shard has seen a map. `weight` counts when a shard joins later; that of the
    first members is the one in cluster.yaml.
    """

    id: str
    url: str
    store_id: str
    cluster_id: str | None = None
    weight: int = 1


class ClusterState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stored document. Before the cluster is formed: who has announced itself; afterwards: the map."""

    announced: dict[str, Announcement] = {}
    map: ClusterMap | None = None


class Waiting(NamedTuple):
    """The cluster is not formed: these first members have not announced themselves yet."""

    waiting_for: list[str]


class FirstMembers(NamedTuple):
    """What cluster.yaml says about the cluster to form; `weights` by shard id, in the order of the file."""

    weights: dict[str, int]
    partitions: int
    replicas: int


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(ClusterState).decode


# --- the rules: pure ---------------------------------------------------------------------------------------


def check(announcement: Announcement) -> None:
    """Raises BadBody for a field without sense."""
    if not ID_PATTERN.fullmatch(announcement.id):
        raise BadBody(f"id {announcement.id!r} is no shard id: it must match {ID_PATTERN.pattern}.")
    if not _URL.fullmatch(announcement.url):
        raise BadBody(f"url {announcement.url!r} is no address such as http://127.0.0.1:9101.")
    if not announcement.store_id or announcement.cluster_id == "":
        raise BadBody("store_id and cluster_id must not be empty; leave cluster_id out while there is none.")
    if announcement.weight < 1:
        raise BadBody(f"weight {announcement.weight} must be 1 or more.")


def decide(state: ClusterState, announcement: Announcement, first: FirstMembers, new_cluster_id: str) -> ClusterState:
    """The state after the announcement; the same one if it changes nothing.

    Raises ForeignData for a file that is not the one the cluster knows (or knows under another id), Conflict
    for a shard that is no member.
    """
    if state.map is not None:
        return _decide_formed(state, state.map, announcement)
    if announcement.cluster_id is not None:
        raise ForeignData(
            f"the file of shard {announcement.id} belongs to cluster {announcement.cluster_id}, "
            "of which this controller knows nothing."
        )
    if announcement.id not in first.weights:
        raise _not_a_member(announcement.id)
    for other in state.announced.values():
        if other.store_id == announcement.store_id and other.id != announcement.id:
            raise _copied_file(announcement.id, other.id)
    announced = {**state.announced, announcement.id: announcement}
    if waiting_for(announced, first):
        return ClusterState(announced=announced)
    members = [
        Member(id=shard_id, url=announced[shard_id].url, store_id=announced[shard_id].store_id, weight=weight)
        for shard_id, weight in first.weights.items()
    ]
    formed = first_map(new_cluster_id, first.partitions, members)
    return ClusterState(map=msgspec.structs.replace(formed, replicas=first.replicas))


def _decide_formed(state: ClusterState, cluster_map: ClusterMap, announcement: Announcement) -> ClusterState:
    if announcement.cluster_id not in (None, cluster_map.cluster_id):
        raise ForeignData(
            f"the file of shard {announcement.id} belongs to cluster {announcement.cluster_id}, "
            f"this controller to cluster {cluster_map.cluster_id}."
        )
    for other in cluster_map.members:
        if other.store_id == announcement.store_id and other.id != announcement.id:
            raise _copied_file(announcement.id, other.id)
    member = cluster_map.member(announcement.id)
    if member is None:
        raise _not_a_member(announcement.id)
    if member.store_id != announcement.store_id:
        raise ForeignData(
            f"shard {announcement.id} has an empty or foreign file: the cluster knows it with "
            f"store id {member.store_id}, not {announcement.store_id}."
        )
    if member.url == announcement.url:
        return state
    return ClusterState(map=with_member_url(cluster_map, announcement.id, announcement.url))


def _not_a_member(shard_id: str) -> Conflict:
    return Conflict(f"shard {shard_id} is not a member of this cluster: add it first.", retry_after_ms=1000)


def _copied_file(shard_id: str, other_id: str) -> ForeignData:
    return ForeignData(f"the file of shard {shard_id} is a copy of that of shard {other_id}.")


def waiting_for(announced: dict[str, Announcement], first: FirstMembers) -> list[str]:
    """The first members that have not announced themselves, in the order of the file."""
    return [shard_id for shard_id in first.weights if shard_id not in announced]


def differences(first: FirstMembers, cluster_map: ClusterMap) -> list[str]:
    """In what cluster.yaml and the stored map differ, a sentence each."""
    found = []
    if first.partitions != cluster_map.partitions:
        found.append(f"partitions: the map has {cluster_map.partitions}, cluster.yaml {first.partitions}")
    if first.replicas != cluster_map.replicas:
        found.append(f"replicas: the map has {cluster_map.replicas}, cluster.yaml {first.replicas}")
    weights = {member.id: member.weight for member in cluster_map.members}
    found += _missing("cluster.yaml", first.weights, weights) + _missing("the map", weights, first.weights)
    for shard_id, weight in first.weights.items():
        if weights.get(shard_id, weight) != weight:
            found.append(f"shard {shard_id}: the map has weight {weights[shard_id]}, cluster.yaml {weight}")
    return found


def _missing(where: str, there: dict[str, int], elsewhere: dict[str, int]) -> list[str]:
    return [f"shard {shard_id} is in {where} only" for shard_id in there if shard_id not in elsewhere]


# --- the shell ---------------------------------------------------------------------------------------------


class ClusterService:
    """The rules, applied to a store. Every method may be called by any number of tasks at the same time."""

    def __init__(self, store: MapStore, config: ClusterConfig) -> None:
        self._store = store
        self._tries_max = config.limits.map_write_tries_max
        self._first = FirstMembers(
            weights={shard.id: shard.weight for shard in config.shards},
            partitions=config.partitions,
            replicas=config.replicas,
        )

    async def report_start(self) -> None:
        """Log what is stored and where cluster.yaml differs from it. Raises ForeignData if it is unreadable."""
        _, state = await self._read()
        if state.map is None:
            missing = ", ".join(waiting_for(state.announced, self._first))
            _log.info("the cluster is not formed yet, waiting for shards %s", missing)
            return
        _log.info("cluster %s, epoch %d", state.map.cluster_id, state.map.epoch)
        for difference in differences(self._first, state.map):
            _log.warning("cluster.yaml differs from the stored map, which stands: %s", difference)

    async def announce(self, announcement: Announcement) -> ClusterMap | Waiting:
        """Write down that a shard is there: the map if it is a member, or who is waited for.

        Raises BadBody, ForeignData and Conflict as `check` and `decide` do; Unavailable if the store cannot
        answer or other writers always came first: then the shard announces itself again.
        """
        check(announcement)
        for _ in range(self._tries_max):
            revision, state = await self._read()
            following = decide(state, announcement, self._first, secrets.token_hex(16))
            if following == state or await self._store.compare_and_swap(revision, _encode(following)):
                _report_change(announcement, state, following)
                return following.map or Waiting(waiting_for(following.announced, self._first))
        raise Unavailable(f"{self._tries_max} writes of the map lost their race.", retry_after_ms=1000)

    async def map_after(self, epoch: int) -> ClusterMap:
        """The map as soon as there is one with a higher epoch; waits for ever if none comes.

        Raises Unavailable when the store is closed.
        """
        revision = -1
        while True:
            revision, document = await self._store.watch(revision)
            state = _decode_state(document)
            if state.map is not None and state.map.epoch > epoch:
                return state.map

    async def _read(self) -> tuple[int, ClusterState]:
        revision, document = await self._store.read()
        return revision, _decode_state(document)


def _decode_state(document: bytes | None) -> ClusterState:
    if document is None:
        return ClusterState()
    try:
        return _decode(document)
    except msgspec.DecodeError as error:
        raise ForeignData(f"this version cannot read the controller's stored state: {error}.") from error


def _report_change(announcement: Announcement, before: ClusterState, after: ClusterState) -> None:
    if after.map is None:
        _log.info("shard %s announced itself from %s", announcement.id, announcement.url)
    elif before.map is None:
        shards = ", ".join(member.id for member in after.map.members)
        _log.info("cluster %s is formed: epoch 1, shards %s", after.map.cluster_id, shards)
    elif before.map.epoch != after.map.epoch:
        _log.info("shard %s moved to %s: epoch %d", announcement.id, announcement.url, after.map.epoch)
