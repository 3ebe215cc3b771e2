"""The play-through of a transfer, in `kvstore up --demo`: two accounts on different shards, seen step by step.

Owns: what POST /v1/demo/transfer does; the accounts; the document `play` among the events, which grows as things
happen.
Promises: all of it is real: the transfer is an ordinary transaction, coordinated by a second router that may be killed
in the middle of it; what recovery does is looked at from outside, with the same questions that any client may ask.
Leaves to others: running the transaction (`demo_coordinator`), starting that router again (the supervisor).
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Annotated, Any, Literal

import aiohttp
import msgspec

from kvstore.config import Limits
from kvstore.errors import BadBody, ChangeRefused, Conflict, KvError, Unavailable, from_problem
from kvstore.model import Preconditions
from kvstore.protocol import Get, Put
from kvstore.router.cluster_views import ClusterViews
from kvstore.router.coordinator import Coordinator
from kvstore.router.feed import Feed
from kvstore.router.service import RouterService
from kvstore.transport.http.responses import Response, json_response
from kvstore.transport.http.routes import Call
from kvstore.transport.http.schema import about

log = logging.getLogger(__name__)

START_BALANCE = 100
ROUTER = "router-demo"

_PREFIX = "demo/accounts/"
_NAMES_TRIED = 200
_BACK_S = 15.0  # that the second router may take to be started again
_RESOLVED_S = 30.0
_LOOK_S = 0.05
_STEPS_MAX = 60


Stop = Annotated[Literal["never", "before-decision", "after-decision"], about("Where the coordinator is killed.")]


class TransferBody(msgspec.Struct, forbid_unknown_fields=True):
    """All optional."""

    amount: Annotated[int, about(minimum=1, maximum=START_BALANCE)] = 10
    stop: Stop = "never"


class Account(msgspec.Struct):
    """A key of the transfer, and the shard that has it."""

    key: str
    shard: str
    version: int = 0
    balance: int = 0


class Demo:
    """`url`: of the second router."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, service: RouterService, feed: Feed, limits: Limits
    ) -> None:
        self._url = url
        self._session = session
        self._service = service
        self._views = ClusterViews(service)
        self._feed = feed
        self._coordinator = Coordinator(service, limits)
        self._number = 0
        self._playing: asyncio.Task[None] | None = None
        feed.keep("demo", True)

    async def transfer(self, call: Call) -> Response:
        """Begin one. Raises BadBody; Conflict while another one is played; ChangeRefused with a single shard."""
        body: TransferBody = call.body
        if not 1 <= body.amount <= START_BALANCE:
            raise BadBody(f"`amount` is 1 to {START_BALANCE}.")
        if self._playing is not None and not self._playing.done():
            raise Conflict("a transfer is being played; wait until it has ended.", retry_after_ms=1000)
        accounts = self._choose_accounts()
        self._number += 1
        play = _Play(self._number, body, accounts, self._feed)
        self._playing = asyncio.create_task(self._run(play))
        return json_response(202, {"play": self._number})

    async def close(self) -> None:
        """Break off what is played."""
        if self._playing is not None:
            self._playing.cancel()
            await asyncio.gather(self._playing, return_exceptions=True)

    def _choose_accounts(self) -> tuple[Account, Account]:
        """Two keys on different shards."""
        first = f"{_PREFIX}alice"
        owner = self._service.table.owner_of(first).shard_id
        for number in range(_NAMES_TRIED):
            key = f"{_PREFIX}bob" if not number else f"{_PREFIX}bob-{number}"
            shard = self._service.table.owner_of(key).shard_id
            if shard != owner:
                return Account(first, owner), Account(key, shard)
        raise ChangeRefused("all keys are on one shard: add another one, so that a transfer has two to span.")

    async def _run(self, play: _Play) -> None:
        try:
            await self._wait_for_router()
            await self._play(play)
        except KvError as error:
            play.end("failed", error.detail)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            play.end("failed", f"the second router cannot be reached: {error}")
        except Exception:
            log.exception("a play-through failed")
            play.end("failed", "the router met an error of its own; its log says more.")

    async def _play(self, play: _Play) -> None:
        await self._read(play.accounts)
        source, target = sorted(play.accounts, key=lambda account: account.balance, reverse=True)
        play.begin(source, target)
        txn = {
            "if": [{"key": account.key, "version": account.version} for account in (source, target)],
            "then": [
                {"op": "put", "key": source.key, "value": str(source.balance - play.body.amount)},
                {"op": "put", "key": target.key, "value": str(target.balance + play.body.amount)},
            ],
        }
        if await self._coordinate(play, txn):
            await self._read(play.accounts)
            if play.succeeded:
                play.end("committed", "The client was answered, and both accounts have changed.")
            else:
                play.end(
                    "aborted", "Another client wrote an account first, so a condition failed: nothing was written."
                )
            return
        await self._watch_recovery(play)

    async def _wait_for_router(self) -> None:
        """Raises Unavailable."""
        until_s = time.monotonic() + _BACK_S
        while time.monotonic() < until_s:
            try:
                async with self._session.get(f"{self._url}/readyz", timeout=_short()) as answer:
                    if answer.status == 200:
                        return
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            await asyncio.sleep(_LOOK_S)
        raise Unavailable("the second router does not come back: look into the log of `kvstore up`.")

    async def _read(self, accounts: tuple[Account, Account]) -> None:
        """Their balances; an account that is not there, or is no number, is opened with the first balance."""
        for account in accounts:
            answer = (await self._service.ask(Get(0, account.key))).answer
            value = (answer.value or b"").decode("ascii", "replace")
            if answer.status != 200 or not value.isdecimal() or len(value) > 9:
                opening = str(START_BALANCE).encode()
                answer = (await self._service.ask(Put(0, account.key, opening, 0, Preconditions()))).answer
                value = opening.decode()
            if answer.problem is not None:
                raise from_problem(answer.problem)
            account.version, account.balance = answer.version, int(value)

    async def _coordinate(self, play: _Play, txn: dict[str, Any]) -> bool:
        """Whether it was brought to its end; False: the second router was killed. Raises KvError."""
        body = msgspec.json.encode({"transaction": txn, "stop": play.body.stop})
        began_ms = play.now_ms()
        try:
            async with self._session.post(f"{self._url}/v1/demo/coordinate", data=body) as answer:
                if answer.status != 200:
                    raise from_problem(await answer.json(content_type=None))
                async for line in answer.content:
                    told = msgspec.json.decode(line, type=dict[str, Any])
                    if told["kind"] == "error":
                        raise Unavailable(str(told["detail"]))
                    play.told(told, began_ms)
        except aiohttp.ClientError:
            play.step("killed", ROUTER, ROUTER, "kill -9", "The coordinator is dead. The client has not been told.")
            return False
        return True

    async def _watch_recovery(self, play: _Play) -> None:
        """Look at the keys until no intent is left, and at what the shards say has become of the transaction."""
        play.state = "recovering"
        seen: dict[str, bool] = {}
        until_s = time.monotonic() + _RESOLVED_S
        while time.monotonic() < until_s:
            for account in play.accounts:
                told = await self._views.explain(account.key)
                has_intent = told.get("intent") is not None
                if has_intent != seen.get(account.key, False):
                    play.saw_intent(account, has_intent)
                seen[account.key] = has_intent
            if not any(seen.values()):
                break
            await asyncio.sleep(_LOOK_S)
        else:
            play.end("failed", f"an intent is still there after {_RESOLVED_S:g} s: is a shard down?")
            return
        found = await self._coordinator.look(play.txn) if play.txn else None
        before = sum(account.balance for account in play.accounts)
        await self._read(play.accounts)
        same = sum(account.balance for account in play.accounts) == before
        total = f"The sum of both accounts is {'still' if same else 'no longer'} {before}."
        if found is not None and found.state == "committed":
            play.end("committed", f"The decision was durable, so the shards finished it without a coordinator. {total}")
        else:
            play.end("aborted", f"Nothing had been decided, so the shards gave it up for good. {total}")


class _Play:
    """One play-through, and its document."""

    def __init__(self, number: int, body: TransferBody, accounts: tuple[Account, Account], feed: Feed) -> None:
        self.body = body
        self.accounts = accounts
        self.state = "running"
        self.txn = ""
        self.succeeded = False
        self._number = number
        self._feed = feed
        self._began_s = time.perf_counter()
        self._steps: list[dict[str, Any]] = []
        self._says = ""
        self._ways: list[str] = []

    def now_ms(self) -> float:
        return (time.perf_counter() - self._began_s) * 1000

    def begin(self, source: Account, target: Account) -> None:
        self._ways = [source.key, target.key]
        self._publish()

    def told(self, told: dict[str, Any], began_ms: float) -> None:
        """A line of the second router."""
        at_ms = began_ms + told["at_ms"]
        self.txn = str(told.get("txn") or self.txn)
        if told["kind"] == "sent":
            self.step("sent", ROUTER, told["shard"], told["message"], "", at_ms)
        elif told["kind"] == "answered":
            self.step("answered", told["shard"], ROUTER, told["message"], told["says"], at_ms)
        else:
            self.succeeded = bool(told["succeeded"])
            said = "committed" if self.succeeded else "a condition failed"
            self.step("result", ROUTER, "client", "answer", said, at_ms)

    def saw_intent(self, account: Account, has_intent: bool) -> None:
        if has_intent:
            said = f"{account.key} carries an intent: no client may write or read it until its fate is known."
            self.step("intent", account.shard, account.shard, "in doubt", said)
        else:
            self.step("resolved", account.shard, account.shard, "recovered", f"The intent on {account.key} is gone.")

    def step(self, kind: str, source: str, to: str, message: str, says: str, at_ms: float | None = None) -> None:
        if len(self._steps) < _STEPS_MAX:
            at_ms = round(self.now_ms() if at_ms is None else at_ms, 2)
            self._steps.append(
                {"at_ms": at_ms, "kind": kind, "from": source, "to": to, "message": message, "says": says}
            )
        self._publish()

    def end(self, state: str, says: str) -> None:
        self.state, self._says = state, says
        self._publish()

    def _publish(self) -> None:
        document = {
            "number": self._number,
            "state": self.state,
            "stop": self.body.stop,
            "amount": self.body.amount,
            "txn": self.txn,
            "accounts": [msgspec.structs.asdict(account) for account in self.accounts],
            "from": self._ways[0] if self._ways else "",
            "to": self._ways[1] if self._ways else "",
            "steps": list(self._steps),
            "says": self._says,
        }
        self._feed.offer("play", document)


def _short() -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=1.0)
