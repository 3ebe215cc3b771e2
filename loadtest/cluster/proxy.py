"""All links of a cluster: a TCP proxy in this process, through which every one of its connections goes.

Owns: making something wrong with a link (cut, stalled, slow, lossy, repeating) and ending it, listening for children,
and the addresses at which clients reach routers.
Promises: without a fault bytes pass as they come. A fault is of one direction between two processes, by their names,
and holds for the connections that there are and for those to come, whichever side opened them; `heal` ends it.
Leaves to others: connections (`connections`) and their bytes (`proxied`), finding requests to repeat (`duplicates`),
making processes connect through here (`child`), which fault comes when (`schedule`).

A link is closed while one of its directions is cut or stalled: a new connection then hangs, as a TCP handshake does,
until the link is healed or the client gives up. A destination that refuses the connection refuses it
here, too: the greeting of a child is answered only when its destination has accepted.

    child ──"shard-s1 127.0.0.1:9102\\n"──> proxy ──connect──> 127.0.0.1:9102
          <─────────── "+" ──────────────        <─accepted──
          <═══════════════ bytes, both ways, as the faults let them ═════>
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from loadtest.cluster.connections import Connections
from loadtest.cluster.duplicates import CLIENTS, Duplicates, RequestFinder
from loadtest.cluster.faults import Faults, Route
from loadtest.cluster.proxied import Counts, End

__all__ = ["CLIENTS", "CONNECTED", "Proxy"]

CONNECTED = b"+"

_GREETING_BYTES_MAX = 256
_BACKLOG = 1024


class Proxy:
    """`faults`: their names are kept up to date by the runner; `counts`: what has been done."""

    def __init__(self, seed: int = 0) -> None:
        self.faults = Faults()
        self.counts = Counts()
        random = Random(f"links {seed}")
        self.connections = Connections(self.faults, self.counts, random)
        self._greeters: set[asyncio.BaseTransport] = set()
        self._servers: list[asyncio.Server] = []
        self._address = ""
        self._duplicates = Duplicates(self.faults, self.counts, random)

    # --- the proxy ---------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """ "HOST:PORT", for children. Raises RuntimeError before `start`."""
        if not self._address:
            raise RuntimeError("the proxy has no address yet: await start() first")
        return self._address

    async def start(self) -> None:
        self._address = await self._listen(lambda: _Greeter(self._greeters, self._on_greeting))

    async def stop(self) -> None:
        """End all connections. The proxy cannot be started again."""
        for server in self._servers:
            server.close()
        await self._duplicates.stop()
        self.connections.reset_all()
        for transport in list(self._greeters):
            transport.close()
        await self.connections.close()
        for server in self._servers:
            await server.wait_closed()
        await asyncio.sleep(0)  # the ends that were aborted close their sockets in the loop's next turn

    async def open_for_clients(self, destination: str) -> str:
        """A URL under which clients reach the router at "HOST:PORT", by links from `CLIENTS`."""
        self._duplicates.destinations.append(destination)
        route = Route(CLIENTS, destination, is_back=False)
        return f"http://{await self._listen(lambda: self._client_end(route))}"

    def _client_end(self, route: Route) -> End:
        finder = RequestFinder(self._duplicates.wants, self._duplicates.send)
        return self.connections.begin(route, on_data=finder.feed)

    def _on_greeting(self, source: str, address: str, transport: asyncio.Transport, rest: bytes) -> None:
        near = self.connections.begin(Route(source, address, is_back=False), CONNECTED)
        transport.set_protocol(near)
        near.connection_made(transport)
        if rest:
            near.data_received(rest)

    async def _listen(self, protocol: Callable[[], asyncio.Protocol]) -> str:
        server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, backlog=_BACKLOG)
        self._servers.append(server)
        host, port = server.sockets[0].getsockname()
        return f"{host}:{port}"

    # --- faults ------------------------------------------------------------------------------------------------------

    def cut(self, source: str, destination: str) -> None:
        """What `source` sends to `destination` vanishes; no connection ends by it, none is made, from either side."""
        self.faults.at(source, destination).is_cut = True

    def stall(self, source: str, destination: str) -> None:
        """What `source` sends to `destination` waits, and arrives when the link is healed."""
        self.faults.at(source, destination).is_stalled = True
        self.connections.note_change(source, destination)

    def delay(self, source: str, destination: str, delay_ms: float, jitter_ms: float = 0.0) -> None:
        """What `source` sends arrives later by `delay_ms` and up to `jitter_ms` more, in its order."""
        fault = self.faults.at(source, destination)
        fault.delay_s, fault.jitter_s = delay_ms / 1000, jitter_ms / 1000

    def drop(self, source: str, destination: str, probability: float) -> None:
        """Each piece that `source` sends is lost with this probability, and its connection with it."""
        self.faults.at(source, destination).drop_probability = probability

    def duplicate(self, probability: float) -> None:
        """A client's request with an Idempotency-Key is delivered a second time, with this probability, to any router;
        0: no more of that."""
        self._duplicates.probability = probability

    def was_duplicated(self, idempotency_key: str) -> bool:
        """Whether a request with this key was, or is to be, delivered twice: then a refusal says nothing about the
        other delivery. Of the last 100,000."""
        return idempotency_key in self._duplicates.keys

    def heal(self, source: str, destination: str) -> None:
        """Nothing is wrong with this direction any more. Connections that it has lost bytes of are reset."""
        if self.faults.by_way.pop((source, destination), None) is not None:
            self.connections.note_change(source, destination)
            self.connections.note_healed()

    def heal_all(self) -> None:
        """Nothing is wrong any more, and nothing is repeated."""
        self.duplicate(0.0)
        for source, destination in list(self.faults.by_way):
            self.heal(source, destination)

    def reset(self, source: str, destination: str) -> int:
        """End all connections between the two at once, whichever side opened them; how many."""
        return self.connections.reset(source, destination)


class _Greeter(asyncio.Protocol):
    """A child that has connected and says, in its first line, who it is and where to."""

    def __init__(
        self,
        greeters: set[asyncio.BaseTransport],
        on_greeting: Callable[[str, str, asyncio.Transport, bytes], None],
    ) -> None:
        self._greeters = greeters
        self._on_greeting = on_greeting
        self._said = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._greeters.add(transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._said += data
        line, newline, rest = self._said.partition(b"\n")
        words = line.decode(errors="replace").split(" ")
        if newline and len(words) == 2:
            self._greeters.discard(self._transport)
            self._on_greeting(words[0], words[1], self._transport, rest)
        elif newline or len(self._said) > _GREETING_BYTES_MAX:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._greeters.discard(self._transport)
