"""What the parts of one store share: its environment, its disk, and its tables in memory.

Owns: nothing but the bundle; each table has a module of its own.
Promises: all of it belongs to one store and is used in its event loop's thread only.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, Protocol

from kvstore.config import Limits
from kvstore.environment import Environment
from kvstore.metrics import ShardStats
from kvstore.storage.engine import Engine
from kvstore.storage.log import Log
from kvstore.storage.rows import Clock
from kvstore.store.batch import Locks
from kvstore.store.cache import Cache
from kvstore.store.decision_table import DecisionTable
from kvstore.store.memtable import Memtable
from kvstore.store.ready import Ready
from kvstore.transactions.intents import Holds


class OnFatal(Protocol):
    """Ends the process: what happened leaves it unknown what is durable."""

    def __call__(self, error: BaseException, /) -> NoReturn: ...


class Served(NamedTuple):
    """The partitions that the store serves.

    `generations`: for each partition the number of its arrival in this store, 0 while it is not served. A partition
    that leaves and comes back has another number, so "the same generation" means that no other store had it in between.
    `frozen`: those that are owned, but not served until a newer map says who is to have them.
    """

    generations: list[int]
    epoch: int = 0
    frozen: Set[int] = frozenset()


@dataclass
class Tables:
    """`clock` and `executed` are as of the newest decided batch, `visible` and `served` as of the newest visible one."""

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
    memtable: Memtable = field(default_factory=Memtable)
    holds: Holds = field(default_factory=Holds)
    ready: Ready = field(default_factory=Ready)
    stats: ShardStats = field(default_factory=ShardStats)
