"""What the parts of one store share: its environment, its disk, and its tables in memory.

Owns: nothing but the bundle; each table has a module of its own.
Promises: all of it belongs to one store and is used in its event loop's thread only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from kvstore.config import Limits
from kvstore.environment import Environment
from kvstore.metrics import ShardStats
from kvstore.replication.sender import Sender
from kvstore.storage.engine import Engine
from kvstore.storage.log import Log
from kvstore.storage.rows import Clock
from kvstore.store.cache import Cache
from kvstore.store.decision_table import DecisionTable
from kvstore.store.memtable import Memtable
from kvstore.store.ops import Locks
from kvstore.store.ready import Ready
from kvstore.store.served import Served
from kvstore.store.verification import Verification
from kvstore.transactions.intents import PreparedTxns
from kvstore.transactions.openings import Openings


class OnFatal(Protocol):
    """Ends the process: what happened leaves it unknown what is durable."""

    def __call__(self, error: BaseException, /) -> NoReturn: ...


@dataclass
class Tables:
    """`clock`, `executed`: as of the newest decided batch; `visible`, `served`: of the newest visible one.

    `term`: of the records that are appended. `sender`: ships them to copies; None as long as no map has named one.
    `is_sealed`: no more operations are taken, because another node is to take over, or the process is about to end.
    `file_full`: the file could not take what was to be applied to it, the last time that this was tried.
    """

    environment: Environment
    limits: Limits
    engine: Engine
    log: Log
    locks: Locks
    cache: Cache
    decisions: DecisionTable
    clock: Clock
    visible: Clock
    executed: Served
    served: Served
    ready: Ready
    verification: Verification
    openings: Openings = field(default_factory=Openings)
    memtable: Memtable = field(default_factory=Memtable)
    holds: PreparedTxns = field(default_factory=PreparedTxns)
    stats: ShardStats = field(default_factory=ShardStats)
    term: int = 0
    sender: Sender | None = None
    is_sealed: bool = False
    file_full: bool = False

    def may_answer(self) -> bool:
        """Whether what no record carries may be answered now; to be asked behind the look at it, without an await
        between.
        """
        return self.sender is None or self.sender.may_answer()

    def takes_writes(self) -> bool:
        """Whether operations are taken in: in a term that goes on."""
        return not self.is_sealed and (self.sender is None or self.sender.serves)
