"""The calls of `kvstore up --demo`: play a transfer through, run its transaction step by step, kill a node.

Owns: their entries. They exist where a router is given them, on loopback, and are documented there and nowhere else.
Promises: plain data.
Leaves to others: what they do (`router.demo`, `router.demo_coordinator`, `router.demo_failover`).
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from kvstore.errors import BadBody, BodyTooLarge, ChangeRefused, Conflict, NotFound
from kvstore.router.demo import Demo, TransferBody
from kvstore.router.demo_coordinator import NDJSON, CoordinateBody, DemoCoordinator
from kvstore.router.demo_failover import DemoFailover, KillBody
from kvstore.router.routes.words import BODY
from kvstore.transport.http.routes import Body, Content, Keys, Right, Route, Success, Touches, example
from kvstore.transport.http.schema import about


class TransferTaken(Struct):
    """It has begun."""

    play: Annotated[int, about("Its number.", minimum=1)]


class KillTaken(Struct):
    """The failover has begun."""

    play: Annotated[int, about("Its number.", minimum=1)]


_TRANSACTION = {"transaction": {"then": [{"op": "put", "key": "a", "value": "1"}]}, "stop": "never"}
_LINE = '{"at_ms":0.8,"kind":"sent","shard":"s2","message":"prepare"}\n'

TRANSFER_ROUTES = (
    Route(
        "POST",
        "/v1/demo/transfer",
        Demo.transfer,
        Touches(Right.WRITE, Keys.ALL),
        id="playTransfer",
        tag="page",
        summary="Play a transfer through",
        description="Between two accounts on different shards, coordinated by a second router, which is killed where "
        "`stop` says. The event `play` tells each step. Only with `kvstore up --demo`, on loopback.",
        body=Body(
            Content(TransferBody, example({"amount": 10, "stop": "before-decision"}, "all fields")),
            1024,
            required=False,
        ),
        answers=(Success(202, "It has begun.", Content(TransferTaken, example({"play": 1}))),),
        errors=(BadBody, BodyTooLarge, *BODY, Conflict, ChangeRefused),
    ),
)
KILL_ROUTES = (
    Route(
        "POST",
        "/v1/demo/kill",
        DemoFailover.kill,
        Touches(Right.ADMIN, Keys.NONE),
        id="killNode",
        tag="page",
        summary="Kill a node, and show the failover",
        description="SIGKILL to the process of the node, which `kvstore up` starts again after `away_s`. Refused with "
        "409 unless every shard whose primary is there has a copy in sync elsewhere. The event `failover` tells each "
        "step. Only with `kvstore up --demo`, on loopback.",
        body=Body(Content(KillBody, example({"node": "s1", "away_s": 8}, "all fields")), 1024),
        answers=(Success(202, "It has begun.", Content(KillTaken, example({"play": 1}))),),
        errors=(BadBody, BodyTooLarge, *BODY, Conflict, ChangeRefused, NotFound),
    ),
)
COORDINATE_ROUTES = (
    Route(
        "POST",
        "/v1/demo/coordinate",
        DemoCoordinator.coordinate,
        Touches(Right.WRITE, Keys.BODY),
        id="coordinate",
        tag="page",
        summary="Run a transaction and tell each message of it",
        description="Of the second router that `kvstore up --demo` starts; it kills itself where `stop` says.",
        body=Body(Content(CoordinateBody, example(_TRANSACTION, "all fields")), 64 * 1024),
        answers=(
            Success(200, "A line of JSON per message, as it happens.", Content(str, example(_LINE, "a line"), NDJSON)),
        ),
        errors=(BadBody, BodyTooLarge, *BODY),
    ),
)
