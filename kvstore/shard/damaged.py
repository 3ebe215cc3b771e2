"""A copy whose files are damaged, and what the map says is to become of it.

Owns: what is still known of such a copy; when it may be made anew.
Promises: it grants nothing, promises nothing, and no other copy is fed from it. It is made anew only by a map by which
another node is the primary and this copy is not in sync: until then its files may be needed, by a person.
Leaves to others: the files (`folder`), the change itself (`resident`), who takes its place (the controller).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvstore.errors import KvError
from kvstore.replication.beats import CopyReport
from kvstore.replication.configuration import Configuration
from kvstore.storage.engine import Identity
from kvstore.store.damaged_files import Salvaged

Fate = Literal["wait", "make anew", "refuse"]


class DamagedCopy(NamedTuple):
    """`error`: what is wrong, and what a person can do where there is no other copy."""

    shard_id: str
    error: KvError
    salvaged: Salvaged

    @property
    def identity(self) -> Identity:
        """Of the store that it was a copy of, by the map."""
        found = self.salvaged
        return Identity(found.store_id, found.newest_map.cluster_id, self.shard_id, found.newest_map.partitions)

    def report(self) -> CopyReport:
        """What the controller is told."""
        return CopyReport(
            shard=self.shard_id,
            store_id=self.salvaged.store_id,
            copy_id=self.salvaged.copy_id,
            role="damaged",
            promised=self.salvaged.promised,
            damage=self.error.detail,
        )


def fate(config: Configuration | None, node_id: str) -> Fate:
    """What becomes of a damaged copy on that node by a map that the controller has given.

    `refuse`: it is the primary's, and no copy in sync can take its place.
    """
    if config is None:
        return "wait"
    if config.primary.node == node_id:
        return "wait" if config.in_sync else "refuse"
    here = config.copy_on(node_id)
    return "wait" if here is not None and here.state == "in-sync" else "make anew"
