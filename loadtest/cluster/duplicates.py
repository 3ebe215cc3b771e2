"""Requests that arrive twice: finding them in what a client sends, and delivering the second copy.

Owns: which requests are repeated, and the copies on their way. Where they begin and end in a stream, h11 knows.
Promises: only a whole request that carries an Idempotency-Key is ever repeated, as it came but for its Connection
field; its second answer is read and dropped. What is kept of a request is bounded; a longer one is delivered once.
A stream that is no HTTP is not touched.
Leaves to others: the first delivery, which does not wait for any of this (`proxied`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from random import Random

import h11

from loadtest.cluster.faults import Faults, Route
from loadtest.cluster.proxied import Counts

CLIENTS = "clients"

_HEAD_BYTES_MAX = 64 * 1024
_REQUEST_BYTES_MAX = 1024 * 1024
_AT_ONCE_MAX = 256
_KEYS_MAX = 100_000
_LATE_S_MAX = 2.0
_ANSWER_TIMEOUT_S = 75.0  # longer than any wait for a lock
_READ_BYTES = 65_536


class RequestFinder:
    """Reads along with what one client sends on one connection. `on_request` gets each whole request that `wants` said
    yes to, with its Idempotency-Key, as one that is the last on its connection."""

    def __init__(self, wants: Callable[[str], bool], on_request: Callable[[bytes], None]) -> None:
        self._wants = wants
        self._on_request = on_request
        self._server = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES_MAX)
        self._copier: h11.Connection | None = None
        self._copy = bytearray()
        self._is_lost = False

    def feed(self, data: bytes) -> None:
        """The next bytes, in pieces of any size."""
        if self._is_lost:
            return
        try:
            self._server.receive_data(data)
            while isinstance(event := self._server.next_event(), h11.Request | h11.Data | h11.EndOfMessage):
                self._take(event)
        except h11.ProtocolError:  # where the next request begins cannot be known any more
            self._is_lost = True

    def _take(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        if isinstance(event, h11.Request):
            key = dict(event.headers).get(b"idempotency-key")
            is_wanted = key is not None and self._wants(key.decode("latin-1"))
            self._copier = h11.Connection(h11.CLIENT) if is_wanted else None
            self._copy.clear()
            event = _closing(event)
        if self._copier is not None:
            self._copy += self._copier.send(event) or b""
            if len(self._copy) > _REQUEST_BYTES_MAX:
                self._copier = None
            elif isinstance(event, h11.EndOfMessage):
                self._on_request(bytes(self._copy))
        if isinstance(event, h11.EndOfMessage):
            for answer in (h11.Response(status_code=204, headers=[]), h11.EndOfMessage()):
                self._server.send(answer)
            self._server.start_next_cycle()


def _closing(request: h11.Request) -> h11.Request:
    """The request, as the last one on its connection."""
    headers = [(name, value) for name, value in request.headers.raw_items() if name.lower() != b"connection"]
    headers.append((b"Connection", b"close"))
    return h11.Request(method=request.method, target=request.target, headers=headers)


class Duplicates:
    """Delivers copies to `destinations`, each at once or up to two seconds late. `keys`: what was repeated."""

    def __init__(self, faults: Faults, counts: Counts, random: Random) -> None:
        self.destinations: list[str] = []
        self.probability = 0.0
        self.keys: dict[str, None] = {}
        self._faults = faults
        self._counts = counts
        self._random = random
        self._tasks: set[asyncio.Task[None]] = set()

    def wants(self, idempotency_key: str) -> bool:
        """Whether the request that has just begun is to be repeated. Who asks remembers it from now on."""
        if not self.probability or len(self._tasks) >= _AT_ONCE_MAX:
            return False
        if self._random.random() >= self.probability:
            return False
        self.keys[idempotency_key] = None
        if len(self.keys) > _KEYS_MAX:
            del self.keys[next(iter(self.keys))]
        return True

    def send(self, request: bytes) -> None:
        """Deliver the copy, to any router that can be reached."""
        task = asyncio.get_running_loop().create_task(self._deliver(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _deliver(self, request: bytes) -> None:
        random = self._random
        late_s = _LATE_S_MAX * random.random() ** 3  # mostly soon: while the first one is at work
        if random.random() < 0.5:
            await asyncio.sleep(late_s)
        destinations = [address for address in self.destinations if not self._is_closed(address)]
        if not destinations:
            return
        host, _, port = random.choice(destinations).rpartition(":")
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(host, int(port))
                try:
                    writer.write(request)
                    self._counts.duplicates += 1
                    while await reader.read(_READ_BYTES):
                        pass
                finally:
                    writer.close()

    def _is_closed(self, address: str) -> bool:
        return self._faults.is_closed(Route(CLIENTS, address, is_back=False))
