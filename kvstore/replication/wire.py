"""A connection between a primary and a copy, whatever carries it.

Owns: what both ends ask of a connection; the exchanges of an opening, which end before a session begins.
Promises: messages come whole and in order, or the connection is lost: nothing that was sent before counts as received.
Leaves to others: sockets (shard), sessions (`sender`, `serving`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from kvstore.replication import messages
from kvstore.replication.session import Session
from kvstore.storage.segments import Entry

M = TypeVar("M")
FETCH_BYTES = 1 << 20


class WireLost(Exception):
    """The connection is lost, or the other end said what it must not."""


class WireRefused(WireLost):
    """The other end's process takes no connection of this one's, and will not before a person has done something."""


class Wire(Protocol):
    """One end."""

    async def send(self, message: Any) -> None:
        """Returns once the connection has taken it, not when it has come. Raises WireLost."""

    async def receive(self) -> Any:
        """The next message. Raises WireLost."""

    async def close(self) -> None:
        """End the connection; not an error if it is lost."""


Connect = Callable[[str, Session], Awaitable[Wire]]
"""Connect to the node of that id, for that session. Raises WireLost."""


class Refused(Exception):
    """The copy refuses the session. `promised`: the higher term that it has promised, 0: it is not there."""

    def __init__(self, promised: int) -> None:
        super().__init__(
            f"the copy has promised term {promised}" if promised else "the copy that was meant is not there"
        )
        self.promised = promised


async def expect(wire: Wire, kind: type[M]) -> M:
    """The next message, which is of that kind. Raises Refused, WireLost."""
    message = await wire.receive()
    if isinstance(message, messages.Deposed):
        raise Refused(message.promised)
    if isinstance(message, messages.Foreign):
        raise Refused(0)
    if not isinstance(message, kind):
        raise WireLost(f"{type(message).__name__} came instead of {kind.__name__}")
    return message


async def greet(wire: Wire, session: Session) -> messages.Told:
    """Have the copy promise the session's term, and tell where its log ends. Raises Refused, WireLost."""
    await wire.send(messages.Hello(session))
    return await expect(wire, messages.Told)


async def fetch(wire: Wire, after: int) -> Sequence[Entry]:
    """Some records of the greeted copy behind that number; none if there are no more. Raises Refused, WireLost."""
    await wire.send(messages.Fetch(after, FETCH_BYTES))
    return (await expect(wire, messages.Fetched)).entries
