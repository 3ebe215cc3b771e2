"""The bodies of calls that only the controller takes, as they come.

Owns: their members and types.
Promises: an unknown member is refused.
Leaves to others: what they mean (`operator_changes`, `service`), those that come by way of a router
(`transport.change_documents`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

_NUMBER_MAX = 2**63 - 1  # in the file


class Recover(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/recovery: which map was shown, and which of its members are silent for good."""

    cluster_id: str
    epoch: int
    without: list[str] = []


class NewTold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/told: the last durable record of a store, and its version clock.

    `copy_id`: of the copy that serves it; empty: it is only asked what was told, or a program tells that names none.
    """

    store_id: str
    number: Annotated[int, msgspec.Meta(ge=0, le=_NUMBER_MAX)]
    version: Annotated[int, msgspec.Meta(ge=0, le=_NUMBER_MAX)] = 0
    copy_id: str = ""
