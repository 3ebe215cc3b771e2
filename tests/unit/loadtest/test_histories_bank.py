"""loadtest.histories.bank: it finds every fault that it claims to find, and none in the books of an honest bank."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.histories.bank import Bank, Kind, check, marker_text
from loadtest.histories.history import Account, Balances, Outcome, Transfer

OPENING = Bank({number: Account(100, 1) for number in range(4)})


def transfer(
    source: int, target: int, amount: int, versions: tuple[int, int], version: int | None, **members: Any
) -> Transfer:
    """Done from second 0 to 1 unless said otherwise; `versions` are those that it read."""
    done: dict[str, Any] = {
        "client": "c",
        "begin_s": 0.0,
        "end_s": 1.0,
        "outcome": "done",
        "marker": f"m{source}{target}-{amount}",
    }
    if members.get("outcome") == "unknown":
        members |= {"end_s": None}
    return Transfer(
        source=source,
        target=target,
        amount=amount,
        source_version=versions[0],
        target_version=versions[1],
        version=version,
        **(done | members),
    )


def balances(begin_s: float, end_s: float, **accounts: tuple[int, int]) -> Balances:
    """A read of all accounts: as at the opening but for those given, as in a0=(balance, version)."""
    given = {int(name[1:]): Account(*account) for name, account in accounts.items()}
    whole = {**OPENING.accounts, **given}
    return Balances(client="r", begin_s=begin_s, end_s=end_s, outcome="done", whole=True, accounts=whole)


def bank(**accounts: tuple[int, int]) -> Bank:
    return Bank(balances(0, 0, **accounts).accounts)


def markers(*transfers: Transfer) -> dict[str, str]:
    return {transfer.marker: marker_text(transfer) for transfer in transfers}


def kinds(*arguments: Any) -> set[Kind]:
    return {violation.kind for violation in check(*arguments)}


ONE = transfer(0, 1, 10, (1, 1), 5)
AFTER_ONE = bank(a0=(90, 5), a1=(110, 5))


# --- what is right is not blamed ---------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_bank_where_nothing_happened() -> None:
    assert check(OPENING, [], OPENING, {}) == []
    assert check(OPENING, [balances(0, 1)], OPENING, {}) == []


def test_an_acknowledged_transfer_is_there_once() -> None:
    assert check(OPENING, [ONE], AFTER_ONE, markers(ONE)) == []


def test_a_read_at_the_same_time_may_show_it_or_not() -> None:
    for read in (balances(0, 2), balances(0, 2, a0=(90, 5), a1=(110, 5))):
        assert check(OPENING, [ONE, read], AFTER_ONE, markers(ONE)) == []


def test_a_refused_transfer_is_not_there() -> None:
    refused = transfer(0, 1, 10, (1, 1), None, outcome="refused")
    assert check(OPENING, [refused], OPENING, {}) == []


def test_an_unknown_transfer_may_be_there_or_not_and_its_marker_tells() -> None:
    unknown = transfer(0, 1, 10, (1, 1), None, outcome="unknown")
    assert check(OPENING, [unknown], OPENING, {}) == []
    assert check(OPENING, [unknown, balances(5, 6)], AFTER_ONE, markers(unknown)) == []


# --- at the end --------------------------------------------------------------------------------------------------


def test_an_acknowledged_transfer_without_its_marker_is_found() -> None:
    assert Kind.LOST in kinds(OPENING, [ONE], AFTER_ONE, {})
    assert kinds(OPENING, [ONE], OPENING, {}) >= {Kind.LOST, Kind.NOT_ONCE}


def test_a_refused_transfer_that_was_done_is_found() -> None:
    refused = transfer(0, 1, 10, (1, 1), None, outcome="refused")
    assert Kind.REFUSED in kinds(OPENING, [refused], AFTER_ONE, markers(refused))
    assert Kind.NOT_ONCE in kinds(OPENING, [refused], AFTER_ONE, {})


def test_an_unknown_transfer_done_without_its_marker_or_not_done_with_it_is_found() -> None:
    unknown = transfer(0, 1, 10, (1, 1), None, outcome="unknown")
    assert Kind.NOT_ONCE in kinds(OPENING, [unknown], AFTER_ONE, {})
    assert Kind.NOT_ONCE in kinds(OPENING, [unknown], OPENING, markers(unknown))


def test_a_transfer_done_twice_is_found_although_the_total_is_right() -> None:
    found = kinds(OPENING, [ONE], bank(a0=(80, 6), a1=(120, 6)), markers(ONE))
    assert Kind.NOT_ONCE in found
    assert Kind.TOTAL not in found


def test_a_transfer_of_which_only_half_was_done_is_found() -> None:
    for half in (bank(a0=(90, 5)), bank(a1=(110, 5))):
        assert kinds(OPENING, [ONE], half, markers(ONE)) >= {Kind.NOT_ONCE, Kind.TOTAL, Kind.TORN}


def test_a_marker_that_no_client_wrote_or_that_holds_something_else_is_found() -> None:
    assert kinds(OPENING, [], OPENING, {"m": "0 to 1: 10"}) == {Kind.FOREIGN}
    assert kinds(OPENING, [ONE], AFTER_ONE, {ONE.marker: "3 to 2: 7"}) == {Kind.FOREIGN}


def test_two_transfers_that_were_done_on_one_version_are_found() -> None:
    other = transfer(0, 2, 20, (1, 1), 6)
    closing = bank(a0=(70, 6), a1=(110, 5), a2=(120, 6))
    assert kinds(OPENING, [ONE, other], closing, markers(ONE, other)) == {Kind.LOST_UPDATE}
    overwritten = bank(a0=(80, 6), a1=(110, 5), a2=(120, 6))
    assert Kind.NOT_ONCE in kinds(OPENING, [ONE, other], overwritten, markers(ONE, other))


def test_an_unknown_transfer_on_a_version_that_another_one_used_is_found() -> None:
    other = transfer(0, 2, 20, (1, 1), None, outcome="unknown")
    closing = bank(a0=(70, 6), a1=(110, 5), a2=(120, 6))
    assert Kind.LOST_UPDATE in kinds(OPENING, [ONE, other], closing, markers(ONE, other))


def test_a_version_that_does_not_rise_is_found() -> None:
    back = transfer(0, 1, 10, (1, 1), 1)
    assert Kind.VERSION_BACK in kinds(OPENING, [back], bank(a0=(90, 1), a1=(110, 1)), markers(back))


# --- reads -------------------------------------------------------------------------------------------------------


def test_a_read_whose_total_is_wrong_is_found() -> None:
    assert Kind.TOTAL in kinds(OPENING, [ONE, balances(0, 2, a0=(90, 5))], AFTER_ONE, markers(ONE))
    assert Kind.TOTAL in kinds(OPENING, [], bank(a0=(99, 1)), {})


def test_a_read_that_shows_half_a_transfer_is_found_although_the_total_is_right() -> None:
    """Two halves of two transfers of the same amount."""
    other = transfer(2, 3, 10, (1, 1), 6)
    half = balances(0, 2, a0=(90, 5), a3=(110, 6))
    closing = bank(a0=(90, 5), a1=(110, 5), a2=(90, 6), a3=(110, 6))
    found = kinds(OPENING, [ONE, other, half], closing, markers(ONE, other))
    assert found == {Kind.TORN}


def test_a_balance_below_zero_is_found() -> None:
    overdrawn = transfer(0, 1, 150, (1, 1), 5)
    closing = bank(a0=(-50, 5), a1=(250, 5))
    assert kinds(OPENING, [overdrawn], closing, markers(overdrawn)) == {Kind.NEGATIVE}


def test_a_read_without_an_account_is_found() -> None:
    gone = Bank({number: account for number, account in OPENING.accounts.items() if number != 3})
    assert kinds(OPENING, [], gone, {}) == {Kind.MISSING}


def test_a_read_that_lacks_what_was_acknowledged_before_it_began_is_found() -> None:
    assert kinds(OPENING, [ONE, balances(2, 3)], AFTER_ONE, markers(ONE)) == {Kind.STALE}


def test_a_read_that_lacks_what_another_one_saw_before_it_began_is_found() -> None:
    unknown = transfer(0, 1, 10, (1, 1), None, outcome="unknown")
    seen = balances(2, 3, a0=(90, 5), a1=(110, 5))
    assert kinds(OPENING, [unknown, seen, balances(4, 5)], AFTER_ONE, markers(unknown)) == {Kind.STALE}
    assert kinds(OPENING, [unknown, seen, balances(2, 5)], AFTER_ONE, markers(unknown)) == set()


def test_a_read_of_one_account_that_is_stale_is_found() -> None:
    single = Balances(client="r", begin_s=2, end_s=3, outcome="done", accounts={0: Account(100, 1)})
    assert kinds(OPENING, [ONE, single], AFTER_ONE, markers(ONE)) == {Kind.STALE}


def test_a_read_of_two_accounts_that_shows_half_a_transfer_is_found() -> None:
    half = Balances(client="r", begin_s=0, end_s=3, outcome="done", accounts={0: Account(90, 5), 1: Account(100, 1)})
    assert kinds(OPENING, [ONE, half], AFTER_ONE, markers(ONE)) == {Kind.TORN}


def test_two_reads_that_saw_two_transfers_in_different_orders_are_found() -> None:
    other = transfer(2, 3, 10, (1, 1), 5, end_s=9.0)
    one = transfer(0, 1, 10, (1, 1), 5, end_s=9.0)
    reads = balances(0, 9, a0=(90, 5), a1=(110, 5)), balances(0, 9, a2=(90, 5), a3=(110, 5))
    closing = bank(a0=(90, 5), a1=(110, 5), a2=(90, 5), a3=(110, 5))
    assert kinds(OPENING, [one, other, *reads], closing, markers(one, other)) == {Kind.FORK}


def test_one_version_with_two_balances_is_found() -> None:
    read = balances(0, 9, a0=(95, 5), a1=(105, 5))
    assert kinds(OPENING, [ONE, read], AFTER_ONE, markers(ONE)) == {Kind.CHANGED}


def test_a_version_of_a_transfer_that_was_not_done_is_found() -> None:
    unknown = transfer(0, 1, 10, (1, 1), None, outcome="unknown")
    read = balances(0, 9, a0=(90, 5), a1=(110, 5))
    assert Kind.DIRTY in kinds(OPENING, [unknown, read], OPENING, {})


def test_one_fault_in_many_reads_is_told_a_few_times_only() -> None:
    reads = [balances(0, 2, a0=(90, 5)) for _ in range(50)]
    assert len(check(OPENING, [ONE, *reads], AFTER_ONE, markers(ONE))) < 15


def test_a_violation_names_the_transfer_and_when_it_was() -> None:
    found = "; ".join(map(str, check(OPENING, [ONE], AFTER_ONE, {})))
    assert "lost transfer: transfer m01-10 (0 to 1: 10) [c, 0.0000 to 1.0000] was acknowledged" in found


# --- books of an honest bank -------------------------------------------------------------------------------------


def honest(seed: int, length: int) -> tuple[Bank, list[Transfer | Balances], Bank, dict[str, str]]:
    """Operations that take effect one after the other, each at an instant within its time."""
    rng = random.Random(seed)
    accounts = {number: Account(100, rng.randint(1, 9)) for number in range(6)}
    opening = Bank(dict(accounts))
    clock = 10
    effects = sorted(rng.uniform(0, 20) for _ in range(length))
    history: list[Transfer | Balances] = []
    left: dict[str, str] = {}
    for number, effect_s in enumerate(effects):
        times = {"begin_s": effect_s - rng.random(), "end_s": effect_s + rng.random()}
        if rng.random() < 0.4:
            shown = accounts if rng.random() < 0.8 else {number: accounts[number] for number in rng.sample(range(6), 2)}
            whole = len(shown) == len(accounts)
            read = Balances(
                client="r", begin_s=effect_s, end_s=effect_s, outcome="done", whole=whole, accounts=dict(shown)
            )
            read.begin_s, read.end_s = times["begin_s"], times["end_s"]
            history.append(read)
            continue
        source, target = rng.sample(range(6), 2)
        amount = rng.randint(0, accounts[source].balance)
        outcome: Outcome = rng.choices(("done", "refused", "unknown"), (6, 2, 2))[0]
        done = outcome == "done" or (outcome == "unknown" and rng.random() < 0.5)
        versions = accounts[source].version, accounts[target].version
        clock += rng.randint(1, 3)
        version = clock if outcome == "done" else None
        made = transfer(source, target, amount, versions, version, outcome=outcome, marker=f"m{number}", **times)
        history.append(made)
        if done:
            accounts[source] = Account(accounts[source].balance - amount, clock)
            accounts[target] = Account(accounts[target].balance + amount, clock)
            left[made.marker] = marker_text(made)
    rng.shuffle(history)
    return opening, history, Bank(accounts), left


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 60))
def test_the_books_of_an_honest_bank_are_never_blamed(seed: int, length: int) -> None:
    assert check(*honest(seed, length)) == []


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32))
def test_any_balance_changed_in_such_books_is_found(seed: int) -> None:
    opening, history, closing, left = honest(seed, 40)
    rng = random.Random(seed)
    number = rng.randrange(6)
    forged = dict(closing.accounts)
    forged[number] = Account(forged[number].balance + 1, forged[number].version)
    assert {Kind.TOTAL, Kind.NOT_ONCE} <= kinds(opening, history, Bank(forged), left)
