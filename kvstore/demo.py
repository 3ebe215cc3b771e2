"""`kvstore up --demo`: a second router, which the page may have killed in the middle of a transfer.

Owns: its id and its place among the children of the launcher; where a demo is refused.
Promises: the second router listens on loopback, and all that reaches it does so from this machine.
Leaves to others: starting and restarting children (`launcher`, `supervisor`), the play-through (`router.demo`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from kvstore.addresses import is_loopback
from kvstore.config import ClusterConfig
from kvstore.errors import ConfigError
from kvstore.supervisor import Child

DEMO_ROUTER = "demo"


def check_demo(config: ClusterConfig) -> None:
    """Raises ConfigError unless all that is reached of a demo is reached from this machine only."""
    for router in config.routers:
        if router.id == DEMO_ROUTER:
            raise ConfigError(f"--demo starts a router {DEMO_ROUTER!r} of its own; rename that one in cluster.yaml.")
        if not is_loopback(router.listen):
            raise ConfigError(
                f"--demo is for this machine only, and router {router.id} listens on {router.listen}: let it listen on "
                "127.0.0.1, or leave --demo out."
            )


def with_demo(children: Sequence[Child], router_child: Callable[..., Child]) -> list[Child]:
    """The same children, their routers knowing a second one. `router_child`: of id, HOST:PORT and options."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    known = ("--demo-url", f"http://{listen}")
    return [
        *(child._replace(argv=(*child.argv, *known)) if child.role == "router" else child for child in children),
        router_child(DEMO_ROUTER, listen, "--demo-coordinator"),
    ]
