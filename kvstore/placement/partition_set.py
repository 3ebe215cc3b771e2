"""Sets of partitions as bits: what a shard says it has shown, what a router still wants.

Owns: the form of a set, as an integer and as the bytes of a message.
Promises: pure. In the integer bit p stands for partition p, so union, intersection and difference are `|`, `&` and
`& ~`; in the bytes that is bit p % 8 of byte p // 8.
Leaves to others: what a set means (`protocol.Page`).
"""

from __future__ import annotations

from collections.abc import Iterable

_DIGITS = bytes.maketrans(b"\0\1", b"01")


def all_of(partitions: int) -> int:
    """The set of all of so many partitions."""
    return (1 << partitions) - 1


def from_flags(flags: Iterable[object]) -> int:
    """The set of those whose flag is true; the first flag is that of partition 0."""
    return int(b"0" + bytes(map(bool, flags))[::-1].translate(_DIGITS), 2)


def to_flags(bits: int, partitions: int) -> list[bool]:
    """For each of so many partitions whether it is in the set."""
    return [digit == "1" for digit in f"{bits & all_of(partitions):0{partitions}b}"[::-1]]


def listed(bits: int) -> list[int]:
    """The partitions of the set, in order."""
    return [partition for partition, digit in enumerate(reversed(f"{bits:b}")) if digit == "1"]


def encode(bits: int, partitions: int) -> bytes:
    """The set as it travels: (`partitions` + 7) // 8 bytes. Raises OverflowError if it has a partition beyond them."""
    return bits.to_bytes((partitions + 7) // 8, "little")


def decode(encoded: bytes) -> int:
    """The set that has travelled."""
    return int.from_bytes(encoded, "little")


def runs(partitions: Iterable[int]) -> list[list[int]]:
    """[first, count] of each run of successive numbers."""
    found: list[list[int]] = []
    for partition in sorted(partitions):
        if found and partition == found[-1][0] + found[-1][1]:
            found[-1][1] += 1
        else:
            found.append([partition, 1])
    return found


def as_text(partitions: Iterable[int]) -> str:
    """The numbers in order, for people; those between the first and the last of a run left out."""
    return ", ".join(f"{first}-{first + count - 1}" if count > 1 else str(first) for first, count in runs(partitions))
