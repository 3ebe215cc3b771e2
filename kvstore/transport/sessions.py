"""The session of announcements: which run of a controller a process belongs to.

Owns: the id of the session that a process is in, the ids of those that it was in before, and where they travel.
Promises: an id is learned from the own controller alone, so two clusters never know a session of each other, not even
when one of them runs on a copy of the other's data directory and has all of its ids.
Leaves to others: drawing the id (`controller.app`), asking for it (`map_follower`), who is let in (`shard.hellos`).

The controller's process draws the id at its start and keeps it in memory only. Its answers carry it in a header, and
every hello of a channel names it: a router, a shard or a controller that reaches a shard of another session, because
an address in its map is that of another cluster's process, is refused there before it can ask anything. A process may
name an earlier session, while it is cut off from the controller; the controller keeps the ids of its last processes and
tells them to a shard that asks, which may have been away itself when it should have learned them.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable

HEADER = "Kv-Session"
EARLIER_HEADER = "Kv-Earlier-Sessions"  # in the answer to a process that asks for the session
PARAMETER = "session"
IS_STRANGER = 421  # the shard belongs to another session, for certain
IS_UNSURE = 503  # its controller cannot be asked now
ADOPT = "stop the cluster on the copy, and make it a cluster of its own with `kvstore cluster adopt`"

KEPT = 16
_ID = re.compile(r"[0-9a-z-]{1,64}")


def ids_of(text: str) -> list[str]:
    """The session ids in a text that separates them by commas; what is none is left out."""
    return [each for each in (part.strip() for part in text.split(",")) if _ID.fullmatch(each)]


class ClusterSession:
    """`id`: what the hellos of this process name, empty until it is known. `on_enter`: called with each new one."""

    def __init__(self, session_id: str = "") -> None:
        self.id = session_id
        self.on_enter: Callable[[str], None] = lambda session_id: None
        self._known = deque([session_id] if session_id else [], 2 * KEPT)

    def enter(self, session_id: str | None, earlier: str = "") -> None:
        """The own controller is in that session, None: it did not say; and was in the earlier ones."""
        for each in ids_of(earlier)[-KEPT:]:
            self.recall(each)
        if session_id and session_id != self.id:
            self.id = session_id
            self.recall(session_id)
            self.on_enter(session_id)

    def recall(self, session_id: str) -> None:
        """Note an earlier session of this very cluster."""
        if session_id not in self._known:
            self._known.append(session_id)

    def knows(self, session_id: str) -> bool:
        """Whether it is the present session, or an earlier one of this cluster."""
        return session_id in self._known
