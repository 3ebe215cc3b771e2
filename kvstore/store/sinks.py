"""Sinks of the store's own operations.

Owns: where the answers go that no router waits for.
Promises: nothing is raised into the pipeline but what the function raises.
Leaves to others: the sinks of connections (`transport.channel`).
"""

from __future__ import annotations

from collections.abc import Callable

from kvstore.protocol import Reply
from kvstore.store.write_set import Sink


class Then:
    """Calls a function with the reply; `behind` is the sink of the client on whose behalf it asks, if any."""

    def __init__(self, function: Callable[[Reply], None], behind: Sink | None = None) -> None:
        self._function = function
        self._behind = behind

    def send(self, reply: Reply, /) -> None:
        """Call the function with the reply."""
        self._function(reply)

    @property
    def closed(self) -> bool:
        """Whether the sink behind it is."""
        return self._behind is not None and self._behind.closed


DISCARD = Then(lambda _: None)
