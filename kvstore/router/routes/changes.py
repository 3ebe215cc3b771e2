"""The calls that change the cluster, and tell how far a change is. The controller decides them.

Owns: the entries of `/v1/shards`, `/v1/moves` and `/v1/changes`, as clients see them, and their examples.
Promises: what has no place in such a call is refused here; the controller decodes what is passed on by itself.
Leaves to others: every decision (the controller), asking it (`controller_client`), the documents
(`transport.change_documents`).
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from kvstore.config import ID_PATTERN, Limits
from kvstore.errors import (
    BadBody,
    BadParameter,
    BodyTooLarge,
    ChangeRefused,
    ControllerBehind,
    ForeignData,
    NotFound,
    OutcomeUnknown,
)
from kvstore.router.controller_client import CHANGE_ID, Controller
from kvstore.router.routes.words import BODY, CHANGES_THE_CLUSTER, OF_THE_CLUSTER
from kvstore.transport.change_documents import (
    AcceptedOld,
    AcceptOld,
    Change,
    Changes,
    ChangeTaken,
    Moves,
    NewPrimary,
    NewReplicas,
    NewShard,
    Plan,
    ShardChange,
    ShardId,
)
from kvstore.transport.http.responses import Response
from kvstore.transport.http.routes import (
    NO_BODY,
    Body,
    Call,
    Content,
    Errors,
    Parameter,
    Route,
    Success,
    example,
    flag,
    text,
)
from kvstore.transport.http.schema import about

Json = dict[str, Any]


class ChangeRoutes:
    """The calls that change the cluster, passed on to the controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def add_shard(self, call: Call) -> Response:
        return await self._pass_on(call, "/v1/shards")

    async def weigh_shard(self, call: Call) -> Response:
        return await self._pass_on(call, f"/v1/shards/{call.argument}")

    async def remove_shard(self, call: Call) -> Response:
        return await self._pass_on(call, f"/v1/shards/{call.argument}")

    async def accept_old(self, call: Call) -> Response:
        return await self._pass_on(call, f"/v1/shards/{call.argument}/accept-old")

    async def promote(self, call: Call) -> Response:
        return await self._pass_on(call, f"/v1/shards/{call.argument}/promote")

    async def replicate(self, call: Call) -> Response:
        return await self._pass_on(call, "/v1/cluster")

    async def moves(self, call: Call) -> Response:
        return await self._controller.ask("GET", "/v1/moves", None)

    async def rebalance(self, call: Call) -> Response:
        return await self._pass_on(call, "/v1/moves")

    async def cancel(self, call: Call) -> Response:
        return await self._pass_on(call, "/v1/moves")

    async def changes(self, call: Call) -> Response:
        return await self._controller.ask("GET", "/v1/changes", None)

    async def change(self, call: Call) -> Response:
        return await self._controller.ask("GET", f"/v1/changes/{call.argument}", None)

    async def _pass_on(self, call: Call, path: str) -> Response:
        """A change. The controller decodes the body by itself."""
        given = {name: value for name, value in call.parameters.items() if value is not False}
        query = urlencode({name: "true" if value is True else value for name, value in given.items()})
        return await self._controller.ask(call.head.method, f"{path}?{query}" if query else path, call.raw or None)


def decode_shard_id(raw: str, limits: Limits) -> str:
    """Raises BadParameter: nothing that means something else in a path is passed on."""
    if not ID_PATTERN.fullmatch(raw):
        raise BadParameter(f"{raw[:100]!a} is no id of a shard: it must match {ID_PATTERN.pattern}.")
    return raw


def decode_change_id(raw: str, limits: Limits) -> str:
    """Raises NotFound."""
    if not CHANGE_ID.fullmatch(raw):
        raise NotFound(
            f"{raw[:100]!a} is no id of a change.",
            title="There is no such change",
            next_step="GET /v1/changes lists those that are known.",
        )
    return raw


# --- the entries ------------------------------------------------------------------------------------------------------

_SHARDS, _SHARD, _MOVES = "/v1/shards", "/v1/shards/{id}", "/v1/moves"
_LOCATION = ("Location",)
_ID = Parameter("id", "path", ShardId, example("s5"), "The shard.", decode_shard_id)
_PLAN = flag("plan", "Change nothing: only tell what would move.")
_BODY_BYTES_MAX = 4096
_ERRORS: Errors = (BadBody, BodyTooLarge, *BODY, ChangeRefused, ControllerBehind, OutcomeUnknown)
_GRACE = "No call fails because of it. Changes asked for while others are under way are planned together with them. "
EXAMPLE_MOVE = {
    "from": "s1", "to": "s5", "partitions": 210, "step": "copy", "keys_done": 1200, "keys_total": 7800,
    "bytes_done": 139200, "write_pause_ms": 0.0, "detail": "",
}  # fmt: skip
EXAMPLE_CHANGE = {
    "partitions": 610, "keys": 22380, "bytes": 2596080, "groups": 3, "seconds": 1.42, "write_pause_ms_max": 31.5,
    "write_pause_ms_p99": 31.5,
}  # fmt: skip
_EXAMPLE_RESOURCE = {
    "id": "6f1d0c3b9a8e4f27", "kind": "add", "shard": "s5", "weight": 1, "to": None, "replicas": None,
    "state": "running",
    "detail": "610 of 820 partitions have moved.", "waiting_for": None, "progress": 0.7823,
    "partitions_done": 610, "partitions_total": 820, "keys_done": 23580, "keys_total": 30180,
    "bytes_done": 2735280, "groups_done": 3, "started_at": "2026-11-28T21:14:03.250Z", "ended_at": None,
    "seconds": 1.42, "write_pause_ms_max": 31.5, "write_pause_ms_p99": 31.5,
}  # fmt: skip
_EXAMPLE_PLAN = {
    "partitions": 820, "keys": 30180, "bytes": 3500880,
    "moves": [{"from": "s1", "to": "s5", "partitions": 820, "keys": 30180, "bytes": 3500880}],
}  # fmt: skip
_EXAMPLE_MOVES = {"epoch": 12, "moves": [EXAMPLE_MOVE], "wanted": [], "ending": [], "last": EXAMPLE_CHANGE}
_PLAN_ONLY = Success(200, "With plan=true: what would move.", Content(Plan, example(_EXAMPLE_PLAN)))


def _taken(value: Json) -> Success:
    content = Content(ChangeTaken, example(value))
    return Success(202, "It is written down, and goes on whatever happens.", content, _LOCATION)


def _body(kind: type, value: Json) -> Body:
    return Body(Content(kind, example(value, "all fields")), _BODY_BYTES_MAX)


CHANGE_ROUTES = (
    Route(
        "POST",
        _SHARDS,
        ChangeRoutes.add_shard,
        CHANGES_THE_CLUSTER,
        id="addShard",
        tag="cluster",
        summary="Add a shard",
        description="With `url` a shard that serves there already joins; without, the running `kvstore up` starts one. "
        f"Then its share of the partitions moves to it. {_GRACE}`Location` shows how far it is.",
        parameters=(_PLAN,),
        body=_body(NewShard, {"id": "s5", "url": "http://127.0.0.1:9105", "weight": 1}),
        answers=(_PLAN_ONLY, _taken({"id": "s5", "state": "joining", "epoch": 12})),
        errors=(*_ERRORS, ForeignData),
    ),
    Route(
        "PATCH",
        _SHARD,
        ChangeRoutes.weigh_shard,
        CHANGES_THE_CLUSTER,
        id="weighShard",
        tag="cluster",
        summary="Change a shard's weight",
        description=f"Its share of the partitions becomes larger or smaller in proportion. {_GRACE}",
        parameters=(_ID, _PLAN),
        body=_body(ShardChange, {"weight": 2}),
        answers=(_PLAN_ONLY, _taken({"id": "s5", "state": "up", "epoch": 13})),
        errors=(*_ERRORS, NotFound),
    ),
    Route(
        "DELETE",
        _SHARD,
        ChangeRoutes.remove_shard,
        CHANGES_THE_CLUSTER,
        id="removeShard",
        tag="cluster",
        summary="Drain and remove a shard",
        description="Its partitions move to the others; then it is no member any more, and the `kvstore up` that runs "
        f"its process ends it and keeps its file as shard-ID.db.removed. {_GRACE}The last shard cannot be removed. "
        "With lost=true its disk is taken for lost: once every other shard has heard of it, its partitions are opened "
        "again, empty; `confirm` is its id again, without which 409 says what would be lost.",
        parameters=(
            _ID,
            _PLAN,
            flag("lost", "Its disk is lost: its partitions are reopened, empty, by the others."),
            text("confirm", ShardId, "s5"),
        ),
        body=NO_BODY,
        answers=(_PLAN_ONLY, _taken({"id": "s5", "state": "leaving", "epoch": 14})),
        errors=(*_ERRORS, NotFound),
    ),
    Route(
        "POST",
        f"{_SHARD}/accept-old",
        ChangeRoutes.accept_old,
        CHANGES_THE_CLUSTER,
        id="acceptOld",
        tag="cluster",
        summary="Let a shard start with an older copy of its file",
        description="A shard that opens with less than it had told the controller is refused: all that its copy lacks "
        "was acknowledged and would be lost, and versions and fencing tokens could be given twice. Where there is no "
        "newer copy, this lets it start. `confirm` is the shard's id.",
        parameters=(_ID,),
        body=_body(AcceptOld, {"confirm": "s5"}),
        answers=(
            Success(
                202,
                "It may start.",
                Content(AcceptedOld, example({"id": "s5", "told": 48120, "version": 51200})),
                _LOCATION,
            ),
        ),
        errors=(*_ERRORS, NotFound),
    ),
    Route(
        "POST",
        f"{_SHARD}/promote",
        ChangeRoutes.promote,
        CHANGES_THE_CLUSTER,
        id="promoteCopy",
        tag="cluster",
        summary="Make another copy the primary",
        description="The primary hands over to the copy on node `to`, which is refused with 409 unless it is in sync. "
        f"No acknowledged write is lost, and no call fails; the shard stays there. {_GRACE}With accept_loss, and the "
        "shard's id in confirm, a copy that is not in sync becomes the primary, and what it lacks is lost: refused "
        "with 409 while the primary or a copy in sync is heard, and unconfirmed, with what would be lost.",
        parameters=(_ID,),
        body=_body(NewPrimary, {"to": "s2"}),
        answers=(_taken({"id": "s1", "to": "s2", "epoch": 16}),),
        errors=(*_ERRORS, NotFound),
    ),
    Route(
        "PATCH",
        "/v1/cluster",
        ChangeRoutes.replicate,
        CHANGES_THE_CLUSTER,
        id="changeReplicas",
        tag="cluster",
        summary="Keep more or fewer copies of every key",
        description="Copies are made while all is served. Where there are fewer nodes than copies, there are as many "
        "copies as nodes. Fewer are refused with 409 while a shard has no primary that answers.",
        body=_body(NewReplicas, {"replicas": 2}),
        answers=(_taken({"replicas": 2, "epoch": 17}),),
        errors=_ERRORS,
    ),
    Route(
        "GET",
        _MOVES,
        ChangeRoutes.moves,
        OF_THE_CLUSTER,
        id="getMoves",
        tag="cluster",
        summary="The moves that stand",
        answers=(Success(200, "In the order in which they are done.", Content(Moves, example(_EXAMPLE_MOVES))),),
    ),
    Route(
        "POST",
        _MOVES,
        ChangeRoutes.rebalance,
        CHANGES_THE_CLUSTER,
        id="rebalance",
        tag="cluster",
        summary="Plan again",
        description="From the present members and weights, as after a cancel.",
        parameters=(_PLAN,),
        body=NO_BODY,
        answers=(_PLAN_ONLY, _taken({"epoch": 15})),
        errors=_ERRORS,
    ),
    Route(
        "DELETE",
        _MOVES,
        ChangeRoutes.cancel,
        CHANGES_THE_CLUSTER,
        id="cancelMoves",
        tag="cluster",
        summary="Cancel what has not moved yet",
        description="What has moved stays where it is. A shard that was joining and has nothing yet is no member any "
        "more; one that was leaving stays.",
        body=NO_BODY,
        answers=(_taken({"epoch": 16}),),
        errors=_ERRORS,
    ),
    Route(
        "GET",
        "/v1/changes",
        ChangeRoutes.changes,
        OF_THE_CLUSTER,
        id="getChanges",
        tag="cluster",
        summary="The changes of the cluster",
        description="All that run, and the last that ended, the newest first; kept with the map.",
        answers=(Success(200, "The newest first.", Content(Changes, example({"items": [_EXAMPLE_RESOURCE]}))),),
    ),
    Route(
        "GET",
        "/v1/changes/{id}",
        ChangeRoutes.change,
        OF_THE_CLUSTER,
        id="getChange",
        tag="cluster",
        summary="A change of the cluster",
        description="Each call that answers 202 names one in `Location`. It is done when all that it asks for has come "
        "about and clients are answered for all that has moved.",
        parameters=(
            Parameter(
                "id",
                "path",
                Annotated[str, about(pattern="^[0-9a-f]+$")],
                example("6f1d0c3b9a8e4f27"),
                "The change.",
                decode_change_id,
            ),
        ),
        answers=(Success(200, "How far it is, or how it ended.", Content(Change, example(_EXAMPLE_RESOURCE))),),
        errors=(NotFound,),
    ),
)
