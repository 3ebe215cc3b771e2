"""Telling the controller how far the log has come, and hearing whether it had come further before.

Owns: when the number of the last durable record is told: at the opening, then at most every `told_every_s`, and at an
orderly stop.
Promises: a store opened unverified follows no newer map before the controller has confirmed its number, and a move is
told done only when the controller has the number of its last record: so no older copy of the files can come to own
what it never received. A store that has told of more than it has now (an older copy of its files, or a lost log) does
not serve: it is refused at the opening or, if the controller could not be asked then, as soon as it can. Where a
person has accepted that, its versions go on above all that it gave.
Leaves to others: what is kept (the controller), what the log itself proves (`storage.recovery`), the opening of a store
that has copies, but for its question (`term_opening`).

The controller is no part of any write: while it is away, a store without copies opens after `told_timeout_s` and
serves, unverified. One that has copies waits: it needs the controller for its term, too.
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp

from kvstore import failpoints
from kvstore.config import Limits
from kvstore.environment import Environment
from kvstore.errors import StoreBehind
from kvstore.said_once import SaidOnce
from kvstore.storage.engine import TryLater
from kvstore.store.opening import ToldBefore
from kvstore.store.store import Store

log = logging.getLogger(__name__)


class ToldNumbers:
    """`is_verified`: the controller has confirmed that this store has told of no more than it has."""

    def __init__(self, session: aiohttp.ClientSession, controller_url: str, limits: Limits) -> None:
        self._session = session
        self._url = f"{controller_url.rstrip('/')}/v1/told"
        self._limits = limits
        self._told = 0
        self.is_verified = False

    async def at_opening(self, store_id: str) -> ToldBefore:
        """What the store has told; zeros if the controller cannot be asked in time."""
        loop, pause_s = asyncio.get_running_loop(), self._limits.told_timeout_s / 10
        ends_at = loop.time() + self._limits.told_timeout_s
        while (left_s := ends_at - loop.time()) > 0:
            told = await self._tell(store_id, 0, 0, left_s)
            if told is not None:
                self.is_verified = True
                return told
            await asyncio.sleep(pause_s)
        log.warning("the controller cannot be asked how far this store had come: it serves unverified")
        return ToldBefore()

    async def ask(self, store_id: str) -> ToldBefore | None:
        """What the store has told; None if the controller does not answer in time."""
        return await self._tell(store_id, 0, 0, self._limits.told_timeout_s)

    async def run(self, store: Store) -> None:
        """Tell for ever. Raises StoreBehind."""
        while True:
            await self.tell(store)
            await asyncio.sleep(self._limits.told_every_s if self.is_verified else self._limits.told_timeout_s)

    async def tell(self, store: Store) -> None:
        """Tell what is durable now, if it is news. Raises StoreBehind."""
        number = store.durable
        if self.is_verified and number == self._told:
            return
        told = await self._tell(
            store.identity.store_id, number, store.clock.version, self._limits.told_timeout_s, store.copy_id
        )
        if told is None:
            return  # also where another copy is the primary by now: the map that says so is on its way
        if told.number > store.durable:
            if not store.tables.may_answer():
                return  # another node has told it since, it seems, and nothing is answered here until a map says more
            raise behind(store.durable, told.number)
        if told.clock_floor > store.clock.version:  # the controller was away at the opening of an accepted older copy
            await store.pipeline.step(lambda batch: batch.changes.see(told.clock_floor), urgent=True)
            await self.tell(store)  # what was told with a version below that floor has not been kept
            return
        self.is_verified, self._told = True, number

    async def confirm(self, store: Store) -> None:
        """Return when the controller has the number of all that is durable now. Raises StoreBehind, TryLater."""
        number = store.durable
        await self.tell(store)
        if not self.is_verified or self._told < number:
            raise TryLater("the controller does not take the number of the log's last record.", retry_after_ms=1000)

    async def _tell(
        self, store_id: str, number: int, version: int, timeout_s: float, copy_id: str = ""
    ) -> ToldBefore | None:
        """The highest that the store has told; None if the controller does not answer in that time, or refuses it."""
        body = {"store_id": store_id, "number": number, "version": version, "copy_id": copy_id}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.post(self._url, json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    return None
                told = await answer.json(content_type=None)
                return ToldBefore(int(told["number"]), int(told.get("clock_floor", 0)))
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
            return None


class ToldOfTerm:
    """Whether the controller confirms that the log with which a term is opened has all that was told.

    `is_confirmed`: it has. `clock_floor`: above that version the store goes on then.
    """

    def __init__(self, numbers: ToldNumbers, shard: str, limits: Limits, environment: Environment) -> None:
        self.is_confirmed = False
        self.clock_floor = 0
        self._numbers = numbers
        self._shard = shard
        self._timeout_s = limits.told_timeout_s
        self._environment = environment
        self._waits = SaidOnce()

    async def is_below(self, store_id: str, number: int) -> bool:
        """Whether the log, whose last record that is, ends below what was told; then after a while.

        False if it is confirmed, and if the controller does not answer: then it is to be asked again.
        """
        told = await self._numbers.ask(store_id)
        if told is None:
            if self._waits.is_news("away"):
                log.warning("shard %s waits: the controller cannot be asked how far it had come", self._shard)
            await self._environment.sleep(self._timeout_s / 10)
            return False
        if told.number <= number or failpoints.planted("told-not-compared"):
            self.is_confirmed, self.clock_floor = True, told.clock_floor
            return False
        if self._waits.is_news(why := behind(number, told.number).detail):
            log.error(
                "shard %s is not opened. %s Start the node with the newer files, or put them back; if they are lost, "
                "`kvstore shard accept-old %s` goes on with what is here",
                self._shard, why, self._shard,
            )  # fmt: skip
        await self._environment.sleep(self._timeout_s)
        return True


def behind(number: int, told: int) -> StoreBehind:
    """Why a store must not serve."""
    return StoreBehind(
        f"The store ends with record {number}, and it has told the controller that record {told} was durable.",
        number=number,
        told=told,
    )
