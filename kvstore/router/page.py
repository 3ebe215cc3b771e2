"""The page over HTTP: `/` for browsers, and the files below `/page/`.

Owns: who gets the page and who the JSON index at `/`, and the header fields of the page's files.
Promises: a client that does not ask for HTML gets JSON; every file comes with the content security policy, an entity
tag, and `no-cache`, so that a browser asks again and is answered 304.
Leaves to others: the files and the policy (`kvstore.dashboard`), the index (`app`).
"""

from __future__ import annotations

import re

from kvstore.dashboard.files import CONTENT_SECURITY_POLICY, INDEX, StaticFile, static_files
from kvstore.errors import NoSuchRoute
from kvstore.transport.http.requests import Head, decode_key, decode_query
from kvstore.transport.http.responses import Response

PAGE_PREFIX = "/page/"
PAGE_ROUTE = "/page/{file}"

_NONE: frozenset[str] = frozenset()
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


def page_file(head: Head) -> Response:
    """A file below `/page/`. Raises NoSuchRoute, and the errors of `decode_key`."""
    decode_query(head.query, _NONE)
    found = static_files().get(decode_key(head.path[len(PAGE_PREFIX) :], _NAME_BYTES_MAX))
    if found is None:
        raise NoSuchRoute(f"the page has no file {head.path[:200]!a}")
    return _answer(found, head, "")


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
