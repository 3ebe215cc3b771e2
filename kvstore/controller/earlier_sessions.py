"""The sessions that a controller had before this one.

Owns: `controller-<id>.sessions` beside the controller's file: the ids of its last processes, the oldest first.
Promises: this process's id is in the file before another process hears of it. A file that cannot be read or written
ends nothing: a process that has missed a restart of the controller then waits until it hears of this session itself.
Leaves to others: drawing the id and telling the earlier ones (`app`), what they allow (`transport.sessions`).
"""

from __future__ import annotations

import logging
from pathlib import Path

from kvstore.data_file import write_durably
from kvstore.transport.sessions import KEPT, ids_of

log = logging.getLogger(__name__)


def sessions_path(data_dir: Path, controller_id: str) -> Path:
    """The file of that controller's sessions."""
    return data_dir / f"controller-{controller_id}.sessions"


def begin_session(path: Path, session_id: str) -> list[str]:
    """Add the id to the file; returns those before it, the oldest first. Raises nothing: see the module."""
    earlier: list[str] = []
    try:
        if path.exists():
            earlier = ids_of(path.read_text(encoding="ascii", errors="replace"))[-KEPT:]
        write_durably(path, f"{','.join([*earlier, session_id][-KEPT:])}\n".encode("ascii"))
    except OSError as error:
        log.warning("the sessions cannot be kept in %s: %s", path, error)
    return earlier
