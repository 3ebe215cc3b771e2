"""Tables of text that lose nothing.
As wide as their content, and where a terminal is narrower, one block a row.

Owns: the widths of columns, the rules between header, rows and sums, the colours of cells.
Promises: every character of every cell is shown, whatever the width. (Tables that shorten their cells to fit cut the
port off an address, just where people copy it.) Pure; needs no import that takes time.
Leaves to others: what is in the cells, which are one printable line each (`cluster`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

_GAP = "  "
_RULE = "─"
_RESET = "\x1b[0m"


class Column(NamedTuple):
    """`colours`: of cells, by their text: parameters of the terminal's SGR sequence, as in "31;1"."""

    name: str
    right: bool = False
    colours: Mapping[str, str] = {}


class Table(NamedTuple):
    """`sums`: a last row of its own, or none."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    sums: Sequence[str] = ()

    def lines(self, width: int | None = None, *, colour: bool = False) -> list[str]:
        """At most so many characters wide (None: any number), but for cells that are wider by themselves."""
        widths = [max(map(len, cells)) for cells in zip(*self._all(), strict=True)]
        if width is not None and sum(widths) + len(_GAP) * (len(widths) - 1) > width:
            return self._blocks(colour)
        rule = _GAP.join(_RULE * each for each in widths)
        header = [column.name for column in self.columns]
        lines = [self._line(header, widths, False), rule, *(self._line(row, widths, colour) for row in self.rows)]
        return [*lines, rule, self._line(self.sums, widths, False)] if self.sums else lines

    def _all(self) -> list[Sequence[str]]:
        return [[column.name for column in self.columns], *self.rows, *([self.sums] if self.sums else [])]

    def _line(self, cells: Sequence[str], widths: Sequence[int], colour: bool) -> str:
        padded = []
        for cell, column, width in zip(cells, self.columns, widths, strict=True):
            space = " " * (width - len(cell))
            shown = _painted(cell, column) if colour else cell
            padded.append(space + shown if column.right else shown + space)
        return _GAP.join(padded).rstrip(" ")

    def _blocks(self, colour: bool) -> list[str]:
        """The first cell as a heading, the others under it with their names; empty ones are left out."""
        name_width = max(len(column.name) for column in self.columns[1:])
        lines = []
        for row in (*self.rows, *([self.sums] if self.sums else [])):
            lines.append(row[0])
            for cell, column in zip(row[1:], self.columns[1:], strict=True):
                shown = _painted(cell, column) if colour else cell
                lines += [f"  {column.name:<{name_width}}  {shown}"] if cell else []
        return lines


def _painted(cell: str, column: Column) -> str:
    code = column.colours.get(cell)
    return f"\x1b[{code}m{cell}{_RESET}" if code else cell
