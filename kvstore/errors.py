"""Every error of the system, once: its code, HTTP status, whether a repeat is safe, and what to do next.

An error crosses three borders as the same thing: a shard puts `problem()` into its answer, the router sends it as an
RFC 9457 problem document, and the client raises the class that `from_problem` finds by `code`. Nothing compares
messages: `code` is the identity, `detail` is for people.

`retryable` means: nothing was done by this try, the same request may be sent again unchanged.
"""

from __future__ import annotations

from typing import Any, ClassVar

_BY_CODE: dict[str, type[KvError]] = {}


class KvError(Exception):
    """Base of all errors. `detail` says what happened to what; `members` is what a program needs to react.

    Class attributes: `status` (HTTP), `code` (stable, kebab-case), `title`, `retryable`, `next_step`.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    retryable: ClassVar[bool] = False
    next_step: ClassVar[str] = "Look into the log of the process; please report what you find there."

    def __init_subclass__(cls) -> None:
        _BY_CODE[cls.code] = cls

    def __init__(self, detail: str = "", /, **members: Any) -> None:
        super().__init__(detail or self.title)
        self.detail = detail or self.title
        self.members = members

    @property
    def sentences(self) -> str:
        """What happened and what to do next, on one line."""
        end = "" if self.detail.endswith((".", "?", "!")) else "."
        return f"{self.detail}{end} {self.members.get('next_step', self.next_step)}".rstrip()

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 members of this error, `type` and `status` included."""
        return {
            "type": f"/problems/{self.code}",
            "code": self.code,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "next_step": self.next_step,
            **self.members,
        }


_BY_CODE[KvError.code] = KvError
_STANDARD_MEMBERS = frozenset({"type", "code", "title", "status", "detail", "next_step"})


def from_problem(problem: Any) -> KvError:
    """The error that a decoded problem document names; what is none becomes a plain `KvError`. Raises nothing."""
    if not isinstance(problem, dict):
        return KvError()
    kind = _BY_CODE.get(str(problem.get("code")), KvError)
    members = {name: value for name, value in problem.items() if name not in _STANDARD_MEMBERS}
    return kind(str(problem.get("detail", "")), **members)


def all_errors() -> list[type[KvError]]:
    """Every error class, by code; the OpenAPI document and the table in API.md are checked against it."""
    return [_BY_CODE[code] for code in sorted(_BY_CODE)]


# --- 400: the request is wrong; nothing was done ---------------------------------------------------------------------


class BadRequest(KvError):
    status, code, title = 400, "bad-request", "The request cannot be understood"
    next_step = "Correct the request as `detail` says, then send it again."


class KeyEmpty(BadRequest):
    code, title = "key-empty", "The key is empty"
    next_step = "Name a key of 1 to 1,024 bytes: /v1/kv/KEY."


class KeyTooLong(BadRequest):
    code, title = "key-too-long", "The key is too long"
    next_step = "Shorten the key; store a long name inside the value and use its hash as the key."


class KeyNotUtf8(BadRequest):
    code, title = "key-not-utf8", "The key is not percent-encoded UTF-8"
    next_step = "Percent-encode the UTF-8 bytes of the key (curl --data-urlencode, urllib.parse.quote)."


class BadParameter(BadRequest):
    code, title = "bad-parameter", "A query parameter or header is wrong"
    next_step = "Correct the parameter that `detail` names."


class BadBody(BadRequest):
    code, title = "bad-body", "The body is not what this call takes"
    next_step = "Correct the body as `detail` says; nothing of it was done."


class BadCursor(BadRequest):
    code, title = "bad-cursor", "The cursor is not one that this call gave out"
    next_step = "Pass `next` of the page before unchanged as `after`, or begin again without it."


class BadTtl(BadRequest):
    code, title = "bad-ttl", "The ttl is not a time to live"
    next_step = "Give ttl in decimal seconds, within the limits that `detail` names."


class BadCondition(BadRequest):
    code, title = "bad-condition", "The condition header is malformed"
    next_step = 'Quote the version: If-Match: "42". Several are separated by commas; * means any.'


# --- 403 to 417: refused by rule -------------------------------------------------------------------------------------


class Foreign(KvError):
    status, code, title = 403, "foreign-origin", "A request from a foreign origin or for a foreign host is refused"
    next_step = "Call by the address of the router, or list the host name under `allowed_hosts` in cluster.yaml."


class NotFound(KvError):
    status, code, title = 404, "not-found", "What the request names does not exist"
    next_step = "Check the spelling; GET /v1/kv?prefix=… lists keys, GET /v1/locks?prefix=… the locks held."


class NoSuchRoute(KvError):
    status, code, title = 404, "no-such-route", "There is no such route"
    next_step = "GET / names the routes; a key's address is /v1/kv/KEY."


class MethodNotAllowed(KvError):
    status, code, title = 405, "method-not-allowed", "The route does not take this method"
    next_step = "Use one of the methods in the Allow header."


class RequestTimeout(KvError):
    status, code, title = 408, "request-timeout", "The request took too long to arrive"
    next_step = "Send the body without pauses; nothing of it was done."


class Conflict(KvError):
    status, code, title, retryable = 409, "conflict", "The request conflicts with the state of the cluster", True
    next_step = "Wait for retry_after_ms and send it again."


class ChangeRefused(KvError):
    status, code, title = 409, "change-refused", "The cluster cannot be changed like that"
    next_step = "Do first what `detail` says; nothing was changed."


class OtherProtocol(KvError):
    """`protocol`: the number that the process speaks which refuses."""

    status, code, title = 409, "other-protocol", "The two processes are of versions that do not understand each other"
    next_step = (
        "Start both with the same version of kvstore, or with two releases that follow each other; upgrade a cluster "
        "from one release to the next."
    )


class PreconditionFailed(KvError):
    status, code, title = 412, "precondition-failed", "The condition does not hold"
    next_step = "Read the key again, decide again, and send the version from its ETag."


class LockLost(KvError):
    status, code, title = 412, "lock-lost", "The token is not the holder's"
    next_step = "Stop what the lock protected: it may be another client's by now. Acquire it again to go on."


class ValueTooLarge(KvError):
    status, code, title = 413, "value-too-large", "The value is too large"
    next_step = "Split the value over several keys, or raise limits.value_bytes_max in cluster.yaml."


class BodyTooLarge(KvError):
    status, code, title = 413, "body-too-large", "The body is too large"
    next_step = "Send several smaller requests."


class ReadTooLarge(KvError):
    status, code, title = 413, "read-too-large", "What the transaction reads is too large for one answer"
    next_step = "Read fewer or smaller keys in one transaction, or raise limits.txn_read_bytes_max in cluster.yaml."


class UriTooLong(KvError):
    status, code, title = 414, "uri-too-long", "The request line is too long"
    next_step = "A key has at most 1,024 bytes (3,072 characters percent-encoded); shorten the address."


class ContentEncodingRefused(KvError):
    status, code, title = 415, "content-encoding-refused", "Values are stored as sent"
    next_step = "Send the body without Content-Encoding; compress before, if you like, and store the result."


class ExpectationFailed(KvError):
    status, code, title = 417, "expectation-failed", "The expectation is unknown"
    next_step = "Only Expect: 100-continue is known."


class WrongOwner(KvError):
    status, code, title, retryable = 421, "wrong-owner", "This shard does not own the key", True
    next_step = "Fetch the cluster map of at least the epoch in `epoch` and ask the shard that it names."

    @property
    def epoch(self) -> int:
        """That of the map by which the shard does not own it."""
        return int(self.members.get("epoch", 0))

    @property
    def fenced(self) -> bool:
        """By its map it does, but it has stopped to answer, because the partition is about to leave."""
        return bool(self.members.get("fenced", False))


class IdempotencyKeyReused(KvError):
    status, code, title = 422, "idempotency-key-reused", "The Idempotency-Key was used for another request"
    next_step = "Draw a new random key for each request; repeat a key only with the very same request."


class Locked(KvError):
    status, code, title, retryable = 423, "locked", "Another client holds the lock", True
    next_step = "Wait for retry_after_ms and try again, or acquire with `wait`; a holder sends its Lock-Token."


class HeadersTooLarge(KvError):
    status, code, title = 431, "headers-too-large", "The request's header fields are too large"
    next_step = "Send fewer or shorter header fields."


# --- the cluster cannot do it now ------------------------------------------------------------------------------------


class TooManyRequests(KvError):
    status, code, title, retryable = 429, "too-many-requests", "More is asked than can be taken in", True
    next_step = "Wait for retry_after_ms and send it again; keep fewer requests under way."


class DataCorrupt(KvError):
    """Stored bytes do not match their checksum.
    `damaged_row`: the row as it was found, if that is all that is damaged, so that it can be written again."""

    damaged_row: Any = None
    status, code, title = 500, "data-corrupt", "A stored row does not match its checksum"
    next_step = "Restore the shard's file from a backup; the row is left as it is for examination."


class Unavailable(KvError):
    status, code, title, retryable = 503, "unavailable", "The part of the cluster that owns the key cannot answer", True
    next_step = "Wait for retry_after_ms and send it again; GET /v1/cluster shows which shard is down."


class ControllerBehind(Unavailable):
    code, title = "controller-behind", "The controller has lost what the cluster did last, and changes nothing"
    next_step = "Run `kvstore controller recover`: it shows the newest map that the nodes have, and asks to take it."


class OutcomeUnknown(KvError):
    status, code, title = 504, "outcome-unknown", "The write may or may not have been done"
    next_step = "Ask again with the same Idempotency-Key; without one, read to see before you repeat the write."


class NotImplementedYet(KvError):
    status, code, title = 501, "not-implemented", "This is announced but does not exist yet"
    next_step = "Send the request without it."


class DiskFull(KvError):
    status, code, title = 507, "disk-full", "The shard's disk is full; nothing was written"
    next_step = "Delete keys (that still works) or make room on the disk; writes go on by themselves then."


# --- processes that cannot start; never sent over HTTP to clients of a router ----------------------------------------


class ConfigError(KvError):
    status, code, title = 500, "config-error", "The configuration is wrong"
    next_step = "Mend the line that `detail` names."

    @property
    def sentences(self) -> str:
        return self.detail  # which names the mend itself


class DataInUse(ConfigError):
    code, title = "data-in-use", "Another process uses the data"
    next_step = "End that process; a start after that succeeds."


class ForeignData(KvError):
    """`is_damage`: it could be this store's data, which something has happened to."""

    is_damage: bool = False
    status, code, title = 409, "foreign-data", "The data file belongs to another store, cluster or version"
    next_step = "Point data_dir at the right data, or move the file away."


class StoreBehind(ForeignData):
    """`number`: of the store's last record; `told`: that of a durable record that it has told of."""

    code, title = "store-behind", "The store lacks records that it had: an older copy of the file, or a lost log"
    next_step = (
        "Restore the newest copy of file and log; where there is none, `kvstore shard accept-old ID` lets the shard "
        "start, and all that came behind is lost."
    )


class LogDamaged(KvError):
    """`number`: the first record that is lost or damaged; `file` and `offset`: where it lies, or should lie."""

    @property
    def number(self) -> int:
        """0 where it is not known."""
        return int(self.members.get("number", 0))

    status, code, title = 500, "log-damaged", "The log of the store has lost or damaged records that were durable"
    next_step = "Restore this copy of the store from another one; the files are left as they are for examination."


def is_damage(error: KvError) -> bool:
    """Whether it says that the files of a store are not what was written: another copy can take their place."""
    return isinstance(error, DataCorrupt | LogDamaged) or (isinstance(error, ForeignData) and error.is_damage)
