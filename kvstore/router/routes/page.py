"""The page over HTTP: `/` for browsers, and the files below `/page/`.

Owns: who gets the page and who the JSON index at `/`, and the header fields of the page's files.
Promises: a client that does not ask for HTML gets JSON; every file comes with the content security policy, an entity
tag, and `no-cache`, so that a browser asks again and is answered 304.
Leaves to others: the files and the policy (`kvstore.dashboard`), the index (`process`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from kvstore.dashboard.files import CONTENT_SECURITY_POLICY, INDEX, StaticFile, static_files
from kvstore.errors import NoSuchRoute
from kvstore.router.routes.words import KEY_IN_PATH, OF_ANYONE, condition
from kvstore.transport.http.requests import Head, decode_key
from kvstore.transport.http.responses import Response
from kvstore.transport.http.routes import Call, Content, Parameter, Route, Success, example
from kvstore.transport.http.schema import about

_NAME_BYTES_MAX = 1024
_QUALITY = re.compile(r"\s*q\s*=\s*([01](?:\.[0-9]{0,3})?)\s*", re.IGNORECASE)


def wants_page(head: Head) -> bool:
    """The client prefers HTML to JSON and has named it (RFC 9110, section 12.5.1): browsers do, curl does not."""
    qualities = {}
    for item in head.fields.get("accept", "").split(","):
        media_range, *parameters = item.split(";")
        quality = next((float(match[1]) for each in parameters if (match := _QUALITY.fullmatch(each))), 1.0)
        qualities[media_range.strip().lower()] = quality
    html = qualities.get("text/html", 0.0)
    return html > 0 and html >= qualities.get("application/json", 0.0)


def index_page(head: Head) -> Response:
    """The page itself."""
    return _answer(static_files()[INDEX], head, "Vary: Accept\r\n")


class PageRoutes:
    """The files of the page."""

    async def file(self, call: Call) -> Response:
        """A file below `/page/`. Raises NoSuchRoute."""
        found = static_files().get(call.argument)
        if found is None:
            raise NoSuchRoute(f"the page has no file {call.argument[:200]!a}.")
        return _answer(found, call.head, "")


def _answer(found: StaticFile, head: Head, lines: str) -> Response:
    lines += (
        f"ETag: {found.etag}\r\nCache-Control: no-cache\r\nX-Content-Type-Options: nosniff\r\n"
        f"Content-Security-Policy: {CONTENT_SECURITY_POLICY}\r\nReferrer-Policy: no-referrer\r\n"
        "Cross-Origin-Opener-Policy: same-origin\r\nCross-Origin-Resource-Policy: same-origin\r\n"
    )
    known = [tag.strip().removeprefix("W/") for tag in head.fields.get("if-none-match", "").split(",")]
    if found.etag in known or known == ["*"]:
        return Response(304, lines=lines)
    return Response(200, found.body, found.media_type, lines)


# --- the entry --------------------------------------------------------------------------------------------------------

HTML = Content(str, example("<!doctype html>", "its start"), "text/html; charset=utf-8")

_SAFE = ("Page-ETag", "Content-Security-Policy", "Cache-Control", "X-Content-Type-Options")
_FILE = Parameter(
    "file",
    "path",
    Annotated[str, about(enum=sorted(static_files()))],
    example("app.js"),
    "One of those that the page names.",
    lambda raw, limits: decode_key(raw, _NAME_BYTES_MAX),
)

PAGE_ROUTES = (
    Route(
        "GET",
        "/page/{file}",
        PageRoutes.file,
        OF_ANYONE,
        id="getPageFile",
        tag="page",
        summary="A file of the page",
        parameters=(_FILE, condition("If-None-Match", "304 if the file still has one of these")),
        answers=(
            Success(200, "The file.", Content(Any, example("export const …", "a script"), "*/*"), _SAFE),
            Success(304, "If-None-Match names its tag.", None, _SAFE),
        ),
        errors=(*KEY_IN_PATH, NoSuchRoute),
    ),
)
