"""Free ports: programs that look for them at the same time do not get the same ones."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from loadtest.cluster.processes import free_ports

SAME_ORDER = "import random; from loadtest.cluster.processes import free_ports; random.seed(7); print(*free_ports(3))"


def test_a_port_that_was_given_is_given_to_no_other_program_before_this_one_has_ended() -> None:
    random.seed(7)
    mine = free_ports(3)
    asked = subprocess.run([sys.executable, "-c", SAME_ORDER], capture_output=True, text=True, check=True, timeout=60)
    others = [int(port) for port in asked.stdout.split()]
    assert len(others) == 3
    assert not set(mine) & set(others)


def test_a_port_that_was_given_long_ago_may_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.cluster.processes._CLAIMS_MAX", 2)
    (first,) = free_ports(1)
    free_ports(2)
    monkeypatch.setattr(random, "sample", lambda *_, **__: [first])
    assert free_ports(1) == [first]
