"""Following the cluster map: a shard or router asks the controller, by long poll, for one newer than its own.

Owns: the calls of the controller's HTTP interface that its followers make, and their endless, bounded repetition.
Promises: while the controller is away the last map stays in force; nothing is raised for it, and one line is logged
when it goes and one when it is back. One that has not answered yet since this process began is being started beside
it, as a rule: that is said only when it takes long. When the controller's process is another one, the shard announces
itself again at once, and until then all goes on with the last addresses.
Leaves to others: what a new map means to its follower.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from kvstore.config import Limits
from kvstore.environment import SYSTEM, Environment
from kvstore.errors import ControllerBehind, ForeignData, from_problem
from kvstore.placement.cluster_map import ClusterMap
from kvstore.placement.map_format import decode_map
from kvstore.transport.sessions import EARLIER_HEADER, HEADER, PARAMETER, ClusterSession
from kvstore.transport.versions import refused_by

log = logging.getLogger(__name__)

_START_PATIENCE_S = 5.0
_ASK_TIMEOUT_S = 1.0


class MapFollower:
    """`start_patience_s`: for so long a controller that has not answered yet is not worth a line.

    `cluster`: the session that the controller's answers say, for all channels of this process.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        controller_url: str,
        limits: Limits,
        *,
        start_patience_s: float = _START_PATIENCE_S,
        environment: Environment = SYSTEM,
        cluster: ClusterSession | None = None,
    ) -> None:
        self._clock_s = environment.monotonic_s
        self._session = session
        self._cluster = cluster or ClusterSession()
        self._url = controller_url.rstrip("/")
        self._limits = limits
        self._timeout = aiohttp.ClientTimeout(total=limits.map_poll_s + 5.0)
        self._away = False
        self._answered = False
        self._refused = ""
        self._began_s = self._clock_s()
        self._start_patience_s = start_patience_s
        self._announced: dict[str, Any] | None = None
        self._announced_in = ""

    async def announce(
        self,
        shard_id: str,
        url: str,
        store_id: str,
        cluster_id: str | None,
        weight: int,
        *,
        join: bool = False,
        partitions: int | None = None,
        epoch: int = 0,
        clock: int = 0,
        copy_id: str = "",
        host: str = "",
        zone: str = "",
    ) -> None:
        """Tell the controller that this shard is there, until it has heard it. Raises ForeignData (the `problem`) if it
        is refused.

        `join`: make it a member, with this weight, if it is none. `partitions`: of how many its file is. `epoch`: of
        the map that it follows; `clock`: the highest version that it has given or seen. `copy_id`: of its copy of the
        store. `host`, `zone`: of the node, empty if they are not named.
        """
        body: dict[str, Any] = {
            "id": shard_id,
            "url": url,
            "store_id": store_id,
            "cluster_id": cluster_id,
            "weight": weight,
            "copy_id": copy_id,
        }
        body |= {name: value for name, value in (("host", host), ("zone", zone)) if value}
        if join:
            body["join"] = True
        if partitions is not None:
            body["partitions"] = partitions
        if epoch:
            body |= {"epoch": epoch, "clock": clock}
        self._announced = body
        while True:
            try:
                async with self._session.post(f"{self._url}/v1/members", json=body, timeout=self._timeout) as answer:
                    self._cluster.enter(answer.headers.get(HEADER))
                    if answer.status in (200, 202):
                        self._announced_in = self._cluster.id
                        self._note(None)
                        return
                    problem = from_problem(await answer.json(content_type=None))
                    if isinstance(problem, ForeignData):
                        raise problem
                    if (refused := refused_by(self._url, answer.headers)) is not None:
                        self._refuse(f"the controller refuses this node: {refused.sentences}")
                    else:
                        self._note(problem)
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self._note(error)
            await self._wait()

    async def follow(
        self,
        epoch: int,
        on_map: Callable[[ClusterMap], None],
        cluster_id: str | None = None,
        clock: Callable[[], int] | None = None,
    ) -> None:
        """Call `on_map` with each map whose epoch is above the last one's, for ever; `cluster_id`: whose.

        `clock`: the highest version that this store has given or seen, to be told along.
        """
        while True:
            try:
                if self._announced is not None and self._announced_in != self._cluster.id:
                    await self._announce_again(cluster_id, epoch)
                query = {"after": str(epoch), **({"cluster": cluster_id} if cluster_id else {})}
                if self._cluster.id:
                    query[PARAMETER] = self._cluster.id  # answered at once if it is another one
                if clock is not None:
                    query["clock"] = str(clock())
                async with self._session.get(f"{self._url}/v1/map", params=query, timeout=self._timeout) as answer:
                    body = await answer.read()
                    self._cluster.enter(answer.headers.get(HEADER))
                    if answer.status == 200:
                        cluster_map = decode_map(body)
                        epoch, cluster_id = cluster_map.epoch, cluster_map.cluster_id
                        on_map(cluster_map)
                    if answer.status in (200, 204):
                        self._note(None)
                        continue
                    problem = from_problem(msgspec.json.decode(body))
                    self._note(problem)
                    if isinstance(problem, ControllerBehind) and cluster_id:
                        await self._announce_again(cluster_id, epoch)
            except ForeignData as error:
                self._refuse(f"{error.detail} The last map stays in force.")
            except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, UnicodeDecodeError) as error:
                self._note(error)
            await self._wait()

    def _refuse(self, why: str) -> None:
        """Controller and this process are of versions that do not understand each other: say so once."""
        if why != self._refused:
            self._refused = why
            log.error("%s", why)

    async def _announce_again(self, cluster_id: str | None, epoch: int) -> None:
        """Once, as what it is by now.
        A controller that has just started, or lost its file, does not know it yet."""
        if self._announced is not None:
            self._announced |= {"cluster_id": cluster_id, "epoch": epoch}
            url, body = f"{self._url}/v1/members", self._announced
            async with self._session.post(url, json=body, timeout=self._timeout) as answer:
                self._cluster.enter(answer.headers.get(HEADER))
                self._announced_in = self._cluster.id

    async def ask_session(self) -> bool:
        """Have the session be the one that the controller is in now, with the earlier ones known.

        Returns whether it answered in a second.
        """
        timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
        try:
            async with self._session.get(f"{self._url}/healthz", timeout=timeout) as answer:
                self._cluster.enter(answer.headers.get(HEADER), answer.headers.get(EARLIER_HEADER, ""))
                return HEADER in answer.headers
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _wait(self) -> None:
        await asyncio.sleep(self._limits.reconnect_wait_s_max / 5)

    def _note(self, error: Exception | None) -> None:
        if error is None:
            if self._away:
                log.warning("the controller at %s is back", self._url)
            self._away, self._answered = False, True
        elif not self._away and (self._answered or self._clock_s() >= self._began_s + self._start_patience_s):
            self._away = True
            then = "going on with the last map" if self._answered else "waiting for its first answer"
            why = "no answer in time" if isinstance(error, TimeoutError) else error  # whose own text is empty
            log.warning("the controller at %s is away (%s): %s", self._url, why, then)
