"""The program that measures failovers: its settings are those that are documented, and what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from kvstore.config import Limits
from loadtest.failover import QUICK, summary

SHIPPED = Path(__file__).resolve().parents[3] / "cluster.yaml"


def test_the_quick_settings_are_those_that_the_shipped_file_names_and_are_accepted() -> None:
    comment = " ".join(SHIPPED.read_text(encoding="utf-8").partition("  # Copies of a shard.")[2].split())
    named = dict(re.findall(r"(\w+_s) ([0-9.]+)(?=[,.] )", comment.partition("Quicker: ")[2]))
    assert {name: float(value) for name, value in named.items()} == QUICK
    assert msgspec.convert(QUICK, Limits).failover_after_s == QUICK["failover_after_s"]


def test_a_summary_tells_the_median_and_what_lies_outside_of_it() -> None:
    assert summary("dead", [2.0, 9.0, 2.2]) == "dead, 3 times: median 2.20 s (2.00 to 9.00)"
    assert summary("planned", [0.05, 0.07]) == "planned, 2 times: median 60 ms (50 to 70)"
