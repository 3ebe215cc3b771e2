"""A network between simulated hosts: connections in order, links that are slow and cut, hosts that vanish.

Owns: `Network`, `Host`, `Connection` and its two ends.
Promises: within a connection and a direction what is sent arrives in order, once and whole, or not at all from some
point on; between connections there is no order. A cut link keeps what is sent until it is healed, or the connection is
reset, as TCP does; both directions are cut apart. Single connections may be late, while others go by the same link. A
killed process's kernel still sends what it has taken, then says that the connection is over; a host without power says
nothing any more.
Leaves to others: what travels (`session`, `servers`), when links fail (`cluster_faults`).
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from typing import Any

from loadtest.simulate.loop import Process, SimulatedLoop

LATENCY_S = (0.00005, 0.0015)
SLOW_SHARE, SLOW_S = 0.01, 0.05  # now and then a packet is sent again by the kernel
UNTAKEN_MAX = 64  # messages under way in a direction, beyond which a sender waits
_NO_ROUTE_S = 3.0
_APART_S = 1e-8
_AGAIN_SHARE, _AGAIN_S = 0.3, 4.0

Link = tuple[str, str]


class Host:
    """A machine on the network. `accept` begins to serve a connection, in the process that runs there now."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: Process | None = None
        self.has_power = True
        self.accept: Callable[[Any, End], None] | None = None


class End:
    """One end of a connection: `send`, `receive`, `close`."""

    def __init__(self, connection: Connection, owner: Process | None, host: str) -> None:
        self._connection = connection
        self.owner = owner
        self.host = host
        self.peer: End = self
        self.closed = False
        self.inbox: deque[Any] = deque()
        self.over = False  # nothing will come any more
        self.due_s = 0.0  # when what was sent last arrives
        self.under_way = 0
        self.sent: deque[Any] = deque()  # what has not arrived yet
        self.lost = 0  # so many of these were lost on their way, and are to be sent again
        self._arrived: asyncio.Future[None] | None = None
        self._waiting: list[asyncio.Future[None]] = []  # senders, for the peer to take something

    async def send(self, message: Any) -> None:
        """Raises ConnectionResetError."""
        if self.closed or (self.owner is not None and not self.owner.alive):
            raise ConnectionResetError("the connection is closed")
        self._connection.network.carry(self, message)
        while self.under_way > UNTAKEN_MAX and not self.closed:
            taken = asyncio.get_running_loop().create_future()
            self._waiting.append(taken)
            await taken

    async def receive(self) -> Any:
        """The next message; None when the connection is over."""
        while not self.inbox and not self.over:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        if self.inbox:
            self.peer.note_taken()
            return self.inbox.popleft()
        return None

    def close(self, last: Any = None) -> None:
        """In order: what was sent arrives, then `last`, if there is one, then the end."""
        if not self.closed:
            if last is not None:
                self._connection.network.carry(self, last)
            self.closed = self.over = True
            self._connection.network.carry(self, _OVER)

    def note_taken(self) -> None:
        self.under_way -= 1
        self._let_send()

    def _let_send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for taken in waiting:
            if not taken.done():
                taken.set_result(None)

    def take(self, message: Any) -> None:
        """It has arrived."""
        if message is _OVER:
            self.end()
        elif not self.over:
            self.inbox.append(message)
            self._wake()

    def end(self) -> None:
        """The connection is over for this end."""
        self.closed = self.over = True
        self._wake()
        self._let_send()

    def drop_lost(self) -> None:
        """What was lost on its way is not sent again."""
        while self.lost:
            self.lost -= 1
            self.sent.pop()

    def abort(self) -> None:
        """End it at once, and without a word to the other end.
        That is told by its own kernel when it next sends."""
        self._connection.reset()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


class Connection:
    """Two ends, which know each other."""

    def __init__(self, network: Network, caller: Process | None, source: str, server: Process, target: str) -> None:
        self.network = network
        self.near = End(self, caller, source)
        self.far = End(self, server, target)
        self.near.peer, self.far.peer = self.far, self.near
        self.is_reset = False

    def reset(self) -> None:
        """Both ends hear of it, unless their link is cut; what is under way is lost."""
        if not self.is_reset:
            self.is_reset = True
            self.network.forget(self)
            for end in (self.near, self.far):
                end.drop_lost()
                self.network.schedule(self.network.latency(end.peer.host, end.host), end.end)


class Network:
    """`cut` and `slow`: links in one direction, from host to host. `loses`: whether a message that an end sends is
    lost, which makes the end `late`: it sends that again, and all that follows, once `end_lateness` says so. `doubles`:
    some messages come twice."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random) -> None:
        self.loop = loop
        self.hosts: dict[str, Host] = {}
        self.cut: dict[Link, None] = {}
        self.slow: dict[Link, float] = {}
        self.loses: Callable[[End, Any], bool] = lost_by_none
        self.late: dict[End, None] = {}
        self.doubles = False
        self._rng = rng
        self._connections: dict[Connection, None] = {}
        self._of_no_process = copy_context()

    def host(self, name: str) -> Host:
        return self.hosts.setdefault(name, Host(name))

    def latency(self, source: str, target: str) -> float:
        seconds = self._rng.uniform(*LATENCY_S) + self.slow.get((source, target), 0.0)
        return seconds + (self._rng.uniform(0, SLOW_S) if self._rng.random() < SLOW_SHARE else 0.0)

    def schedule(self, delay_s: float, function: Callable[..., None], *args: Any) -> None:
        """In the name of no process: what wakes up does so in that of its own."""
        self.loop.schedule(delay_s, function, *args, context=self._of_no_process)

    # --- connections --------------------------------------------------------------------------------------------------

    async def connect(self, caller: Process | None, source: str, target: str, greeting: Any) -> End:
        """The near end of a connection to the process that runs at the target now.
        Raises OSError; the caller has to bound the time."""
        answer: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._reach(caller, source, target, greeting, answer)
        return await answer

    def _reach(
        self, caller: Process | None, source: str, target: str, greeting: Any, answer: asyncio.Future[End]
    ) -> None:
        def settle(result: End | OSError) -> None:
            if answer.done() or (caller is not None and not caller.alive):
                if isinstance(result, End):
                    result.close()
            elif isinstance(result, End):
                answer.set_result(result)
            else:
                answer.set_exception(result)

        def arrive() -> None:
            host = self.hosts.get(target)
            if (source, target) in self.cut or (target, source) in self.cut or host is None or not host.has_power:
                error = TimeoutError(f"{target} does not answer")
                self.schedule(_NO_ROUTE_S, settle, error)
            elif host.process is None or not host.process.alive or host.accept is None:
                refused = ConnectionRefusedError(f"nothing listens at {target}")
                self.schedule(self.latency(target, source), settle, refused)
            else:
                connection = Connection(self, caller, source, host.process, target)
                self._connections[connection] = None
                host.accept(greeting, connection.far)
                self.schedule(self.latency(target, source), settle, connection.near)

        self.schedule(self.latency(source, target), arrive)

    def carry(self, end: End, message: Any) -> None:
        """Bring it to the other end, after all that this end has sent before."""
        connection = end._connection
        if connection.is_reset:
            return
        if message is not _OVER:
            end.under_way += 1
        if self.loses(end, message):
            self.late[end] = None
        end.sent.append(message)
        if end.lost or end in self.late or self._is_cut(end):
            end.lost += 1
        else:
            self._set_out(end)

    def _is_cut(self, end: End) -> bool:
        return (end.host, end.peer.host) in self.cut

    def _set_out(self, end: End, from_s: float = 0.0) -> None:
        """Some message does, from that time on; which one arrives by that is the first that has not."""
        now_s = self.loop.now_s
        # Timers of one time come in any order: each message is a little later than the one before.
        end.due_s = max(end.due_s + _APART_S, max(now_s, from_s) + self.latency(end.host, end.peer.host))
        self.schedule(end.due_s - now_s, self._arrive, end)

    def _arrive(self, end: End) -> None:
        connection = end._connection
        if connection.is_reset:
            return
        if self._is_cut(end):
            end.lost += 1
            return
        message = end.sent.popleft()
        target = self.host(end.peer.host)
        if not target.has_power:
            return
        if end.peer.owner is not None and end.peer.owner is not target.process:
            connection.reset()  # the process is gone, and its kernel says so
            return
        end.peer.take(message)
        if message is _OVER and end.peer.closed:
            self.forget(connection)

    def send_again(self, end: End, message: bytes) -> None:
        """Some time after it was sent first, now and then; if the connection is there yet."""
        if message and self._rng.random() < _AGAIN_SHARE:
            self.schedule(self._rng.uniform(0.0, _AGAIN_S), self._send_again, end, message)

    def _send_again(self, end: End, message: bytes) -> None:
        if not end.closed:
            self.carry(end, message)

    def forget(self, connection: Connection) -> None:
        self._connections.pop(connection, None)

    # --- what happens to it -------------------------------------------------------------------------------------------

    def on_death(self, host: Host, process: Process) -> None:
        """The process has ended: its kernel closes its connections, if there still is one."""
        for connection in list(self._connections):
            for end in (connection.near, connection.far):
                if end.owner is process and not end.closed:
                    end.closed = end.over = True
                    if host.has_power:
                        self.carry(end, _OVER)
                    else:
                        end.drop_lost()

    def cut_links(self, links: Iterable[Link]) -> None:
        self.cut.update(dict.fromkeys(links))

    def heal_links(self, links: Iterable[Link], reset_share: float) -> None:
        """What was kept arrives now; or its connection is reset."""
        for link in links:
            if self.cut.pop(link, _OVER) is not _OVER:
                self._deliver_lost(link, reset_share)

    def _deliver_lost(self, link: Link, reset_share: float) -> None:
        for connection in list(self._connections):
            for end in (connection.near, connection.far):
                if (end.host, end.peer.host) != link or end in self.late or not end.lost:
                    continue
                if self._rng.random() < reset_share:
                    connection.reset()
                    break
                lost, end.lost = end.lost, 0
                for _ in range(lost):
                    self._set_out(end)

    def end_lateness(self, ends: Iterable[End]) -> None:
        """What they have lost is sent again, also of processes that have ended: each message once the one before is
        acknowledged, as TCP begins after a loss."""
        for end in ends:
            if self.late.pop(end, _OVER) is not _OVER and not self._is_cut(end):
                lost, end.lost, from_s = end.lost, 0, self.loop.now_s
                for _ in range(lost):
                    self._set_out(end, from_s)
                    from_s = end.due_s + self.latency(end.peer.host, end.host)

    def reset_between(self, one: str, other: str) -> int:
        """Reset all connections between both hosts; how many there were."""
        found = [each for each in self._connections if {each.near.host, each.far.host} == {one, other}]
        for connection in found:
            connection.reset()
        return len(found)


_OVER = object()


def lost_by_none(end: End, message: Any) -> bool:
    return False


def both_ways(one: str, others: Iterable[str]) -> list[Link]:
    """The links between that host and each of the others."""
    return [link for other in others for link in ((one, other), (other, one))]
