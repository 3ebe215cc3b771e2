"""Undo: what an operation has changed in memory, so that one that fails can be taken back alone.

Owns: the list of inverse steps, in the order in which the steps were done.
Promises: pure. After `back_to(mark)` every container and attribute that was noted since that mark is as it was then;
marks nest.
Leaves to others: what is noted (`locks`, `intents`, `store.write_set`, `store.outcomes`), and when an operation has
failed (`store.batch`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT: Any = object()


Step = tuple[Callable[[Any, Any, Any], None], Any, Any, Any]
"""`step(owner, name, before)` takes back what is about to be done."""


class Undo:
    """Notes are taken before the change that they are about. `note`: of a step of any kind."""

    __slots__ = ("_steps", "note")

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self.note: Callable[[Step], None] = self._steps.append

    @property
    def mark(self) -> int:
        """The present moment, for `back_to`."""
        return len(self._steps)

    def note_item(self, mapping: dict[Any, Any], key: Any) -> None:
        """`mapping[key]` is about to be set, replaced or removed."""
        self.note((_put_back, mapping, key, mapping.get(key, _ABSENT)))

    def note_copy(self, mapping: dict[Any, Any], key: Any, copy: Any) -> None:
        """What `mapping[key]` refers to is about to be changed in place; `copy` is of its present state."""
        self.note((_put_back, mapping, key, copy))

    def note_attribute(self, owner: object, name: str) -> None:
        """The attribute is about to be set."""
        self.note((setattr, owner, name, getattr(owner, name)))

    def note_length(self, items: Any) -> None:
        """Something is about to be appended to the list or deque."""
        self.note((_shorten, items, len(items), None))

    def back_to(self, mark: int) -> None:
        """Take back all that was noted since."""
        steps = self._steps
        while len(steps) > mark:
            step, owner, name, before = steps.pop()
            step(owner, name, before)

    def clear(self) -> None:
        """What was noted stays done."""
        self._steps.clear()


def _put_back(mapping: dict[Any, Any], key: Any, before: Any) -> None:
    if before is _ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = before


def put_back(mapping: dict[Any, Any], key: Any, before: Any) -> None:
    """`mapping[key]` is what it was; None: there was none."""
    if before is None:
        mapping.pop(key, None)
    else:
        mapping[key] = before


def _shorten(items: Any, length: int, _: None) -> None:
    while len(items) > length:
        items.pop()
