"""Requests that arrive twice: finding them in what a client sends, and delivering the second copy.

Owns: where HTTP/1.1 requests begin and end in a stream of bytes (RFC 9112), and the copies on their way.
Promises: only a whole request that carries an Idempotency-Key is ever repeated, byte by byte as it came but for its
Connection field; its second answer is read and dropped. What is kept of a request is bounded; a longer one, or one
with a chunked body, is delivered once. A stream that is no HTTP is not touched.
Leaves to others: the first delivery, which does not wait for any of this (`proxied`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from random import Random

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

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_KEY = re.compile(rb"\r\nidempotency-key:[ \t]*([^\r\n]*?)[ \t]*\r\n", re.IGNORECASE)
_CONNECTION = re.compile(rb"\r\nconnection:[^\r\n]*(?=\r\n)", re.IGNORECASE)


class RequestFinder:
    """Reads along with what one client sends on one connection. `on_request` gets each whole request that `wants` said
    yes to, with its Idempotency-Key."""

    def __init__(self, wants: Callable[[str], bool], on_request: Callable[[bytes], None]) -> None:
        self._wants = wants
        self._on_request = on_request
        self._buffer = bytearray()
        self._read: Callable[[], bool] = self._read_head
        self._body_left = 0
        self._kept: bytearray | None = None
        self._is_lost = False

    def feed(self, data: bytes) -> None:
        """The next bytes, in pieces of any size."""
        if self._is_lost:
            return
        self._buffer += data
        while self._buffer and self._read():
            pass

    def _give_up(self) -> bool:
        """Where the next request begins cannot be known any more."""
        self._is_lost = True
        self._buffer.clear()
        self._kept = None
        return False

    def _read_head(self) -> bool:
        """True: go on with the next state; False: more bytes are needed."""
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return self._give_up() if len(self._buffer) > _HEAD_BYTES_MAX else False
        head = bytes(self._buffer[:end])
        del self._buffer[:end]
        if not head.split(b"\r\n", 1)[0].endswith(b"HTTP/1.1") or _UPGRADE.search(head):
            return self._give_up()
        if _CHUNKED.search(head):
            self._read = self._read_chunk_size
            return True
        length = _LENGTH.search(head)
        self._body_left = int(length[1]) if length else 0
        key = _KEY.search(head)
        is_short = end + self._body_left <= _REQUEST_BYTES_MAX
        self._kept = bytearray(head) if key and is_short and self._wants(key[1].decode("latin-1")) else None
        self._read = self._read_body
        return self._body_left > 0 or self._end_request()

    def _read_body(self) -> bool:
        piece = self._buffer[: self._body_left]
        del self._buffer[: self._body_left]
        self._body_left -= len(piece)
        if self._kept is not None:
            self._kept += piece
        return self._body_left == 0 and self._end_request()

    def _end_request(self) -> bool:
        kept, self._kept = self._kept, None
        self._read = self._read_head
        if kept is not None:
            self._on_request(bytes(kept))
        return True

    # --- a chunked body: read over ------------------------------------------------------------------------------------

    def _take_line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            if len(self._buffer) > _HEAD_BYTES_MAX:
                self._give_up()
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _read_chunk_size(self) -> bool:
        line = self._take_line()
        if line is None:
            return False
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            return self._give_up()
        self._body_left = size + 2  # the line's end behind it
        self._read = self._read_chunk if size else self._read_trailer
        return True

    def _read_chunk(self) -> bool:
        taken = min(self._body_left, len(self._buffer))
        del self._buffer[:taken]
        self._body_left -= taken
        if self._body_left:
            return False
        self._read = self._read_chunk_size
        return True

    def _read_trailer(self) -> bool:
        line = self._take_line()
        if line == b"":
            self._read = self._read_head
        return line is not None


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
                    writer.write(_closing(request))
                    self._counts.duplicates += 1
                    while await reader.read(_READ_BYTES):
                        pass
                finally:
                    writer.close()

    def _is_closed(self, address: str) -> bool:
        return self._faults.is_closed(Route(CLIENTS, address, is_back=False))


def _closing(request: bytes) -> bytes:
    """The request, as the last one on its connection."""
    head, _, body = request.partition(b"\r\n\r\n")
    return _CONNECTION.sub(b"", head) + b"\r\nConnection: close\r\n\r\n" + body
