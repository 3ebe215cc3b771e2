"""Keys that are read, written, deleted and swapped: is each of them one register, whose versions rise?

Owns: the sequential register, what follows at once from values that are written once each, the rules for versions.
Promises: pure. What it reports is wrong with certainty; a key whose search was given up is named as undecided. Without
deletes and swaps the rules of zones alone are complete; the search decides the rest.
Leaves to others: the search (linearizability).

A key is absent before its history begins. As each value is written once, a client that shows it came after its writer:
a write of unknown outcome whose value was seen was done, and ended at the latest when the first who saw it ended.

Zones (Gibbons & Korach, "Testing Shared Memories", 1997): of a value, those who wrote it, read it and swapped it away
stand together; from the first end to the last begin among them the key held that value, and no other one.

An unknown write (swap, delete) that no client saw can still be the reason why a client did not find what was before. So
it is dropped exactly if no operation that ended after its begin profits: only a swap that was told 412 does (for a
delete: also a client that saw that there was no such key). Between it and the next change stand only such operations,
and all others may be answered the same without it. Reads of unknown outcome say nothing, refused operations did
nothing: both are left out.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Hashable, Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from loadtest.histories.findings import Findings, Floor, Violation, ended_s, times
from loadtest.histories.history import Register
from loadtest.histories.linearizability import STEPS_MAX, Entry, Outcome, Stuck, search

_NEVER = float("inf")
_STEPS_IN_ALL = 4  # as many times the steps for one key


class Kind(StrEnum):
    NOT_LINEARIZABLE = "not linearizable"
    FOREIGN = "value from nowhere"  # no client wrote it to this key
    REFUSED = "refused write was done"
    EARLY = "seen before it was written"
    LOST_UPDATE = "lost update"  # two swaps were done on one value
    TWO_VALUES = "one version, two values"
    TWO_VERSIONS = "one value, two versions"
    VERSION_USED = "version given twice"
    VERSION_BACK = "version went back"
    WRONG_412 = "refused though unchanged"  # a 412 that names the very version that it was to have


class Judgement(NamedTuple):
    """`undecided`: a sentence for each key whose search was given up."""

    violations: list[Violation]
    undecided: list[str]


def check(history: Iterable[Register], steps_max: int = STEPS_MAX) -> Judgement:
    """All that is wrong with it, key by key. `steps_max` bounds the search for each key.

    Raises ValueError if a value is written twice: such a history proves nothing.
    """
    by_key: dict[str, list[Register]] = {}
    writers: dict[str, Register] = {}
    for operation in history:
        by_key.setdefault(operation.key, []).append(operation)
        if operation.action in ("write", "swap"):
            if operation.value is None:
                raise ValueError(f"{_name(operation)} names no value: each write has one")
            if writers.setdefault(operation.value, operation) is not operation:
                raise ValueError(f"{operation.value!r} is written twice: each value may be written once only")
    findings = Findings()
    undecided: list[str] = []
    steps_left = steps_max * _STEPS_IN_ALL
    for key, operations in sorted(by_key.items(), key=lambda item: len(item[1])):
        steps_left -= _Key(key, operations, findings, undecided).judge(min(steps_max, steps_left))
    return Judgement(findings.violations, undecided)


class _Holds(NamedTuple):
    """The state: the value (None: no such key), and how many reads of it are still to come."""

    value: str | None
    reads_left: int


_ANY = "\0any"  # stands for all values that no client read nor expected
ABSENT = _Holds(None, 0)


class _RegisterModel:
    """A register of whose values is known how often each is read, and by whom it is swapped away.
    As long as a client has to see a value, nothing may overwrite it, for it never comes back. (A key that is absent
    may become so again.)

    The answers of an operation are part of it; an optional one is a change that may have been made.
    """

    initial = ABSENT

    def __init__(self, reads: dict[str, int], swapped_by: dict[str, Register], expected: set[str]) -> None:
        self._reads = reads
        self._swapped_by = swapped_by
        self._named = expected | reads.keys()

    def step(self, state: _Holds, operation: Register) -> _Holds | None:
        value, reads_left = state
        if operation.action == "read":
            if operation.value != value:
                return None
            return state if value is None else _Holds(value, reads_left - 1)
        if operation.action == "swap":
            if operation.met != (value == operation.expected):
                return None
            if not operation.met:
                return state
        if reads_left or (value is not None and self._swapped_by.get(value, operation) is not operation):
            return None
        return ABSENT if operation.action == "delete" else self._holding(operation.value)

    def _holding(self, value: str | None) -> _Holds:
        if value is None or value in self._named:
            return _Holds(value, self._reads.get(value or "", 0))
        return _Holds(_ANY, 0)

    def is_pure(self, operation: Register) -> bool:
        return operation.action == "read" or not operation.met

    def fixes(self, operation: Register) -> bool:
        return True

    def kind(self, operation: Register) -> Hashable:
        """Optional ones write what no client read: only whether a client expects it can tell them apart."""
        value = None if operation.value is None else self._holding(operation.value).value
        return operation.action, value, operation.expected


class _Key:
    """One key: first what follows at once, then the search."""

    def __init__(self, key: str, operations: Sequence[Register], findings: Findings, undecided: list[str]) -> None:
        self._key = key
        self._findings = findings
        self._undecided = undecided
        self._all = operations
        self._writers = {op.value: op for op in operations if op.action in ("write", "swap") and op.value is not None}
        self._done = [op for op in operations if op.outcome == "done"]
        self._seers: dict[str, list[Register]] = {}  # value -> who was answered so that it was there
        for operation in self._done:
            if (seen := _saw(operation)) is not None:
                self._seers.setdefault(seen, []).append(operation)
        self._is_right = True

    def judge(self, steps_max: int) -> int:
        """How many steps it took."""
        self._check_versions()
        self._find_unknown_that_were_seen()
        self._check_writers()
        self._check_swaps()
        if self._is_right:
            self._check_zones()
        if not self._is_right:
            return 0
        model = self._model()
        outcome = search(model, self._entries(model), steps_max)
        self._tell(outcome)
        return outcome.steps

    def _blame(self, kind: Kind, detail: str) -> None:
        self._is_right = self._is_right and kind in _OF_VERSIONS
        self._findings.blame(kind, self._key, f"key {self._key}: {detail}")

    def _check_writers(self) -> None:
        for value, seers in self._seers.items():
            first = min(seers, key=ended_s)
            writer = self._writers.get(value)
            if writer is None:
                self._blame(Kind.FOREIGN, f"{_name(first)} shows a value that no client wrote")
            elif writer.outcome == "refused" or not writer.met:
                self._blame(Kind.REFUSED, f"{_name(first)} shows what {_name(writer)} was refused to write")
            elif writer.begin_s > ended_s(first):
                self._blame(Kind.EARLY, f"{_name(first)} ended before {_name(writer)} began")

    def _find_unknown_that_were_seen(self) -> None:
        """They were done; and so were the unknown swaps that they themselves were seen by, and so on."""
        pending = list(self._seers)
        while pending:
            writer = self._writers.get(pending.pop())
            if writer is not None and writer.outcome == "unknown" and (seen := _saw(writer)) is not None:
                if seen not in self._seers:
                    pending.append(seen)
                self._seers.setdefault(seen, []).append(writer)

    def _check_swaps(self) -> None:
        for value, seers in self._seers.items():
            swaps = [seer for seer in seers if seer.action == "swap"]
            if len(swaps) > 1:
                self._blame(Kind.LOST_UPDATE, f"{_name(swaps[0])} and {_name(swaps[1])} were both done on {value!r}")

    # --- zones ---------------------------------------------------------------------------------------------------

    def _check_zones(self) -> None:
        zones = self._zones()
        for one, two in itertools.pairwise(zones):
            if two.from_s < one.to_s:
                self._blame(Kind.NOT_LINEARIZABLE, f"{one.story}; and {two.story}")
                return
        starts = [zone.from_s for zone in zones]
        for operation in self._done:
            place = bisect.bisect_left(starts, operation.begin_s) - 1
            if place < 0 or ended_s(operation) >= zones[place].to_s:
                continue
            value = zones[place].value
            if operation.met and value in (_saw(operation), operation.value):
                continue
            if operation.met or operation.expected == value:
                self._blame(Kind.NOT_LINEARIZABLE, f"{zones[place].story}; and in between: {_name(operation)}")

    def _zones(self) -> list[_Zone]:
        """Those of values that were held for sure, in order of time."""
        zones = []
        for value, writer in self._writers.items():
            if writer.outcome == "refused" or not writer.met:
                continue
            together = [writer, *self._seers.get(value, [])]
            first = min(together, key=ended_s)
            last = max(together, key=lambda operation: operation.begin_s)
            if ended_s(first) < last.begin_s:
                zones.append(_Zone(ended_s(first), last.begin_s, value, first, last))
        return sorted(zones, key=lambda zone: zone.from_s)

    # --- the search ----------------------------------------------------------------------------------------------

    def _model(self) -> _RegisterModel:
        reads = {value: sum(seer.action == "read" for seer in seers) for value, seers in self._seers.items()}
        swapped_by = {value: seer for value, seers in self._seers.items() for seer in seers if seer.action == "swap"}
        expected = {op.expected for op in self._all if op.action == "swap" and op.expected is not None}
        return _RegisterModel(reads, swapped_by, expected)

    def _entries(self, model: _RegisterModel) -> list[Entry[Register]]:
        """The operations, those in which nothing could show left out, each between the narrowest times."""
        ends_s = self._narrowest_ends()
        versions = {op.value: op.version for op in self._done if op.version is not None and op.met}
        refused_until_s = max((ended_s(op) for op in self._done if not op.met), default=-_NEVER)
        absent_until_s = max((ended_s(op) for op in self._all if _needs_absence(op)), default=-_NEVER)
        entries = []
        for operation in self._all:
            begin_s, end_s = operation.begin_s, operation.end_s
            if operation.outcome == "refused" or (operation.outcome == "unknown" and operation.action == "read"):
                continue
            if operation.action != "read" and operation.value is not None and operation.met:
                end_s = ends_s.get(operation.value, end_s)
            profit_until_s = max(refused_until_s, absent_until_s) if operation.action == "delete" else refused_until_s
            if end_s is None and begin_s > profit_until_s:
                continue
            version = operation.version if operation.action == "delete" else versions.get(operation.value)
            entries.append(Entry(operation, begin_s, end_s, float(version or 0)))
        return entries

    def _narrowest_ends(self) -> dict[str, float]:
        """Until when each value was written that was seen.
        A chain of swaps is gone through from its last one on."""
        into = {value: seer.value for value, seers in self._seers.items() for seer in seers if seer.action == "swap"}
        ends_s: dict[str, float] = {}
        for start in self._seers:
            chain = [start]
            while len(chain) <= len(self._seers):  # longer only if they go in a circle: the search will say so
                further = into.get(chain[-1])
                if further is None or further in ends_s or further not in self._seers:
                    break
                chain.append(further)
            for value in reversed(chain):
                writer = self._writers[value]
                seen_s = [
                    min(ended_s(seer), ends_s.get(_left(seer) or "", _NEVER))
                    for seer in self._seers[value]
                    if seer.action == "swap"
                ]
                seen_s += [ended_s(seer) for seer in self._seers[value] if seer.action == "read"]
                ends_s[value] = max(writer.begin_s, min(ended_s(writer), *seen_s))
        return ends_s

    def _tell(self, outcome: Outcome[Register, _Holds]) -> None:
        if outcome.decided and outcome.stuck is not None:
            self._blame(Kind.NOT_LINEARIZABLE, _window(outcome.stuck))
        if not outcome.decided:
            came = "" if outcome.stuck is None else f"; as far as it came: {_window(outcome.stuck)}"
            self._undecided.append(
                f"key {self._key}: the search for an order of {len(self._all)} operations was given up after"
                f" {outcome.steps} steps{came}"
            )

    # --- versions ------------------------------------------------------------------------------------------------

    def _check_versions(self) -> None:
        told = [op for op in self._done if op.version is not None]
        self._check_names(told)
        floor = Floor([(ended_s(op), op.version or 0, op) for op in told])
        for operation in told:
            known = floor.before(operation.begin_s)
            version = operation.version or 0
            if known is not None and (version < known[0] or (version == known[0] and _changes(operation))):
                detail = f"{_name(operation)} told version {version}; before it began, {_name(known[1])} had told"
                self._blame(Kind.VERSION_BACK, f"{detail} version {known[0]}")

    def _check_names(self, told: Sequence[Register]) -> None:
        """A version is of one change and of one value, and a value has one version."""
        by_version: dict[int, Register] = {}
        by_value: dict[str, Register] = {}
        changes: dict[int, Register] = {}
        for op in (op for op in told if op.met):
            version = op.version or 0
            other = by_version.setdefault(version, op)
            if _left(other) != _left(op):
                self._blame(Kind.TWO_VALUES, f"{_name(other)} and {_name(op)} both told version {version}")
            if _changes(op) and changes.setdefault(version, op) is not op:
                self._blame(Kind.VERSION_USED, f"{_name(changes[version])} and {_name(op)} both made version {version}")
            if op.value is not None and (other := by_value.setdefault(op.value, op)).version != version:
                self._blame(Kind.TWO_VERSIONS, f"{_name(other)} told version {other.version}, {_name(op)} {version}")
        for op in (op for op in told if not op.met):
            holder = by_value.get(op.expected or "")
            if holder is not None and holder.version == op.version:
                detail = f"{_name(op)} was told that the version is {op.version}, and that is the one of"
                self._blame(Kind.WRONG_412, f"{detail} what it expected: {_name(holder)}")


class _Zone(NamedTuple):
    """The key held `value` at least from the end of `first` to the begin of `last`."""

    from_s: float
    to_s: float
    value: str
    first: Register
    last: Register

    @property
    def story(self) -> str:
        return f"it held {self.value!r} from the end of {_name(self.first)} to the begin of {_name(self.last)}"


def _saw(operation: Register) -> str | None:
    """The value that was there if the operation was done as it was answered.
    None: none, or it does not say."""
    if operation.action == "swap" and operation.met:
        return operation.expected
    return operation.value if operation.action == "read" else None


def _left(operation: Register) -> str | None:
    """The value that was there behind it, if it was done."""
    return None if operation.action == "delete" else operation.value


def _changes(operation: Register) -> bool:
    return operation.action != "read" and operation.met


def _needs_absence(operation: Register) -> bool:
    if operation.action == "read":
        return operation.outcome == "done" and operation.value is None
    return operation.action == "swap" and operation.met and operation.expected is None


def _window(stuck: Stuck[Register, _Holds]) -> str:
    """The smallest window: where every order ends, and with what."""
    value, reads_left = stuck.state
    holds = "absent" if value is None else "at a value that no client read" if value == _ANY else f"at {value!r}"
    still = f" (which {reads_left} reads are still to show)" if reads_left else ""
    last = f", the last of them: {', then '.join(map(_name, stuck.last))}" if stuck.last else ""
    left = "".join(f"\n    {_name(operation)}" for operation in stuck.left)
    return (
        f"until {stuck.until_s:.4f} there is an order of {stuck.placed} operations{last};"
        f" it leaves the key {holds}{still}, and none of these can be next:{left}"
    )


def _name(operation: Register) -> str:
    """The operation in words, with its times."""
    value = "absent" if operation.value is None else repr(operation.value)
    expected = "absent" if operation.expected is None else repr(operation.expected)
    what = {
        "read": f"the read of {value}" if operation.outcome == "done" else "the read",
        "write": f"the write of {value}",
        "delete": "the delete",
        "swap": f"the swap from {expected} to {value}{'' if operation.met else ' (412)'}",
    }[operation.action]
    return f"{what} {times(operation)}"


_OF_VERSIONS = {Kind.TWO_VALUES, Kind.TWO_VERSIONS, Kind.VERSION_USED, Kind.VERSION_BACK, Kind.WRONG_412}
