"""Draws the pictures of the documents from the code itself: `python -m loadtest.pictures`.

Owns: `kvstore/pictures/*.svg`: the system as `kvstore up` starts it, and the ring before and after a shard joins.
Promises: the same code draws the same bytes, so a test compares the committed files with what would be drawn.
Leaves to others: where partitions belong (`placement.ring`), which processes there are (`config`).
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from kvstore.config import default_config
from kvstore.placement.ring import ShardWeight, partition_of, place, virtual_nodes

FOLDER = Path(__file__).resolve().parents[1] / "kvstore" / "pictures"
PARTITIONS = 64  # the fewest that a cluster may have: more could not be told apart in a picture
EXAMPLE_KEY = "user:42"

_COLOURS = {"s1": "#3f6fb5", "s2": "#e0a526", "s3": "#4b9b69", "s4": "#d2553f"}
_INK, _GREY, _PAPER = "#1f2328", "#6b7280", "#ffffff"
_FONT = "font-family='system-ui, sans-serif'"


def pictures() -> dict[str, str]:
    """File name and text of every picture."""
    return {"system.svg": system(), "ring.svg": ring()}


# --- the system -------------------------------------------------------------------------------------------------------


def system() -> str:
    """Clients, router, controller and shards, with the addresses and shares of the default cluster."""
    config = default_config()
    owners = Counter(place([ShardWeight(shard.id, shard.weight) for shard in config.shards], config.partitions))
    router, controller = config.routers[0], config.controllers[0]
    parts = [
        *_box(30, 40, 190, 92, "clients", ["curl, a browser, kvstore", "the Python client"], _GREY),
        *_box(325, 40, 210, 92, f"router {router.id}", [f"http://{router.listen}", "key → partition → shard"], _INK),
        *_box(325, 196, 210, 92, f"controller {controller.id}", [controller.listen, "owns the cluster map"], _GREY),
        *_arrow(220, 86, 325, 86, "HTTP"),
        *_arrow(430, 196, 430, 132, "map", dashed=True),
    ]
    top, gap = 22, 80
    for number, shard in enumerate(config.shards):
        y = top + number * gap
        lines = [f"{shard.listen} · {owners[shard.id]:,} of {config.partitions:,} partitions", f"shard-{shard.id}.db"]
        parts += _box(690, y, 290, 68, f"shard {shard.id}", lines, _COLOURS[shard.id])
        parts += _arrow(535, 86, 690, y + 26)
        parts += _arrow(535, 250, 690, y + 46, dashed=True)
    parts += _text(612, 18, "one WebSocket a shard,", 11, _GREY, "middle")
    parts += _text(612, 32, "many operations a frame", 11, _GREY, "middle")
    return _svg(1000, 350, "The system: clients, router, controller and shards", parts)


def _box(x: int, y: int, width: int, height: int, title: str, lines: Sequence[str], colour: str) -> Iterator[str]:
    yield (
        f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='6' fill='{_PAPER}' "
        f"stroke='{colour}' stroke-width='2'/>"
    )
    yield from _text(x + 14, y + 24, title, 15, _INK, weight=600)
    for number, line in enumerate(lines):
        yield from _text(x + 14, y + 44 + 17 * number, line, 12, _GREY)


def _arrow(x1: int, y1: int, x2: int, y2: int, label: str = "", *, dashed: bool = False) -> Iterator[str]:
    style = "stroke-dasharray='4 4' " if dashed else ""
    yield (
        f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{_GREY}' {style}stroke-width='1.5' "
        "marker-end='url(#tip)'/>"
    )
    if label:
        x, y = (x1 + x2) // 2, (y1 + y2) // 2
        yield from _text(x + 24 if x1 == x2 else x - 4, y + 4 if x1 == x2 else y - 8, label, 11, _GREY, "middle")


# --- the ring ---------------------------------------------------------------------------------------------------------


def ring() -> str:
    """Virtual nodes and partitions of three shards, and of four: what moved is marked."""
    three = [ShardWeight(f"s{number}") for number in (1, 2, 3)]
    four = [*three, ShardWeight("s4")]
    before = place(three, PARTITIONS)
    after = place(four, PARTITIONS, before)
    moved = [partition for partition in range(PARTITIONS) if before[partition] != after[partition]]
    parts = [
        *_circle(270, 300, "three shards", three, before, []),
        *_circle(790, 300, "a fourth one has joined", four, after, moved),
        *_legend(four, before, after, len(moved)),
    ]
    return _svg(1060, 640, "The ring with its virtual nodes, before and after a shard joins", parts)


def _circle(x: int, y: int, title: str, nodes: list[ShardWeight], owners: list[str], moved: list[int]) -> Iterator[str]:
    """Outside the virtual nodes, inside one arc per partition; `moved` ones stand out."""
    yield from _text(x, 34, title, 18, _INK, "middle", 600)
    for point, shard in virtual_nodes(nodes):
        angle = point / 2**64
        (x1, y1), (x2, y2) = _at(x, y, 216, angle), _at(x, y, 234, angle)
        yield (
            f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{_COLOURS[shard]}' "
            "stroke-width='1.6'/>"
        )
    for partition, owner in enumerate(owners):
        inner, outer = (150, 208) if partition in moved else (170, 208)
        yield from _sector(x, y, inner, outer, partition, _COLOURS[owner])
    mine = partition_of(EXAMPLE_KEY.encode(), PARTITIONS)
    tip_x, tip_y = _at(x, y, 146, (mine + 0.5) / PARTITIONS)
    yield f"<line x1='{x}' y1='{y + 12}' x2='{tip_x:.1f}' y2='{tip_y:.1f}' stroke='{_INK}' stroke-width='1.2'/>"
    yield from _text(x, y - 34, EXAMPLE_KEY, 15, _INK, "middle", 600)
    yield from _text(x, y - 14, f"partition {mine} of {PARTITIONS}", 12, _GREY, "middle")
    yield from _text(x, y + 3, f"is owned by {owners[mine]}", 12, _GREY, "middle")


def _sector(x: int, y: int, inner: int, outer: int, partition: int, colour: str) -> Iterator[str]:
    first, last = (partition + 0.08) / PARTITIONS, (partition + 0.92) / PARTITIONS
    corners = [_at(x, y, outer, first), _at(x, y, outer, last), _at(x, y, inner, last), _at(x, y, inner, first)]
    (a, b, c, d) = [f"{cx:.1f} {cy:.1f}" for cx, cy in corners]
    yield f"<path d='M{a} A{outer} {outer} 0 0 1 {b} L{c} A{inner} {inner} 0 0 0 {d} Z' fill='{colour}'/>"


def _at(x: int, y: int, radius: int, turn: float) -> tuple[float, float]:
    """A point on the circle, `turn` of a turn clockwise from the top."""
    angle = 2 * math.pi * turn
    return x + radius * math.sin(angle), y - radius * math.cos(angle)


def _legend(nodes: list[ShardWeight], before: list[str], after: list[str], moved: int) -> Iterator[str]:
    had, has = Counter(before), Counter(after)
    for number, node in enumerate(nodes):
        x = 60 + number * 240
        yield f"<rect x='{x}' y='558' width='14' height='14' fill='{_COLOURS[node.id]}'/>"
        line = f"{node.id}: {had[node.id]} partitions, then {has[node.id]}"
        yield from _text(x + 22, 570, line, 13, _INK)
    takers = {owner for _, owner in _changes(before, after)}
    yield from _text(
        60,
        604,
        f"Ticks: virtual nodes. Sectors: partitions, in the colour of their owner. The {moved} longer ones moved, "
        f"all to {' and '.join(sorted(takers))}; the others stay where they are.",
        13,
        _GREY,
    )


def _changes(before: list[str], after: list[str]) -> list[tuple[str, str]]:
    return [pair for pair, _ in groupby(sorted(zip(before, after, strict=True))) if pair[0] != pair[1]]


# --- SVG --------------------------------------------------------------------------------------------------------------


def _text(x: int, y: int, text: str, size: int, colour: str, anchor: str = "start", weight: int = 400) -> Iterator[str]:
    yield (
        f"<text x='{x}' y='{y}' font-size='{size}' font-weight='{weight}' fill='{colour}' "
        f"text-anchor='{anchor}'>{text}</text>"
    )


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    tip = (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0 L8 4 L0 8 Z' fill='{_GREY}'/></marker></defs>"
    )
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' {_FONT} role='img'>"
    paper = f"<rect width='{width}' height='{height}' fill='{_PAPER}'/>"
    return "\n".join([head, f"<title>{title}</title>", tip, paper, *parts, "</svg>", ""])


def main() -> None:
    """Write all pictures."""
    argparse.ArgumentParser(prog="python -m loadtest.pictures", description=main.__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
