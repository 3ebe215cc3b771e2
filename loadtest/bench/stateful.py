"""Workloads whose next request needs the answer before it: compare-and-set, and locks.

Owns: what has to be right before such a workload is measured and after each run, and the file its wrk script reads.
Promises: a run is counted only if the system did what it is measured for: a stale comparison is refused, a held lock is
granted to no other client, and a counter holds as many increments as were acknowledged (and, at the most, one more for
every connection that was cut off while it waited for an answer).
Leaves to others: the requests (conditions.py), the order of runs (drive.py).

wrk tells its script neither which connection a request is for nor which one an answer came from: these workloads run
with one thread of wrk, and one state of Lua, for each connection, and every connection has keys of its own (but for the
hot one). That costs wrk more CPU time than replay.lua does, by the same measure for all systems.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from loadtest.bench import http1
from loadtest.bench.conditions import Conditions, fill, split
from loadtest.bench.dialects import Dialect
from loadtest.bench.http1 import Answer, Request
from loadtest.drivers.aio import session

_HERE = Path(__file__).parent
_HOT_KEY = "hot-counter"
_GRANT_WAIT_S = 0.5
_OFFSET_DIGITS = 12


class Talk:
    """One system, asked one request at a time, with answers of any form. `async with Talk(…) as talk:`"""

    def __init__(self, url: str, dialect: Dialect, conditions: Conditions) -> None:
        self.dialect = dialect
        self.conditions = conditions
        self.url = url
        self._http = session()

    async def __aenter__(self) -> Talk:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def ask(self, request: Request) -> Answer:
        """Raises aiohttp.ClientError when the system does not answer."""
        return await http1.send(self._http, self.url, request)

    async def done(self, request: Request) -> Answer:
        """Raises RuntimeError when the answer is not 2xx."""
        return await http1.done(self._http, self.url, request)

    async def versions(self, prefix: str) -> dict[str, str]:
        """Of all keys with that prefix, in the form that the slot for a version takes."""
        found: dict[str, str] = {}
        request: Request | None = self.conditions.versions(prefix)
        while request is not None:
            versions, request = self.conditions.listed(await self.done(request), prefix)
            found |= versions
        return found


class Template(NamedTuple):
    """A request with slots, and what its script knows at first (the version), without blanks."""

    request: Request
    known: str = "-"


class Stateful(ABC):
    """`connections`: the only numbers of connections that make sense for it; empty: as asked."""

    script: Path
    connections: tuple[int, ...] = ()

    async def check(self, talk: Talk, keys: Sequence[str]) -> None:  # noqa: B027 (not every one needs it)
        """Raises RuntimeError if the system does not do what is to be measured."""

    @abstractmethod
    async def sections(
        self, talk: Talk, keys: Sequence[str], values: Sequence[bytes], count: int
    ) -> list[list[Template]]:
        """Set the system up for a run, and tell the templates of each of its `count` connections."""

    async def verify(self, talk: Talk, operations: int, connections: int) -> None:  # noqa: B027 (not every one needs it)
        """Raises RuntimeError if the system does not hold what it acknowledged during the run."""


class Cas(Stateful):
    """Each connection overwrites its own keys, each time with the version that the last answer told."""

    script = _HERE / "cas.lua"

    async def check(self, talk: Talk, keys: Sequence[str]) -> None:
        conditions, key = talk.conditions, keys[0]
        known = (await talk.versions(key))[key]
        first, second = (fill(conditions.cas(key, value), known) for value in (b"first", b"second"))
        if not conditions.was_set(await talk.ask(first)):
            raise RuntimeError(f"{conditions.name} refuses to set an unchanged key")
        if conditions.was_set(await talk.ask(second)):
            raise RuntimeError(f"{conditions.name} overwrites a key that has changed")
        if not talk.dialect.shows((await talk.ask(talk.dialect.get(key))).body, b"first"):
            raise RuntimeError(f"{conditions.name} does not show what was set")

    async def sections(
        self, talk: Talk, keys: Sequence[str], values: Sequence[bytes], count: int
    ) -> list[list[Template]]:
        versions = await talk.versions(keys[0].partition("-")[0] + "-")
        requests = [talk.conditions.cas(key, value) for key, value in zip(keys, values, strict=True)]
        templates = [Template(request, versions[key]) for key, request in zip(keys, requests, strict=True)]
        return [templates[number::count] for number in range(count)]


class HotCas(Stateful):
    """All connections increment one counter: read it, set it to one more if unchanged, else again."""

    script = _HERE / "cas_hot.lua"
    connections = (32,)

    async def sections(
        self, talk: Talk, keys: Sequence[str], values: Sequence[bytes], count: int
    ) -> list[list[Template]]:
        await talk.done(talk.dialect.put(_HOT_KEY, b"0"))
        read, write = talk.dialect.get(_HOT_KEY), talk.conditions.cas_counter(_HOT_KEY)
        return [[Template(read), Template(write)] for _ in range(count)]

    async def verify(self, talk: Talk, operations: int, connections: int) -> None:
        number = talk.conditions.number(await talk.ask(talk.dialect.get(_HOT_KEY)))
        if not operations <= number <= operations + connections:
            raise RuntimeError(f"{talk.conditions.name} acknowledged {operations} increments and holds {number}")


class LockCycles(Stateful):
    """Each connection takes and releases locks with names of its own: none waits for another."""

    script = _HERE / "lock.lua"

    async def check(self, talk: Talk, keys: Sequence[str]) -> None:
        conditions, name = talk.conditions, _lock_name(keys[0])
        token = await self._acquire(talk, name)
        if token is None:
            raise RuntimeError(f"{conditions.name} does not grant a lock that is free")
        if await self._acquire(talk, name) is not None:
            raise RuntimeError(f"{conditions.name} grants a lock to two at a time")
        await talk.done(fill(conditions.release(name), token))
        if await self._acquire(talk, name) is None:
            raise RuntimeError(f"{conditions.name} does not grant a lock that was released")

    async def _acquire(self, talk: Talk, name: str) -> str | None:
        """In a session of its own; None if it takes longer than `_GRANT_WAIT_S`."""
        conditions, session = talk.conditions, talk.conditions.session()
        slot = () if session is None else (conditions.session_id(await talk.done(session)),)
        with suppress(TimeoutError):
            async with asyncio.timeout(_GRANT_WAIT_S):
                return conditions.token(await talk.ask(fill(conditions.acquire(name), *slot)))
        return None

    async def sections(
        self, talk: Talk, keys: Sequence[str], values: Sequence[bytes], count: int
    ) -> list[list[Template]]:
        conditions = talk.conditions
        for request in conditions.free(await talk.done(conditions.held(_lock_name("")))):
            await talk.done(request)
        session = conditions.session()
        first = [Template(session)] if session is not None else []
        names = [_lock_name(key) for key in keys]
        pairs = [(Template(conditions.acquire(name)), Template(conditions.release(name))) for name in names]
        return [[*first, *(each for pair in pairs[number::count] for each in pair)] for number in range(count)]


def _lock_name(key: str) -> str:
    return f"lock-{key}"


def write_sections(sections: Sequence[Sequence[Template]], host: str) -> bytes:
    """The FILE of the scripts: a table with place and length of each connection's part, then the parts.

    A template is a line, `KNOWN BYTES [WIDTH BYTES]…`, with the lengths of the texts around its slots and the widths of
    these, then those texts.
    """
    parts = [b"".join(_write(template, host) for template in section) for section in sections]
    place = len(parts) * 2 * (_OFFSET_DIGITS + 1)
    table = []
    for part in parts:
        table.append(b"%0*d %0*d\n" % (_OFFSET_DIGITS, place, _OFFSET_DIGITS, len(part)))
        place += len(part)
    return b"".join([*table, *parts])


def _write(template: Template, host: str) -> bytes:
    texts, widths = split(template.request.render(host))
    numbers = [len(texts[0])]
    for width, text in zip(widths, texts[1:], strict=True):
        numbers += [width, len(text)]
    return b"%b %b\n%b" % (template.known.encode(), b" ".join(b"%d" % number for number in numbers), b"".join(texts))
