"""A copy whose files are damaged, and what the map says is to become of it.

Owns: finding damage in a copy that is open; what is still known of a damaged one; when it may be rebuilt.
Promises: it grants nothing, promises nothing, and no other copy is fed from it. It is rebuilt only by a map by which
another node is the primary and this copy is not in sync: until then its files may be needed, by a person.
Leaves to others: the files (`folder`), the change itself (`resident`), who takes its place (the controller).
"""

from __future__ import annotations

import asyncio
from typing import Literal, NamedTuple

from kvstore.config import Limits
from kvstore.environment import Environment
from kvstore.errors import DataCorrupt, KvError
from kvstore.replication.beats import CopyReport
from kvstore.replication.configuration import Configuration
from kvstore.replication.copy import StoreCopy
from kvstore.storage.engine import Identity
from kvstore.store.damaged_files import Salvaged
from kvstore.store.verification import Verification

_LOOK_S = 0.5

Fate = Literal["wait", "rebuild", "refuse"]


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
    return "wait" if here is not None and here.state == "in-sync" else "rebuild"


async def until_damaged(copy: StoreCopy, environment: Environment, limits: Limits) -> None:
    """Verify the file of a copy in the background, for ever. Raises DataCorrupt with the first damage.

    Not while its primary is silent: the copy may be all that there is, and most of it can be read.
    """
    while True:
        engine = copy.engine
        verification = Verification(environment, limits, engine, engine.identity.partitions, copy.is_examined)
        work = environment.spawn(verification.run())
        try:
            while copy.engine is engine:  # a snapshot begins with another one
                if verification.is_examined:
                    copy.note_examined()
                if verification.damage and copy.silent_s < limits.failover_after_s:
                    raise DataCorrupt(verification.damage)
                await environment.sleep(_LOOK_S)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
