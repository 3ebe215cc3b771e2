"""The JSON documents of the public API as JSON Schemas (draft 2020-12), the components of the OpenAPI document.

Owns: the shape of every document that the router takes or gives.
Promises: request bodies are closed (an unknown field is refused, as `batch` refuses it), answers are open: a client
must let pass what it does not know, so that fields can be added.
Leaves to others: routes, statuses and header fields (`operations`), the documents that speak of shards and moves
(`membership_schemas`), the words of a schema (`json_schema`).
"""

from __future__ import annotations

from typing import Any

from kvstore.config import PARTITIONS_MAX, PARTITIONS_MIN, Limits
from kvstore.errors import (
    BadTtl,
    Conflict,
    DataCorrupt,
    DiskFull,
    KeyEmpty,
    KeyNotUtf8,
    KeyTooLong,
    KvError,
    Locked,
    NotFound,
    OutcomeUnknown,
    TooManyRequests,
    Unavailable,
    ValueTooLarge,
    all_errors,
)
from kvstore.protocol import VERSION_MAX
from kvstore.router.event_schemas import event_schemas
from kvstore.router.json_schema import (
    Schema,
    array,
    closed,
    codes,
    document,
    having,
    integer,
    number,
    one_of,
    ref,
    text,
)
from kvstore.router.locks import TTL_DEFAULT_S, TTL_MIN_S
from kvstore.router.membership_schemas import membership_schemas, weight_schema

OPERATION_ERRORS: tuple[type[KvError], ...] = (
    KeyEmpty, KeyNotUtf8, KeyTooLong, BadTtl, NotFound, Conflict, ValueTooLarge, Locked, TooManyRequests, KvError,
    DataCorrupt, Unavailable, OutcomeUnknown, DiskFull,
)  # fmt: skip
_NULL: Schema = {"type": "null"}


def schemas(limits: Limits) -> dict[str, Schema]:
    """Every component schema by name."""
    return {
        **_words(limits),
        **_batch(limits),
        **_transaction(limits),
        **_listing(limits),
        **_locks(limits),
        **_cluster(),
        **_process(),
        **event_schemas(),
        "Problem": _problem(),
    }


def _words(limits: Limits) -> dict[str, Schema]:
    return {
        "Key": text(f"1 to {limits.key_bytes_max:,} bytes of UTF-8.", examples=["users/1"]),
        "Version": integer(
            "Rises with every change of the key and never restarts, not even after a delete.", 1, maximum=VERSION_MAX
        ),
        "Token": integer(
            "Rises with every grant of the lock's name, for ever. A guard, not a secret.", 1, maximum=VERSION_MAX
        ),
        "ValueText": text("The value, where its bytes are UTF-8."),
        "ValueBase64": text(
            "The value in base64 (RFC 4648, section 4), where its bytes are not UTF-8.",
            contentEncoding="base64",
            pattern="^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
        ),
        "TtlLeft": number("Seconds until the key expires; absent if it never does.", exclusiveMinimum=0),
    }


def _batch(limits: Limits) -> dict[str, Schema]:
    key = {"key": ref("Key")}
    ttl = number(
        f"Seconds until the key expires: above 0, at most {limits.ttl_s_max:,}. Without it the key never expires.",
    )
    stored = {"key": ref("Key"), "version": ref("Version")}
    return {
        "Batch": closed(
            document(
                "Independent operations; not atomic.",
                {"ops": _operations(minItems=1)},
            )
        ),
        "PutOperation": closed(
            document(
                f"Sets the value, of at most {limits.value_bytes_max:,} bytes: exactly one of value and value_base64.",
                {"op": {"const": "put"}, **key},
                {"value": ref("ValueText"), "value_base64": ref("ValueBase64"), "ttl": ttl},
            )
        )
        | {"oneOf": [having("value"), having("value_base64")]},
        "GetOperation": closed(document("Reads the value.", {"op": {"const": "get"}, **key})),
        "DeleteOperation": closed(document("Removes the key.", {"op": {"const": "delete"}, **key})),
        "BatchResults": document(
            "One result per operation, in their order.",
            {"results": array(one_of("", ref("WrittenResult"), ref("ReadResult"), ref("FailedResult")))},
        ),
        "WrittenResult": document(
            "201: a put created the key; 204: a put replaced it, or a delete removed it.",
            {"status": {"enum": [201, 204]}, **stored},
        ),
        "ReadResult": document("What a get read.", {"status": {"const": 200}, **stored}, _value_and_ttl())
        | {"oneOf": [having("value"), having("value_base64")]},
        "FailedResult": document(
            "An operation that was not done, with the members that its code has in a Problem; the others are.",
            {
                "status": {"enum": sorted({error.status for error in OPERATION_ERRORS})},
                "key": {"type": "string"},
                "code": codes(OPERATION_ERRORS),
                "detail": text(),
            },
            _members(),
        ),
    }


def _operations(description: str = "", **more: Any) -> Schema:
    operations = {"put": "PutOperation", "get": "GetOperation", "delete": "DeleteOperation"}
    mapping = {op: ref(name)["$ref"] for op, name in operations.items()}
    one = one_of("", *map(ref, operations.values()), discriminator={"propertyName": "op", "mapping": mapping})
    return array(one, description, **more)


def _transaction(limits: Limits) -> dict[str, Schema]:
    conditions = array(one_of("", *map(ref, ("VersionCondition", "ExistsCondition", "LockCondition"))))
    return {
        "Transaction": closed(
            document(
                "`then` is done if all of `if` holds, else `else`: all of the branch, or nothing. A branch writes a "
                f"key at most once. Keys have 1 to {limits.key_bytes_max:,} bytes, a ttl is above 0 and at most "
                f"{limits.ttl_s_max:,} s, a value has at most {limits.value_bytes_max:,} bytes; what is not so refuses "
                "all of it.",
                {"then": _operations(minItems=1)},
                {"if": conditions, "else": _operations("Nothing, if left out.")},
            )
        ),
        **_conditions(),
        "TransactionState": document(
            "`pending`: it can still go either way.", {"status": text(enum=["committed", "aborted", "pending"])}
        ),
        **_transaction_result(),
    }


def _conditions() -> dict[str, Schema]:
    key = {"key": ref("Key")}
    return {
        "VersionCondition": closed(
            document("The key is there, with this version.", {**key, "version": ref("Version")})
        ),
        "ExistsCondition": closed(document("Whether there is such a key.", {**key, "exists": {"type": "boolean"}})),
        "LockCondition": closed(
            document(
                "The token is that of the lock's holder. That also opens the key of that name to the transaction.",
                {"lock": ref("Key"), "token": integer("What the lock was granted with.", maximum=VERSION_MAX)},
            )
        ),
    }


def _transaction_result() -> dict[str, Schema]:
    key, version = {"key": ref("Key")}, {"version": ref("Version")}
    results = one_of("", ref("TransactionWrote"), ref("TransactionFound"), ref("TransactionFoundNone"))
    return {
        "TransactionResult": document(
            "What the transaction did.",
            {
                "id": text("For GET /v1/txn/{id}."),
                "succeeded": {"type": "boolean", "description": "Which branch ran: `then` if true."},
                "version": one_of("Of every key that it wrote; null if it wrote none.", ref("Version"), _NULL),
                "results": array(
                    results,
                    "One per operation of the branch that ran, in its order. Gets see the state before its writes.",
                ),
            },
        ),
        "TransactionWrote": document("Of a put or delete, whether or not there was such a key.", {**key, **version})
        | {"not": {"anyOf": [having("value"), having("value_base64")]}},
        "TransactionFound": document(
            "Of a get.", {**key, **version}, {"value": ref("ValueText"), "value_base64": ref("ValueBase64")}
        )
        | {"oneOf": [having("value"), having("value_base64")]},
        "TransactionFoundNone": document("Of a get: there is no such key.", {**key, "exists": {"const": False}}),
    }


def _value_and_ttl() -> dict[str, Schema]:
    return {"value": ref("ValueText"), "value_base64": ref("ValueBase64"), "ttl": ref("TtlLeft")}


def _listing(limits: Limits) -> dict[str, Schema]:
    return {
        "Item": document(
            "A key; with values=true also its value, in value or value_base64, and its ttl.",
            {"key": ref("Key"), "version": ref("Version")},
            _value_and_ttl(),
        )
        | {"not": having("value", "value_base64")},
        "Page": document(
            "A page of keys in byte order, over all shards.",
            {
                "items": array(ref("Item"), maxItems=limits.list_keys_max),
                "next": _next(),
            },
            _missing(),
        ),
        "Count": document("How many keys there are.", {"count": integer()}, _missing()),
    }


def _locks(limits: Limits) -> dict[str, Schema]:
    name, holder = {"name": ref("Key")}, {"owner": ref("Owner"), "token": ref("Token")}
    ttl = number("Seconds until the lease ends by itself, unless it is renewed.", minimum=TTL_MIN_S)
    left = {"ttl_left": number("Seconds until the lease ends by itself.", minimum=0)}
    most = {"maximum": limits.lock_ttl_s_max}
    wait = number("Seconds to wait while somebody else holds it.", minimum=0, maximum=limits.lock_wait_s_max, default=0)
    return {
        "Owner": text(
            f"A name for people: at most {limits.owner_bytes_max:,} bytes of UTF-8.",
            maxLength=limits.owner_bytes_max,
            examples=["me"],
        ),
        "Acquire": closed(
            document(
                "How the lock is wanted; no body at all is the same as no members.",
                {},
                {"ttl": ttl | most | {"default": TTL_DEFAULT_S}, "wait": wait, "owner": ref("Owner")},
            )
        ),
        "Granted": document("A lease that was granted or renewed.", {**name, **holder, "ttl": ttl | most}),
        "Lease": document("Who holds a lock.", {**name, **holder, **left, "waiting": integer("How many wait for it.")}),
        "LeasePage": document(
            "A page of the locks that are held, by name in byte order, over all shards.",
            {
                "items": array(
                    document("A lock that is held.", {**name, **holder, **left}), maxItems=limits.list_keys_max
                ),
                "next": _next(),
            },
            _missing(),
        ),
        "Intent": document(
            "A transaction is about to write the key, or has read it or tests it.",
            {
                "txn": text("The transaction, for GET /v1/txn/{id}."),
                "anchor": text("The key beside which its decision is kept."),
                "age_s": number("Seconds since it was left here.", minimum=0),
                "vote": integer("If it is committed, then at a version above this."),
            },
        ),
        "LockOfKey": document("The lease that guards the key.", {**holder, **left}),
    }


def _missing() -> dict[str, Schema]:
    """Of an answer to `partial=true`."""
    partition = integer("A partition whose keys may lack, since its shard is down.", maximum=PARTITIONS_MAX - 1)
    return {"missing": array(partition, maxItems=PARTITIONS_MAX)}


def _next() -> Schema:
    return {"type": ["string", "null"], "description": "Give it as `after` of the next page; null: end."}


def _cluster() -> dict[str, Schema]:
    ids = text("The id of a shard.", pattern="^[a-z0-9][a-z0-9-]{0,31}$", examples=["s1"])
    return {
        "ShardId": ids,
        "Partitions": integer("Their number, a power of two; fixed.", PARTITIONS_MIN, maximum=PARTITIONS_MAX),
        "Epoch": integer("Number of the cluster map; rises with every change of it.", 1),
        "Cluster": document(
            "The cluster as this router sees it.",
            {
                "cluster_id": text(),
                "epoch": ref("Epoch"),
                "partitions": ref("Partitions"),
                "replicas": integer("Copies of every key.", 1),
                "nodes": array(ref("Node"), "The processes that serve shards."),
                "shards": array(ref("Shard"), "In the order of joining."),
                "moves": array(ref("Move"), "Partitions under way to another shard."),
                "in_doubt": document(
                    "Transactions whose outcome is open.",
                    {"count": integer(), "oldest_s": {"type": ["number", "null"], "minimum": 0}},
                ),
                "wanted": one_of("Null while the controller does not answer.", _NULL, ref("Wanted")),
                "ending": one_of("Null while the controller does not answer.", _NULL, ref("Ending")),
                "last_change": ref("LastChange"),
                "advice": text("One sentence: that all is well, or what is not, and what happens next or what to do."),
            },
        ),
        "Node": document(
            "A process that serves shards, at an address.",
            {
                "id": ref("ShardId"),
                "url": text(format="uri"),
                "state": text("`down`: no shard whose primary is there answers this router.", enum=["up", "down"]),
            },
            {"host": text(), "zone": text("Copies of a shard go to different ones where they can.")},
        ),
        "Shard": document(
            "`keys` and `bytes` (of keys and values) are at most 1 s old; of a shard that is down, the last known.",
            {
                "id": ref("ShardId"),
                "url": text(format="uri"),
                "state": text("`down`: it does not answer this router.", enum=["joining", "up", "leaving", "down"]),
                "weight": weight_schema(),
                "partitions": integer("How many it owns."),
                "keys": integer(),
                "bytes": integer(),
                "primary": text("The node that answers for it."),
                "term": integer("The epoch of the map that named its primary.", 0),
                "copies": array(ref("Copy"), "Those on other nodes; none so far."),
            },
        ),
        "Copy": document(
            "A copy of a shard beside its primary. `lag`: how many records it is behind.",
            {"node": ref("ShardId"), "state": text("", enum=["joining", "in-sync"]), "lag": integer()},
        ),
        **membership_schemas(),
        "Explanation": _explanation(),
    }


def _explanation() -> Schema:
    way = {
        "key": ref("Key"),
        "hash": text("xxh3-64 of the key, hexadecimal.", pattern="^[0-9a-f]{16}$"),
        "partition": integer("The top bits of the hash.", maximum=PARTITIONS_MAX - 1),
        "partitions": ref("Partitions"),
        "epoch": ref("Epoch"),
        "walk": array(ref("ShardId"), "The shards in the order in which the ring meets them from the key's point."),
        "owner": ref("ShardId"),
        "owner_url": text(format="uri"),
        "primary": text("The node that answers for the owner."),
        "copies": array(ref("ShardId"), "The nodes with copies of the owner."),
        "owner_state": text("`down`: it could not be asked.", enum=["up", "down"]),
    }
    row = {
        "detail": text("Why the owner or the row cannot be read."),
        "row": text(
            "What the owner stores. `tombstone`: a deletion; `damaged`: it does not match its checksum.",
            enum=["value", "tombstone", "absent", "damaged"],
        ),
        "version": ref("Version"),
        "sequence": integer("Number of the change in the owner's file."),
        "bytes": integer("Size of the value."),
        "expires_at_ms": {"type": ["integer", "null"], "description": "Unix time in milliseconds; null: never."},
        "cached": {"type": "boolean", "description": "Whether the owner has it in memory."},
        "lock": one_of("Who may write the key; null: everybody.", _NULL, ref("LockOfKey")),
        "intent": one_of("What a transaction that is not finished here has left on the key.", _NULL, ref("Intent")),
    }
    of_row = ("lock", "intent", "version", "sequence", "bytes", "expires_at_ms", "cached")
    return document("The way of a key, and what its owner knows of it.", way, row) | {
        "oneOf": [
            having("detail", owner_state="down"),
            having("detail", owner_state="up") | {"not": having("row")},
            having("detail", owner_state="up", row="damaged"),
            having("lock", "intent", owner_state="up", row="absent"),
            having(*of_row, owner_state="up", row="tombstone"),
            having(*of_row, owner_state="up", row="value"),
        ]
    }


def _process() -> dict[str, Schema]:
    def state(word: str) -> Schema:
        return document("", {"status": {"const": word}, "router": text("The id of this router.")})

    return {
        "Alive": state("alive"),
        "Ready": state("ready"),
        "Index": document(
            "What there is to call.",
            {"name": {"const": "kvstore"}, "routes": array(text()), "documentation": {"const": "/openapi.json"}},
        ),
    }


def _problem() -> Schema:
    everything = all_errors()
    return document(
        "An RFC 9457 problem document. Its identity is `code`; `detail` is for people.",
        {
            "type": text(enum=[f"/problems/{error.code}" for error in everything]),
            "code": codes(everything),
            "title": text(),
            "status": integer("The HTTP status.", 400, maximum=599),
            "detail": text("What happened, to whom."),
            "next_step": text("What to do about it."),
        },
        _members(),
    )


def _members() -> dict[str, Schema]:
    """What a program may need to react to an error; which of them are there depends on the code."""
    return {
        "retry_after_ms": integer("Nothing was done; send it again after this time.", 1),
        "version": ref("Version"),
        "owner": text("Who holds the lock, as it named itself."),
        "ttl_left": number("Seconds until the lease ends by itself, unless it is renewed.", minimum=0),
        "txn_id": text("The transaction, for GET /v1/txn/{id}."),
        "parameter": text("The query parameter or field that is wrong."),
        "shard": ref("ShardId"),
        "allow": array(text(), "The methods that the route takes."),
        "bytes_max": integer("The limit in bytes that was passed."),
        "key_bytes_max": integer("The limit of a key in bytes."),
        "owner_bytes_max": integer("The limit of an owner's name in bytes."),
        "ttl_s_max": integer("The limit of a ttl in seconds."),
        "lock_ttl_s_min": number("The shortest ttl of a lock in seconds.", minimum=0),
        "lock_ttl_s_max": integer("The longest ttl of a lock in seconds."),
    }
