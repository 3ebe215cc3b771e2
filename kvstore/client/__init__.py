"""The Python client of a router: `async with Client(url) as kv`.

`client` has the calls on keys, locks and transactions, `cluster_calls` those on the cluster, `held_lock` a lock for the
length of a block; `connection` sends, and says of each failure whether something may have been done; `results` are the
values that come back.
"""

from kvstore.addresses import DEFAULT_URL
from kvstore.client.client import Client
from kvstore.client.connection import (
    CONNECT_TIMEOUT_S,
    LARGE_BODY_BYTES,
    RETRY_WAIT_MS_UNNAMED,
    RETRY_WAIT_S_MAX,
    base_url,
)
from kvstore.client.results import Counted, Holder, Item, ListedItem, Page, Result
from kvstore.operations import Delete, Get, Operation, Put
from kvstore.txn import TxnResult

__all__ = [
    "CONNECT_TIMEOUT_S",
    "DEFAULT_URL",
    "LARGE_BODY_BYTES",
    "RETRY_WAIT_MS_UNNAMED",
    "RETRY_WAIT_S_MAX",
    "Client",
    "Counted",
    "Delete",
    "Get",
    "Holder",
    "Item",
    "ListedItem",
    "Operation",
    "Page",
    "Put",
    "Result",
    "TxnResult",
    "base_url",
]
