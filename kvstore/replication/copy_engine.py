"""A copy's file: the engine that is there now, and whether it was found to be whole.

Owns: the engine, and its turn, which is held by whatever changes it.
Promises: nothing is written into a file that was not examined.
Leaves to others: what is applied, and when (`copy_applier`), rows of a snapshot (`copy_filling`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from kvstore.errors import DataCorrupt
from kvstore.storage.engine import Applied, Engine


class CopyEngine:
    """`engine`: a snapshot begins with another one."""

    def __init__(self, engine: Engine, renew: Callable[[], Awaitable[Engine]], *, is_examined: bool) -> None:
        """`renew`: makes an empty engine in the place of a closed one. `is_examined`: found to be whole before."""
        self.engine = engine
        self.turn = asyncio.Lock()
        self._renew = renew
        self._examined = engine if is_examined else None  # that was found to be whole

    @property
    def applied(self) -> Applied:
        """What the file stands for."""
        return self.engine.applied

    @property
    def is_examined(self) -> bool:
        """Whether the file was found to be whole, so that more may be written into it."""
        return self._examined is self.engine

    def note_examined(self) -> None:
        """The file was found to be whole."""
        self._examined = self.engine

    async def examine(self) -> None:
        """Once, before anything is applied, or others are taken out for what this copy has.

        Raises DataCorrupt: what is written into a damaged file damages more.
        """
        engine = self.engine
        if self._examined is engine:
            return
        if wrong := (await engine.verify(None)).faults:
            raise DataCorrupt(f"The file of this copy is damaged ({wrong[0].detail}).")
        self._examined = engine

    async def renew(self) -> None:
        """Put an empty engine in the place of this one; only with the turn. Raises OSError."""
        await self.engine.close()
        self.engine = self._examined = await self._renew()
