"""What a call is, and the table from which calls are found, decoded and handed to their handlers.

Owns: `Route`: path, method, parameters, body, answers, errors, examples, and what a call touches with which right.
Promises: one entry says everything about a call: dispatch, strict decoding, the OpenAPI document and the lists in the
documents come from it. What an entry does not name is refused: parameters, members of a body, header fields that would
change what a write means.
Leaves to others: what a handler does, the form of the OpenAPI document (`openapi`), schemas of types (`schema`).

A path has at most one parameter: `/v1/kv/{key}` takes all that follows the prefix, `/v1/shards/{id}/accept-old` what is
between. Paths without one are found first, then those whose prefix and suffix match, longer ones before shorter ones.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from kvstore.config import Limits
from kvstore.errors import (
    BadBody,
    BadParameter,
    BodyTooLarge,
    KvError,
    MethodNotAllowed,
    NoSuchRoute,
    OtherProtocol,
    PreconditionFailed,
    ValueTooLarge,
)
from kvstore.strict_json import decode_strictly
from kvstore.transport import versions
from kvstore.transport.bodies import BodyReader
from kvstore.transport.http.requests import Head, HostGuard, decode_query, read_head
from kvstore.transport.http.responses import JSON, Response, StreamedResponse, problem_response

Reply = Response | StreamedResponse
Errors = tuple[type[KvError], ...]

CHANGING_HEADERS = ("If-Match", "If-None-Match", "Lock-Token", "Idempotency-Key")
_READS = frozenset({"GET", "HEAD"})
_BLANK_BYTES_MAX = 4096


# --- what an entry says -----------------------------------------------------------------------------------------------


class Right(Enum):
    """What the caller of a route must be allowed to do."""

    NONE = "none"  # nothing: it tells of no key and of nothing that the cluster does
    READ = "read"
    WRITE = "write"
    ADMIN = "admin"
    PEER = "peer"  # be another process of the cluster


class Keys(Enum):
    """On which keys."""

    NONE = "none"
    PATH = "path"  # the one that the path names
    PREFIX = "prefix"  # those that begin with the query parameter `prefix`
    BODY = "body"  # those that its operations and conditions name; what only reads needs only Right.READ
    ALL = "all"


class Touches(NamedTuple):
    """What a call touches."""

    right: Right
    keys: Keys


class Parameter(NamedTuple):
    """`kind`: a type, whose schema it has. `decode`: raises a KvError; without one text is text, and bool a flag.

    `default`: what a call has without it, or a function of the limits. `component`: its name in the OpenAPI document,
    where several routes share it.
    """

    name: str
    place: str
    kind: Any
    examples: Mapping[str, Any]
    description: str = ""
    decode: Callable[[str, Limits], Any] | None = None
    default: Any = None
    required: bool = False
    component: str = ""


class Content(NamedTuple):
    """A document: the type of which it is, examples by name, its media type."""

    kind: Any
    examples: Mapping[str, Any]
    media_type: str = JSON


class Body(NamedTuple):
    """What a call takes. `bytes_max`: a number, or the name of a limit.
    `content.kind`: a Struct, or bytes as they are.

    Without `content` it must be blank. What need not be there is as if it had no members.
    """

    content: Content | None
    bytes_max: str | int = _BLANK_BYTES_MAX
    required: bool = True
    too_large: type[BodyTooLarge | ValueTooLarge] = BodyTooLarge


NO_BODY = Body(None)


class Success(NamedTuple):
    """An answer that is no error. `headers` are names among the components; `other`: in another media type."""

    status: int
    description: str
    content: Content | None = None
    headers: tuple[str, ...] = ()
    other: Content | None = None


class Route(NamedTuple):
    """A call. `handler`: a method of the class whose instance the table is given with it, not bound yet.

    `body`: None if it is not looked at. `errors`: besides those of any route. `is_work`: it counts among the requests
    under way, which are bounded. `is_hello`: a process that speaks another protocol is refused.
    """

    method: str
    path: str
    handler: Callable[[Any, Call], Awaitable[Any]]
    touches: Touches
    id: str
    tag: str
    summary: str
    answers: tuple[Success, ...]
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    errors: Errors = ()
    error_headers: Mapping[type[KvError], tuple[str, ...]] = {}
    is_work: bool = False
    is_hello: bool = False

    def named(self, place: str) -> list[Parameter]:
        """The parameters in that place."""
        return [parameter for parameter in self.parameters if parameter.place == place]


# --- what a handler is given ------------------------------------------------------------------------------------------


class Call:
    """One request, decoded as its route says.

    `argument`: the parameter in the path. `parameters`: those of the query that were given. `body`: decoded; `raw`: its
    bytes.
    """

    parameters: Mapping[str, Any] = {}
    body: Any = None
    raw = b""

    def __init__(self, request: web.BaseRequest, head: Head, argument: Any, defaults: Mapping[str, Any]) -> None:
        self.request = request
        self.head = head
        self.argument = argument
        self.defaults = defaults

    def get(self, name: str) -> Any:
        """A parameter of the query, or its default."""
        return self.parameters[name] if name in self.parameters else self.defaults[name]


class Bound(NamedTuple):
    """A route with the handler that answers it."""

    route: Route
    handle: Callable[[Call], Awaitable[Any]]
    decode_argument: Callable[[str, Limits], Any] | None
    names: frozenset[str]
    decoders: Mapping[str, Callable[[str, Limits], Any]]
    defaults: Mapping[str, Any]
    refused: tuple[str, ...]
    bytes_max: int
    decoder: msgspec.json.Decoder[Any] | None


class _Path(NamedTuple):
    path: str
    prefix: str
    suffix: str
    methods: dict[str, Bound]

    def method(self, method: str) -> Bound:
        """Raises MethodNotAllowed."""
        bound = self.methods.get(method)
        if bound is None:
            raise MethodNotAllowed(f"{method!a} is not among {', '.join(self.methods)}.", allow=list(self.methods))
        return bound


def _nothing_at(path: str) -> NoSuchRoute:
    return NoSuchRoute(f"there is nothing at {path[:200]!a}.")


class RouteTable:
    """The routes of a process, by path and method. HEAD is answered as GET."""

    def __init__(self, limits: Limits, bodies: BodyReader, missing: Callable[[str], NoSuchRoute] = _nothing_at) -> None:
        """`missing`: the error for a path that no entry has."""
        self._missing = missing
        self._limits = limits
        self._bodies = bodies
        self._fixed: dict[str, _Path] = {}
        self._open: list[_Path] = []
        self._open_prefixes: list[str] = []  # in the order in which they came

    @property
    def routes(self) -> list[Route]:
        """All of them, HEAD left out: it is that of GET without bodies."""
        paths = (*self._open, *self._fixed.values())
        return [bound.route for path in paths for method, bound in path.methods.items() if method != "HEAD"]

    def add(self, owner: object, routes: Iterable[Route]) -> None:
        """Routes whose handlers are methods of `owner`."""
        for route in routes:
            methods, bound = self._path_of(route.path).methods, self._bind(owner, route)
            methods[route.method] = bound
            if route.method == "GET":
                methods["HEAD"] = bound

    def _path_of(self, path: str) -> _Path:
        prefix, brace, rest = path.partition("{")
        if not brace:
            return self._fixed.setdefault(path, _Path(path, path, "", {}))
        found = next((each for each in self._open if each.path == path), None)
        if found is None:
            found = _Path(path, prefix, rest.partition("}")[2], {})
            self._open.append(found)
            self._open_prefixes.append(found.prefix)
            self._open.sort(key=lambda each: (self._open_prefixes.index(each.prefix), -len(each.suffix)))
        return found

    def _bind(self, owner: object, route: Route) -> Bound:
        query, heeded = route.named("query"), {parameter.name for parameter in route.named("header")}
        refused = () if route.method in _READS else tuple(name for name in CHANGING_HEADERS if name not in heeded)
        in_path = next(iter(route.named("path")), None)
        body = route.body
        bytes_max = 0 if body is None else body.bytes_max
        kind = None if body is None or body.content is None else body.content.kind
        return Bound(
            route,
            getattr(owner, route.handler.__name__),
            None if in_path is None else in_path.decode or _decode_text,
            frozenset(parameter.name for parameter in query),
            {each.name: each.decode or _decoder_of(each) for each in query},
            {each.name: each.default(self._limits) if callable(each.default) else each.default for each in query},
            tuple(name.lower() for name in refused),
            bytes_max if isinstance(bytes_max, int) else getattr(self._limits, bytes_max),
            None if kind in (None, bytes) else msgspec.json.Decoder(kind),
        )

    # --- a request ----------------------------------------------------------------------------------------------------

    def find(self, path: str) -> tuple[_Path, str]:
        """The entry of a path, and what stands there for its parameter, raw. Raises NoSuchRoute (`missing`)."""
        fixed = self._fixed.get(path)
        if fixed is not None:
            return fixed, ""
        for entry in self._open:
            if path.startswith(entry.prefix) and path.endswith(entry.suffix):
                return entry, path[len(entry.prefix) : len(path) - len(entry.suffix)]
        raise self._missing(path)

    async def answer(self, bound: Bound, argument: str, request: web.BaseRequest, head: Head) -> Any:
        """The handler's answer to the decoded call.

        Raises BadParameter for a header field or parameter that the route does not take, BadBody for a body that is not
        as documented, and what else decoding and handler raise; all are a KvError.
        """
        decode = bound.decode_argument
        call = Call(request, head, decode(argument, self._limits) if decode is not None else None, bound.defaults)
        if head.query:
            given = decode_query(head.query, bound.names)
            call.parameters = {name: bound.decoders[name](text, self._limits) for name, text in given.items()}
        for name in bound.refused:
            if name in head.fields:
                raise BadParameter(f"the header {name} is not taken here; it goes with PUT or DELETE on one key.")
        body = bound.route.body
        if body is not None:
            call.raw = raw = await self._bodies.read(request, head, bound.bytes_max, body.too_large)
            if bound.decoder is not None:
                call.body = decode_body(bound.decoder, raw if body.required or raw.strip() else b"{}")
            elif body.content is None and raw.strip():
                raise BadBody(f"{bound.route.method} {bound.route.path} takes no body.")
        return await bound.handle(call)


def decode_body(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """The document that a body is. Raises BadBody."""
    try:
        return decode_strictly(decoder, raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise BadBody(f"the body is not as documented: {error}.") from None


async def answer_call(table: RouteTable, guard: HostGuard, request: web.BaseRequest) -> Any:
    """The answer of a process that counts and bounds nothing; an error is a problem document."""
    try:
        head = read_head(request)
        guard.check(head.fields)
        entry, argument = table.find(head.path)
        bound = entry.method(head.method)
        if bound.route.is_hello:
            versions.check_protocol(head.fields, request.remote)
        reply = await table.answer(bound, argument, request, head)
    except KvError as error:
        reply = problem_response(error, error_lines(error))
    if isinstance(reply, Response):
        reply.head_only = request.method == "HEAD"
    return reply


def error_lines(error: KvError) -> str:
    """What an error says in header fields, too."""
    if isinstance(error, MethodNotAllowed):
        return f"Allow: {', '.join(error.members['allow'])}\r\n"
    if isinstance(error, OtherProtocol):
        return f"{versions.HEADER}: {versions.PROTOCOL}\r\n"
    if isinstance(error, PreconditionFailed) and "version" in error.members:
        return f'ETag: "{error.members["version"]}"\r\n'
    return ""


# --- parameters -------------------------------------------------------------------------------------------------------


def example(value: Any, name: str = "an example") -> dict[str, Any]:
    """Examples by name, of which this is the one."""
    return {name: value}


def flag(name: str, description: str) -> Parameter:
    """A parameter of the query that is `true` or `false`; false without it."""
    return Parameter(name, "query", bool, example(True), description, default=False)


def text(name: str, kind: Any, value: Any, description: str = "") -> Parameter:
    """A parameter of the query that is taken as it is; `value` is an example."""
    return Parameter(name, "query", kind, example(value), description, default="")


def integer(name: str, kind: Any, value: int, description: str, low: int, high: str, default: Any) -> Parameter:
    """A parameter of the query, from `low` to the limit of the name `high`."""

    def decode(given: str, limits: Limits) -> int:
        most = getattr(limits, high)
        if not (given.isascii() and given.isdigit() and len(given) <= 12) or not low <= int(given) <= most:
            raise BadParameter(f"{name}={given!a} is not an integer from {low} to {most}.", parameter=name)
        return int(given)

    return Parameter(name, "query", kind, example(value), description, decode, default)


def _decode_text(given: str, limits: Limits) -> str:
    return given


def _decoder_of(parameter: Parameter) -> Callable[[str, Limits], Any]:
    if parameter.kind is not bool:
        return _decode_text

    def decode(given: str, limits: Limits) -> bool:
        if given not in ("true", "false"):
            raise BadParameter(f"{parameter.name}={given!a} is neither true nor false.", parameter=parameter.name)
        return given == "true"

    return decode
