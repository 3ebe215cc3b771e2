"""The operations that the page lives on as data: a part of the list `operations`; and those of a demo.

Owns: what the routes of the page, of the events and of the demo take, and how they can answer.
Promises: as `operations`. The demo's are documented where they exist, and nowhere else.
Leaves to others: the types and what several operations have in common (`operation`), the shape of the documents
(`event_schemas`).
"""

from __future__ import annotations

from kvstore.dashboard.files import static_files
from kvstore.errors import BadBody, BodyTooLarge, ChangeRefused, Conflict, NoSuchRoute, TooManyRequests
from kvstore.router.event_schemas import EVENTS
from kvstore.router.json_schema import ref, text
from kvstore.router.operation import BODY, KEY_IN_PATH, Content, Operation, Success, condition, example, json_answer
from kvstore.transport.http.responses import JSON

EXAMPLE_PAGE_HTML = Content("text/html; charset=utf-8", {"type": "string"}, example("its start", "<!doctype html>"))

_SAFE = ("Page-ETag", "Content-Security-Policy", "Cache-Control", "X-Content-Type-Options")
_EXAMPLE_EVENTS = (
    'id: 5c1e-8\nevent: snapshot\ndata: {"router":"0","cluster":…}\n\n'
    'id: 5c1e-9\nevent: rates\ndata: {"at_ms":1790000000000,"reads":812.0,…}\n\n'
)


def page_operations() -> list[Operation]:
    """All of them but HEAD, which is that of GET without bodies."""
    return [_events(), _file()]


def _events() -> Operation:
    kinds = ", ".join(f"`{kind}` ({schema})" for kind, schema in EVENTS.items())
    stream = Content("text/event-stream", {"type": "string"}, example("its start", _EXAMPLE_EVENTS))
    return Operation(
        "/v1/events",
        "GET",
        id="getEvents",
        tag="page",
        summary="The cluster as it changes",
        description="Server-sent events, for the page and for people: `curl -N`. First a `snapshot` (Snapshot), or "
        f"after a Last-Event-ID of this router's start what has changed since; then changes: {kinds}. The data of each "
        "is the whole new document of that kind, with the schema named, at most four a second of a kind. A comment "
        "when nothing was said for 15 s. A listener that does not read is cut off.",
        answers=(Success(200, "It does not end by itself.", stream, ("Cache-Control", "X-Content-Type-Options")),),
        parameters=(
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "The id of the last event seen. One that this router does not know gets a snapshot.",
                "schema": text(),
                "example": "5c1e-9",
            },
        ),
        errors=(TooManyRequests,),
    )


def _file() -> Operation:
    content = Content("*/*", {}, example("a script", "export const …"))
    name = {
        "name": "file",
        "in": "path",
        "required": True,
        "description": "One of those that the page names.",
        "schema": text(enum=sorted(static_files())),
        "example": "app.js",
    }
    return Operation(
        "/page/{file}",
        "GET",
        id="getPageFile",
        tag="page",
        summary="A file of the page",
        parameters=(name, condition("If-None-Match", "304 if the file still has one of these")),
        answers=(
            Success(200, "The file.", content, _SAFE),
            Success(304, "If-None-Match names its tag.", None, _SAFE),
        ),
        errors=(*KEY_IN_PATH, NoSuchRoute),
    )


def demo_operations(routes: tuple[str, ...]) -> list[Operation]:
    """Those of these routes."""
    return [operation for operation in (_transfer(), _coordinate()) if operation.route in routes]


def _transfer() -> Operation:
    body = Content(JSON, ref("Transfer"), example("all fields", {"amount": 10, "stop": "before-decision"}))
    return Operation(
        "/v1/demo/transfer",
        "POST",
        id="playTransfer",
        tag="page",
        summary="Play a transfer through",
        description="Between two accounts on different shards, coordinated by a second router, which is killed where "
        "`stop` says. The event `play` tells each step. Only with `kvstore up --demo`, on loopback.",
        body={"required": False, "content": body.render()},
        answers=(json_answer("It has begun.", "TransferTaken", {"play": 1}, 202),),
        errors=(BadBody, BodyTooLarge, *BODY, Conflict, ChangeRefused),
    )


def _coordinate() -> Operation:
    value = {"transaction": {"then": [{"op": "put", "key": "a", "value": "1"}]}, "stop": "never"}
    lines = Content(
        "application/x-ndjson",
        {"type": "string"},
        example("a line", '{"at_ms":0.8,"kind":"sent","shard":"s2","message":"prepare"}\n'),
    )
    return Operation(
        "/v1/demo/coordinate",
        "POST",
        id="coordinate",
        tag="page",
        summary="Run a transaction and tell each message of it",
        description="Of the second router that `kvstore up --demo` starts; it kills itself where `stop` says.",
        body={"required": True, "content": Content(JSON, ref("Coordinate"), example("all fields", value)).render()},
        answers=(Success(200, "A line of JSON per message, as it happens.", lines),),
        errors=(BadBody, BodyTooLarge, *BODY),
    )
