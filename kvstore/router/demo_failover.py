"""The failover of `kvstore up --demo`.
A node is killed from the page, and what follows is told as it happens.

Owns: what POST /v1/demo/kill does; the writes that go on all the while; the document `failover` among the events.
Promises: all of it is real: the process is ended by SIGKILL, and `kvstore up` starts it again after a stated time; the
writes are ordinary ones, one after the other, to a key of a shard that the node led; at the end the key is read, and
what it holds is compared with what was acknowledged. No node is killed whose shards no copy could take over.
Leaves to others: the kill (`kvstore.demo`, in the launcher), the words (`failover_story`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Annotated

import msgspec

from kvstore.addresses import listen_address
from kvstore.config import DEMO_AWAY_S_MAX, Limits
from kvstore.errors import BadBody, ChangeRefused, Conflict, KvError, NotFound, OutcomeUnknown, Unavailable
from kvstore.model import Preconditions
from kvstore.placement.cluster_map import ClusterMap
from kvstore.protocol import Delete, Get, Put
from kvstore.router.controller_client import Controller
from kvstore.router.failover_story import FailoverStory, Look, Step
from kvstore.router.feed import Feed
from kvstore.router.service import RouterService
from kvstore.transport.http.responses import Response, json_response
from kvstore.transport.http.routes import Call
from kvstore.transport.http.schema import about

log = logging.getLogger(__name__)

AWAY_S_MIN = 5.0
WRITES_MAX = 900

_PREFIX = "demo/failover/"
_NAMES_TRIED = 2000
_BEFORE_S = 1.0  # of writes before the kill
_WRITE_EVERY_S = 0.1
_LOOK_S = 0.1
_DOOR_S = 5.0
_OVER_S = 45.0  # after the node was to come back
_STEPS_MAX = 60


class KillBody(msgspec.Struct, forbid_unknown_fields=True):
    """`away_s`: how long the node stays dead."""

    node: str
    away_s: Annotated[float, about(minimum=AWAY_S_MIN, maximum=DEMO_AWAY_S_MAX)] = 8.0


class DemoFailover:
    """`door`: HOST:PORT/WORD of the launcher."""

    def __init__(self, door: str, service: RouterService, controller: Controller, feed: Feed, limits: Limits) -> None:
        place, _, self._word = door.partition("/")
        self._place = listen_address(place)
        self._service = service
        self._controller = controller
        self._feed = feed
        self._limits = limits
        self._number = 0
        self._playing: asyncio.Task[None] | None = None

    async def kill(self, call: Call) -> Response:
        """Begin. Raises BadBody, NotFound, Conflict while another is shown, ChangeRefused without a copy in sync."""
        body: KillBody = call.body
        if not AWAY_S_MIN <= body.away_s <= DEMO_AWAY_S_MAX:
            raise BadBody(f"`away_s` is {AWAY_S_MIN:g} to {DEMO_AWAY_S_MAX:g}.")
        if self._playing is not None and not self._playing.done():
            raise Conflict("a failover is being shown; wait until it has ended.", retry_after_ms=1000)
        cluster_map = self._service.table.cluster_map
        if cluster_map is None or cluster_map.node(body.node) is None:
            raise NotFound(f"there is no node {body.node[:100]!r}.", title="There is no such node")
        check_successors(cluster_map, body.node)
        self._number += 1
        self._playing = asyncio.create_task(self._run(_Show(self._number, body, self._limits, self._feed)))
        return json_response(202, {"play": self._number})

    async def close(self) -> None:
        """Break off what is shown."""
        if self._playing is not None:
            self._playing.cancel()
            await asyncio.gather(self._playing, return_exceptions=True)

    async def _run(self, show: _Show) -> None:
        writer: Writer | None = None
        writing: asyncio.Task[None] | None = None
        try:
            writer = Writer(self._service, self._key_of(show.node), show)
            writing = asyncio.create_task(writer.run())
            await asyncio.sleep(_BEFORE_S)
            await self._show(show)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            show.end("done", f"{show.summary()} {await writer.check()}")
        except KvError as error:
            show.end("failed", error.detail)
        except Exception:
            log.exception("a failover could not be shown to its end")
            show.end("failed", "the router met an error of its own; its log says more.")
        finally:
            if writing is not None:
                writing.cancel()

    def _key_of(self, node: str) -> str:
        """A key of a shard that the node leads, or has a copy of. Raises Unavailable."""
        cluster_map = self._service.table.cluster_map
        shards = cluster_map.shards if cluster_map is not None else []
        led = [shard.id for shard in shards if shard.primary.node == node]
        wanted = led or [shard.id for shard in shards if node in shard.nodes]
        for number in range(_NAMES_TRIED):
            if self._service.table.owner_of(f"{_PREFIX}{number}").shard_id in wanted[:1]:
                return f"{_PREFIX}{number}"
        raise Unavailable(f"no key was found that node {node} keeps: it may have nothing yet.")

    async def _show(self, show: _Show) -> None:
        """From the kill to its end. Raises Unavailable."""
        assert self._service.table.cluster_map is not None
        before = self._service.table.cluster_map
        check_successors(before, show.node)
        pid = await self._ask_door(show)
        killed_ms = show.now_ms()
        story = FailoverStory(show.node, before, killed_ms, self._limits.lease_s)
        says = f"kill -9 {pid}: the process of node {show.node} is gone. It is started again after {show.away_s:g} s."
        show.begin(story, killed_ms, Step(killed_ms, "killed", says))
        until_s = time.monotonic() + show.away_s + _OVER_S
        while not story.is_over:
            told = await self._controller.moves(copies=True)
            facts = told.get("copies") if told is not None else None
            show.saw(story.look(Look(show.now_ms(), self._service.table.cluster_map, facts)))
            if time.monotonic() > until_s:
                raise Unavailable(f"it has not come to its end within {show.away_s + _OVER_S:g} s: look into the logs.")
            await asyncio.sleep(_LOOK_S)

    async def _ask_door(self, show: _Show) -> int:
        """Have the node killed; the pid that it had. Raises Unavailable."""
        try:
            async with asyncio.timeout(_DOOR_S):
                reader, writer = await asyncio.open_connection(*self._place)
                order = {"word": self._word, "kill": show.node, "away_s": show.away_s}
                writer.write(json.dumps(order).encode() + b"\n")
                told = json.loads(await reader.readline())
                writer.close()
        except (OSError, TimeoutError, ValueError):
            raise Unavailable("the `kvstore up` that runs the nodes does not answer.") from None
        if "pid" not in told:
            raise Unavailable(str(told.get("detail")))
        return int(told["pid"])


def check_successors(cluster_map: ClusterMap, node: str) -> None:
    """Check that every shard that the node leads has a copy in sync elsewhere. Raises ChangeRefused."""
    for shard in cluster_map.shards:
        if shard.primary.node == node and not any(copy.state == "in-sync" for copy in shard.replicas):
            raise ChangeRefused(
                f"shard {shard.id} has no copy in sync beside the one on node {node}, so none could take over.",
                next_step="`kvstore cluster replicas 2` keeps two copies of every key; wait until they are in sync.",
            )


class Writer:
    """Writes 1, 2, 3, … to one key, one after the other, and remembers what was acknowledged."""

    def __init__(self, service: RouterService, key: str, show: _Show) -> None:
        self._service = service
        self._key = key
        self._show = show
        self._tried = self._acknowledged = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self._tried += 1
            began_ms = self._show.now_ms()
            state = await self._write(self._tried)
            if state == "ok":
                self._acknowledged = self._tried
            self._show.wrote(began_ms, state, self._service.table.cluster_map)
            await asyncio.sleep(_WRITE_EVERY_S)

    async def _write(self, number: int) -> str:
        try:
            answer = (await self._service.ask(Put(0, self._key, b"%d" % number, 0, Preconditions()))).answer
        except OutcomeUnknown:
            return "unknown"
        except KvError:
            return "failed"
        return "ok" if answer.problem is None else "failed"

    async def check(self) -> str:
        """What the key holds, compared with what was acknowledged; then it is deleted. Raises KvError."""
        answer = (await self._service.ask(Get(0, self._key))).answer
        held = int(answer.value or b"0")
        await self._service.ask(Delete(0, self._key, Preconditions()))
        if not self._acknowledged <= held <= self._tried:
            return f"The key holds {held}, but {self._acknowledged} was acknowledged: that must never happen."
        return f"The key holds {held}; the last write acknowledged was {self._acknowledged}: nothing was lost."


class _Show:
    """One failover, and its document."""

    def __init__(self, number: int, body: KillBody, limits: Limits, feed: Feed) -> None:
        self.node, self.away_s = body.node, body.away_s
        self._number = number
        self._times = {"lease_s": limits.lease_s, "failover_after_s": limits.failover_after_s}
        self._feed = feed
        self._began_s = time.perf_counter()
        self._state = "running"
        self._says = ""
        self._story: FailoverStory | None = None
        self._killed_ms: float | None = None
        self._is_answered = False
        self._steps: list[Step] = []
        self._writes: list[tuple[float, float, str]] = []

    def now_ms(self) -> float:
        return round((time.perf_counter() - self._began_s) * 1000, 1)

    def begin(self, story: FailoverStory, killed_ms: float, step: Step) -> None:
        self._story, self._killed_ms = story, killed_ms
        self.saw([step])

    def saw(self, steps: list[Step]) -> None:
        self._steps = [*self._steps, *steps][:_STEPS_MAX]
        self._publish()

    def wrote(self, began_ms: float, state: str, cluster_map: ClusterMap | None) -> None:
        """A write that began then has its answer now; the router follows that map."""
        now_ms = self.now_ms()
        if self._story is not None and cluster_map is not None:
            # A promotion is told before the write that it lets in.
            self._steps = [*self._steps, *self._story.look(Look(now_ms, cluster_map, None))][:_STEPS_MAX]
        if len(self._writes) < WRITES_MAX:
            self._writes.append((began_ms, round(now_ms - began_ms, 1), state))
        if state == "ok" and self._killed_ms is not None and began_ms >= self._killed_ms and not self._is_answered:
            self._is_answered = True
            waited_s = (now_ms - self._killed_ms) / 1000
            says = f"The first write that began after the kill is acknowledged, {waited_s:.1f} s after it."
            self._steps = [*self._steps, Step(now_ms, "acknowledged", says)]
        self._publish()

    def summary(self) -> str:
        """In a sentence or two."""
        failed = sum(state == "failed" for _, _, state in self._writes)
        unknown = sum(state == "unknown" for _, _, state in self._writes)
        slowest_s = max((took_ms for _, took_ms, _ in self._writes), default=0.0) / 1000
        said = f"Of {len(self._writes)} writes {failed} failed, and the slowest waited {slowest_s:.1f} s."
        if unknown:
            said += f" Of {unknown} that had left for the dead node the outcome is unknown (504)."
        return said

    def end(self, state: str, says: str) -> None:
        self._state, self._says = state, says
        self._publish()

    def _publish(self) -> None:
        story = self._story
        led = story.led if story is not None else []
        document = {
            "number": self._number,
            "state": self._state,
            "node": self.node,
            "away_s": self.away_s,
            **self._times,
            "now_ms": self.now_ms(),
            "killed_ms": self._killed_ms,
            "led": led,
            "steps": [step._asdict() for step in self._steps],
            "positions": {shard: list(story.positions.get(shard, ())) for shard in led} if story is not None else {},
            "writes": list(self._writes),
            "says": self._says,
        }
        self._feed.offer("failover", document)
