"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, and nothing about the code.
settings.register_profile("kvstore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstore")


def _catch_what_is_ignored() -> None:
    """`nohup` and a shell's `&` have signals ignored, and children inherit that; what is caught they do not inherit.

    So the run goes on ignoring them, and each process that a test starts begins with the defaults.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


_catch_what_is_ignored()
