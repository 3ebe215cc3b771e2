"""What is wrong with which link of a cluster.

Owns: the faults of each direction between two processes, and which process listens at which address. Pure.
Promises: a fault is of one direction, by the names of both processes, whichever of them opened the connection.
Leaves to others: what a fault does to bytes (`proxied`), to connections that there are (`connections`).
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class Fault(msgspec.Struct):
    """What is wrong with one direction of a link."""

    is_cut: bool = False
    is_stalled: bool = False
    delay_s: float = 0.0
    jitter_s: float = 0.0
    drop_probability: float = 0.0

    @property
    def is_closed(self) -> bool:
        """Nothing passes now."""
        return self.is_cut or self.is_stalled


class Route(NamedTuple):
    """The direction of some bytes: from the process `source` to the address it connected to, or back."""

    source: str
    address: str
    is_back: bool


class Faults:
    """`names`: which process listens at "HOST:PORT"; `by_way`: empty while nothing is wrong, which is the short way."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.by_way: dict[tuple[str, str], Fault] = {}

    def at(self, source: str, destination: str) -> Fault:
        """That of this direction, to be changed."""
        return self.by_way.setdefault((source, destination), Fault())

    def of(self, route: Route) -> Fault | None:
        """That which the bytes on this route meet."""
        return self.by_way.get(self.way(route))

    def way(self, route: Route) -> tuple[str, str]:
        """The processes that the bytes on this route come from and go to."""
        destination = self.names.get(route.address, route.address)
        return (destination, route.source) if route.is_back else (route.source, destination)

    def is_closed(self, route: Route) -> bool:
        """No connection can be made: a handshake needs both directions."""
        ways = (self.of(route._replace(is_back=is_back)) for is_back in (False, True))
        return any(fault is not None and fault.is_closed for fault in ways)
