"""What recovery sees of a store: attempts that are not brought to their end yet.

Owns: which attempts and decisions are old enough to be asked about; owned and unfrozen partitions only.
Promises: looks only.
Leaves to others: asking and finishing (`shard.recovery`), the tables (`transactions.intents`, `decision_table`).
"""

from __future__ import annotations

from kvstore.errors import DataCorrupt
from kvstore.model import Attempt
from kvstore.placement.ring import partition_of
from kvstore.storage.rows import DECISION
from kvstore.store.reads import is_old
from kvstore.store.tables import Tables
from kvstore.transactions.decisions import Decision, decode_decision
from kvstore.transactions.intents import PreparedTxn


class Undecided:
    """Looks at the attempts and decisions of one store."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def old_holds(self) -> list[PreparedTxn]:
        """Attempts whose intents are too old: their anchors' owners must be asked what became of them."""
        tables = self._tables
        return [hold for hold in tables.holds.all() if is_old(hold, tables) and self.owned_keys(hold)]

    def owned_keys(self, hold: PreparedTxn) -> list[str]:
        """The attempt's keys here whose partition is served."""
        generations = self._tables.served.generations
        return [key for key in list(hold.intents) if generations[partition_of(key.encode(), len(generations))]]

    def acknowledge(self, attempts: list[Attempt]) -> None:
        """The routers say that these are finished everywhere."""
        self._tables.decisions.acknowledge(attempts)

    def old_decisions(self, finished_max: int) -> tuple[list[Attempt], list[Attempt]]:
        """Of served partitions: see `DecisionTable.old`."""
        return self._tables.decisions.old(self._tables.served.generations, finished_max)

    async def decision(self, attempt: Attempt) -> Decision | None:
        """What was decided about the attempt, anchored here, while it is kept. Raises DataCorrupt."""
        row = self._tables.memtable.visible((DECISION, attempt.name))
        if row is None:
            (found,) = await self._tables.engine.read([(DECISION, attempt.name)])
            if isinstance(found, DataCorrupt):
                raise found
            row = found
        return decode_decision(row.body) if row is not None and row.body is not None else None
