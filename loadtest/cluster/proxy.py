"""All links of a cluster: a TCP proxy in this process, through which every one of its connections goes.

Owns: what is wrong with which link (cut, stalled, slow, lossy, repeating), connecting through the proxy, and the
addresses at which clients reach routers.
Promises: without a fault bytes pass as they come. A fault is of one direction between two processes, by their names,
and holds for the connections that there are and for those to come, whichever side opened them; `heal` ends it.
Leaves to others: one connection and its bytes (`proxied`), finding requests to repeat (`duplicates`), making processes
connect through here (`child`), which fault comes when (`schedule`).

A link is closed while one of its directions is cut or stalled: a new connection then hangs, as a TCP handshake does,
until the link is healed or the client gives up. A destination that refuses the connection refuses it
here, too: the greeting of a child is answered only when its destination has accepted.

    child ──"shard-s1 127.0.0.1:9102\\n"──> proxy ──connect──> 127.0.0.1:9102
          <─────────── "+" ──────────────        <─accepted──
          <═══════════════ bytes, both ways, as the faults let them ═════>
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import Random

from loadtest.cluster.duplicates import CLIENTS, Duplicates, RequestFinder
from loadtest.cluster.proxied import Counts, End, Fault, Route

__all__ = ["CLIENTS", "CONNECTED", "Proxy"]

CONNECTED = b"+"

_GREETING_BYTES_MAX = 256
_BACKLOG = 1024


class Proxy:
    """`names`: which process listens at "HOST:PORT", kept up to date by the runner; `counts`: what has been done."""

    def __init__(self, seed: int = 0) -> None:
        self.names: dict[str, str] = {}
        self.counts = Counts()
        self.random = Random(f"links {seed}")
        self._faults: dict[tuple[str, str], Fault] = {}
        self._connections: set[End] = set()
        self._greeters: set[asyncio.BaseTransport] = set()
        self._connecting: dict[End, asyncio.Task[None]] = {}
        self._opened = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._address = ""
        self._duplicates = Duplicates(self)

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
        for near in list(self._connections):
            near.reset()
        for transport in list(self._greeters):
            transport.close()
        connecting = list(self._connecting.values())
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()
        await asyncio.sleep(0)  # the ends that were aborted close their sockets in the loop's next turn

    async def open_for_clients(self, destination: str) -> str:
        """A URL under which clients reach the router at "HOST:PORT", by links from `CLIENTS`."""
        self._duplicates.destinations.append(destination)
        route = Route(CLIENTS, destination, is_back=False)
        return f"http://{await self._listen(lambda: self._client_end(route))}"

    async def _listen(self, protocol: Callable[[], asyncio.Protocol]) -> str:
        server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, backlog=_BACKLOG)
        self._servers.append(server)
        host, port = server.sockets[0].getsockname()
        return f"{host}:{port}"

    @property
    def open_connections(self) -> int:
        """How many there are now, those that are just being made included."""
        return len(self._connections)

    # --- faults ------------------------------------------------------------------------------------------------------

    def cut(self, source: str, destination: str) -> None:
        """What `source` sends to `destination` vanishes; no connection ends by it, none is made, from either side."""
        self._fault(source, destination).is_cut = True

    def stall(self, source: str, destination: str) -> None:
        """What `source` sends to `destination` waits, and arrives when the link is healed."""
        self._fault(source, destination).is_stalled = True
        self._look_at(source, destination)

    def delay(self, source: str, destination: str, delay_ms: float, jitter_ms: float = 0.0) -> None:
        """What `source` sends arrives later by `delay_ms` and up to `jitter_ms` more, in its order."""
        fault = self._fault(source, destination)
        fault.delay_s, fault.jitter_s = delay_ms / 1000, jitter_ms / 1000

    def drop(self, source: str, destination: str, probability: float) -> None:
        """Each piece that `source` sends is lost with this probability, and its connection with it."""
        self._fault(source, destination).drop_probability = probability

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
        if self._faults.pop((source, destination), None) is not None:
            self._look_at(source, destination)
            self._announce()

    def heal_all(self) -> None:
        """Nothing is wrong any more, and nothing is repeated."""
        self.duplicate(0.0)
        for source, destination in list(self._faults):
            self.heal(source, destination)

    def reset(self, source: str, destination: str) -> int:
        """End all connections between the two at once, whichever side opened them; how many."""
        between = [near for near in self._connections if set(self._named(near.route)) == {source, destination}]
        for near in between:
            near.reset()
        self.counts.resets += len(between)
        return len(between)

    def _fault(self, source: str, destination: str) -> Fault:
        return self._faults.setdefault((source, destination), Fault())

    def _look_at(self, source: str, destination: str) -> None:
        """The faults of this direction are others now."""
        for near in list(self._connections):
            for end in (near, near.other):
                if self._named(end.route) == (source, destination):
                    fault = self.fault_of(end.route)
                    if end.has_lost and (fault is None or not fault.is_closed):
                        self.counts.resets += 1
                        near.reset()
                    else:
                        end.set_reading()

    # --- what the ends must know -------------------------------------------------------------------------------------

    @property
    def faults(self) -> Mapping[tuple[str, str], Fault]:
        return self._faults

    def fault_of(self, route: Route) -> Fault | None:
        return self._faults.get(self._named(route))

    def _named(self, route: Route) -> tuple[str, str]:
        destination = self.names.get(route.address, route.address)
        return (destination, route.source) if route.is_back else (route.source, destination)

    def is_closed(self, route: Route) -> bool:
        """No connection can be made: a handshake needs both directions."""
        ways = (self.fault_of(route._replace(is_back=is_back)) for is_back in (False, True))
        return any(fault is not None and fault.is_closed for fault in ways)

    def on_lost(self, end: End) -> None:
        near = end.other if end.route.is_back else end
        if near.transport is None:
            task = self._connecting.get(near)
            if task is not None:
                task.cancel()
            elif near.other.transport is None:
                self._connections.discard(near)

    # --- connecting --------------------------------------------------------------------------------------------------

    def _client_end(self, route: Route) -> End:
        finder = RequestFinder(self._duplicates.wants, self._duplicates.send)
        near = End(self, route, on_data=finder.feed, on_open=lambda: self._connect(near, b""))
        return near

    def _on_greeting(self, source: str, address: str, transport: asyncio.Transport, rest: bytes) -> None:
        near = End(self, Route(source, address, is_back=False), on_open=lambda: self._connect(near, CONNECTED))
        transport.set_protocol(near)
        near.connection_made(transport)
        if rest:
            near.data_received(rest)

    def _connect(self, near: End, word: bytes) -> None:
        """Make the connection's other half; `word` is what the near end is told then."""

        def opened() -> None:
            if word:
                near.write(word)
            near.deliver_due()

        near.other = far = End(self, near.route._replace(is_back=True), on_open=opened)
        far.other = near
        self.counts.connections += 1
        self._connections.add(near)
        task = asyncio.get_running_loop().create_task(self._reach(near, far))
        self._connecting[near] = task
        task.add_done_callback(lambda _: self._reached(near))

    async def _reach(self, near: End, far: End) -> None:
        while self.is_closed(near.route):
            await self._opened.wait()
        host, _, port = near.route.address.rpartition(":")
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, host, int(port))
        except (OSError, ValueError, OverflowError):  # refused, or an address that is none
            self.counts.refused += 1
            near.reset()

    def _reached(self, near: End) -> None:
        """Or not."""
        del self._connecting[near]
        if near.transport is None and near.other.transport is None:
            self._connections.discard(near)

    def _announce(self) -> None:
        """Some link may be open that was not."""
        opened, self._opened = self._opened, asyncio.Event()
        opened.set()


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
