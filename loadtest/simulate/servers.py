"""The processes of a simulated cluster, each on a host of its own.
What all of them have, routers, a controller.

Owns: putting the real services together as their processes do, from start to death; what each answers over HTTP.
Promises: what the controller's store has is all of it that outlives its process, and nothing does of a router.
Leaves to others: the machines (`machine`), nodes with their disks (`node`), the services (`kvstore`), what travels
(`session`).
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec

from kvstore.config import ClusterConfig, Limits, ShardConfig
from kvstore.controller.copy_keeper import check_beat
from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.interface import Told
from kvstore.controller.membership import Announcement
from kvstore.controller.parts import Parts, assemble
from kvstore.controller.service import ClusterService, Waiting
from kvstore.controller.shards import ShardClients
from kvstore.errors import KvError
from kvstore.replication.beats import Beat
from kvstore.router.coordinator import Coordinator
from kvstore.router.service import RouterService
from kvstore.transport.map_follower import MapFollower
from kvstore.transport.sessions import HEADER, PARAMETER, ClusterSession
from loadtest.simulate.door import Door
from loadtest.simulate.loop import Process
from loadtest.simulate.machine import PARTITIONS, Found, Machine
from loadtest.simulate.map_store import Register, SimulatedMapStore
from loadtest.simulate.network import End, Network
from loadtest.simulate.session import Channel, Question, SimulatedSession
from loadtest.workloads.calls import Call

CONTROLLER = "http://controller"
_NODES, _BEAT = "/v1/nodes/", "/beat"


class Server(Machine):
    """A machine on the network. `wanted`: its process is started again when it ends."""

    def __init__(self, name: str, network: Network, rng: random.Random, limits: Limits, found: Found) -> None:
        super().__init__(network.host(name), network.loop, rng, limits, found)
        self.network = network
        self.host.accept = self._accept
        self.wanted = True
        self.headers: dict[str, str] = {}  # of all answers of this process

    def _on_death(self) -> None:
        process = self.process
        super()._on_death()
        if process is not None:
            self.network.on_death(self.host, process)

    def session(self, process: Process) -> SimulatedSession:
        return SimulatedSession(self.network, self.rng, self.name, process)

    # --- who comes to the door

    def _accept(self, greeting: Any, end: End) -> None:
        self.spawn(self._welcome(greeting, end))

    async def _welcome(self, greeting: Any, end: End) -> None:
        try:
            if isinstance(greeting, Question):
                await end.send(await self._answered(greeting))
            elif isinstance(greeting, Channel):
                await self.serve_channel(greeting, end)
            else:
                await self.serve_client(end)
        except ConnectionResetError:
            pass
        except Exception as error:
            self.found(error)
        end.close()

    async def _answered(self, question: Question) -> tuple[int, bytes, dict[str, str]]:
        try:
            return *await self.answer(question), self.headers
        except KvError as error:
            return error.status, msgspec.json.encode(error.problem()), self.headers

    async def answer(self, question: Question) -> tuple[int, bytes]:
        """Raises KvError."""
        return 404, b"{}"

    async def serve_channel(self, asked: Channel, end: End) -> None:
        await end.send(b"refused")

    async def serve_client(self, end: End) -> None:
        """One call after the other, until the client leaves."""


class RouterServer(Server):
    """A router."""

    def __init__(self, name: str, network: Network, rng: random.Random, limits: Limits, found: Found) -> None:
        super().__init__(name, network, rng, limits, found)
        self._door: Door | None = None

    async def run(self, process: Process) -> None:
        session = self.session(process)
        cluster = ClusterSession()
        service = RouterService(self.limits, session, self.environment, cluster)  # type: ignore[arg-type]
        self._door = Door(service, Coordinator(service, self.limits, self.environment), self.limits)
        follower = MapFollower(
            session,  # type: ignore[arg-type]
            CONTROLLER,
            self.limits,
            cluster=cluster,
            environment=self.environment,
        )
        await asyncio.gather(follower.follow(0, service.table.follow), service.greet())

    def on_death(self) -> None:
        self._door = None

    async def serve_client(self, end: End) -> None:
        while True:
            call: Call | None = await end.receive()
            if call is None or self._door is None:
                return
            await end.send(await self._door.answer(call))


class ControllerServer(Server):
    """The controller. `register`: what its store keeps. `config`: as of a cluster.yaml."""

    def __init__(
        self, network: Network, rng: random.Random, limits: Limits, found: Found, first: list[str], replicas: int
    ) -> None:
        super().__init__("controller", network, rng, limits, found)
        self.register = Register()
        self.config = ClusterConfig(
            routers=[], controllers=[], shards=[ShardConfig(id=each, listen="127.0.0.1:0") for each in first],
            partitions=PARTITIONS, limits=limits, replicas=replicas,
        )  # fmt: skip
        self.parts: Parts | None = None

    async def run(self, process: Process) -> None:
        store = SimulatedMapStore(self.register, self.rng)
        document = ClusterDocument(store, self.limits.map_write_tries_max)
        cluster = ClusterSession(self.environment.random_hex(8))
        self.headers = {HEADER: cluster.id}
        shards = ShardClients(self.limits, self.session(process), cluster)  # type: ignore[arg-type]
        parts = assemble(document, self.config, shards, cluster.id, self.environment)
        self.parts = parts
        await asyncio.gather(*parts.works(), parts.service.watch_if_behind())

    def on_death(self) -> None:
        self.parts = None

    async def answer(self, question: Question) -> tuple[int, bytes]:
        if self.parts is None:
            return 503, b"{}"
        service, keeper = self.parts.service, self.parts.keeper
        if question.path == "/healthz":
            return 200, b"{}"
        if question.path == "/v1/map":
            return await self._map(service, question.query)
        if question.path == "/v1/members":
            announcement = msgspec.json.decode(question.body, type=Announcement)
            found = await service.announce(announcement)
            if isinstance(found, Waiting):
                return 202, msgspec.json.encode({"waiting_for": found.waiting_for})
            return 200, msgspec.json.encode(found)
        if question.path == "/v1/told":
            told = msgspec.json.decode(question.body)
            given = Told(told["number"], told["version"])
            kept = await service.tell(told["store_id"], given, told.get("copy_id", ""))
            return 200, msgspec.json.encode(kept._asdict())
        if question.path.startswith(_NODES) and question.path.endswith(_BEAT):
            beat = msgspec.json.decode(question.body, type=Beat)
            check_beat(question.path.removeprefix(_NODES).removesuffix(_BEAT), beat)
            return 200, msgspec.json.encode(await keeper.beat(beat))
        return 404, b"{}"

    async def _map(self, service: ClusterService, query: dict[str, str]) -> tuple[int, bytes]:
        epoch = int(query["after"])
        if cluster_id := query.get("cluster"):
            service.hear(cluster_id, epoch)
            service.on_clock(int(query.get("clock", "0")))
        if query.get(PARAMETER, self.headers[HEADER]) != self.headers[HEADER]:
            return 204, b""
        try:
            async with asyncio.timeout(self.limits.map_poll_s):
                return 200, msgspec.json.encode(await service.map_after(epoch))
        except TimeoutError:
            return 204, b""
