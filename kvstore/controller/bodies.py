"""The bodies of the controller's calls, as they come.

Owns: their members and types.
Promises: an unknown member is refused.
Leaves to others: what they mean (`service`), HTTP (`app`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

_NUMBER_MAX = 2**63 - 1  # in the file


class NewShard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/shards."""

    id: str
    url: str | None = None
    weight: int = 1


class Recover(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/recovery: which map was shown, and which of its members are silent for good."""

    cluster_id: str
    epoch: int
    without: list[str] = []


class NewTold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/told: the last durable record of a store, and its version clock."""

    store_id: str
    number: Annotated[int, msgspec.Meta(ge=0, le=_NUMBER_MAX)]
    version: Annotated[int, msgspec.Meta(ge=0, le=_NUMBER_MAX)] = 0


class Confirmation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/shards/{id}/accept-old."""

    confirm: str


class NewWeight(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of PATCH /v1/shards/{id}."""

    weight: int


class NewReplicas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of PATCH /v1/cluster."""

    replicas: int


class NewPrimary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/shards/{id}/promote: the node whose copy is to be the primary.

    `accept_loss`: although it is not in sync; `confirm` is the shard's id again then.
    """

    to: str
    accept_loss: bool = False
    confirm: str | None = None
