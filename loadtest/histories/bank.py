"""Transfers between accounts and reads of all accounts: did each happen once, whole, and in one order?

Owns: the rules for a bank whose accounts are never created nor deleted while it is looked at.
Promises: pure. What it reports is wrong with certainty: a transfer of unknown outcome counts as done exactly if its
marker is there at the end.
Leaves to others: making transfers (loadtest.workloads.bank).

Every transfer writes two accounts and a marker key in one transaction, on the condition that both accounts still have
the versions that its client read. So, of what is there at the end:

    an acknowledged transfer    its marker is there, and it counts in the balances once
    a refused one               no marker, and it does not count
    an unknown one              either; the marker tells which, and the balances must agree

and, while it goes on, for every read of all accounts: the total is that of the beginning; it shows each transfer whole
or not at all; nothing that was acknowledged or seen before it began is missing. Versions of a key only rise, so a read
is a vector of versions, and the reads of a serializable store form a chain: of any two, one is behind the other in no
account. (Sorted by their sums, each must be at most the next; what holds for neighbours holds for all.)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from loadtest.histories.findings import Findings, Floor, Violation, times
from loadtest.histories.history import Account, Balances, Transfer

_Known = list[tuple[float, int, Transfer | Balances | None]]


class Kind(StrEnum):
    TOTAL = "total"  # money came from nowhere, or went there
    NEGATIVE = "negative balance"
    TORN = "half a transfer"
    STALE = "stale read"  # something is missing that was acknowledged or seen before the read began
    FORK = "two orders"  # two reads, each of which shows what the other does not
    CHANGED = "one version, two balances"
    DIRTY = "version from nowhere"  # of no transfer that was done
    MISSING = "account is missing"
    LOST = "lost transfer"
    REFUSED = "refused transfer was done"
    FOREIGN = "foreign marker"
    LOST_UPDATE = "lost update"  # two transfers were done on one version of an account
    VERSION_BACK = "version did not rise"
    NOT_ONCE = "not done exactly once"


class Bank(NamedTuple):
    """All accounts by number, at one moment at which nothing was under way."""

    accounts: Mapping[int, Account]

    @property
    def total(self) -> int:
        return sum(account.balance for account in self.accounts.values())


def marker_text(transfer: Transfer) -> str:
    """What the marker of this transfer holds."""
    return f"{transfer.source} to {transfer.target}: {transfer.amount}"


def check(
    opening: Bank, history: Iterable[Transfer | Balances], closing: Bank, markers: Mapping[str, str]
) -> list[Violation]:
    """All that is wrong between `opening` and `closing`; `markers` are those found at the end, with their texts."""
    return _Check(opening, list(history), closing, markers).run()


class _Check:
    def __init__(
        self, opening: Bank, history: Sequence[Transfer | Balances], closing: Bank, markers: Mapping[str, str]
    ) -> None:
        self._opening = opening
        self._closing = closing
        self._markers = markers
        self._transfers = [operation for operation in history if isinstance(operation, Transfer)]
        self._done = [transfer for transfer in self._transfers if self._was_done(transfer)]
        # the end is a read like all others, later than everything
        last_s = max((max(operation.begin_s, operation.end_s or 0.0) for operation in history), default=0.0)
        end = Balances(
            client="the end",
            begin_s=last_s + 1,
            end_s=last_s + 2,
            outcome="done",
            whole=True,
            accounts=dict(closing.accounts),
        )
        self._reads = [read for read in history if isinstance(read, Balances) and read.outcome == "done"] + [end]
        self._whole = [read for read in self._reads if read.whole]
        self._findings = Findings()

    def run(self) -> list[Violation]:
        self._check_markers()
        self._check_versions_used_once()
        self._check_closing()
        for read in self._whole:
            self._check_whole(read)
        self._check_halves()
        self._check_seen()
        self._check_staleness()
        self._check_chain()
        return self._findings.violations

    def _was_done(self, transfer: Transfer) -> bool:
        return transfer.outcome == "done" or (transfer.outcome == "unknown" and transfer.marker in self._markers)

    def _blame(self, kind: Kind, detail: str) -> None:
        self._findings.blame(kind, "bank", detail)

    # --- at the end ----------------------------------------------------------------------------------------------

    def _check_markers(self) -> None:
        known = {transfer.marker: transfer for transfer in self._transfers}
        for transfer in self._transfers:
            if transfer.outcome == "done" and transfer.marker not in self._markers:
                self._blame(Kind.LOST, f"{_name(transfer)} was acknowledged, and its marker is not there")
            if transfer.outcome == "refused" and transfer.marker in self._markers:
                self._blame(Kind.REFUSED, f"{_name(transfer)} was refused, and its marker is there")
        for marker, text in self._markers.items():
            if marker not in known:
                self._blame(Kind.FOREIGN, f"no client wrote the marker {marker} ({text!r})")
            elif text != marker_text(known[marker]):
                detail = f"the marker of {_name(known[marker])} holds {text!r} and not {marker_text(known[marker])!r}"
                self._blame(Kind.FOREIGN, detail)

    def _check_versions_used_once(self) -> None:
        used: dict[tuple[int, int], Transfer] = {}
        for transfer in self._done:
            for number, version in _versions_read(transfer):
                other = used.setdefault((number, version), transfer)
                if other is not transfer:
                    detail = f"{_name(other)} and {_name(transfer)} were both done on version {version}"
                    self._blame(Kind.LOST_UPDATE, f"{detail} of account {number}")
                if transfer.version is not None and transfer.version <= version:
                    detail = f"{_name(transfer)} wrote version {transfer.version} over version {version}"
                    self._blame(Kind.VERSION_BACK, f"{detail} of account {number}")

    def _check_closing(self) -> None:
        expected = {number: account.balance for number, account in self._opening.accounts.items()}
        by_account: dict[int, list[Transfer]] = {}
        for transfer in self._done:
            expected[transfer.source] -= transfer.amount
            expected[transfer.target] += transfer.amount
            by_account.setdefault(transfer.source, []).append(transfer)
            by_account.setdefault(transfer.target, []).append(transfer)
        for number, balance in expected.items():
            account = self._closing.accounts.get(number)
            if account is not None and account.balance != balance:
                last = by_account.get(number, [])[-2:]
                names = f"; the last ones: {', '.join(map(_name, last))}" if last else ""
                detail = f"account {number} has {account.balance} at the end; with every transfer done once,"
                self._blame(Kind.NOT_ONCE, f"{detail} it would have {balance}{names}")

    # --- every read by itself ------------------------------------------------------------------------------------

    def _check_whole(self, read: Balances) -> None:
        if missing := self._opening.accounts.keys() - read.accounts.keys():
            self._blame(Kind.MISSING, f"{_name(read)} has no account {min(missing)} (and {len(missing) - 1} more)")
            return
        total = sum(account.balance for account in read.accounts.values())
        if total != self._opening.total:
            self._blame(Kind.TOTAL, f"{_name(read)} adds up to {total}, not to {self._opening.total}")
        for number, account in read.accounts.items():
            if account.balance < 0:
                self._blame(Kind.NEGATIVE, f"{_name(read)} has {account.balance} in account {number}")

    def _check_halves(self) -> None:
        """A read that shows what a transfer wrote to one account shows the other account, too.
        As the transfer (or a later one) wrote it."""
        wrote = {
            (number, transfer.version): (transfer, other)
            for transfer in self._done
            if transfer.version is not None
            for number, other in _both_ways(transfer)
        }
        for read in self._reads:
            for number, account in read.accounts.items():
                transfer, other = wrote.get((number, account.version), (None, number))
                if transfer is None or transfer.version is None or other not in read.accounts:
                    continue
                if read.accounts[other].version < transfer.version:
                    detail = f"{_name(read)} shows {_name(transfer)} in account {number} and not in account {other}"
                    self._blame(Kind.TORN, detail)

    def _check_seen(self) -> None:
        """Every version that was seen is of a transfer that was done, and always has the same balance."""
        wrote = {
            (number, transfer.version)
            for transfer in self._done
            for number in (transfer.source, transfer.target)
            if transfer.version is not None
        }
        unsure = {
            number
            for transfer in self._done
            for number in (transfer.source, transfer.target)
            if transfer.version is None
        }
        balances = {(number, account.version): account.balance for number, account in self._opening.accounts.items()}
        at_first = set(balances)
        for read in self._reads:
            for number, account in read.accounts.items():
                if (known := balances.setdefault((number, account.version), account.balance)) != account.balance:
                    detail = f"{_name(read)} has {account.balance} in account {number} at version {account.version}"
                    self._blame(Kind.CHANGED, f"{detail}, where another read has {known}")
                seen = (number, account.version)
                if seen not in wrote and seen not in at_first and number not in unsure:
                    detail = f"{_name(read)} has version {account.version} of account {number}"
                    self._blame(Kind.DIRTY, f"{detail}, which no transfer that was done has written")

    # --- reads and time ------------------------------------------------------------------------------------------

    def _check_staleness(self) -> None:
        """No read has less than what was acknowledged, or seen by another one, before it began."""
        known: dict[int, _Known] = {}
        for number, account in self._opening.accounts.items():
            known[number] = [(float("-inf"), account.version, None)]
        for end_s, number, version, by in self._known_from():
            known.get(number, []).append((end_s, version, by))
        floors = {number: Floor(steps) for number, steps in known.items()}
        for read in self._reads:
            for number, account in read.accounts.items():
                floor = floors[number].before(read.begin_s) if number in floors else None
                version, witness = floor or (account.version, None)
                if account.version < version:
                    detail = f"{_name(read)} has version {account.version} of account {number}, and before it began"
                    source = f"{_name(witness)} had " if witness is not None else "the bank opened with "
                    self._blame(Kind.STALE, f"{detail} {source}version {version}")

    def _known_from(self) -> Iterator[tuple[float, int, int, Transfer | Balances]]:
        """From when on, of which account, which version is the least that may be read, and who said so."""
        for transfer in self._done:
            if transfer.end_s is not None and transfer.version is not None:
                yield transfer.end_s, transfer.source, transfer.version, transfer
                yield transfer.end_s, transfer.target, transfer.version, transfer
        for read in self._reads:
            if read.end_s is not None:
                for number, account in read.accounts.items():
                    yield read.end_s, number, account.version, read

    def _check_chain(self) -> None:
        whole = [read for read in self._whole if read.accounts.keys() == self._opening.accounts.keys()]
        whole.sort(key=lambda read: sum(account.version for account in read.accounts.values()))
        for earlier, later in itertools.pairwise(whole):
            behind = _first_behind(later, earlier)
            if behind is not None:
                ahead = _first_behind(earlier, later)
                detail = f"of account {behind}, {_name(earlier)} has a later version than {_name(later)}"
                self._blame(Kind.FORK, f"{detail}; of account {ahead} it is the other way round")


def _first_behind(read: Balances, other: Balances) -> int | None:
    """An account of which `read` has an older version than `other`."""
    return next(
        (number for number, account in read.accounts.items() if account.version < other.accounts[number].version), None
    )


def _versions_read(transfer: Transfer) -> Sequence[tuple[int, int]]:
    return (transfer.source, transfer.source_version), (transfer.target, transfer.target_version)


def _both_ways(transfer: Transfer) -> Sequence[tuple[int, int]]:
    return (transfer.source, transfer.target), (transfer.target, transfer.source)


def _name(operation: Transfer | Balances) -> str:
    if isinstance(operation, Balances):
        return f"the read {times(operation)}"
    return f"transfer {operation.marker} ({marker_text(operation)}) {times(operation)}"
