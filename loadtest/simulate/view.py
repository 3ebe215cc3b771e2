"""A simulated cluster as an observer sees it who looks into all processes at once.

Owns: the map that the controller's store has now, what its process knows, the stores and copies that running processes
have.
Promises: changes nothing.
Leaves to others: what must hold of that (`invariants`, `ending`), which faults it allows (`disk_faults`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from kvstore.controller.map_store.interface import Told
from kvstore.controller.membership import ClusterState
from kvstore.controller.move_tries import Try
from kvstore.controller.parts import Parts
from kvstore.placement.cluster_map import ClusterMap, Replica, Shard
from kvstore.replication.copy import StoreCopy
from kvstore.shard.resident import Resident
from kvstore.store.store import Store
from loadtest.simulate.node import NodeServer
from loadtest.simulate.servers import ControllerServer


class ControllerView:
    """What a controller knows; nothing if there is none."""

    def __init__(self, server: ControllerServer | None) -> None:
        self._server = server

    def told(self, store_id: str) -> int:
        """The number of the last record of which its store was told."""
        return self._server.register.told.get(store_id, Told()).number if self._server is not None else 0

    def is_held_for_dead(self, node: str) -> bool:
        """Whether its process has not heard that node for too long."""
        return self._parts is not None and self._parts.keeper.is_dead(node)

    def tries(self) -> list[Try]:
        """Of the moves that its process carries out."""
        return list(self._parts.mover.tries.by_pair.values()) if self._parts is not None else []

    @property
    def _parts(self) -> Parts | None:
        return self._server.parts if self._server is not None else None


class View:
    """`nodes`: by their names. `document`: as the controller's store has it now. `replicas`: as in cluster.yaml."""

    def __init__(
        self,
        nodes: Mapping[str, NodeServer],
        document: Callable[[], bytes | None],
        replicas: int = 1,
        controller: ControllerServer | None = None,
    ) -> None:
        self.nodes = nodes
        self._document = document
        self._replicas = replicas
        self.controller = ControllerView(controller)
        self.is_behind = False  # the map is that of an old copy of the record, or made of one
        self._decoded: bytes | None = None
        self._map: ClusterMap | None = None  # that is in it

    @property
    def map(self) -> ClusterMap | None:
        """None as long as no cluster is formed, and while the controller's record is lost."""
        document = self._document()
        if document is not self._decoded:
            self._decoded = document
            self._map = msgspec.json.decode(document, type=ClusterState).map if document is not None else None
        return self._map

    @property
    def shards(self) -> list[Shard]:
        return found.shards if (found := self.map) is not None else []

    def shard(self, shard_id: str) -> Shard | None:
        return found.shard(shard_id) if (found := self.map) is not None else None

    def is_member(self, node: str) -> bool:
        return (found := self.map) is not None and found.node(node) is not None

    # --- in processes that run

    def resident(self, node: str, shard_id: str) -> Resident | None:
        """What that node has of the shard."""
        server = self.nodes.get(node)
        if server is None or server.node is None or not server.is_alive:
            return None
        return server.node.stores.by_shard.get(shard_id)

    def store(self, node: str, shard_id: str) -> Store | None:
        """The shard's store, if that node has it as its primary."""
        resident = self.resident(node, shard_id)
        return resident.local.hosted.store if resident is not None and resident.local.hosted is not None else None

    def primary(self, shard_id: str) -> Store | None:
        """The shard's store on the node that the map names."""
        shard = self.shard(shard_id)
        return self.store(shard.primary.node, shard_id) if shard is not None else None

    def copy(self, node: str, shard_id: str) -> StoreCopy | None:
        """The shard's copy, if that node has it as no primary."""
        resident = self.resident(node, shard_id)
        return resident.local.copy if resident is not None else None

    def has(self, node: str, shard_id: str, copy_id: str) -> bool:
        """Whether that node has that copy, undamaged."""
        resident = self.resident(node, shard_id)
        return resident is not None and resident.local.copy_id == copy_id and not resident.local.damage

    def lacks(self, node: str, shard_id: str, copy_id: str) -> bool:
        """Whether that node does not have that copy, undamaged; of one that is down it is not known."""
        server = self.nodes.get(node)
        is_down = server is not None and (server.node is None or not server.is_alive)
        return not is_down and not self.has(node, shard_id, copy_id)

    # --- copies

    def holds_last(self, node: str) -> bool:
        """Whether that node has the only good copy of something, as far as running processes have others."""
        held = (shard for shard in self.shards if node in dict(good_copies(shard)))
        return any(not any(self.has(other, shard.id, each) for other, each in others(shard, node)) for shard in held)

    def is_alone(self, node: str, shard: Shard) -> bool:
        """Whether that node is to have a good copy, and all others are known to lack theirs."""
        is_there = node in dict(good_copies(shard))
        return is_there and all(self.lacks(other, shard.id, each) for other, each in others(shard, node))

    def opens(self, node: str) -> bool:
        """Whether that node runs and is about to open a store.
        Its last beat may have the other copies taken out."""
        server = self.nodes.get(node)
        if server is None or server.node is None or not server.is_alive:
            return False
        residents = server.node.stores.by_shard
        return any(shard.primary.node == node and self._is_opening(residents.get(shard.id)) for shard in self.shards)

    @staticmethod
    def _is_opening(resident: Resident | None) -> bool:
        hosted = resident.local.hosted if resident is not None else None
        return hosted is None or not hosted.is_open

    def is_whole(self) -> bool:
        """Whether each shard has as many copies in sync as it is to have, on disks of processes that run."""
        return self.map is not None and all(map(self._has_copies, self.shards))

    def _has_copies(self, shard: Shard) -> bool:
        places = good_copies(shard)
        return len(places) >= self.wanted_copies() and all(self.has(node, shard.id, each) for node, each in places)

    def wanted_copies(self) -> int:
        """How many of each shard there are to be, on the nodes that there are."""
        nodes = found.nodes if (found := self.map) is not None else []
        return min(self._replicas, sum(not node.given_up for node in nodes))


class LostDisks:
    """How many disks were lost since all was copied: fewer than there are copies, at most."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._count = 0

    def add(self) -> None:
        self._count += 1

    def count(self) -> int:
        """Since all was copied."""
        self._count *= not self._view.is_whole()
        return self._count

    def may_be_more(self, node: str) -> bool:
        """Whether that node's disk may be the next.
        Others have all that is on it, and are not being taken out."""
        is_first = not self.count()
        may_be = self._count < self._view.wanted_copies() - 1 and (not is_first or self._view.is_whole())
        return may_be and not self._view.holds_last(node) and not self._view.opens(node)


def in_sync(shard: Shard) -> list[Replica]:
    return [each for each in shard.replicas if each.state == "in-sync"]


def good_copies(shard: Shard) -> list[tuple[str, str]]:
    """Node and copy of the primary, then of the copies in sync."""
    return [(shard.primary.node, shard.primary.copy_id), *((each.node, each.copy_id) for each in in_sync(shard))]


def others(shard: Shard, node: str) -> list[tuple[str, str]]:
    """The good copies that are not on that node."""
    return [(other, each) for other, each in good_copies(shard) if other != node]
