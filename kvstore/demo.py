"""What the page of `kvstore up --demo` may do to processes.
A second router to kill, a door through which to kill nodes.

Owns: that router's id and its place among the children of the launcher; the door; where a demo is refused.
Promises: both listen on loopback. The door takes one order, from a process that knows its word, which only this
launcher's routers are told, in their environment: a web page cannot know it.
Leaves to others: starting and restarting children (`launcher`, `supervisor`), what is shown (`router.demo`,
`router.demo_failover`).

An order is a line of JSON, `{"word":W,"kill":"s1","away_s":12}`; the answer another one, with `pid` or `detail`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvstore.addresses import is_loopback
from kvstore.config import DEMO_AWAY_S_MAX, ClusterConfig
from kvstore.errors import ConfigError
from kvstore.supervisor import Child, Supervisor

DEMO_ROUTER = "demo"
DOOR_VARIABLE = "KVSTORE_DEMO_DOOR"

_ORDER_BYTES_MAX = 1024
_ORDER_S = 5.0


def check_demo(config: ClusterConfig) -> None:
    """Check that all that is reached of a demo is reached from this machine only. Raises ConfigError."""
    for router in config.routers:
        if router.id == DEMO_ROUTER:
            raise ConfigError(f"--demo starts a router {DEMO_ROUTER!r} of its own; rename that one in cluster.yaml.")
        if not is_loopback(router.listen):
            raise ConfigError(
                f"--demo is for this machine only, and router {router.id} listens on {router.listen}: let it listen on "
                "127.0.0.1, or leave --demo out."
            )


class DemoDoor:
    """Open from its making on; orders are carried out while `serve` runs."""

    def __init__(self) -> None:
        self._word = secrets.token_hex(16)
        self._socket = socket.create_server(("127.0.0.1", 0))

    @property
    def place(self) -> str:
        """HOST:PORT/WORD, for `DOOR_VARIABLE`."""
        return f"127.0.0.1:{self._socket.getsockname()[1]}/{self._word}"

    def close(self) -> None:
        """Take no order any more."""
        self._socket.close()

    async def serve(self, supervisor: Supervisor) -> None:
        """For ever."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError, TimeoutError, ValueError):
                async with asyncio.timeout(_ORDER_S):
                    line = await reader.readline()
                    writer.write(json.dumps(self._carry_out(line, supervisor)).encode() + b"\n")
                    await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, sock=self._socket, limit=_ORDER_BYTES_MAX)
        async with server:
            await server.serve_forever()

    def _carry_out(self, line: bytes, supervisor: Supervisor) -> dict[str, object]:
        """Raises ValueError for what is no order."""
        order = json.loads(line)
        if not isinstance(order, dict) or not hmac.compare_digest(str(order.get("word")).encode(), self._word.encode()):
            raise ValueError("the word is wrong")
        node, away_s = order.get("kill"), order.get("away_s")
        if not isinstance(node, str) or not isinstance(away_s, int | float) or not 0 < away_s <= DEMO_AWAY_S_MAX:
            raise ValueError("it is no order")
        try:
            return {"pid": supervisor.kill_for(f"shard-{node}", away_s)}
        except KeyError:
            return {"detail": f"this `kvstore up` does not run node {node}."}
        except ValueError:
            return {"detail": f"node {node} does not run now: wait until it is back."}


def with_demo(children: Sequence[Child], router_child: Callable[..., Child], door: DemoDoor) -> list[Child]:
    """The same children, their routers knowing a second one and the door. `router_child`: of id, HOST:PORT, options."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"

    def knowing(child: Child) -> Child:
        environment = {**child.environment, DOOR_VARIABLE: door.place}
        return child._replace(argv=(*child.argv, "--demo-url", f"http://{listen}"), environment=environment)

    return [
        *(knowing(child) if child.role == "router" else child for child in children),
        router_child(DEMO_ROUTER, listen, "--demo-coordinator"),
    ]
