"""What a key may hold after a crash, given what its only writer was told.

Owns: the rule that decides whether an answer of the store fits what was acknowledged before.
Promises: pure; it detects a lost write, a delete undone, a refused write done, a write that comes late or from nowhere,
and a version that goes back or is given twice.
Leaves to others: sending and reading (loadtest/crash_rounds.py), histories with several writers of one key.

The rule, for one key with one writer that sends one write at a time and values that never repeat. At any moment the key
holds one of its *candidates*: the effect of the last acknowledged write, or of any write after it whose outcome is
unknown (in their order: once one of them was seen, those before it are out). A write that was refused ("nothing was
done") is never a candidate, and an acknowledged write clears all that was open before it: the store must not carry out,
later, what it had not done when it acknowledged the next write of the same client. Versions: each acknowledged or newly
seen write has a version above all that were seen on this key before, across deletes and restarts.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """The ways in which an answer can be wrong."""

    LOST = "lost write"
    RESURRECTED = "deleted value is back"
    LATE = "write with unknown outcome came after a later acknowledged one"
    REFUSED = "refused write was done"
    FOREIGN = "value that nobody wrote"
    VERSION_BACK = "version did not rise"
    VERSION_CHANGED = "version changed without a write"
    WRONG_ANSWER = "answer contradicts what the key may hold"


class Violation(NamedTuple):
    key: str
    kind: Kind
    detail: str

    def __str__(self) -> str:
        return f"{self.key}: {self.kind}: {self.detail}"


class KeyHistory:
    """One key as its only writer knows it. A value of None means absent (a delete, or never written)."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.violations: list[Violation] = []
        self._value: bytes | None = None
        self._version: int | None = None  # None: absent, or not known
        self._open: list[bytes | None] = []  # writes with unknown outcome since, oldest first
        self._highest_version = 0
        self._fate: dict[bytes, Kind] = {}  # of each value ever sent: what it would mean to see it out of turn

    @property
    def candidates(self) -> list[bytes | None]:
        """What the key may hold now."""
        return [self._value, *self._open]

    @property
    def version(self) -> int | None:
        """The version of the value last acknowledged or seen; None when the key is absent."""
        return self._version

    # --- what the writer was told ------------------------------------------------------------------------------

    def put_acknowledged(self, value: bytes, version: int, created: bool) -> None:
        """201 (`created`) or 204, with the version from the ETag."""
        possible = None in self.candidates if created else any(held is not None for held in self.candidates)
        if not possible:
            answered = "created" if created else "replaced"
            self._blame(Kind.WRONG_ANSWER, f"put answered {answered}; {self._describe()}")
        self._take_new_version(version, "put")
        self._settle(value, version)
        self._fate[value] = Kind.LOST

    def delete_acknowledged(self, existed: bool) -> None:
        """204 (`existed`) or 404."""
        possible = any(held is not None for held in self.candidates) if existed else None in self.candidates
        if not possible:
            answered = "done" if existed else "no such key"
            self._blame(Kind.WRONG_ANSWER if existed else Kind.LOST, f"delete answered {answered}; {self._describe()}")
        self._settle(None, None)

    def outcome_unknown(self, value: bytes | None) -> None:
        """The connection broke, or the answer was that nobody can tell. None: it was a delete."""
        self._open.append(value)
        if value is not None:
            self._fate[value] = Kind.LATE

    def refused(self, value: bytes | None) -> None:
        """The answer was an error that says that nothing was done, or nothing was ever sent."""
        if value is not None:
            self._fate[value] = Kind.REFUSED

    # --- what a reader sees --------------------------------------------------------------------------------------

    def observed(self, value: bytes | None, version: int | None) -> None:
        """A read that began and ended while no write of this key was under way; None and None for 404."""
        if value == self._value:
            if value is not None and version != self._version:
                self._blame(Kind.VERSION_CHANGED, f"read version {version}; {self._describe()}")
        elif value in self._open:
            later = self._open[self._open.index(value) + 1 :]
            if version is not None:
                self._take_new_version(version, "read")
            self._settle(value, version)
            self._open = later
        else:
            self._blame(*self._why_not(value, version))
            self._settle(value, version)  # go on from there: one fault is told once
            self._highest_version = max(self._highest_version, version or 0)

    def _why_not(self, value: bytes | None, version: int | None) -> tuple[Kind, str]:
        if value is None:
            return Kind.LOST, f"it is absent; {self._describe()}"
        kind = self._fate.get(value, Kind.FOREIGN)
        if kind is Kind.LOST and all(held is None for held in self.candidates):
            kind = Kind.RESURRECTED
        return kind, f"read {_short(value)} at version {version}; {self._describe()}"

    def _settle(self, value: bytes | None, version: int | None) -> None:
        self._value, self._version, self._open = value, version, []

    def _take_new_version(self, version: int, what: str) -> None:
        if version <= self._highest_version:
            detail = f"{what} has version {version}, version {self._highest_version} was seen before"
            self._blame(Kind.VERSION_BACK, detail)
        self._highest_version = max(self._highest_version, version)

    def _blame(self, kind: Kind, detail: str) -> None:
        self.violations.append(Violation(self.key, kind, detail))

    def _describe(self) -> str:
        held = "acknowledged: absent" if self._value is None else f"acknowledged: {_short(self._value)}"
        version = "" if self._version is None else f" at version {self._version}"
        unknown = ", ".join("delete" if value is None else _short(value) for value in self._open)
        return f"{held}{version}" + (f", unknown since: {unknown}" if unknown else "")


def _short(value: bytes) -> str:
    return repr(value[:40])
