"""Transactions that read lists and append to them: is there an order of them all that explains what they saw?

Owns: the order of appends per key, inferred from the lists that were read; what follows from it; the anomalies.
Promises: pure. What it reports is wrong with certainty: an operation of unknown outcome may have happened or not,
unless a client read what it appended. It is sound, not complete: of an order that no client has read nothing is
concluded.
Leaves to others: cycles and their names (cycles), making histories (loadtest.workloads.append).

The method is that of Elle (Kingsbury & Alvaro, "Elle: Inferring Isolation Anomalies from Experimental Observations",
VLDB 2020). As each value is appended once, a list that was read tells its whole past: the longest one gives the order
of all appends to its key, and every other read must be a prefix of it. From the order follow the dependencies:

    ww  who appended a value           before  who appended the next one
    wr  who appended a list's last     before  who read that list
    rw  who read a list                before  who appended the next value
    rt  who ended                      before  who began later

An append that was acknowledged and is in no list that was read comes after all those read (lists only grow). A read
sees the state before the appends of its own transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

from loadtest.histories.cycles import RT, RW, WR, WW, Cycle, Edge, Graph
from loadtest.histories.findings import Findings, Violation, times
from loadtest.histories.history import Lists

_TAIL = 6  # values of a list that are shown


class Kind(StrEnum):
    """What can be wrong, besides the cycles, which have their names from `cycles.LEVELS`."""

    FOREIGN = "foreign value"  # no client appended it
    ABORTED_READ = "G1a"  # it was appended by a transaction that was refused
    INTERMEDIATE_READ = "G1b"  # a part of what one transaction appended to a key
    INTERNAL = "internal"  # one transaction read a key twice, differently
    DUPLICATE = "duplicate append"  # it is in one list twice
    INCOMPATIBLE = "incompatible order"  # two reads, neither a prefix of the other
    LOST = "lost append"  # acknowledged, and missing in a read that began later and in all others


def check(history: Iterable[Lists]) -> list[Violation]:
    """All that is wrong with it, by Kind, or by the name of a class of cycles.

    Raises ValueError if a value is appended twice: such a history proves nothing."""
    return _Check(list(history)).run()


class _Check:
    def __init__(self, history: Sequence[Lists]) -> None:
        self._history = history
        self._writers: dict[tuple[str, int], int] = {}  # (key, value) -> place in the history
        self._findings = Findings()
        self._blame = self._findings.blame
        self._why: dict[Edge, tuple[str, str]] = {}  # the key, and a clause on what comes after
        for place, operation in enumerate(history):
            for key, values in operation.appends.items():
                for value in values:
                    if self._writers.setdefault((key, value), place) != place or values.count(value) > 1:
                        raise ValueError(f"{value} is appended to {key} twice: each value may be appended once only")

    def run(self) -> list[Violation]:
        reads = self._reads()
        orders = {key: self._order(key, lists) for key, lists in reads.items()}
        for key, lists in reads.items():
            self._look_into_lists(key, lists)
        self._look_for_lost(orders, reads)
        cycles = self._graph(orders, reads).cycles()
        return [*self._findings.violations, *(Violation(cycle.name, self._story(cycle)) for cycle in cycles)]

    # --- lists by themselves -------------------------------------------------------------------------------------

    def _reads(self) -> dict[str, list[tuple[int, list[int]]]]:
        """Per key: who read it, and what. Two reads of one transaction must be the same."""
        found: dict[str, list[tuple[int, list[int]]]] = {}
        for place, operation in enumerate(self._history):
            own: dict[str, list[int]] = {}
            for key, values in operation.reads:
                if own.setdefault(key, values) != values:
                    detail = f"{self._name(place)} read {key} as {_short(own[key])} and as {_short(values)}"
                    self._blame(Kind.INTERNAL, key, detail)
                found.setdefault(key, []).append((place, values))
            for key in operation.appends:
                found.setdefault(key, [])
        return found

    def _order(self, key: str, lists: Sequence[tuple[int, list[int]]]) -> list[int]:
        """The longest list; every other one must be its beginning."""
        longest_by, longest = max(lists, key=lambda read: len(read[1]), default=(0, []))
        for place, values in lists:
            if longest[: len(values)] != values:
                differs = next(i for i, value in enumerate(values) if longest[i] != value)
                self._blame(
                    Kind.INCOMPATIBLE,
                    key,
                    f"of {key}, {self._name(place)} read {_short(values[: differs + 1])} and"
                    f" {self._name(longest_by)} {_short(longest[: differs + 1])}, from place {differs} on",
                )
        return longest

    def _look_into_lists(self, key: str, lists: Sequence[tuple[int, list[int]]]) -> None:
        seen: set[tuple[int, ...]] = set()
        for place, values in lists:
            if tuple(values) in seen:
                continue
            seen.add(tuple(values))
            if len(set(values)) < len(values):
                twice = next(value for value in values if values.count(value) > 1)
                self._blame(Kind.DUPLICATE, key, f"{self._name(place)} read {key} with {twice} in it twice")
            for value in values:
                self._look_at_value(key, value, place)
            if values and (writer := self._writers.get((key, values[-1]))) is not None:
                wrote = self._history[writer].appends[key]
                if wrote[-1] != values[-1]:
                    detail = f"{self._name(place)} read {key} up to {values[-1]}, and {self._name(writer)} appended"
                    self._blame(Kind.INTERMEDIATE_READ, key, f"{detail} {wrote} at once")

    def _look_at_value(self, key: str, value: int, reader: int) -> None:
        writer = self._writers.get((key, value))
        if writer is None:
            self._blame(Kind.FOREIGN, key, f"{self._name(reader)} read {value} in {key}, which no client appended")
        elif self._history[writer].outcome == "refused":
            detail = (
                f"{self._name(reader)} read {value} in {key}, and {self._name(writer)}, who appended it, was refused"
            )
            self._blame(Kind.ABORTED_READ, key, detail)

    def _look_for_lost(self, orders: dict[str, list[int]], reads: dict[str, list[tuple[int, list[int]]]]) -> None:
        last = {
            key: max(lists, key=lambda read: self._history[read[0]].begin_s)[0] for key, lists in reads.items() if lists
        }
        present = {key: set(order) for key, order in orders.items()}
        for (key, value), writer in self._writers.items():
            end_s = self._history[writer].end_s
            if self._history[writer].outcome != "done" or end_s is None or value in present.get(key, ()):
                continue
            if key in last and self._history[last[key]].begin_s > end_s:
                detail = f"{self._name(writer)} was told that {value} is appended to {key}; {self._name(last[key])}"
                self._blame(Kind.LOST, key, f"{detail} began later and read {key} without it, as did all others")

    # --- transactions and one another ----------------------------------------------------------------------------

    def _graph(self, orders: dict[str, list[int]], reads: dict[str, list[tuple[int, list[int]]]]) -> Graph:
        graph = Graph(len(self._history))
        unseen = self._unseen(orders)
        for key, order in orders.items():
            after = self._next_writers(key, order)
            for place, values in reads[key]:
                if values != order[: len(values)]:
                    continue  # told already; of such a read nothing can be concluded
                if values and (writer := self._writers.get((key, values[-1]))) is not None:
                    self._add(graph, writer, WR, place, key, f"which read {key} up to {values[-1]}")
                if len(values) < len(order):
                    beyond = [] if (writer := after[len(values)]) is None else [writer]
                else:
                    beyond = unseen.get(key, [])
                for writer in beyond:
                    self._add(graph, place, RW, writer, key, f"which appended to {key} what the other did not see")
            self._add_overwrites(graph, key, order, unseen.get(key, []))
        graph.add_times([(operation.begin_s, operation.end_s) for operation in self._history])
        return graph

    def _add(self, graph: Graph, before: int, kind: int, after: int, key: str, why: str) -> None:
        graph.add(before, kind, after)
        self._why.setdefault(Edge(before, kind, after), (key, why))

    def _next_writers(self, key: str, order: Sequence[int]) -> list[int | None]:
        """At each place: who appended what stands there (None: no client that is known)."""
        return [self._writers.get((key, value)) for value in order]

    def _add_overwrites(self, graph: Graph, key: str, order: Sequence[int], unseen: Sequence[int]) -> None:
        writers = self._next_writers(key, order)
        for place in range(1, len(order)):
            before, after = writers[place - 1], writers[place]
            if before is not None and after is not None:
                why = f"which appended {order[place]} to {key} behind {order[place - 1]}"
                self._add(graph, before, WW, after, key, why)
        if order and (last := writers[-1]) is not None:
            for after in unseen:
                self._add(graph, last, WW, after, key, f"which appended to {key} behind {order[-1]}")

    def _unseen(self, orders: dict[str, list[int]]) -> dict[str, list[int]]:
        """Per key: the acknowledged appenders of what no client has read."""
        present = {key: set(order) for key, order in orders.items()}
        found: dict[str, list[int]] = {}
        for (key, value), writer in self._writers.items():
            if self._history[writer].outcome == "done" and value not in present.get(key, ()):
                found.setdefault(key, []).append(writer)
        return found

    # --- telling it ----------------------------------------------------------------------------------------------

    def _name(self, place: int) -> str:
        return f"T{place} {times(self._history[place])}"

    def _story(self, cycle: Cycle) -> str:
        """The cycle edge by edge, then what each of its transactions did."""
        steps = [f"T{cycle.edges[0].before}"]
        keys = set()
        for edge in cycle.edges:
            key, why = ("", "which began after its end") if edge.kind == RT else self._why[edge]
            keys.add(key)
            steps.append(f"{edge.word}-> T{edge.after}, {why}")
        facts = [f"\n    {self._describe(edge.before, keys)}" for edge in cycle.edges]
        return "; ".join(steps) + "".join(facts)

    def _describe(self, place: int, keys: set[str]) -> str:
        """What it did, on the keys that matter here."""
        operation = self._history[place]
        reads = [f"read {key} {_short(values)}" for key, values in operation.reads if key in keys]
        appends = [f"appended {values} to {key}" for key, values in operation.appends.items() if key in keys]
        return f"{self._name(place)}: {', '.join(reads + appends) or 'nothing on these keys'}"


def _short(values: Sequence[int]) -> str:
    """A list by its end: the end is what differs."""
    return f"[{'… ' if len(values) > _TAIL else ''}{' '.join(map(str, values[-_TAIL:]))}]"
