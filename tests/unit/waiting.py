"""Waiting, in one event loop, for what no process tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

WAIT_S = 60.0


async def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds. Raises TimeoutError after 60 s."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.002)
