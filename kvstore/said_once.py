"""A line of the log that is written when its reason changes, and not at every try."""

from __future__ import annotations


class SaidOnce:
    """`reason`: the one that was said last; empty if there is nothing to say."""

    def __init__(self) -> None:
        self.reason = ""

    def is_news(self, reason: str) -> bool:
        """Whether it is to be said; from now on it counts as said.
        An empty one never is, and ends the one before."""
        is_news, self.reason = bool(reason) and reason != self.reason, reason
        return is_news
