"""The shape of a peak, for Locust beside locustfile.py: few users, many, few again.

Owns: how many users there are at which second, by the option --peak.
Promises: the last phase has as many users as the first one, so that the two can be compared.
Leaves to others: starting it and drawing the sums (loadtest.peak).
"""

from __future__ import annotations

from typing import Any

from locust import LoadTestShape, events

SPAWN_RATE = 100


class Peak(LoadTestShape):
    """`--peak USERS,MOST,BEFORE_S,PEAK_S,AFTER_S`."""

    def tick(self) -> tuple[int, float] | None:
        shape: Any = self
        few, most, *seconds = map(int, shape.runner.environment.parsed_options.peak.split(","))
        passed_s = shape.get_run_time()
        # all who must go, go at once: the rate holds for stopping, too
        for users, rate, lasts_s in zip((few, most, few), (few, SPAWN_RATE, most), seconds, strict=True):
            if passed_s < lasts_s:
                return users, rate
            passed_s -= lasts_s
        return None


def add_options(parser: Any, **_: Any) -> None:
    parser.add_argument("--peak", default="50,1000,15,60,30", help="Users, most users, and seconds of three phases.")


hooks: Any = events
hooks.init_command_line_parser.add_listener(add_options)
