"""A set in a simulated store, its elements one key each: added, removed, listed, counted.

Owns: what is called, and how each answer enters the history; how many elements a count may find.
Leaves to others: the calls (`store_clients`), whether the history can be (`loadtest.histories.sets`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from kvstore.errors import KvError
from kvstore.protocol import Count, Delete, Page, Put, Scan
from kvstore.store.store import Store
from loadtest.histories.history import Element, Members
from loadtest.simulate.machine import PARTITIONS
from loadtest.simulate.store_clients import Client, outcome_of
from loadtest.simulate.store_invariants import Violation
from loadtest.simulate.store_machine import Lost

_SET = "set/"
_UNDER_WAY_MAX = 8  # every other client may be adding or removing one element
_ALL = b"\xff" * (PARTITIONS // 8)


class Sets:
    """One client's part of it: it removes what it has added."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._elements: deque[str] = deque()

    async def add_or_remove(self) -> None:
        client = self._client
        begin_s, op = client.now_s, client.id()
        if self._elements and client.rng.random() < 0.4:
            element, action = self._elements.popleft(), "remove"
            reply = await client.ask(Delete(op, _SET + element))
            if reply is not None and reply.status == 404:
                raise Violation(f"element {element} was added and is not there")
        else:
            element, action = str(client.history.next_value()), "add"
            reply = await client.ask(Put(op, _SET + element, b"1"))
            if outcome_of(reply) == "done":
                self._elements.append(element)
        client.note(Element, begin_s, outcome_of(reply), set=_SET, element=element, action=action)


async def list_any(client: Client) -> None:
    await list_all(client, client.rng.choice((3, 1000)))


async def list_all(client: Client, limit: int) -> bool:
    """All elements, page by page, each of them read without a partition having left."""
    begin_s, after, elements = client.now_s, "", list[str]()
    while True:
        page = await _page(client, _scan(Scan(client.id(), _SET, after, limit)))
        if page is None:
            return False
        elements += [item[0].removeprefix(_SET) for item in page.items]
        after = page.last
        if not page.more:
            break
    client.note(Members, begin_s, "done", set=_SET, elements=elements)
    return True


def _scan(scan: Scan) -> Callable[[Store], Awaitable[Page]]:
    return lambda store: store.scans.scan(scan)


async def _page(client: Client, work: Callable[[Store], Awaitable[Page]]) -> Page | None:
    try:
        page: Page = await client.machine.call(work)
    except (Lost, KvError):
        return None
    return page if page.owned == _ALL else None


async def count(client: Client) -> None:
    begin_s = client.now_s
    page = await _page(client, lambda store: store.scans.count(Count(0, _SET)))
    if page is None:
        return
    least, most = _bounds(client, begin_s, client.now_s)
    client.machine.loop.note(f"{client.name}: counted {page.count}")
    if not least <= page.count <= most:
        raise Violation(f"counted {page.count} elements from {begin_s:.6f} on, where {least} to {most} were there")


def _bounds(client: Client, begin_s: float, end_s: float) -> tuple[int, int]:
    """How many elements were there for sure, and how many at most. Adds under way are not known here yet."""
    never = float("inf")
    added: dict[str, tuple[float, float]] = {}
    removed: dict[str, tuple[float, float]] = {}
    for op in client.history.operations:
        if isinstance(op, Element) and op.outcome != "refused":
            table = added if op.action == "add" else removed
            table[op.element] = op.begin_s, never if op.end_s is None else op.end_s
    least = sum(end < begin_s and removed.get(each, (never, 0))[0] > end_s for each, (_, end) in added.items())
    most = sum(begin < end_s and removed.get(each, (0, never))[1] > begin_s for each, (begin, _) in added.items())
    return least - _UNDER_WAY_MAX, most + _UNDER_WAY_MAX
