"""What lies of a shard's store on a node, and what is known from it.

Owns: what has the files now: a store that is served, a copy, or neither because they are damaged.
Promises: every question is answered in each of these states, and while the files change hands.
Leaves to others: when they change hands (`resident`), the files themselves (`store.copy_place`, `hosted`, `damaged`).
"""

from __future__ import annotations

import logging

from kvstore.placement.cluster_map import ClusterMap, newest_of
from kvstore.replication.beats import CopyReport
from kvstore.replication.copy import StoreCopy
from kvstore.replication.promise import Identity as CopyIdentity
from kvstore.shard.damaged import DamagedCopy
from kvstore.shard.followed_map import FollowedMap
from kvstore.shard.hosted import HostedStore
from kvstore.storage.engine import Identity
from kvstore.storage.log import Log
from kvstore.store.copy_place import CopyFiles
from kvstore.store.damaged_files import Salvaged, salvaged_by
from kvstore.store.store import Store

log = logging.getLogger(__name__)


class LocalStore:
    """`hosted`: served, or about to be. `files`: a copy's. None has them while they change hands.

    `hands_over`: the copy's files are about to be another's, and no session may use them.
    """

    def __init__(self, shard_id: str) -> None:
        self.shard_id = shard_id
        self.hosted: HostedStore | None = None
        self.files: CopyFiles | None = None
        self.damaged: DamagedCopy | None = None
        self.hands_over = False
        self._store_id = ""

    def take_hosted(self) -> HostedStore:
        """What was served, whose files change hands now. The id of its store stays known."""
        assert self.hosted is not None
        hosted, self.hosted = self.hosted, None
        self._store_id = hosted.store.identity.store_id
        return hosted

    def note_damaged(self, damaged: DamagedCopy) -> None:
        """The files are not used any more. What has them open is closed after this."""
        self.damaged = damaged
        log.error("the copy of shard %s here is damaged, and is not used any more: %s", self.shard_id, self.damage)

    def controller_heard(self, report: CopyReport | None, *, decides: bool) -> None:
        """The controller has taken a beat with that report of what lies here. `decides`: it may change the map."""
        if self.hosted is not None:
            self.hosted.controller_heard(decides=decides)
        if self.damaged is not None and report == self.damaged.report():
            self.damaged.told.set()

    def note_rebuilt(self, files: CopyFiles) -> None:
        """An empty copy has taken the place of the damaged one."""
        self.files, self.damaged = files, None
        log.warning("the copy of shard %s is rebuilt, and will be filled by its primary", self.shard_id)

    @property
    def store(self) -> Store | None:
        """As long as it is served, or about to be."""
        return self.hosted.store if self.hosted is not None else None

    @property
    def copy(self) -> StoreCopy | None:
        """As long as it is no primary, nor about to be: a session must not change such a store."""
        return self.files.copy if self.files is not None and not self.hands_over else None

    @property
    def identity(self) -> Identity | None:
        """Of the store whose rows are here; None while the files change hands."""
        if self.hosted is not None:
            return self.hosted.store.identity
        if self.damaged is not None:
            return self.damaged.identity
        return self.files.copy.engine.identity if self.files is not None else None

    @property
    def is_settled(self) -> bool:
        """Whether no write that came is executed and not answered. What is closed now may still answer."""
        return self.hosted.is_settled if self.hosted is not None else self.identity is not None

    @property
    def store_id(self) -> str:
        """Of the store that lies here, also while its files change hands between primary and copy."""
        identity = self.identity
        return identity.store_id if identity is not None else self._store_id

    @property
    def copy_id(self) -> str:
        """Empty while the files change hands, and where it is lost."""
        if self.hosted is not None:
            return self.hosted.store.copy_id
        if self.damaged is not None:
            return self.damaged.salvaged.copy_id
        return self.files.copy.identity.copy_id if self.files is not None else ""

    @property
    def damage(self) -> str:
        """What is wrong with the files here; empty if nothing is known to be."""
        return self.damaged.error.detail if self.damaged is not None else ""

    @property
    def logged_map(self) -> ClusterMap | None:
        """The newest in its files."""
        if self.hosted is not None:
            return self.hosted.store.cluster_map
        if self.damaged is not None:
            return self.damaged.salvaged.newest_map
        return self.files.newest_map if self.files is not None else None

    @property
    def clock(self) -> int:
        """The highest version that the store has given or seen, as far as its file says."""
        if self.hosted is not None:
            return self.hosted.store.clock.version
        return self.files.copy.engine.applied.clock.version if self.files is not None else 0

    @property
    def log_with_copies(self) -> Log | None:
        """The log, if the store lies on other nodes, too."""
        files = self.files  # another thread may ask
        if (hosted := self.hosted) is None:
            return files.copy.log if files is not None else None
        sender = hosted.store.tables.sender
        return hosted.store.tables.log if sender is not None and sender.shipping.links else None

    def salvaged(self, followed: FollowedMap) -> Salvaged | None:
        """What would be known if the files were found to be damaged.
        None if the newest map here does not tell, or the files change hands."""
        identity = self.identity
        if identity is None:
            return None
        newest = newest_of([followed.newest, self.logged_map])
        promised = self.files.copy.identity.promised if self.files is not None else followed.term
        here = CopyIdentity(identity.store_id, self.copy_id, promised)
        return salvaged_by(newest, followed.shard_id, followed.node_id, here)
