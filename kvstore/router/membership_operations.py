"""The operations that change the cluster as data: a part of the list `operations`.

Owns: what the routes of shards and moves take, and how they can answer.
Promises: as `operations`.
Leaves to others: the types and what several operations have in common (`operation`), the shape of JSON documents
(`schemas`).
"""

from __future__ import annotations

from kvstore.errors import BadBody, BodyTooLarge, ChangeRefused, ControllerBehind, ForeignData, NotFound, OutcomeUnknown
from kvstore.router.json_schema import ref, text
from kvstore.router.operation import (
    BODY,
    Content,
    Errors,
    Json,
    Operation,
    Success,
    example,
    flag,
    json_answer,
    query,
)
from kvstore.transport.http import JSON

_SHARDS, _SHARD, _MOVES = "/v1/shards", "/v1/shards/{id}", "/v1/moves"
_CHANGES, _CHANGE = "/v1/changes", "/v1/changes/{id}"
_ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "description": "The shard.",
    "schema": ref("ShardId"),
    "example": "s5",
}
_PLAN = query("plan", flag("Change nothing: only tell what would move."), True)
_ERRORS: Errors = (BadBody, BodyTooLarge, *BODY, ChangeRefused, ControllerBehind, OutcomeUnknown)
_LOCATION = ("Location",)
_GRACE = "No call fails because of it. Changes asked for while others are under way are planned together with them. "
EXAMPLE_MOVE = {
    "from": "s1", "to": "s5", "partitions": 210, "step": "copy", "keys_done": 1200, "keys_total": 7800,
    "bytes_done": 139200, "write_pause_ms": 0.0, "detail": "",
}  # fmt: skip
EXAMPLE_CHANGE = {
    "partitions": 610, "keys": 22380, "bytes": 2596080, "groups": 3, "seconds": 1.42, "write_pause_ms_max": 31.5,
    "write_pause_ms_p99": 31.5,
}  # fmt: skip
EXAMPLE_RESOURCE = {
    "id": "6f1d0c3b9a8e4f27", "kind": "add", "shard": "s5", "weight": 1, "state": "running",
    "detail": "610 of 820 partitions have moved.", "waiting_for": None, "progress": 0.7823,
    "partitions_done": 610, "partitions_total": 820, "keys_done": 23580, "keys_total": 30180,
    "bytes_done": 2735280, "groups_done": 3, "started_at": "2026-11-28T21:14:03.250Z", "ended_at": None,
    "seconds": 1.42, "write_pause_ms_max": 31.5, "write_pause_ms_p99": 31.5,
}  # fmt: skip
_EXAMPLE_PLAN = {
    "partitions": 820, "keys": 30180, "bytes": 3500880,
    "moves": [{"from": "s1", "to": "s5", "partitions": 820, "keys": 30180, "bytes": 3500880}],
}  # fmt: skip


def membership_operations() -> list[Operation]:
    """All of them but HEAD, which is that of GET without bodies."""
    return [_add(), _weigh(), _remove(), _accept_old(), _moves(), _rebalance(), _cancel(), _changes(), _change()]


def _add() -> Operation:
    return Operation(
        _SHARDS,
        "POST",
        id="addShard",
        tag="cluster",
        summary="Add a shard",
        description="With `url` a shard that serves there already joins; without, the running `kvstore up` starts one. "
        f"Then its share of the partitions moves to it. {_GRACE}`Location` shows how far it is.",
        parameters=(_PLAN,),
        body=_body("NewShard", {"id": "s5", "url": "http://127.0.0.1:9105", "weight": 1}),
        answers=(_plan_only(), _taken({"id": "s5", "state": "joining", "epoch": 12})),
        errors=(*_ERRORS, ForeignData),
    )


def _weigh() -> Operation:
    return Operation(
        _SHARD,
        "PATCH",
        id="weighShard",
        tag="cluster",
        summary="Change a shard's weight",
        description=f"Its share of the partitions becomes larger or smaller in proportion. {_GRACE}",
        parameters=(_ID, _PLAN),
        body=_body("ShardChange", {"weight": 2}),
        answers=(_plan_only(), _taken({"id": "s5", "state": "up", "epoch": 13})),
        errors=(*_ERRORS, NotFound),
    )


def _remove() -> Operation:
    return Operation(
        _SHARD,
        "DELETE",
        id="removeShard",
        tag="cluster",
        summary="Drain and remove a shard",
        description="Its partitions move to the others; then it is no member any more, and the `kvstore up` that runs "
        f"its process ends it and keeps its file as shard-ID.db.removed. {_GRACE}The last shard cannot be removed. "
        "With lost=true its disk is taken for lost: once every other shard has heard of it, its partitions are opened "
        "anew, empty; `confirm` is its id again, without which 409 says what would be lost.",
        parameters=(
            _ID,
            _PLAN,
            query("lost", flag("Its disk is lost: its partitions are opened anew, empty, by the others."), True),
            query("confirm", ref("ShardId"), "s5"),
        ),
        answers=(_plan_only(), _taken({"id": "s5", "state": "leaving", "epoch": 14})),
        errors=(*_ERRORS, NotFound),
    )


def _accept_old() -> Operation:
    return Operation(
        f"{_SHARD}/accept-old",
        "POST",
        id="acceptOld",
        tag="cluster",
        summary="Let a shard start with an older copy of its file",
        description="A shard that opens with less than it had told the controller is refused: all that its copy lacks "
        "was acknowledged and would be lost, and versions and fencing tokens could be given twice. Where there is no "
        "newer copy, this lets it start. `confirm` is the shard's id.",
        parameters=(_ID,),
        body=_body("AcceptOld", {"confirm": "s5"}),
        answers=(
            json_answer("It may start.", "AcceptedOld", {"id": "s5", "told": 48120, "version": 51200}, 202, _LOCATION),
        ),
        errors=(*_ERRORS, NotFound),
    )


def _moves() -> Operation:
    document = {"epoch": 12, "moves": [EXAMPLE_MOVE], "wanted": [], "ending": [], "last": EXAMPLE_CHANGE}
    return Operation(
        _MOVES,
        "GET",
        id="getMoves",
        tag="cluster",
        summary="The moves that stand",
        answers=(json_answer("In the order in which they are done.", "Moves", document),),
    )


def _rebalance() -> Operation:
    return Operation(
        _MOVES,
        "POST",
        id="rebalance",
        tag="cluster",
        summary="Plan anew",
        description="From the present members and weights, as after a cancel.",
        parameters=(_PLAN,),
        answers=(_plan_only(), _taken({"epoch": 15})),
        errors=_ERRORS,
    )


def _cancel() -> Operation:
    return Operation(
        _MOVES,
        "DELETE",
        id="cancelMoves",
        tag="cluster",
        summary="Cancel what has not moved yet",
        description="What has moved stays where it is. A shard that was joining and has nothing yet is no member any "
        "more; one that was leaving stays.",
        answers=(_taken({"epoch": 16}),),
        errors=_ERRORS,
    )


def _changes() -> Operation:
    return Operation(
        _CHANGES,
        "GET",
        id="getChanges",
        tag="cluster",
        summary="The changes of the cluster",
        description="All that run, and the last that ended, the newest first; kept with the map.",
        answers=(json_answer("The newest first.", "Changes", {"items": [EXAMPLE_RESOURCE]}),),
    )


def _change() -> Operation:
    return Operation(
        _CHANGE,
        "GET",
        id="getChange",
        tag="cluster",
        summary="A change of the cluster",
        description="Each call that answers 202 names one in `Location`. It is done when all that it asks for has come "
        "about and clients are answered for all that has moved.",
        parameters=(
            {**_ID, "description": "The change.", "schema": text(pattern="^[0-9a-f]+$"), "example": "6f1d0c3b9a8e4f27"},
        ),
        answers=(json_answer("How far it is, or how it ended.", "Change", EXAMPLE_RESOURCE),),
        errors=(NotFound,),
    )


def _body(schema: str, value: Json) -> Json:
    return {"required": True, "content": Content(JSON, ref(schema), example("all fields", value)).render()}


def _taken(value: Json) -> Success:
    return json_answer("It is written down, and goes on whatever happens.", "ChangeTaken", value, 202, _LOCATION)


def _plan_only() -> Success:
    return json_answer("With plan=true: what would move.", "Plan", _EXAMPLE_PLAN)
