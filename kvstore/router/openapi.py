"""The OpenAPI 3.1 document of the public API."""

from __future__ import annotations

import msgspec

from kvstore.config import Limits


def openapi_json(limits: Limits) -> bytes:
    """The document as JSON."""
    return msgspec.json.encode({"openapi": "3.1.0", "info": {"title": "kvstore", "version": "1"}, "paths": {}})
