"""The number of the protocol between processes: which versions of this program may speak with each other.

Owns: the number that this program speaks, the header field in which each process names its own, who is refused.
Promises: a process whose number is no neighbour of the own one is refused before anything is done for it, and before
what it sent is decoded; both ends say so, with both numbers and what to do.
Leaves to others: what is said (`protocol`, `replication.messages`, `replication.beats`), which calls are hellos (the
routes of shard and controller), the formats of files and maps, which have numbers of their own.

The hellos are the requests that begin something: a channel, a connection to a copy, an announcement, a beat. The number
rises by one with each release that changes what processes say to each other; such a release still understands the one
before it. So a cluster is upgraded process by process, from one release to the next. A process that names no number is
of a release before the first number, 0.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from kvstore.errors import OtherProtocol

log = logging.getLogger(__name__)

PROTOCOL = 1
HEADER = "Kv-Protocol"
FIELDS = {HEADER: str(PROTOCOL)}  # of every request to another process

_NUMBER = re.compile(r"[0-9]{1,6}")
_NAMED_CHARS_MAX = 20
_SAID_MAX = 16
_said: dict[str, None] = {}  # refused numbers that stand in the log already


def check_protocol(fields: Mapping[str, str], peer: str | None) -> None:
    """Refuse a hello of another protocol from that address. Raises OtherProtocol, and says so in the log.

    `fields` are named in lower case.
    """
    named = fields.get(HEADER.lower(), "0")
    if _NUMBER.fullmatch(named) and abs(int(named) - PROTOCOL) <= 1:
        return
    refused = OtherProtocol(
        f"This process speaks protocol {PROTOCOL} and understands those beside it, {PROTOCOL - 1} and {PROTOCOL + 1}; "
        f"the one at {peer} speaks {named[:_NAMED_CHARS_MAX]!a}, and is refused."
    )
    if named not in _said and len(_said) < _SAID_MAX:
        _said[named] = None
        log.error("%s", refused.sentences)
    raise refused


def refused_by(url: str, fields: Mapping[str, str] | None) -> OtherProtocol | None:
    """Why the process there has refused a hello of this one, if that was its protocol; `fields`: of its answer."""
    theirs = fields.get(HEADER) if fields is not None else None
    if theirs is None:
        return None
    return OtherProtocol(
        f"The process at {url} speaks protocol {theirs} and refuses this one, which speaks {PROTOCOL}: their versions "
        "do not follow each other."
    )
