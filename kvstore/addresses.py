"""Addresses: where a process listens, and where others are told to reach it.

Owns: HOST:PORT of either kind, as text and as a pair; the address of a router that none is given for.
Promises: no address is told to others at which no process could answer: neither "all addresses" (0.0.0.0, [::]) nor
port 0.
Leaves to others: listening, and to whom an address is told.
"""

from __future__ import annotations

import ipaddress
import re
import socket

from kvstore.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8080"


def listen_address(listen: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" (IPv6 in brackets). Port 0 lets the system choose. Raises ConfigError."""
    host, separator, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not separator or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
        raise ConfigError(f"{listen!r} is no address; write HOST:PORT, for example 127.0.0.1:8080.")
    return host, int(port)


def is_loopback(listen: str) -> bool:
    """Whether only this machine reaches that address (HOST:PORT). Raises ConfigError."""
    host = listen_address(listen)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_any_address(host: str) -> bool:
    """Whether listening on `host` (without brackets) means all addresses, in whatever form that is written."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        pass
    try:
        return socket.inet_aton(host) == b"\0\0\0\0"  # 0 and 0.0, too
    except OSError:
        return False


def address_text(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def on_this_host(listen: str) -> tuple[str, int]:
    """Where a process of this very host reaches one that listens there: 0.0.0.0 becomes 127.0.0.1, [::] ::1."""
    host, port = listen_address(listen)
    if is_any_address(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return host, port


def advertised_host(listen: str, advertise: str | None) -> str:
    """The host at which others are told to reach it. Raises ConfigError if that cannot be reached."""
    host = listen_address(advertise or listen)[0]
    if is_any_address(host):
        option = "--advertise" if advertise else "--listen"
        raise ConfigError(
            f"{option} {advertise or listen} is no address at which others could reach this process: "
            "add --advertise HOST:PORT with the one by which they know this host (port 0: the port it listens at)."
        )
    return host


def advertised(listen: str, advertise: str | None, bound_port: int) -> str:
    """HOST:PORT that is told to others; `bound_port` is the port that it listens at by now. Raises ConfigError."""
    host = advertised_host(listen, advertise)
    return address_text(host, listen_address(advertise or listen)[1] or bound_port)
