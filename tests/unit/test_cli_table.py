"""Tables at a terminal: nothing is cut off, and what is last known is not shown as present."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.cli.cluster import _ring_table, _status, spread
from kvstore.cli.shards import _line
from kvstore.cli.table import Column, Table


def document(host: str = "127.0.0.1", state: str = "up") -> dict[str, Any]:
    shards = [
        {
            "id": f"s{n}",
            "url": f"http://{host}:{9100 + n}",
            "state": state if n == 2 else "up",
            "weight": 1,
            "partitions": 1024,
            "keys": 1_234_567,
            "bytes": 123_456_789,
        }
        for n in range(1, 5)
    ]
    move = {
        "from": "s1", "to": "s5", "partitions": 610, "step": "waiting", "keys_done": 1, "keys_total": 2,
        "write_pause_ms": 0, "detail": "the source does not answer",
    }  # fmt: skip
    return {"cluster_id": "c" * 32, "epoch": 1, "replicas": 1, "partitions": 4096, "shards": shards, "moves": [move]}


@pytest.mark.parametrize("width", [None, 200, 120, 80, 60, 40, 20])
@pytest.mark.parametrize("host", ["127.0.0.1", "kv-3.eu-central.storage.example"])
def test_status_and_ring_show_every_address_and_figure_at_any_width(width: int | None, host: str) -> None:
    shown = _status(document(host), width, False)
    for n in range(1, 5):
        assert any(f"{host}:{9100 + n}" in line for line in shown)
    assert sum("1,234,567" in line for line in shown) == 4
    assert any("4,938,268" in line for line in shown)
    assert any("the source does not answer" in line for line in shown)
    assert "…" not in "".join(shown)
    ring = _ring_table(spread(document(host)), width)
    assert sum("25.00%" in line for line in ring) == 4


def test_the_usual_tables_fit_on_80_columns_as_tables() -> None:
    shown = _status(document(), 80, False)
    assert max(map(len, shown)) <= 80
    assert any(line.startswith("shard  ") for line in shown)
    ring = _ring_table(spread(document()), 80)
    assert max(map(len, ring)) <= 80
    assert "█" in ring[-1]


def test_the_figures_of_a_shard_that_is_down_are_marked_as_what_was_last_known() -> None:
    facts = document(state="down")
    shown = _status(facts, 120, False)
    row = next(line for line in shown if line.startswith("s2"))
    assert "(1,234,567)" in row
    assert "(123.5 MB)" in row
    assert "(4,938,268)" in next(line for line in shown if line.startswith("4 shards"))
    assert any("last known" in line for line in shown)
    assert "(1,234,567) keys" in _line(facts["shards"][1], shows_copies=False)
    assert "(" not in next(line for line in shown if line.startswith("s1"))
    assert spread(facts)["shards"][1]["keys"] is None
    assert spread(facts)["keys_peak_to_mean"] is None


def test_colours_are_there_only_if_they_are_asked_for() -> None:
    table = Table([Column("a"), Column("state", colours={"down": "31"})], [("x", "down"), ("y", "up")])
    assert "\x1b" not in "".join(table.lines())
    assert table.lines(colour=True)[2] == "x  \x1b[31mdown\x1b[0m"
