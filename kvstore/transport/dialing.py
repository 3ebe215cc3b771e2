"""Reaching a node: when its address is tried again, which store the hello names, what is said of an outage.

Owns: the pauses between tries, the WebSocket's hello.
Promises: the pause grows up to `reconnect_wait_s_max`, by so little that a node is found a fifth of its outage after
the end of it at the latest; news of the node ends it at once. An outage is said once for each reason, and once when it
is over; one that is short is not said at all.
Leaves to others: what goes over the connection (`link`), who belongs to which session (`sessions`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Sequence

import aiohttp

from kvstore.config import Limits
from kvstore.said_once import SaidOnce
from kvstore.transport.sessions import ADOPT, IS_STRANGER, PARAMETER, ClusterSession
from kvstore.transport.under_way import Addressee
from kvstore.transport.versions import refused_by

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.01
_PAUSE_GROWTH = 1.25  # of 5 s of outage, 20 tries
_OUTAGE_TOLD_S = 5.0  # of a shard, in the log; shorter ones belong to every restart


class Dialer:
    """Tries to reach the node at that address, and says which store is asked for."""

    def __init__(self, url: str, limits: Limits, session: aiohttp.ClientSession, cluster: ClusterSession) -> None:
        self._url = url
        self._limits = limits
        self._session = session
        self._cluster = cluster
        self._failures = 0  # in a row
        self._pause_s = _FIRST_PAUSE_S
        self._news = asyncio.Event()

    def hurry(self) -> None:
        """There is news of the node: try again at once."""
        self._news.set()

    def hello_for(self, channels: Sequence[Addressee]) -> Addressee:
        """The one whose store the next hello names: the newest first, and another one after each failure.

        A node refuses a hello for a store that it has not, such as that of a shard which was at this address before it
        left.
        """
        return channels[-1 - self._failures % len(channels)]

    async def connect(self, named: Addressee) -> aiohttp.ClientWebSocketResponse:
        """Open a channel that is for the store of `named` first. Raises aiohttp.ClientError, OSError, TimeoutError."""
        self._news.clear()
        async with asyncio.timeout(self._limits.request_timeout_s):
            socket = await self._session.ws_connect(
                f"{self._url}/channel?shard={named.shard_id}&store={named.store_id}&{PARAMETER}={self._cluster.id}",
                max_msg_size=self._limits.frame_read_bytes_max,
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=1.0),
            )
        self._failures, self._pause_s = 0, _FIRST_PAUSE_S
        return socket

    async def pause(self) -> None:
        """Wait before the next try: after one that failed, or a connection that has ended."""
        self._failures += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pause_s):
                await self._news.wait()
                self._failures, self._pause_s = 0, _FIRST_PAUSE_S
                return
        self._pause_s = min(self._pause_s * _PAUSE_GROWTH, self._limits.reconnect_wait_s_max)


class Outage:
    """Log lines on a shard that cannot be reached.
    One says that and why, another one that it can be reached again; none comes at every try."""

    def __init__(self, shard_id: str, url: str) -> None:
        self._shard_id = shard_id
        self._url = url
        self._began_s: float | None = None
        self._said = SaidOnce()

    def goes_on(self, error: Exception, now_s: float) -> None:
        """A try has failed by that error."""
        self._began_s = now_s if self._began_s is None else self._began_s
        if getattr(error, "status", None) == IS_STRANGER:
            if self._said.is_news("it belongs to another cluster"):
                log.error(
                    "shard %s at %s belongs to another cluster with the same ids, and is left alone: one of the two "
                    "runs on a copy of a data directory; %s",
                    self._shard_id, self._url, ADOPT,
                )  # fmt: skip
            return
        if (refused := refused_by(self._url, getattr(error, "headers", None))) is not None:
            if self._said.is_news(refused.detail):
                log.error("shard %s cannot be asked: %s", self._shard_id, refused.sentences)
            return
        reason = str(error) or type(error).__name__
        is_own_fault = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
        if (is_own_fault or now_s - self._began_s >= _OUTAGE_TOLD_S) and self._said.is_news(reason):
            mend = "; raise the limit of open files (ulimit -Hn, LimitNOFILE=)" if is_own_fault else ""
            log.warning("shard %s at %s cannot be reached: %s%s", self._shard_id, self._url, reason, mend)

    def is_over(self) -> None:
        """It is connected."""
        if self._said.reason:
            log.info("shard %s at %s is reached again", self._shard_id, self._url)
        self._began_s, self._said = None, SaidOnce()
