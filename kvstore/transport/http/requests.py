"""Requests taken apart, strictly: line, header fields, path, query; and who may send them.

Owns: the head of a request; the decoding of keys and queries; the check of Host and Origin.
Promises: bytes that are not UTF-8, broken escapes, unknown or repeated parameters never pass for something else.
Leaves to others: which parameters a call takes (`routes`), bodies (`transport.bodies`).
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from aiohttp import web

from kvstore.errors import BadParameter, BadRequest, Foreign, KeyEmpty, KeyNotUtf8, KeyTooLong

_BROKEN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_IP_LITERAL = re.compile(r"\d{1,3}(\.\d{1,3}){3}|\[[0-9A-Fa-f:.]+\]")


class Head(NamedTuple):
    """A request line and its header fields, decoded. `path` is raw; the names in `fields` are lower case."""

    method: str
    path: str
    query: str
    fields: dict[str, str]


def read_head(request: web.BaseRequest) -> Head:
    """Take the request apart. Raises BadRequest for a repeated field that may come but once."""
    path, _, query = request.raw_path.partition("?")
    if not path.startswith("/") and "://" in path:
        path = "/" + path.partition("://")[2].partition("/")[2]
    fields: dict[str, str] = {}
    for raw_name, raw_value in request.raw_headers:
        name = raw_name.decode("ascii", "replace").lower()
        value = raw_value.decode("utf-8", "surrogateescape")
        if name in fields:
            if name in ("host", "content-length", "lock-token", "idempotency-key"):
                raise BadRequest(f"the header {name} is given more than once.")
            value = f"{fields[name]}, {value}"
        fields[name] = value
    return Head(request.method, path, query, fields)


def decode_key(raw: str, bytes_max: int) -> str:
    """A key from its percent-encoded form, strictly. Raises KeyEmpty, KeyTooLong, KeyNotUtf8."""
    if raw.isascii() and "%" not in raw:
        key, size = raw, len(raw)
    else:
        encoded = raw.encode("utf-8", "surrogateescape")
        if _BROKEN_ESCAPE.search(encoded):
            raise KeyNotUtf8("the key holds a % that is not followed by two hexadecimal digits.")
        decoded = unquote_to_bytes(encoded)
        size = len(decoded)
        try:
            key = decoded.decode("utf-8", "strict")
        except UnicodeDecodeError as error:
            raise KeyNotUtf8(f"byte {error.start} of the key is not UTF-8.") from None
    check_key_size(size, bytes_max)
    return key


def check_key(key: str, bytes_max: int) -> str:
    """The key, which came as text (JSON). Raises KeyEmpty, KeyTooLong, KeyNotUtf8 (lone surrogates)."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise KeyNotUtf8("the key holds a lone surrogate, which is not Unicode text.") from None
    if not 0 < size <= bytes_max:
        check_key_size(size, bytes_max)
    return key


def check_key_size(size: int, bytes_max: int) -> None:
    """Refuse a key of that many bytes. Raises KeyEmpty, KeyTooLong."""
    if not size:
        raise KeyEmpty()
    if size > bytes_max:
        raise KeyTooLong(f"the key has {size} bytes; the limit is {bytes_max}.", key_bytes_max=bytes_max)


def decode_query(query: str, known: frozenset[str]) -> dict[str, str]:
    """The parameters of a query. Raises BadParameter for unknown or repeated ones and for what is not UTF-8."""
    parameters: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        raw_name, _, raw_value = item.partition("=")
        name, value = _decode_component(raw_name), _decode_component(raw_value)
        if name not in known:
            offered = f"known are: {', '.join(sorted(known))}" if known else "this call takes none"
            raise BadParameter(f"the query parameter {name!r} is unknown; {offered}.", parameter=name)
        if name in parameters:
            raise BadParameter(f"the query parameter {name!r} is given more than once.", parameter=name)
        parameters[name] = value
    return parameters


def _decode_component(raw: str) -> str:
    encoded = raw.replace("+", " ").encode("utf-8", "surrogateescape")
    if _BROKEN_ESCAPE.search(encoded):
        raise BadParameter(f"the query holds a broken escape in {raw!r}.")
    try:
        return unquote_to_bytes(encoded).decode("utf-8", "strict")
    except UnicodeDecodeError:
        raise BadParameter(f"the query holds bytes that are not UTF-8 in {raw!a}.") from None


class HostGuard:
    """Refuses what a foreign web page could send: foreign Host (DNS rebinding) and foreign Origin."""

    def __init__(self, allowed_hosts: list[str], *, takes_pages: bool = True) -> None:
        """`takes_pages`: those of its own origin may call it."""
        self._takes_pages = takes_pages
        self._names = {"localhost", *(name.lower() for name in allowed_hosts)}
        self._good: set[str] = set()

    def check(self, fields: dict[str, str]) -> None:
        """Refuse a request for a foreign host, or from a page of a foreign origin. Raises Foreign."""
        host = fields.get("host", "")
        if host not in self._good:
            name = re.sub(r":\d+$", "", host).lower()
            if name and name not in self._names and not _IP_LITERAL.fullmatch(name):
                raise Foreign(f"Host {host!a} is not a name of this process.")
            if len(self._good) < 1000:
                self._good.add(host)
        if "origin" in fields and not self._is_own(fields["origin"].lower(), host.lower()):
            raise Foreign(f"a page of {fields['origin']!a} may not call this process.")

    def _is_own(self, origin: str, host: str) -> bool:
        return self._takes_pages and origin in (f"http://{host}", f"https://{host}")


def client_has_left(request: web.BaseRequest) -> bool:
    """The client has closed the connection, or its side of it: the two look alike until something is sent."""
    transport = request.transport
    return transport is None or transport.is_closing() or getattr(request.protocol, "half_closed", False)
