"""What an error says to a person."""

from __future__ import annotations

import pytest

from kvstore.errors import ConfigError, DataCorrupt, ForeignData, KvError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ForeignData("f.db belongs to shard s2"), f"f.db belongs to shard s2. {ForeignData.next_step}"),
        (ForeignData("It belongs to shard s2."), f"It belongs to shard s2. {ForeignData.next_step}"),
        (DataCorrupt("The file is damaged.", next_step="Restore it."), "The file is damaged. Restore it."),
        (DataCorrupt("The file is damaged.", next_step=""), "The file is damaged."),
        (ConfigError("cluster.yaml:3: x is unknown; mend it"), "cluster.yaml:3: x is unknown; mend it"),
    ],
)
def test_an_error_says_what_happened_and_then_what_to_do_about_this_very_one(error: KvError, said: str) -> None:
    assert error.sentences == said
