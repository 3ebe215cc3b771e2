"""A controller whose file was lost, or restored from an old backup.
The newest map that the nodes have, taken again.

Owns: who has announced a cluster that this controller does not know; which map is the newest; the rules of taking it.
Promises: `newest`, `silent` and `recovered` are pure. Nothing is taken that was not shown, and nothing while a member
that may have a newer map is silent, unless it is named. The map that is taken has an epoch far above all that were
heard of, so no two maps of one epoch can meet.
Leaves to others: that nothing is changed before (`document`), asking nodes (`shards`), HTTP (`app`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from kvstore.controller.document import ClusterDocument
from kvstore.controller.membership import Announcement, ClusterState
from kvstore.controller.shards import ShardClients
from kvstore.errors import ChangeRefused, ControllerBehind
from kvstore.placement import moves
from kvstore.placement.cluster_map import ClusterMap, Shard

# Maps that were lost with the file and reached no process that can be asked had epochs below that.
EPOCH_STEP = 1_000_000
_OFFERS_MAX = 4096


class Told(msgspec.Struct, frozen=True):
    """What a node says at /map: who it is, and the newest map that is durable there.

    `beside`: shard and store id of each other store that it serves, by a map that is not newer. `copies`: shard and
    copy id of each copy that lies there whole and is not served.
    """

    shard: str
    store_id: str
    map: ClusterMap | None = None
    beside: list[tuple[str, str]] = []
    copies: list[tuple[str, str]] = []


class Found(NamedTuple):
    """The newest map that was found.
    With it, which shards have it or an older one, and which of its members are silent."""

    map: ClusterMap
    told: list[str]
    silent: list[str]


class Recovery:
    """Every method may be called by any number of tasks at the same time."""

    def __init__(self, document: ClusterDocument, shards: ShardClients) -> None:
        self._document = document
        self._shards = shards
        self._offers: dict[str, Announcement] = {}

    def note(self, announcement: Announcement) -> None:
        """A shard whose file has a history has announced itself."""
        if announcement.cluster_id is not None and (announcement.id in self._offers or len(self._offers) < _OFFERS_MAX):
            self._offers[announcement.id] = announcement

    @property
    def is_offered(self) -> bool:
        """There are shards that have a map."""
        return bool(self._offers)

    def lost(self, state: ClusterState) -> ControllerBehind | None:
        """What to say while there are nodes of a cluster, and no map of it here."""
        if state.map is not None or not (self.is_offered or self._document.heard_of_any):
            return None
        return ControllerBehind("this controller has no map of the cluster that nodes belong to: its file is lost.")

    async def found(self) -> Found:
        """The newest map that is to be had. Raises ChangeRefused if there is nothing to recover."""
        state = await self._document.read()
        found = await self.find(state)
        if state.map is not None and self._document.behind(state) is None and found.map.epoch <= state.map.epoch:
            raise ChangeRefused(
                f"there is nothing to recover: no node has a newer map than this controller, whose epoch is "
                f"{state.map.epoch}."
            )
        return found

    async def find(self, state: ClusterState) -> Found:
        """The newest map of all that are to be had. Raises ChangeRefused if there is none, or not one."""
        urls = {offer.url for offer in self._offers.values()} | _urls(state.map)
        told = await self._ask(urls)
        maps = [each.map for each in told if each.map is not None]
        found = newest([*maps, *([state.map] if state.map is not None else [])])
        told += await self._ask(_urls(found) - urls)
        found = newest([*(each.map for each in told if each.map is not None), found])
        return Found(found, sorted({each.shard for each in told}), silent(found, told))

    async def _ask(self, urls: Collection[str]) -> list[Told]:
        answers = await asyncio.gather(*(self._shards.ask_http(url, "/map", Told) for url in sorted(urls)))
        return [answer for answer in answers if answer is not None]


def _urls(cluster_map: ClusterMap | None) -> set[str]:
    return {node.url for node in cluster_map.nodes} if cluster_map is not None else set()


# --- the rules: pure --------------------------------------------------------------------------------------------------


def newest(maps: Sequence[ClusterMap]) -> ClusterMap:
    """That of the highest epoch. Raises ChangeRefused if there is none, or if they do not agree whose it is."""
    if not maps:
        raise ChangeRefused(
            "no node that has announced itself here has a cluster map: start the shards, with their files, first."
        )
    clusters = sorted({each.cluster_id for each in maps})
    if len(clusters) > 1:
        raise ChangeRefused(
            f"there are nodes of several clusters here, {', '.join(clusters)}: end those that do not belong here."
        )
    found = max(maps, key=lambda each: each.epoch)
    if any(each.epoch == found.epoch and each != found for each in maps):
        raise ChangeRefused(
            f"two nodes have different maps of epoch {found.epoch}: two controllers have changed this cluster. "
            "End the nodes that followed the wrong one, and ask again."
        )
    return found


def silent(cluster_map: ClusterMap, told: Iterable[Told]) -> list[str]:
    """The members of the map of whom nothing was heard: they may have a newer one."""
    answers = list(told)
    heard = {store for each in answers for store in ((each.shard, each.store_id), *each.beside)}
    return [
        shard.id
        for shard in cluster_map.shards
        if (shard.id, shard.store_id) not in heard and not _waits(shard, answers)
    ]


def _waits(shard: Shard, told: Sequence[Told]) -> bool:
    """Whether its primary is a copy until a controller answers, and no copy has taken over by a newer map.

    So it is after a primary's process began anew; its home may have no files. The node of a copy that has taken over
    tells of the map by which it has.
    """
    nodes, copies = {each.shard for each in told}, {copy for each in told for copy in each.copies}
    in_sync = {each.node for each in shard.replicas if each.state == "in-sync"}
    return (shard.id, shard.primary.copy_id) in copies and in_sync <= nodes


def recovered(cluster_map: ClusterMap, heard: int, new_id: Callable[[], str]) -> ClusterMap:
    """The map that the controller goes on with.
    No move of it may be finished by who has begun it: each begins again."""
    voided = moves.all_voided(cluster_map, new_id)
    return msgspec.structs.replace(voided, epoch=max(cluster_map.epoch, heard) + EPOCH_STEP)


def check(found: Found, cluster_id: str, epoch: int, without: Collection[str]) -> None:
    """Raises ChangeRefused unless that is what was shown, and those who are silent are named."""
    if (found.map.cluster_id, found.map.epoch) != (cluster_id, epoch):
        raise ChangeRefused(
            f"the newest map is that of epoch {found.map.epoch} of cluster {found.map.cluster_id} by now: look at it, "
            "and ask again."
        )
    if unnamed := [shard_id for shard_id in found.silent if shard_id not in without]:
        raise ChangeRefused(
            f"shard {', '.join(unnamed)} is a member and silent, and may have a newer map: start it. If it will never "
            f"come back, name it (--without {unnamed[0]}): what only it knows of the cluster is lost then.",
            silent=unnamed,
        )
    if talking := [shard_id for shard_id in without if shard_id not in found.silent]:
        raise ChangeRefused(f"shard {', '.join(talking)} is not among the silent members: do not name it.")


def described(found: Found) -> dict[str, Any]:
    """For people, before they take it."""
    cluster_map = found.map
    owned = [0] * len(cluster_map.shards)
    for owner in cluster_map.owners:
        owned[owner] += 1
    members = [
        {
            "id": shard.id,
            "url": cluster_map.url_of(shard),
            "state": shard.state,
            "weight": shard.weight,
            "partitions": count,
        }
        for shard, count in zip(cluster_map.shards, owned, strict=True)
    ]
    return {
        "cluster_id": cluster_map.cluster_id,
        "epoch": cluster_map.epoch,
        "partitions": cluster_map.partitions,
        "members": members,
        "moves": len(cluster_map.moves),
        "told": found.told,
        "silent": found.silent,
    }
