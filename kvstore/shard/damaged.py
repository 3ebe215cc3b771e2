"""A copy whose files are damaged, and what the map says is to become of it.

Owns: finding damage in a copy that is open; what is still known of a damaged one; when it is rebuilt.
Promises: it grants nothing, promises nothing, and no other copy is fed from it. It is rebuilt only by a map by which
another node is the primary and this copy is not in sync: until then its files may be needed, by a person. The
controller has heard of the damage before.
Leaves to others: the files (`folder`), what the map says of them (`followed_map`), the change itself (`resident`), who
takes its place (the controller).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from kvstore.config import Limits
from kvstore.environment import Environment
from kvstore.errors import DataCorrupt, KvError
from kvstore.replication.beats import CopyReport
from kvstore.replication.copy import StoreCopy
from kvstore.shard.followed_map import FollowedMap
from kvstore.shard.hosted import Surroundings
from kvstore.storage.disk import FULL_ERRNOS
from kvstore.storage.engine import Identity
from kvstore.store.copy_place import CopyFiles
from kvstore.store.damaged_files import Salvaged, salvaged_by
from kvstore.store.verification import Verification

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_FULL_RETRY_S = 0.5


@dataclass(frozen=True, slots=True)
class DamagedCopy:
    """`error`: what is wrong, and what a person can do where there is no other copy.

    `told`: set once the controller has heard of it.
    """

    shard_id: str
    error: KvError
    salvaged: Salvaged
    told: asyncio.Event = field(default_factory=asyncio.Event, compare=False)

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


def lost(followed: FollowedMap) -> DamagedCopy:
    """The copy that was here, by the map: what was made in its place was never the cluster's."""
    salvaged = salvaged_by(followed.newest, followed.shard_id, followed.node_id, None)
    assert salvaged is not None
    detail = f"The files of shard {followed.shard_id} that lay on node {followed.node_id} are lost."
    return DamagedCopy(followed.shard_id, DataCorrupt(detail), salvaged)


async def until_damaged(copy: StoreCopy, followed: FollowedMap, environment: Environment, limits: Limits) -> None:
    """Verify the file of a copy in the background, for ever. Raises DataCorrupt with the first damage.

    Not while its primary is silent, or it is to be the primary itself: it may be all that there is, and most of it can
    be read.
    """
    while True:
        engine, is_examined = copy.engine, copy.own_engine.is_examined
        verification = Verification(environment, limits, engine, engine.identity.partitions, is_examined)
        work = environment.spawn(verification.run())
        try:
            while copy.engine is engine:  # a snapshot begins with another one
                if verification.is_examined:
                    copy.own_engine.note_examined()
                is_heard = not followed.is_primary and copy.lease.silent_s < limits.failover_after_s
                if verification.damage and is_heard:
                    raise DataCorrupt(verification.damage)
                await environment.sleep(_LOOK_S)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def rebuild(damaged: DamagedCopy, followed: FollowedMap, around: Surroundings) -> CopyFiles | None:
    """Make an empty copy instead, once the map allows it.

    Returns None if it is dropped, or the disk has no room yet. Raises the damage of a home that no copy replaces.
    """
    while (fate := followed.fate) != "rebuild" or not damaged.told.is_set():
        if followed.is_dropped:
            return None
        if fate == "refuse" and followed.shard_id == followed.node_id:
            raise damaged.error
        if fate == "rebuild":
            await around.environment.wait_for(damaged.told.wait(), _LOOK_S)
        else:
            await followed.wait_for_change(1.0)
    try:
        return await around.folder.rebuild(followed.shard_id, damaged.salvaged, damaged.identity.partitions)
    except OSError as error:
        if error.errno not in FULL_ERRNOS:
            raise
        log.warning("the copy of shard %s cannot be rebuilt yet: %s", followed.shard_id, error)
        await around.environment.sleep(_FULL_RETRY_S)
        return None
