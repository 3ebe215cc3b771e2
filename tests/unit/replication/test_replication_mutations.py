"""Each rule of replication, taken out: then the explorer finds a story that ends badly.

A rule that no test misses is either not tested or not needed. Below each is taken out alone, by replacing one function,
and one scenario of `scenarios` has to show it.

What is not here, and why:
- Rules that two others say as well. A request names the primary and the copy's id, but terms and joining numbers are
  unique. The round of a session, and that a copy greeted again is credited with nothing: a copy is waited for from a
  record on that comes after all that it can have acknowledged. A record names the checksum of the one before, though in
  a session that has begun the logs agree. A log is synced before its position is told: a position that was told never
  counts as an acknowledgement. A file beyond the common number: only committed records are applied. They cost nothing,
  and the tests of `session` and `shipping` hold them.
- A promotion leaves the old primary in the set: what is lost without that is the second disk, where the model lets only
  disks be lost that another member of the set makes up for (`test_a_promotion_leaves_the_old_primary_in_the_set_…`).
- What keeps a shard served, or quiet, and loses nothing: patience, silence, damping, who may be silent, the disk that
  stalls, the controller that is needed in vain (`test_patience`, `test_failover`, `test_lease`).
- The margin of two clocks: the model's clock is one (`test_lease`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from kvstore.replication import failover, lease, opening, session, shipping
from kvstore.replication.configuration import Primary, Replica
from kvstore.replication.session import Following, Join, Session
from kvstore.replication.shipping import Link, Shipping
from tests.unit.replication import model
from tests.unit.replication.explorer import explore
from tests.unit.replication.model import Model, Rec, Violation, World
from tests.unit.replication.scenarios import SCENARIOS

Change = Callable[[pytest.MonkeyPatch], None]


class Mutation(NamedTuple):
    change: Change
    shown_by: str


MUTATIONS: list[Mutation] = []


def shown_by(scenario: str) -> Callable[[Change], Change]:
    def note(change: Change) -> Change:
        MUTATIONS.append(Mutation(change, scenario))
        return change

    return note


# --- "All traffic belongs to a session ... what names another session is thrown away" ---------------------------------


@shown_by("a late record of an older term")
def a_copy_takes_what_names_another_term_and_start(patch: pytest.MonkeyPatch) -> None:
    def is_current(following: Following, named: Session) -> bool:
        now = following.session
        return now is not None and now._replace(term=named.term, start=named.start) == named

    for module in (session, lease):
        patch.setattr(module, "is_current", is_current)


def _primary_takes(patch: pytest.MonkeyPatch, **alike: Any) -> None:
    """The primary finds a link by its session, but for these fields."""

    def find(now: Shipping, named: Session) -> Link | None:
        def key(each: Session) -> Session:
            return each._replace(copy_id=each.copy_id.rstrip("'"))._replace(**alike)

        return next((link for link in now.links if key(link.session) == key(named)), None)

    patch.setattr(shipping, "find", find)


@shown_by("an acknowledgement of an older term")
def a_primary_counts_the_acknowledgement_of_another_term_and_start(patch: pytest.MonkeyPatch) -> None:
    _primary_takes(patch, term=0, start="")


@shown_by("a begin that is lost")
def a_committed_number_is_told_and_applied_before_the_session_begins(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shipping, "may_send", lambda now, link: not now.deposed)

    def learn_committed(following: Following, named: Session, number: int, last: int) -> Following:
        return following._replace(committed=max(following.committed, min(number, last)))

    patch.setattr(session, "learn_committed", learn_committed)


@shown_by("a term is opened twice")
def a_session_begins_without_comparing_the_chains(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "how_to_join", lambda common, told, applied, **_: Join(told, False))
    patch.setattr(
        session,
        "takes",
        lambda now, named, number, previous, last: session.is_current(now, named) and number == last.number + 1,
    )


@shown_by("a begin that is lost")
def a_primary_sends_and_counts_before_the_copy_has_said_that_it_begins(patch: pytest.MonkeyPatch) -> None:
    greet = shipping.greet

    def changed(now: Shipping, link: Link) -> Shipping:
        after = greet(now, link)
        return after._replace(links=tuple(each._replace(begun=True, acked=link.acked) for each in after.links))

    patch.setattr(shipping, "greet", changed)


@shown_by("late begin")
def a_begin_is_taken_whatever_it_was_computed_from(patch: pytest.MonkeyPatch) -> None:
    begins = session.begins
    patch.setattr(session, "begins", lambda now, named, told, last: begins(now, named, last, last))


# --- "A copy takes records and grants leases only in the term that it has promised ... promised first, durably" -------


@shown_by("a primary dies and its copy is promoted")
def a_promise_is_not_durable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "restarted", lambda side: Following(side.store_id, side.copy_id, 1))


@shown_by("a lease and a promotion")
def a_copy_that_has_promised_more_still_listens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "promise", lambda now, term: now._replace(promised=max(term, now.promised)))
    for module in (session, lease):
        patch.setattr(module, "is_current", lambda now, named: now.session == named)


@shown_by("a lease and a promotion")
def a_node_that_opens_does_not_promise_itself(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model, "own_promise", lambda side, term: side)


@shown_by("a term is opened twice")
def a_node_opens_twice_in_one_term(patch: pytest.MonkeyPatch) -> None:
    may_open = opening.may_open
    patch.setattr(
        opening,
        "may_open",
        lambda config, node, copy_id, promised, given, now: may_open(config, node, copy_id, promised - 1, given, now),
    )


# --- "A log is synced before its position is told" --------------------------------------------------------------------


# --- "Durable when its own sync and every in-sync copy's is done"; applied only up to the committed number ------------


@shown_by("a copy does not answer an opening")
def durable_without_the_own_sync(patch: pytest.MonkeyPatch) -> None:
    counted = shipping._counted

    def changed(now: Shipping) -> Shipping:
        return counted(now._replace(synced=now.last))._replace(synced=now.synced)

    patch.setattr(shipping, "_counted", changed)


def _waits_for(patch: pytest.MonkeyPatch, which: Callable[[Link], bool]) -> None:
    holds_back = Link.holds_back.fget  # type: ignore[attr-defined]
    patch.setattr(Link, "holds_back", property(lambda link: holds_back(link) if which(link) else None))


@shown_by("a copy does not answer an opening")
def durable_without_the_copies(patch: pytest.MonkeyPatch) -> None:
    _waits_for(patch, lambda link: False)


@shown_by("a copy does not answer an opening")
def a_copy_applies_all_that_it_has(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "may_apply", lambda following: 99)


# --- joining ----------------------------------------------------------------------------------------------------------


@shown_by("snapshot")
def a_snapshot_that_is_behind_is_taken(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "takes_snapshot", lambda now, named, at, last: session.is_current(now, named))


@shown_by("a copy joins and is promoted")
def a_copy_is_waited_for_only_once_the_map_says_in_sync(patch: pytest.MonkeyPatch) -> None:
    _waits_for(patch, lambda link: link.in_sync)


@shown_by("a copy joins and is promoted")
def the_lease_of_a_copy_is_needed_only_once_the_map_says_in_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shipping, "awaited", lambda now: tuple(link for link in now.links if link.in_sync))


@shown_by("a copy joins and is promoted")
def in_sync_is_asked_for_before_everything_below_is_on_the_disk(patch: pytest.MonkeyPatch) -> None:
    request_in_sync = shipping.request_in_sync
    patch.setattr(shipping, "request_in_sync", lambda now, link: request_in_sync(now, link._replace(acked=link.waited)))


def _request_names(patch: pytest.MonkeyPatch, fields: tuple[str, ...]) -> None:
    meant = failover._meant

    def changed(config: Any, request: Any) -> Replica | None:
        copy = next((each for each in config.replicas if each.copy_id == request.copy_id), None)
        stands = {"term": config.term, "primary": config.primary.copy_id, "joined": copy and copy.joined}
        return meant(config, request._replace(**{name: value for name, value in stands.items() if name not in fields}))

    patch.setattr(failover, "_meant", changed)


@shown_by("a copy joins, a late request")
def a_request_does_not_name_the_joining_number(patch: pytest.MonkeyPatch) -> None:
    _request_names(patch, ("term", "primary"))


@shown_by("a request of an older term")
def a_request_does_not_name_the_term(patch: pytest.MonkeyPatch) -> None:
    _request_names(patch, ("primary", "joined"))


@shown_by("a copy loses its disk")
def a_copy_with_another_id_takes_over_the_state(patch: pytest.MonkeyPatch) -> None:
    def named(config: Any, node: str, copy_id: str, epoch: int) -> Any:
        there = config.copy_on(node)
        if there is None or there.copy_id == copy_id:
            return None
        return failover._with_copy(config, there, there._replace(copy_id=copy_id), epoch)

    patch.setattr(failover, "named", named)


@shown_by("a lease and a promotion")
def a_copy_is_let_go_when_the_request_to_take_it_out_is_sent(patch: pytest.MonkeyPatch) -> None:
    on_request = Model.on_request

    def changed(self: Model, world: World, request: Any) -> World:
        world = on_request(self, world, request)
        for at, node in enumerate(world.nodes):
            if request.kind == "out" and node.ship is not None and node.ship.config.term == request.term:
                links = tuple(each for each in node.ship.links if each.session.copy_id != request.copy_id)
                world = model._put(world, at, ship=shipping._counted(node.ship._replace(links=links)))
        return world

    patch.setattr(Model, "on_request", changed)


# --- the lease --------------------------------------------------------------------------------------------------------


@shown_by("a lease and a promotion")
def a_primary_answers_without_a_lease(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease, "may_answer", lambda grants, awaited, now: not grants.given_back)


@shown_by("the lease of three")
def a_primary_answers_with_the_grant_of_one_copy(patch: pytest.MonkeyPatch) -> None:
    def may_answer(grants: Any, awaited: Any, now: float) -> bool:
        return not grants.given_back and (not awaited or any(grants.of(each) > now for each in awaited))

    patch.setattr(lease, "may_answer", may_answer)


@shown_by("a late grant")
def a_grant_is_counted_from_its_answer(patch: pytest.MonkeyPatch) -> None:
    held = lease.held
    patch.setattr(lease, "held", lambda grants, named, asked_at, lease_s: held(grants, named, 0, lease_s))


@shown_by("a lease and a promotion")
def a_copy_is_promoted_before_its_own_grant_has_run_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(opening, "may_be_promoted", lambda given, now: True)


@shown_by("a copy that granted starts again")
def a_copy_that_starts_counts_as_having_granted_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease, "granted_at_start", lambda logged, copy_id, promised, now, *_: lease.Granted(now))


@shown_by("a lease is given back")
def a_primary_that_gave_its_lease_back_still_answers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease, "give_back", lambda grants: grants)


@shown_by("a lease and a promotion")
def a_copy_grants_in_a_session_that_is_over(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease, "grants", lambda now, named, *rest: named.copy_id == now.copy_id)


@shown_by("a late giving back")
def a_lease_of_another_session_is_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease, "returned", lambda given, following, named, now: lease.Granted(min(given.until, now)))


# --- opening ----------------------------------------------------------------------------------------------------------


@shown_by("a copy loses its disk")
def a_node_opens_whatever_copy_the_map_names(patch: pytest.MonkeyPatch) -> None:
    may_open = opening.may_open
    patch.setattr(
        opening, "may_open", lambda config, node, copy_id, *rest: may_open(config, node, config.primary.copy_id, *rest)
    )


@shown_by("a lease and a promotion")
def the_copies_in_sync_are_not_asked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(opening, "asked", lambda now: ())


@shown_by("a lease and a promotion")
def the_old_primary_is_not_asked(patch: pytest.MonkeyPatch) -> None:
    asked = opening.asked
    patch.setattr(opening, "asked", lambda now: tuple(copy for copy in asked(now) if copy.joined != now.config.term))


@shown_by("a lease and a promotion")
def the_own_log_is_the_truth(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(opening, "truth", lambda now: None if opening.asked(now) else opening.Truth(now.own, None))


@shown_by("a copy does not answer an opening")
def a_term_is_served_with_all_that_the_log_has_before_the_others_have_it(patch: pytest.MonkeyPatch) -> None:
    def opened(*args: Any) -> Shipping:
        now = _opened(*args)
        return now._replace(committed=now.opening - 1, opening=now.opening - 1)

    _opened = shipping.opened
    patch.setattr(shipping, "opened", opened)


@shown_by("a term is opened twice")
def a_store_starts_alone_while_a_copy_joins(patch: pytest.MonkeyPatch) -> None:
    starts_alone = opening.starts_alone
    patch.setattr(
        opening,
        "starts_alone",
        lambda logged, *rest: starts_alone(logged and logged._replace(replicas=logged.in_sync), *rest),
    )


@shown_by("a store that was alone")
def the_log_carries_no_map_that_was_followed_later(patch: pytest.MonkeyPatch) -> None:
    def rec(term: int, value: int = 0, config: Any = None) -> Rec:
        return Rec(term, value, config if config is not None and config.epoch == 1 else None)

    patch.setattr(model, "Rec", rec)
    starts_alone = opening.starts_alone
    patch.setattr(opening, "starts_alone", lambda logged, node, copy_id, _: starts_alone(logged, node, copy_id, 0))


@shown_by("a first copy for a store that is alone")
def records_are_sent_before_the_map_that_names_the_copy_is_durable(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shipping, "may_send", lambda now, link: link.begun and not now.deposed)
    patch.setattr(shipping, "may_greet", lambda now, link: not now.deposed)


# --- the controller ---------------------------------------------------------------------------------------------------


@shown_by("a copy joins and is promoted")
def a_copy_that_is_not_in_sync_is_promoted(patch: pytest.MonkeyPatch) -> None:
    promoted = failover.promoted

    def changed(config: Any, node: str, copy_id: str, epoch: int) -> Any:
        copies = tuple(copy._replace(state="in-sync") if copy.node == node else copy for copy in config.replicas)
        return promoted(config._replace(replicas=copies), node, copy_id, epoch)

    patch.setattr(failover, "promoted", changed)


@shown_by("a copy loses its disk")
def a_copy_is_promoted_under_another_id(patch: pytest.MonkeyPatch) -> None:
    promoted = failover.promoted

    def changed(config: Any, node: str, copy_id: str, epoch: int) -> Any:
        there = config.copy_on(node)
        after = there and promoted(config, node, there.copy_id, epoch)
        return after and after._replace(primary=Primary(node, copy_id))

    patch.setattr(failover, "promoted", changed)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.change.__name__)
def test_without_the_rule_some_story_ends_badly(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation.change(monkeypatch)
    with pytest.raises(Violation):
        explore(SCENARIOS[mutation.shown_by])
