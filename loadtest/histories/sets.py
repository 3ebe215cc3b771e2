"""Sets whose elements are keys below a prefix: does every listing show what it must, and nothing else?

Owns: the rules for sets whose elements are added once and removed once at most, and are listed now and then.
Promises: pure. What it reports is wrong with certainty. A listing of several pages is no snapshot: each element is
judged by itself, as shown at some instant between the begin and the end of the listing.
Leaves to others: orders between elements (the transactions of append and bank).

Of one element, at an instant after all of its own operations that are spoken of:

    it was there       since the end of its acknowledged add, or of a listing that shows it
    it stays           until its removal begins, whatever became of that; for ever if that was refused
    it is gone         since the end of its acknowledged removal, if it was there when that began; or of a listing that
                       does not show it, if it was there before
    it stays gone      as it is added once only

An acknowledged removal that may have found nothing (the add was still under way) proves nothing: the add can be later.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from enum import StrEnum

from loadtest.histories.findings import Findings, Violation, ended_s, times
from loadtest.histories.history import Element, Members, Operation


class Kind(StrEnum):
    LOST = "lost"  # it was there, nothing can have removed it, and it is not shown
    RESURRECTED = "resurrected"  # it was gone, and shows again
    REFUSED = "refused add was done"
    FOREIGN = "foreign element"  # no client added it
    EARLY = "listed before it was added"
    TWICE = "listed twice"
    ORDER = "order of the listing"  # it does not ascend


def check(history: Iterable[Element | Members]) -> list[Violation]:
    """All that is wrong with it, set by set.

    Raises ValueError if an element is added or removed twice: such a history proves nothing.
    """
    sets: dict[str, _Set] = {}
    findings = Findings()
    for operation in history:
        one = sets.setdefault(operation.set, _Set(operation.set, findings))
        if isinstance(operation, Members):
            if operation.outcome == "done":
                one.listings.append(operation)
            continue
        named = one.adds if operation.action == "add" else one.removals
        if named.setdefault(operation.element, operation) is not operation:
            raise ValueError(f"{_name(operation)}: an element is added once, and removed once at most")
    for one in sets.values():
        one.judge()
    return findings.violations


class _Set:
    def __init__(self, name: str, findings: Findings) -> None:
        self.name = name
        self.adds: dict[str, Element] = {}
        self.removals: dict[str, Element] = {}
        self.listings: list[Members] = []
        self._findings = findings

    def judge(self) -> None:
        self.listings.sort(key=lambda listing: listing.begin_s)
        shown: dict[str, set[int]] = {element: set() for element in self.adds}
        for place, listing in enumerate(self.listings):
            self._check_listing(listing)
            for element in listing.elements:
                shown.setdefault(element, set()).add(place)
        for element, places in shown.items():
            if self._was_added(element, places):
                self._check_element(element, places)

    def _blame(self, kind: Kind, detail: str) -> None:
        self._findings.blame(kind, self.name, f"set {self.name}: {detail}")

    def _check_listing(self, listing: Members) -> None:
        if len(set(listing.elements)) < len(listing.elements):
            twice = next(element for element in listing.elements if listing.elements.count(element) > 1)
            self._blame(Kind.TWICE, f"{_name(listing)} has {twice} twice")
        for one, two in itertools.pairwise(listing.elements):
            if one > two:
                self._blame(Kind.ORDER, f"{_name(listing)} has {two} behind {one}")
                break

    def _was_added(self, element: str, places: set[int]) -> bool:
        """A client that shows it shows something that a client had begun to add."""
        add = self.adds.get(element)
        if not places:
            return add is not None and add.outcome != "refused"
        first = min((self.listings[place] for place in places), key=ended_s)
        if add is None:
            self._blame(Kind.FOREIGN, f"{_name(first)} has {element}, which no client added")
        elif add.outcome == "refused":
            self._blame(Kind.REFUSED, f"{_name(first)} has {element}, and {_name(add)} was refused")
        elif add.begin_s > ended_s(first):
            self._blame(Kind.EARLY, f"{_name(first)} has {element}, and {_name(add)} began later")
        else:
            return True
        return False

    def _check_element(self, element: str, places: set[int]) -> None:
        add = self.adds[element]
        there = min([add, *(self.listings[place] for place in places)], key=ended_s)
        removal = self.removals.get(element)
        if removal is not None and (removal.outcome == "refused" or ended_s(removal) < add.begin_s):
            removal = None  # it removed nothing
        gone: Operation | None = None
        if removal is not None and removal.outcome == "done" and ended_s(there) < removal.begin_s:
            gone = removal
        missing = [
            listing
            for place, listing in enumerate(self.listings)
            if place not in places and listing.begin_s > ended_s(there)
        ]
        gone = min([*([gone] if gone else []), *missing], key=ended_s, default=None)
        self._check_lost(missing, there, removal, [self.listings[place] for place in sorted(places)])
        for place in sorted(places):
            if gone is not None and self.listings[place].begin_s > ended_s(gone):
                how = "does not show it any more" if isinstance(gone, Members) else "was acknowledged"
                detail = f"{_name(self.listings[place])} has {element}, which was there since {_name(there)}"
                self._blame(Kind.RESURRECTED, f"{detail}; and {_name(gone)}, which ended before, {how}")
                break

    def _check_lost(
        self, missing: list[Members], there: Operation, removal: Element | None, showing: list[Members]
    ) -> None:
        for listing in missing:
            if removal is None or removal.begin_s > ended_s(listing):
                why = "and nothing removed it" if removal is None else f"and {_name(removal)} began later"
            elif survived := _survived(removal, listing, showing):
                why = f"and {_name(survived)} has it, although {_name(removal)} was over"
            else:
                continue
            self._blame(Kind.LOST, f"{_name(listing)} does not show what was there since {_name(there)}, {why}")
            return


def _survived(removal: Element, listing: Members, showing: list[Members]) -> Members | None:
    """A listing between the end of the removal and `listing` that shows the element: it was removed in vain, once."""
    return next((one for one in showing if one.begin_s > ended_s(removal) and ended_s(one) < listing.begin_s), None)


def _name(operation: Operation) -> str:
    if isinstance(operation, Element):
        return f"the {'add' if operation.action == 'add' else 'removal'} of {operation.element} {times(operation)}"
    return f"the listing {times(operation)}"
