"""What lies on a node: its stores and copies, by shard, and what is asked of all of them together.

Owns: the answers that more than one of them has a part in.
Leaves to others: each of them (`resident`), which are made and set aside (`node_stores`).
"""

from __future__ import annotations

from kvstore.placement.partition_set import as_text
from kvstore.shard.hosted import HostedStore
from kvstore.shard.resident import Resident
from kvstore.storage.log import Log


class Residents(dict[str, Resident]):
    """By shard."""

    @property
    def served(self) -> list[HostedStore]:
        """The stores that are served here."""
        return [each.local.hosted for each in self.values() if each.local.hosted is not None]

    @property
    def is_busy(self) -> bool:
        """Whether clients are at work in a store that is served here."""
        return any(each.store.applier.is_busy for each in self.served)

    @property
    def clock(self) -> int:
        """The highest version that a store here has given or seen."""
        return max((each.local.clock for each in self.values()), default=0)  # none, once the last has gone

    @property
    def keeps_copies(self) -> bool:
        """Whether files of a store lie here that is not served here: the controller says what becomes of them."""
        return any(each.local.copy is not None or each.local.damage for each in self.values())

    @property
    def whole_copies(self) -> list[tuple[str, str]]:
        """Shard and copy id of each copy here that no snapshot is filling."""
        found = [(each.shard_id, each.local.copy) for each in self.values()]
        return [(shard, copy.identity.copy_id) for shard, copy in found if copy is not None and not copy.is_filling]

    @property
    def damage(self) -> dict[str, str]:
        """What is wrong with files here, by shard."""
        return {each.shard_id: each.local.damage for each in self.values() if each.local.damage}

    @property
    def refused_s(self) -> float:
        """When something was asked of this node last that another one serves."""
        return max((each.early.refused_s for each in self.values()), default=0.0)

    @property
    def disputed(self) -> dict[str, str]:
        """By shard that is served here: the partitions that are otherwise in all its copies, which agree."""
        found = {each.shard_id: each.store.replicas.comparison.disputed for each in self.served}
        return {shard: as_text(partitions) for shard, partitions in found.items() if partitions}

    def logs_with_copies(self) -> list[Log]:
        """The logs here of stores that another node could serve, or serves; to be asked by any thread."""
        return [log for each in list(self.values()) if (log := each.local.log_with_copies) is not None]

    @property
    def syncs_under_way(self) -> frozenset[object]:
        """Of these logs, which lie on one disk."""
        return frozenset(sync for log in self.logs_with_copies() if (sync := log.sync_under_way) is not None)

    def of_store(self, store_id: str) -> Resident | None:
        """Where that store lies here."""
        return next((each for each in self.values() if each.local.store_id == store_id), None)
