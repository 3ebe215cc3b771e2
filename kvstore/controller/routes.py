"""The controller's calls, for shards, routers and launchers, and for people by way of a router.

Owns: the entries of its route table, and the form of bodies and answers.
Promises: setting `stop` ends the long polls under way.
Leaves to others: every rule (`service`, `operator_changes`, `mover`), decoding (`transport.http.routes`).

With ?plan=true a POST, PATCH or DELETE of shards and a POST of moves change nothing, and say what would move: 200.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from functools import partial
from typing import Any, TypeVar

import msgspec

from kvstore.config import ID_PATTERN, Limits
from kvstore.controller.bodies import NewTold, Recover
from kvstore.controller.change_views import ChangeViews
from kvstore.controller.copy_asks import with_primary, with_replicas
from kvstore.controller.copy_keeper import check_beat
from kvstore.controller.document import ClusterDocument
from kvstore.controller.map_store.interface import Told
from kvstore.controller.membership import Announcement, formed_map
from kvstore.controller.operator_changes import Asked, Replanned
from kvstore.controller.parts import Parts
from kvstore.controller.recovery import described
from kvstore.controller.service import Waiting
from kvstore.errors import (
    BadBody,
    BadParameter,
    BodyTooLarge,
    ChangeRefused,
    Conflict,
    ControllerBehind,
    ForeignData,
    NotFound,
    OtherProtocol,
)
from kvstore.metrics import exposition, move_families
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.beats import Beat, BeatAnswer
from kvstore.transport.bodies import BodyReader
from kvstore.transport.change_documents import AcceptOld, NewPrimary, NewReplicas, NewShard, ShardChange
from kvstore.transport.http.responses import TEXT, Response, json_response
from kvstore.transport.http.routes import (
    Body,
    Call,
    Content,
    Errors,
    Keys,
    Parameter,
    Right,
    Route,
    RouteTable,
    Success,
    Touches,
    example,
    flag,
    text,
)
from kvstore.transport.sessions import PARAMETER

_BODY_BYTES_MAX = 64 * 1024
_BEAT_BYTES_MAX = 1024 * 1024
_Result = TypeVar("_Result")


# --- documents --------------------------------------------------------------------------------------------------------


class Wait(msgspec.Struct, frozen=True):
    """202 to an announcement: of which shards the first map waits."""

    waiting_for: list[str]


class Health(msgspec.Struct, frozen=True):
    """The process lives."""

    status: str


# --- handlers ---------------------------------------------------------------------------------------------------------


class _Poll:
    """Waits for what comes some time, but no longer than a long poll may last."""

    def __init__(self, poll_s: float, stop: asyncio.Event) -> None:
        self._poll_s = poll_s
        self._stop = stop

    async def wait_for(self, coming: Awaitable[_Result]) -> _Result | None:
        """None if it has not come in time, or the process stops."""
        waiting = asyncio.ensure_future(coming)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({waiting, stopping}, timeout=self._poll_s, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()
            stopping.cancel()
            await asyncio.gather(waiting, stopping, return_exceptions=True)


class MemberRoutes:
    """For shards, routers and launchers. `session`: the id that this process has drawn."""

    def __init__(self, parts: Parts, poll: _Poll, session: str) -> None:
        self._session = session
        self._service = parts.service
        self._launches = parts.launches
        self._keeper = parts.keeper
        self._poll = poll

    async def get_map(self, call: Call) -> Response:
        epoch = call.get("after")
        if cluster_id := call.get("cluster"):
            self._service.hear(cluster_id, epoch)
            self._service.on_clock(call.get("clock"))
        if call.parameters.get(PARAMETER, self._session) != self._session:
            return Response(204)  # so that it announces itself here soon
        found = await self._poll.wait_for(self._service.map_after(epoch))
        return json_response(200, found) if found is not None else Response(204)

    async def post_member(self, call: Call) -> Response:
        answer = await self._service.announce(call.body)
        if isinstance(answer, Waiting):
            return json_response(202, Wait(answer.waiting_for))
        return json_response(200, answer)

    async def post_told(self, call: Call) -> Response:
        told: NewTold = call.body
        kept = await self._service.tell(told.store_id, Told(told.number, told.version), told.copy_id)
        return json_response(200, kept._asdict())

    async def post_beat(self, call: Call) -> Response:
        check_beat(call.argument, call.body)
        return json_response(200, await self._keeper.beat(call.body))

    async def get_launch(self, call: Call) -> Response:
        found = await self._poll.wait_for(self._launches.after(call.get("after"), call.get("running")))
        return json_response(200, found) if found is not None else Response(204)


class ChangeRoutes:
    """For people, by way of a router."""

    def __init__(self, document: ClusterDocument, parts: Parts, views: ChangeViews) -> None:
        self._document = document
        self._changes = parts.changes
        self._launches = parts.launches
        self._mover = parts.mover
        self._keeper = parts.keeper
        self._views = views

    async def post_shard(self, call: Call) -> Response:
        new: NewShard = call.body
        if call.get("plan"):
            return json_response(200, await self._changes.plan_add(new.id, new.url, new.weight))
        return _asked(await self._changes.add(new.id, new.url, new.weight))

    async def patch_shard(self, call: Call) -> Response:
        weight = call.body.weight
        if call.get("plan"):
            return json_response(200, await self._changes.plan_reweigh(call.argument, weight))
        return _asked(await self._changes.reweigh(call.argument, weight))

    async def delete_shard(self, call: Call) -> Response:
        only_plan, is_lost = call.get("plan"), call.get("lost")
        if (is_lost and only_plan) or ("confirm" in call.parameters and not is_lost):
            raise BadParameter("confirm goes with lost=true, and plan with neither.")
        if is_lost:
            return _taken(await self._changes.give_up(call.argument, call.parameters.get("confirm")))
        if only_plan:
            return json_response(200, await self._changes.plan_remove(call.argument))
        return _asked(await self._changes.remove(call.argument))

    async def post_accept_old(self, call: Call) -> Response:
        return _taken(await self._changes.accept_old(call.argument, call.body.confirm))

    async def post_promote(self, call: Call) -> Response:
        asked: NewPrimary = call.body
        shard, to = call.argument, asked.to
        if asked.accept_loss:
            await self._formed()
            return _taken(await self._keeper.promote_with_loss(shard, to, asked.confirm))
        if asked.confirm is not None:
            raise BadBody("confirm goes with accept_loss.")
        state, change_id = await self._changes.take(
            "promote", lambda state: with_primary(state, shard, to, self._keeper.is_dead), shard, to=to
        )
        return _taken({"id": shard, "to": to, "epoch": formed_map(state).epoch, "change": change_id})

    async def patch_cluster(self, call: Call) -> Response:
        replicas: int = call.body.replicas
        places = self._keeper.places(await self._formed())
        rule = partial(with_replicas, replicas=replicas, unserved=places.unserved() if places is not None else ())
        state, change_id = await self._changes.take("replicas", rule, replicas=replicas)
        return _taken({"replicas": replicas, "epoch": formed_map(state).epoch, "change": change_id})

    async def _formed(self) -> ClusterMap:
        """The map. Raises Unavailable, and ControllerBehind if it was lost."""
        state = await self._document.read()
        if lost := self._changes.recovery.lost(state):
            raise lost
        return formed_map(state)

    async def get_recovery(self, call: Call) -> Response:
        return json_response(200, described(await self._changes.recovery.found()))

    async def post_recovery(self, call: Call) -> Response:
        asked: Recover = call.body
        return _replanned(await self._changes.recover(asked.cluster_id, asked.epoch, asked.without))

    async def get_moves(self, call: Call) -> Response:
        state = await self._document.read()
        moves, epoch = [], 0
        if state.map is not None:
            epoch = state.map.epoch
            await self._mover.tries.caught_up(state.map)
            moves = self._mover.tries.report(state.map)
        wanted = list(state.wanted)
        ending = self._launches.ending(state)
        last = self._views.last(state)
        told = {"epoch": epoch, "moves": moves, "wanted": wanted, "ending": ending, "last": last}
        if call.get("copies"):
            copies = self._keeper.facts(state.map, state.changes) if state.map is not None else None
            behind = self._document.behind(state) or self._changes.recovery.lost(state)
            told |= {"copies": copies} if copies is not None else {}
            told |= {"behind": behind.detail} if behind is not None else {}
        return json_response(200, told)

    async def post_moves(self, call: Call) -> Response:
        if call.get("plan"):
            return json_response(200, await self._changes.plan_plan())
        return _replanned(await self._changes.replan())

    async def delete_moves(self, call: Call) -> Response:
        return _replanned(await self._changes.cancel())

    async def get_changes(self, call: Call) -> Response:
        return json_response(200, {"items": await self._views.all()})

    async def get_change(self, call: Call) -> Response:
        return json_response(200, await self._views.one(call.argument))

    async def get_metrics(self, call: Call) -> Response:
        state = await self._document.read()
        steps = self._mover.tries.steps(state.map) if state.map is not None else {}
        epoch = state.map.epoch if state.map is not None else 0
        moves = move_families(self._mover.record.stats, steps, epoch)
        return Response(200, exposition(moves, self._keeper.families(state.map)), TEXT)

    async def get_health(self, call: Call) -> Response:
        return json_response(200, Health("ok"))


def _asked(asked: Asked) -> Response:
    return _taken(asked._asdict())


def _replanned(replanned: Replanned) -> Response:
    return _taken({"epoch": replanned.map.epoch, "change": replanned.change})


def _taken(document: dict[str, Any]) -> Response:
    """202, where its change can be followed."""
    shown = {name: value for name, value in document.items() if name != "change"}
    return json_response(202, shown, f"Location: /v1/changes/{document['change']}\r\n")


# --- the entries ------------------------------------------------------------------------------------------------------


def _whole_number(name: str, description: str, default: int = 0) -> Parameter:
    def decode(given: str, limits: Limits) -> int:
        if not re.fullmatch("[0-9]{1,16}", given) and given != str(default):
            raise BadParameter(f"{name}={given!r} must be a whole number from 0.", parameter=name)
        return int(given)

    return Parameter(name, "query", int, example(12), description, decode, default)


def _decode_running(given: str, limits: Limits) -> frozenset[str]:
    running = frozenset(filter(None, given.split(",")))
    for shard_id in running:
        if not ID_PATTERN.fullmatch(shard_id):
            raise BadParameter(f"running={shard_id!r}: {shard_id!r} is no shard id.", parameter="running")
    return running


def _body(kind: Any, value: Any, bytes_max: int = _BODY_BYTES_MAX) -> Body:
    return Body(Content(kind, example(value)), bytes_max)


_PEER, _SEES = Touches(Right.PEER, Keys.NONE), Touches(Right.READ, Keys.NONE)
_CHANGES = Touches(Right.ADMIN, Keys.ALL)
_SHARDS, _SHARD, _MOVES = "/v1/shards", "/v1/shards/{id}", "/v1/moves"
_ID = Parameter("id", "path", str, example("s5"), "The shard.")
_CHANGE_ID = Parameter("id", "path", str, example("6f1d0c3b"), "The change.")
_PLAN = flag("plan", "Change nothing: only tell what would move.")
_BODY: Errors = (BadBody, BodyTooLarge)
_REFUSED: Errors = (ChangeRefused, ControllerBehind)
_NODE_ID = Parameter("id", "path", str, example("s5"), "The node.")
_BEAT = {"node": "s1", "start": "5c1e0a77", "cluster_id": "0f5c", "epoch": 7}
_ANNOUNCED = {"id": "s1", "url": "http://127.0.0.1:9101", "store_id": "9f3c"}
_MAP = Content(ClusterMap, {})
_DOCUMENT = Content(dict[str, Any], {})
_PLANNED = Success(200, "With plan=true: what would move.", _DOCUMENT)
_IS_TAKEN = Success(202, "It is written down.", _DOCUMENT)
_NOTHING_NEW = Success(204, "There was nothing new within limits.map_poll_s.")
_POLLED = (
    _whole_number("after", "The epoch that is known; the answer waits for one above it."),
    text("cluster", str, "0f5c7a1e9b2d4c63", "The cluster that the asker belongs to."),
    _whole_number("clock", "The highest version that the asker has given or seen."),
    text(PARAMETER, str, "5c1e0a77", "Its session of announcements; in another one it is answered 204 at once."),
)
_LAUNCHED = (
    _whole_number("after", "The revision that is known; the answer waits for another one.", -1),
    Parameter(
        "running", "query", str, example("s1,s2"), "Shards that it runs.", _decode_running, lambda limits: frozenset()
    ),
)


def _entry(
    method: str,
    path: str,
    handler: Any,
    touches: Touches,
    summary: str,
    *answers: Success,
    parameters: tuple[Parameter, ...] = (),
    body: Body | None = None,
    errors: Errors = (),
    is_hello: bool = False,
) -> Route:
    name = handler.__name__.replace("_", "-")
    errors = (*errors, OtherProtocol) if is_hello else errors
    return Route(
        method, path, handler, touches, name, "controller", summary, answers, "", parameters, body, errors,
        is_hello=is_hello,
    )  # fmt: skip


MEMBER_ROUTES = (
    _entry(
        "GET", "/v1/map", MemberRoutes.get_map, _PEER, "The cluster map, once it is newer",
        Success(200, "The map.", _MAP), _NOTHING_NEW, parameters=_POLLED,
    ),
    _entry(
        "POST", "/v1/members", MemberRoutes.post_member, _PEER, "A shard announces itself",
        Success(200, "The map.", _MAP), Success(202, "The first map waits for others.", Content(Wait, {})),
        body=_body(Announcement, _ANNOUNCED), errors=(*_BODY, Conflict, ForeignData),
        is_hello=True,
    ),
    _entry(
        "POST", "/v1/told", MemberRoutes.post_told, _PEER, "Keep what a log has made durable",
        Success(200, "The highest that was told.", _DOCUMENT),
        body=_body(NewTold, {"store_id": "9f3c", "number": 7, "version": 41}), errors=(*_BODY, Conflict),
    ),
    _entry(
        "POST", "/v1/nodes/{id}/beat", MemberRoutes.post_beat, _PEER, "A node tells of its copies",
        Success(200, "What to do.", Content(BeatAnswer, {})),
        parameters=(_NODE_ID,), body=_body(Beat, _BEAT, _BEAT_BYTES_MAX), errors=(*_BODY, Conflict),
        is_hello=True,
    ),
    _entry(
        "GET", "/v1/launch", MemberRoutes.get_launch, _PEER, "What a launcher is to run, once that changes",
        Success(200, "What to run.", _DOCUMENT), _NOTHING_NEW, parameters=_LAUNCHED,
    ),
)  # fmt: skip
CHANGE_ROUTES = (
    _entry(
        "GET", "/v1/recovery", ChangeRoutes.get_recovery, _CHANGES,
        "The newest map that the nodes have, when this controller's is lost or old", Success(200, "It.", _DOCUMENT),
    ),
    _entry(
        "POST", "/v1/recovery", ChangeRoutes.post_recovery, _CHANGES, "Go on with the map that was shown",
        _IS_TAKEN, body=_body(Recover, {"cluster_id": "0f5c", "epoch": 12}), errors=(*_BODY, ChangeRefused),
    ),
    _entry(
        "POST", _SHARDS, ChangeRoutes.post_shard, _CHANGES, "Add a shard", _PLANNED, _IS_TAKEN,
        parameters=(_PLAN,), body=_body(NewShard, {"id": "s5"}), errors=(*_BODY, *_REFUSED, ForeignData),
    ),
    _entry(
        "PATCH", _SHARD, ChangeRoutes.patch_shard, _CHANGES, "Change a shard's weight", _PLANNED, _IS_TAKEN,
        parameters=(_ID, _PLAN), body=_body(ShardChange, {"weight": 2}), errors=(*_BODY, *_REFUSED, NotFound),
    ),
    _entry(
        "DELETE", _SHARD, ChangeRoutes.delete_shard, _CHANGES,
        "Remove a shard; with lost=true and confirm={id} give it up with all that it has", _PLANNED, _IS_TAKEN,
        parameters=(
            _ID, _PLAN, flag("lost", "Its disk is lost."), text("confirm", str, "s5", "The id again, with lost=true."),
        ),
        errors=(*_REFUSED, NotFound),
    ),
    _entry(
        "POST", f"{_SHARD}/accept-old", ChangeRoutes.post_accept_old, _CHANGES,
        "Let a shard start with less than it told", _IS_TAKEN,
        parameters=(_ID,), body=_body(AcceptOld, {"confirm": "s5"}), errors=(*_BODY, *_REFUSED, NotFound),
    ),
    _entry(
        "POST", f"{_SHARD}/promote", ChangeRoutes.post_promote, _CHANGES, "Make another copy the primary", _IS_TAKEN,
        parameters=(_ID,), body=_body(NewPrimary, {"to": "s2"}), errors=(*_BODY, *_REFUSED, NotFound),
    ),
    _entry(
        "PATCH", "/v1/cluster", ChangeRoutes.patch_cluster, _CHANGES, "More or fewer copies of every key", _IS_TAKEN,
        body=_body(NewReplicas, {"replicas": 2}), errors=(*_BODY, *_REFUSED),
    ),
    _entry(
        "GET", _MOVES, ChangeRoutes.get_moves, _SEES, "What moves", Success(200, "It.", _DOCUMENT),
        parameters=(flag("copies", "Tell of nodes and copies, too."),),
    ),
    _entry(
        "POST", _MOVES, ChangeRoutes.post_moves, _CHANGES, "Plan again", _PLANNED, _IS_TAKEN,
        parameters=(_PLAN,), errors=_REFUSED,
    ),
    _entry(
        "DELETE", _MOVES, ChangeRoutes.delete_moves, _CHANGES, "Cancel what is not committed", _IS_TAKEN,
        errors=_REFUSED,
    ),
    _entry(
        "GET", "/v1/changes", ChangeRoutes.get_changes, _SEES, "Changes of the cluster, the newest first",
        Success(200, "Those that are known.", _DOCUMENT),
    ),
    _entry(
        "GET", "/v1/changes/{id}", ChangeRoutes.get_change, _SEES, "One of them",
        Success(200, "How far it is, or how it ended.", _DOCUMENT), parameters=(_CHANGE_ID,), errors=(NotFound,),
    ),
    _entry(
        "GET", "/healthz", ChangeRoutes.get_health, Touches(Right.NONE, Keys.NONE), "Whether the process is alive",
        Success(200, "It is.", Content(Health, {})),
    ),
    _entry(
        "GET", "/metrics", ChangeRoutes.get_metrics, _SEES, "Metrics",
        Success(200, "Prometheus text format.", Content(str, {}, TEXT)),
    ),
)  # fmt: skip


def make_table(
    document: ClusterDocument,
    parts: Parts,
    views: ChangeViews,
    limits: Limits,
    stop: asyncio.Event,
    session: str,
) -> RouteTable:
    """All calls of a controller. Setting `stop` ends the long polls under way."""
    table = RouteTable(limits, BodyReader(limits))
    table.add(MemberRoutes(parts, _Poll(limits.map_poll_s, stop), session), MEMBER_ROUTES)
    table.add(ChangeRoutes(document, parts, views), CHANGE_ROUTES)
    return table
