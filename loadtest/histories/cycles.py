"""Which transaction must come before which, and where that goes in a circle.

Owns: a graph whose edges have kinds, strongly connected components (Tarjan 1972, without recursion), the search for
cycles by the kinds of their edges, and their names after Adya (1999) and Kingsbury & Alvaro (Elle, 2020).
Promises: pure; if there is a cycle at all, at least one is reported: one of each knot of transactions, under the
gravest name that fits (in a knot of thousands perhaps under a milder one).
Leaves to others: where edges come from (append).

Edges "a before b": WW (b overwrote what a wrote), WR (b read what a wrote), RW (a read what b overwrote) and RT (a had
ended before b began). A serializable history has no cycle of the first three; a strictly serializable one none at all.

RT would be an edge for nearly every pair. So time itself gets nodes: each end of a transaction is an instant, instants
form a chain, and a transaction begins behind the last instant before its begin. A path from a over instants to b exists
exactly if a ended before b began, and a history of n transactions has 2n nodes.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

WW, WR, RW, RT = 1, 2, 4, 8
_WORDS = {WW: "ww", WR: "wr", RW: "rw", RT: "rt"}
# Edges of a knot through which a cycle is looked for: after so many the shortest is short enough; and after so many
# without one the knot is left to the next level, where the first edge will do.
_ENOUGH = 200
_TRIES_MAX = 1_000


class Level(NamedTuple):
    """A class of cycles: one edge of `one`, the others of `rest`. `name` is what it is called."""

    name: str
    one: int
    rest: int


LEVELS = (
    Level("G0", WW, WW),
    Level("G1c", WR, WW | WR),
    Level("G-single", RW, WW | WR),
    Level("G2", RW, WW | WR | RW),
    Level("G0-realtime", WW, WW | RT),
    Level("G1c-realtime", WR, WW | WR | RT),
    Level("G-single-realtime", RW, WW | WR | RT),
    Level("G2-realtime", RW, WW | WR | RW | RT),
)


class Edge(NamedTuple):
    before: int
    kind: int
    after: int

    @property
    def word(self) -> str:
        return _WORDS[self.kind]


class Cycle(NamedTuple):
    """`edges` go around: the last one ends where the first one begins."""

    name: str
    edges: tuple[Edge, ...]


class Graph:
    """Transactions 0 to count - 1; every other node is an instant."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.out: list[dict[int, int]] = [{} for _ in range(count)]  # node -> {node after it: kinds}

    def add(self, before: int, kind: int, after: int) -> None:
        """A transaction does not come before itself: that edge is left out."""
        if before != after:
            self.out[before][after] = self.out[before].get(after, 0) | kind

    def add_times(self, times: Sequence[tuple[float, float | None]]) -> None:
        """Begin and end of each transaction; one without end comes before nothing."""
        ends = sorted((end, node) for node, (_, end) in enumerate(times) if end is not None)
        first = len(self.out)
        self.out.extend({} for _ in ends)
        for place, (_, node) in enumerate(ends):
            self.add(node, RT, first + place)
            if place:
                self.add(first + place - 1, RT, first + place)
        instants = [end for end, _ in ends]
        for node, (begin, _) in enumerate(times):
            if place := bisect.bisect_left(instants, begin):
                self.add(first + place - 1, RT, node)

    def cycles(self) -> list[Cycle]:
        """One of each knot, gravest first."""
        found: list[Cycle] = []
        told: list[set[int]] = []
        for level in LEVELS:
            for knot in self._knots(level.one | level.rest):
                if any(nodes <= knot for nodes in told):
                    continue  # it has a graver one inside
                edges = self._shortest(knot, level)
                if edges is not None:
                    found.append(Cycle(level.name, edges))
                    told.append({edge.before for edge in edges})
        return found

    def _knots(self, kinds: int) -> list[set[int]]:
        return [set(knot) for knot in strongly_connected(self._filtered(kinds)) if len(knot) > 1]

    def _filtered(self, kinds: int) -> list[list[int]]:
        return [[after for after, have in edges.items() if have & kinds] for edges in self.out]

    def _shortest(self, knot: set[int], level: Level) -> tuple[Edge, ...] | None:
        best: tuple[Edge, ...] | None = None
        for number, (before, after) in enumerate(self._edges(knot, level.one)):
            if number >= (_TRIES_MAX if best is None else _ENOUGH):
                break
            path = self._path(after, before, knot, level.rest)
            if path is None:
                continue
            edges = (Edge(before, level.one, after), *self._without_instants(path, level.rest))
            if best is None or len(edges) < len(best):
                best = edges
        return best

    def _edges(self, knot: Iterable[int], kind: int) -> Iterator[tuple[int, int]]:
        for before in sorted(knot):
            for after, have in self.out[before].items():
                if have & kind and after in knot:
                    yield before, after

    def _path(self, start: int, goal: int, knot: set[int], kinds: int) -> list[int] | None:
        """The fewest steps from start to goal inside the knot, as nodes (breadth first)."""
        came_from = {start: start}
        queue = deque([start])
        while queue:
            node = queue.popleft()
            if node == goal:
                break
            for after, have in self.out[node].items():
                if have & kinds and after in knot and after not in came_from:
                    came_from[after] = node
                    queue.append(after)
        else:
            return None
        path = [goal]
        while path[-1] != start:
            path.append(came_from[path[-1]])
        return path[::-1]

    def _without_instants(self, path: Sequence[int], kinds: int) -> Iterator[Edge]:
        """The path as edges between transactions: a stretch over instants is one edge of real time."""
        before = path[0]
        for step, node in itertools.pairwise(path):
            if node < self.count:
                have = self.out[step][node] & kinds
                yield Edge(before, have & -have, node)  # the lowest bit: the strongest kind
                before = node


def strongly_connected(out: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tarjan's components of a graph given as the successors of each node; those of one node, too."""
    index = [-1] * len(out)
    low = [0] * len(out)
    on_stack = [False] * len(out)
    stack: list[int] = []
    components: list[list[int]] = []
    counter = 0
    for root in range(len(out)):
        if index[root] >= 0:
            continue
        work = [(root, 0)]
        while work:
            node, place = work.pop()
            if place == 0:
                index[node] = low[node] = counter
                counter += 1
                stack.append(node)
                on_stack[node] = True
            for position in range(place, len(out[node])):
                after = out[node][position]
                if index[after] < 0:
                    work.append((node, position + 1))
                    work.append((after, 0))
                    break
                if on_stack[after]:
                    low[node] = min(low[node], index[after])
            else:
                if low[node] == index[node]:
                    components.append(_pop_component(stack, on_stack, node))
                if work:
                    parent = work[-1][0]
                    low[parent] = min(low[parent], low[node])
    return components


def _pop_component(stack: list[int], on_stack: list[bool], root: int) -> list[int]:
    component = []
    while True:
        node = stack.pop()
        on_stack[node] = False
        component.append(node)
        if node == root:
            return component
