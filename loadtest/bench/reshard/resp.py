"""Redis Cluster as a client speaks to it: its protocol, its slots, and its redirections.

Owns: RESP 2 for the few commands that are needed, the slot of a key, following MOVED and ASK.
Promises: an error of the server that is no redirection is raised, never passed over.
Leaves to others: what is asked (systems.py).

https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Sequence
from typing import Any

SLOTS = 16_384
_REDIRECTIONS_MAX = 16


class RedisError(Exception):
    """What a Redis server answers with a minus."""


def slot_of(key: bytes) -> int:
    """CRC-16/XMODEM of the key (none has a hash tag here)."""
    return binascii.crc_hqx(key, 0) % SLOTS


def command(*words: bytes) -> bytes:
    """The bytes of a command on the wire."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


async def read_reply(reader: asyncio.StreamReader) -> Any:
    """The next reply: bytes, int, None or a list. Raises RedisError, IncompleteReadError."""
    line = (await reader.readuntil(b"\r\n"))[:-2]
    kind, rest = line[:1], line[1:]
    if kind == b"-":
        raise RedisError(rest.decode(errors="replace"))
    if kind == b":":
        return int(rest)
    if kind == b"$":
        return None if rest == b"-1" else (await reader.readexactly(int(rest) + 2))[:-2]
    if kind == b"*":
        return [await read_reply(reader) for _ in range(int(rest))]
    return rest


class Node:
    """One connection to one server of the cluster, at 127.0.0.1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Node:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, *words: bytes) -> Any:
        """Raises RedisError."""
        (reply,) = await self.ask_many([words])
        if isinstance(reply, RedisError):
            raise reply
        return reply

    async def ask_many(self, commands: Sequence[Sequence[bytes]]) -> list[Any]:
        """All in one go; an error is among the replies."""
        self._writer.write(b"".join(command(*words) for words in commands))
        return [await self._reply() for _ in commands]

    async def _reply(self) -> Any:
        try:
            return await read_reply(self._reader)
        except RedisError as error:
            return error

    def close(self) -> None:
        self._writer.close()


class ClusterClient:
    """One user of the cluster: one call at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._slots: list[int] = []
        self._nodes: dict[int, Node] = {}

    async def ask(self, *words: bytes) -> Any:
        """A command whose second word is its key, sent to where that is. Raises RedisError."""
        if not self._slots:
            self._slots = await self._read_slots()
        slot = slot_of(words[1])
        port, is_asking = self._slots[slot], False
        for _ in range(_REDIRECTIONS_MAX):
            node = await self._node(port)
            try:
                if is_asking:
                    await node.ask(b"ASKING")
                return await node.ask(*words)
            except RedisError as error:
                is_asking, port = redirection(error)
                if not is_asking:
                    self._slots[slot] = port
        raise RedisError(f"slot {slot} is passed on for ever")

    async def _node(self, port: int) -> Node:
        if port not in self._nodes:
            self._nodes[port] = await Node.open(port)
        return self._nodes[port]

    async def _read_slots(self) -> list[int]:
        slots = [self._port] * SLOTS
        for first, last, (_, port, *_), *_ in await (await self._node(self._port)).ask(b"CLUSTER", b"SLOTS"):
            slots[first : last + 1] = [port] * (last + 1 - first)
        return slots

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()


def redirection(error: RedisError) -> tuple[bool, int]:
    """Whether it is for this call only, and the port to ask. Raises the error if it is none."""
    word, _, rest = str(error).partition(" ")
    if word not in ("MOVED", "ASK"):
        raise error
    return word == "ASK", int(rest.rpartition(":")[2])
