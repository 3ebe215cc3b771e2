"""What clients called, when, and what came back: a history, one line of JSON for each operation.

Owns: the shape of an operation, the NDJSON file, the clock.
Promises: an operation whose outcome no client knows stays open: it has no end, and no answer. What is written is
flushed line by line, so that a history outlives the process that wrote it; a last line that was cut is left out by
`read`.
Leaves to others: what a history proves (append, bank).

Times are seconds of this machine's monotonic clock: all clients of one history run on one machine. `begin_s` is taken
before the request is sent and `end_s` after its answer has come, so that "ended before another began" is sure.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

Outcome = Literal["done", "refused", "unknown"]


class Operation(msgspec.Struct, kw_only=True, tag_field="call"):
    """`outcome`: done; refused (the answer says that nothing was done, so nothing may ever show); unknown (it was done,
    or not, or will be, once). `end_s` is None exactly for an unknown one. `said`: the answer in short, for people."""

    client: str
    begin_s: float
    end_s: float | None = None
    outcome: Outcome = "unknown"
    said: str = ""

    def __post_init__(self) -> None:
        if (self.end_s is None) != (self.outcome == "unknown"):
            raise ValueError(f"{self.outcome} with end {self.end_s}: exactly an unknown outcome has no end")
        if self.end_s is not None and self.end_s < self.begin_s:
            raise ValueError(f"it ended ({self.end_s}) before it began ({self.begin_s})")


class Lists(Operation, tag="lists"):
    """A transaction on lists.
    It reads some (each as it was before the appends) and appends to some, all at once.

    A value is appended once in a whole history. `reads` are those of the answer, so there are none unless it was done.
    """

    appends: dict[str, list[int]] = {}
    reads: list[tuple[str, list[int]]] = []


class Account(msgspec.Struct, array_like=True, frozen=True):
    """What an account holds, and the version of its key."""

    balance: int
    version: int


class Transfer(Operation, tag="transfer"):
    """Move `amount` between two accounts (named by number), if both still have the version that was read before; in the
    same transaction write the key `marker`. `version`: what it wrote, when that is known."""

    source: int
    target: int
    amount: int
    marker: str
    source_version: int
    target_version: int
    version: int | None = None


class Balances(Operation, tag="balances"):
    """Accounts by number, read in one transaction (or one of them by itself). `whole`: all were asked for."""

    accounts: dict[int, Account] = {}
    whole: bool = False


class Markers(Operation, tag="markers"):
    """A listing of the markers of transfers, with their texts."""

    markers: dict[str, str] = {}


class Register(Operation, tag="register"):
    """One key: read it, write `value`, delete it, or `swap`: write `value` if the key still holds what was read.

    Each value is written once in a whole history. `value`: what was read (None: there was no such key), or is to be
    written. `expected`: of a swap, the value that was read with the version of its condition (None: no such key).
    `met`: False exactly for a swap whose condition did not hold (412; that is an outcome "done"). `version`: the one
    that the answer told.
    """

    key: str
    action: Literal["read", "write", "delete", "swap"]
    value: str | None = None
    expected: str | None = None
    met: bool = True
    version: int | None = None


class Count(Operation, tag="count"):
    """A counter in a key: read it, or raise it from `value` - 1 to `value` by compare-and-set.
    None: not there (0)."""

    key: str
    action: Literal["read", "raise"]
    value: int | None = None


class Element(Operation, tag="element"):
    """One element of a set, a key of its own below the prefix `set`.
    It is added once, and removed once at most."""

    set: str
    element: str
    action: Literal["add", "remove"]


class Members(Operation, tag="members"):
    """A listing of a whole set, of all its pages, in the order in which the elements came."""

    set: str
    elements: list[str] = []


class Lease(Operation, tag="lease"):
    """A lock is acquired, renewed or released by the client `client`. `token`: the one granted, or shown. `ttl_s`: how
    long the lease lasts from the grant, or from the renewal, on."""

    lock: str
    action: Literal["acquire", "renew", "release"]
    token: int | None = None
    ttl_s: float = 0.0


class Guarded(Operation, tag="guarded"):
    """In a critical section, under the lock `lock` held with `token`.
    `key` was read as `value` - 1, and written as `value`. Refused: the store said that the token is no longer the
    holder's, or that the key was not its own."""

    lock: str
    token: int
    key: str
    value: int


AnyOperation = Lists | Transfer | Balances | Markers | Register | Count | Element | Members | Lease | Guarded

now_s = time.monotonic

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyOperation)


class History:
    """A file to which operations are added in the order in which they end."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self.close = self._file.close

    def add(self, operation: AnyOperation) -> None:
        self._file.write(_encoder.encode(operation) + b"\n")


def write(path: Path, operations: Iterable[AnyOperation]) -> None:
    """A whole history at once; what was in the file before is gone."""
    path.write_bytes(b"".join(_encoder.encode(operation) + b"\n" for operation in operations))


def read(path: Path) -> list[AnyOperation]:
    """Raises ValueError that names the line which is no operation."""
    *lines, cut = path.read_bytes().split(b"\n")
    del cut  # empty, or a line that was never finished
    operations: list[AnyOperation] = []
    for number, line in enumerate(lines, start=1):
        try:
            operations.append(_decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{number}: not an operation: {error}") from None
    return operations
