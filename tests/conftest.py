"""Settings of all tests."""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import signal
import socket
import tempfile
from typing import Any

from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, and nothing about the code.
settings.register_profile("kvstore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvstore")


def _keep_compiled_modules() -> None:
    """Where Python is not to write beside its modules, each of the many processes that are started would compile them
    all again. They share a folder of this run instead, and so do its workers, which inherit the variable.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", "") and "PYTHONPYCACHEPREFIX" not in os.environ:
        os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="kvstore-compiled-")
        atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)


def _catch_what_is_ignored() -> None:
    """`nohup` and a shell's `&` have signals ignored, and children inherit that; what is caught they do not inherit.

    So the run goes on ignoring them, and each process that a test starts begins with the defaults.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def _read_no_certificates() -> None:
    """aiohttp reads those that the machine trusts when it is imported, for a tenth of a second where they are one file.

    No test asks a server that one of them vouches for.
    """
    os.environ["SSL_CERT_FILE"] = os.devnull


def _ask_no_name_server() -> None:
    """Names such as `s1`, of nodes that only a map has, are unknown to this process at once: a name server that does
    not answer takes five seconds for that. `localhost` and addresses are looked up as ever.
    """
    look_up = socket.getaddrinfo

    def known(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name and name != "localhost":
            try:
                ipaddress.ip_address(name)
            except ValueError:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
        return look_up(host, *args, **kwargs)

    socket.getaddrinfo = known


_ask_no_name_server()
_keep_compiled_modules()
_read_no_certificates()
_catch_what_is_ignored()
