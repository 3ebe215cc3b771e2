"""Damage to the files of one store: where, and of which shape.

Owns: the places (log, its note, file, its WAL, its indexes, its map, its id) and the shapes (flipped bits,
zeroed sectors and pages, cut files, a missing file).
Promises: the random generator alone decides, and each damage changes at least one byte, or says that it could not.
Leaves to others: which store, and what becomes of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
PAGE = 4096
PLACES = ("log", "note", "file", "wal", "index", "map", "id")
SHAPES = ("bit", "bits", "sector", "page", "cut", "missing")
_SHAPE_WEIGHTS = (8, 3, 4, 3, 3, 1)
_INDEX_PAGES = frozenset({0x02, 0x0A})


class Damage(NamedTuple):
    """What was done; `offset` -1 for a missing file."""

    place: str
    shape: str
    file: str
    offset: int


def damage(path: Path, rng: random.Random) -> Damage | None:
    """Damage the store whose file is `path`, once; None if the place that was drawn has nothing to damage."""
    place, (shape,) = rng.choice(PLACES), rng.choices(SHAPES, _SHAPE_WEIGHTS)
    if place in ("index", "map") and shape in ("cut", "missing", "page"):
        shape = "sector" if place == "index" else "bit"
    found = _offset_in(path, place, rng)
    if found is None:
        return None
    file, offset = found
    before = file.read_bytes()
    _SHAPES[shape](file, offset, rng)
    if file.exists() and file.read_bytes() == before:
        return None
    return Damage(place, shape, file.name, -1 if shape == "missing" else offset)


def _offset_in(path: Path, place: str, rng: random.Random) -> tuple[Path, int] | None:
    """A random used byte of that place."""
    wal = Path(f"{path}-wal")
    if place == "log":
        segments = sorted(path.parent.glob(f"{path.stem}.log.0*"))
        file = rng.choice(segments)
        used = len(file.read_bytes().rstrip(b"\0"))
        return file, rng.randrange(max(used, SECTOR))
    if place == "note":
        file = path.parent / f"{path.stem}.log.note"
        return file, rng.choice((0, PAGE)) + rng.randrange(80)
    if place == "wal":
        size = wal.stat().st_size if wal.exists() else 0
        return (wal, rng.randrange(size)) if size else None
    if place == "id":
        own = path.with_suffix(".id")
        size = own.stat().st_size if own.exists() else 0
        return (own, rng.randrange(size)) if size else None
    data = path.read_bytes()
    if place == "file":
        return path, rng.randrange(len(data))
    if place == "index":
        pages = [at for at in range(PAGE, len(data), PAGE) if data[at] in _INDEX_PAGES]
        return (path, rng.choice(pages) + rng.randrange(PAGE)) if pages else None
    for file in (path, wal):
        at = file.read_bytes().rfind(b'"cluster_id"') if file.exists() else -1
        if at >= 0:
            return file, at + rng.randrange(200)
    return None


def _flip(file: Path, offset: int, rng: random.Random) -> None:
    _change(file, offset, lambda byte: byte ^ 1 << rng.randrange(8), 1)


def _flip_some(file: Path, offset: int, rng: random.Random) -> None:
    start = offset // SECTOR * SECTOR
    for _ in range(rng.randint(2, 8)):
        _flip(file, min(start + rng.randrange(SECTOR), file.stat().st_size - 1), rng)


def _zero_sector(file: Path, offset: int, rng: random.Random) -> None:
    _change(file, offset // SECTOR * SECTOR, lambda byte: 0, SECTOR)


def _zero_page(file: Path, offset: int, rng: random.Random) -> None:
    _change(file, offset // PAGE * PAGE, lambda byte: 0, PAGE)


def _cut(file: Path, offset: int, rng: random.Random) -> None:
    with file.open("r+b") as opened:
        opened.truncate(offset)


def _remove(file: Path, offset: int, rng: random.Random) -> None:
    file.unlink()


def _change(file: Path, offset: int, changed: Callable[[int], int], count: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        before = opened.read(count)
        opened.seek(offset)
        opened.write(bytes(map(changed, before)))


_SHAPES: dict[str, Callable[[Path, int, random.Random], None]] = {
    "bit": _flip, "bits": _flip_some, "sector": _zero_sector, "page": _zero_page, "cut": _cut, "missing": _remove,
}  # fmt: skip
