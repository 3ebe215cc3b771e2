"""Beats over real HTTP: what nodes are told, what the map says then, what is refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvstore.config import Limits
from kvstore.controller import copy_keeper
from kvstore.controller.copy_asks import with_replicas
from kvstore.controller.document import ClusterDocument
from kvstore.controller.membership import ClusterState
from kvstore.environment import SYSTEM
from kvstore.placement.cluster_map import ClusterMap
from kvstore.replication.beats import Asked, Beat, BeatAnswer, CopyReport, Echo
from kvstore.replication.configuration import Configuration, configuration_of
from tests.unit.controller.test_controller_app import CONFIG, Controller, running

QUICK = msgspec.structs.replace(CONFIG, limits=Limits(failover_after_s=0.4, lease_s=0.3, replica_timeout_s=0.2))


class Nodes:
    """Two nodes, as the controller hears them; what they are told to make, they report from then on."""

    def __init__(self, controller: Controller, formed: ClusterMap) -> None:
        self.controller = controller
        self.map = formed
        self.echoes = {"s1": Echo(), "s2": Echo()}
        self.copies: dict[str, list[CopyReport]] = {
            shard.id: [
                CopyReport(
                    shard=shard.id, store_id=shard.store_id, copy_id=shard.primary.copy_id, role="primary", serves=True
                )
            ]
            for shard in formed.shards
        }
        self.dead: set[str] = set()
        self.asked: dict[str, list[Asked]] = {"s1": [], "s2": []}

    def config(self, shard: str = "s1") -> Configuration:
        found = configuration_of(self.map, shard)
        assert found is not None
        return found

    async def follow(self) -> None:
        status, found = await self.controller.call("GET", "/v1/map?after=0")
        assert status == 200
        self.map = msgspec.convert(found, ClusterMap)

    async def beat(self, node: str) -> BeatAnswer:
        beat = Beat(
            node=node,
            start="x",
            cluster_id=self.map.cluster_id,
            epoch=self.map.epoch,
            echo=self.echoes[node],
            copies=self.copies[node],
            requests=self.asked[node],
        )
        status, said = await self.controller.call("POST", f"/v1/nodes/{node}/beat", data=msgspec.json.encode(beat))
        assert status == 200
        answer = msgspec.convert(said, BeatAnswer)
        self.echoes[node] = Echo(start=answer.start, beat=answer.beat)
        for made in answer.make:
            copy = CopyReport(shard=made.shard, store_id=made.store_id, copy_id=f"{made.shard}-on-{node}", role="copy")
            self.copies[node].append(copy)
        return answer

    async def beats(self) -> None:
        """One of each node, until the map has changed, or for a moment."""
        for node in self.copies.keys() - self.dead:
            await self.beat(node)
        await self.follow()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(60):  # a machine that stands still now and then makes the controller count again
            while True:
                await self.beats()
                if condition():
                    return


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    async with running(tmp_path, QUICK) as controller:
        yield Nodes(controller, await controller.form())


async def raised(nodes: Nodes) -> None:
    status, said = await nodes.controller.call("PATCH", "/v1/cluster", json={"replicas": 2})
    assert (status, said["replicas"]) == (202, 2)


async def test_nothing_is_made_while_one_copy_of_everything_is_asked_for(nodes: Nodes) -> None:
    answer = await nodes.beat("s1")
    assert (answer.make, answer.drop, answer.epoch, answer.behind) == ([], [], 1, False)


async def test_a_node_is_told_to_make_a_copy_and_the_map_names_it_joining(nodes: Nodes) -> None:
    await raised(nodes)
    await nodes.until(lambda: nodes.config("s1").replicas and nodes.config("s2").replicas)
    assert [(copy.node, copy.copy_id, copy.state) for copy in nodes.config("s1").replicas] == [
        ("s2", "s1-on-s2", "joining")
    ]


async def in_sync(nodes: Nodes) -> None:
    await raised(nodes)
    await nodes.until(lambda: nodes.config("s1").replicas)
    (copy,), config = nodes.config("s1").replicas, nodes.config("s1")
    primary = config.primary.copy_id
    asked = Asked(
        kind="in-sync", shard="s1", term=config.term, primary=primary, copy_id=copy.copy_id, joined=copy.joined
    )
    nodes.asked["s1"].append(asked)
    await nodes.until(lambda: nodes.config("s1").in_sync)


async def test_shards_with_fewer_copies_in_sync_than_are_asked_for_are_counted(nodes: Nodes) -> None:
    async def under_replicated() -> str:
        async with nodes.controller.session.get(f"{nodes.controller.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return next(line for line in lines if line.startswith("kvstore_shards_under_replicated "))

    assert (await under_replicated()).endswith(" 0.0"), "one copy is asked for"
    await in_sync(nodes)
    assert (await under_replicated()).endswith(" 1.0"), "that of s2 is not in sync yet"


async def test_a_node_that_follows_a_newer_map_is_told_to_make_and_to_drop_nothing(nodes: Nodes) -> None:
    """The controller's record is an old copy: what its map does not name may be a copy in sync."""
    await raised(nodes)
    left_over = CopyReport(shard="s9", store_id="store-s9", copy_id="copy-of-s9", role="copy")
    nodes.copies["s2"].append(left_over)
    await nodes.follow()
    assert [drop.copy_id for drop in (await nodes.beat("s2")).drop] == ["copy-of-s9"]
    nodes.map = msgspec.structs.replace(nodes.map, epoch=nodes.map.epoch + 5)
    answer = await nodes.beat("s2")
    assert (answer.make, answer.drop, answer.give_back, answer.may_stop) == ([], [], [], False)
    assert answer.behind


async def test_a_silent_primary_is_replaced_once_its_copy_says_that_it_does_not_hear_it_either(nodes: Nodes) -> None:
    await in_sync(nodes)
    nodes.dead.add("s1")
    await nodes.until(lambda: True)
    heir = next(copy for copy in nodes.copies["s2"] if copy.shard == "s1")
    nodes.copies["s2"].remove(heir)
    nodes.copies["s2"].append(msgspec.structs.replace(heir, silent_s=5.0))
    await nodes.until(lambda: nodes.config("s1").primary.node == "s2")
    assert nodes.config("s1").term == nodes.map.epoch or nodes.config("s1").term > 1
    assert [copy.node for copy in nodes.config("s1").replicas] == ["s1"]


async def test_nobody_is_promoted_by_the_first_beat_after_all_machines_stood_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy's node wakes first, and has not heard its primary either."""
    slept_s, boottime_s = [0.0], SYSTEM.boottime_s
    monkeypatch.setattr(SYSTEM, "boottime_s", lambda: boottime_s() + sum(slept_s))
    async with running(tmp_path, QUICK) as controller:
        nodes = Nodes(controller, await controller.form())
        await in_sync(nodes)
        await nodes.beats()
        before = nodes.config("s1")
        heir = next(copy for copy in nodes.copies["s2"] if copy.shard == "s1")
        nodes.copies["s2"].remove(heir)
        nodes.copies["s2"].append(msgspec.structs.replace(heir, silent_s=3600.0))
        slept_s.append(3600.0)
        await nodes.beat("s2")
        await asyncio.sleep(0.05)  # it is decided
        nodes.copies["s2"][-1] = heir
        for _ in range(5):
            await nodes.beats()
        assert nodes.config("s1") == before._replace(epoch=nodes.map.epoch)


async def test_the_end_of_each_log_is_told_primary_first_with_how_old_that_word_is(nodes: Nodes) -> None:
    await in_sync(nodes)
    heir = next(copy for copy in nodes.copies["s2"] if copy.shard == "s1")
    nodes.copies["s2"].remove(heir)
    nodes.copies["s2"].append(msgspec.structs.replace(heir, term=7, number=41, silent_s=0.25))
    await nodes.beat("s2")
    _, told = await nodes.controller.call("GET", "/v1/moves?copies=true")
    primary, copy = told["copies"]["positions"]["s1"]
    assert (primary["node"], primary["role"], primary["serves"]) == ("s1", "primary", True)
    assert (copy["node"], copy["term"], copy["number"], copy["silent_s"]) == ("s2", 7, 41, 0.25)
    assert 0 <= copy["told_s"] < 60


async def test_a_failover_is_listed_as_a_change_once_the_new_primary_serves(nodes: Nodes) -> None:
    await test_a_silent_primary_is_replaced_once_its_copy_says_that_it_does_not_hear_it_either(nodes)
    heir = next(copy for copy in nodes.copies["s2"] if copy.shard == "s1")
    nodes.copies["s2"].remove(heir)
    serving = msgspec.structs.replace(heir, role="primary", serves=True, promised=nodes.config("s1").term)
    nodes.copies["s2"].append(serving)
    await nodes.beats()
    while True:
        await nodes.beats()
        _, found = await nodes.controller.call("GET", "/v1/changes")
        if failovers := [each for each in found["items"] if each["kind"] == "failover"]:
            break
    assert (failovers[0]["shard"], failovers[0]["state"]) == ("s1", "done")
    assert re.search(r"node s2 took over and served after [\d.]+ s\.$", failovers[0]["detail"])


async def test_what_a_primary_asked_for_does_not_outlive_it_while_the_store_of_the_record_is_slow(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for its only copy to be taken out, and dies: the copy takes over, as if it had asked for nothing."""
    await in_sync(nodes)
    (copy,), before = nodes.config("s1").replicas, nodes.config("s1")
    change, is_asked, answers = ClusterDocument.change, asyncio.Event(), asyncio.Event()

    async def slow(document: ClusterDocument, decide: Any, **options: Any) -> Any:
        is_asked.set()
        await answers.wait()
        return await change(document, decide, **options)

    monkeypatch.setattr(ClusterDocument, "change", slow)
    nodes.asked["s1"] = [
        Asked(
            kind="out", shard="s1", term=before.term, primary=before.primary.copy_id, copy_id=copy.copy_id,
            joined=copy.joined,
        )
    ]  # fmt: skip
    async with asyncio.timeout(60):
        while not is_asked.is_set():
            await nodes.beats()
    nodes.dead.add("s1")
    heir = next(each for each in nodes.copies["s2"] if each.shard == "s1")
    nodes.copies["s2"].remove(heir)
    nodes.copies["s2"].append(msgspec.structs.replace(heir, silent_s=3600.0))
    gone = asyncio.get_running_loop().time() + 2 * QUICK.limits.failover_after_s
    while asyncio.get_running_loop().time() < gone:
        await nodes.beat("s2")
        await asyncio.sleep(QUICK.limits.failover_after_s / 8)
    answers.set()
    await nodes.until(lambda: nodes.config("s1") != before)
    assert nodes.config("s1").primary.node == "s2"


async def test_a_promotion_to_a_node_without_a_copy_in_sync_is_refused(nodes: Nodes) -> None:
    status, said = await nodes.controller.call("POST", "/v1/shards/s1/promote", json={"to": "s2"})
    assert (status, said["code"]) == (409, "change-refused")
    assert "in sync: none" in said["detail"]


async def has_old_folder(nodes: Nodes, number: int) -> str:
    """The copy of s1 on s2 ends with record `number`, and has not heard its primary; the id of its store."""
    copy = next(each for each in nodes.copies["s2"] if each.shard == "s1")
    nodes.copies["s2"].remove(copy)
    nodes.copies["s2"].append(msgspec.structs.replace(copy, number=number, term=1, promised=1, silent_s=9.0))
    return copy.store_id


async def beats_that_tell(nodes: Nodes, committed: int, promised: int) -> None:
    """The primary of s1 says, by a beat alone, that so many records are committed."""
    (primary,) = (each for each in nodes.copies["s1"] if each.shard == "s1")
    nodes.copies["s1"].remove(primary)
    nodes.copies["s1"].append(msgspec.structs.replace(primary, committed=committed, promised=promised))
    await nodes.beat("s1")


async def left_alone(nodes: Nodes, number: int) -> None:
    """Twelve records of s1 were committed, its copy on s2 ends with record `number`, and s1 falls silent."""
    told = {"store_id": await has_old_folder(nodes, number), "number": 12, "version": 4000}
    assert (await nodes.controller.call("POST", "/v1/told", json=told))[0] == 200
    nodes.dead.add("s1")


async def until_older(nodes: Nodes, number: int, told: int) -> None:
    """What is here of s1 is told to be older than what was committed."""
    async with asyncio.timeout(60):
        while True:
            await nodes.beats()
            _, said = await nodes.controller.call("GET", "/v1/moves?copies=true")
            if said["copies"]["older"] == {"s1": {"number": number, "told": told}}:
                return


async def stranded(nodes: Nodes, number: int = 7) -> dict[str, Any]:
    """The copy of s1 on s2 joins and has some records; then s1 falls silent. What is told of shards in that state."""
    await raised(nodes)
    await nodes.until(lambda: nodes.config("s1").replicas)
    await left_alone(nodes, number)
    async with asyncio.timeout(60):
        while True:
            await nodes.beats()
            _, said = await nodes.controller.call("GET", "/v1/moves?copies=true")
            found: dict[str, Any] = said["copies"]["stranded"]
            if found.keys() == {"s1"} and found["s1"]["other"] == ("s2" if number else None):
                return found


async def lossy(nodes: Nodes, confirm: str | None = None, to: str = "s2") -> tuple[int, Any]:
    body = {"to": to, "accept_loss": True} | ({"confirm": confirm} if confirm else {})
    return await nodes.controller.call("POST", "/v1/shards/s1/promote", json=body)


async def lossy_while_heard(nodes: Nodes, confirm: str | None) -> tuple[int, Any]:
    """Ask while the controller hears s2, which on a machine that stands still it may not for a moment."""
    async with asyncio.timeout(60):
        while True:
            await nodes.beats()
            status, said = await lossy(nodes, confirm)
            if status == 202 or not any(words in said["detail"] for words in ("or is silent", "is heard")):
                return status, said


async def refused_while_heard(nodes: Nodes, words: str, confirm: str | None = "s1") -> None:
    """Going on with s2's copy is refused with those words once the controller hears s1, and for another reason before.

    On a machine that stands still it may not hear s1 for a moment.
    """
    async with asyncio.timeout(60):
        while True:
            await nodes.beats()
            status, said = await lossy(nodes, confirm)
            assert status == 409, said
            if words in said["detail"]:
                return


async def test_a_copy_that_is_not_in_sync_is_promoted_only_with_the_shards_id_and_goes_on_above_all_that_was_told(
    nodes: Nodes,
) -> None:
    assert await stranded(nodes) == {"s1": {"nodes": ["s1"], "other": "s2", "is_damaged": False}}
    for confirm in (None, "s2"):
        status, said = await lossy_while_heard(nodes, confirm)
        assert (status, said["code"], said["number"], said["told"]) == (409, "change-refused", 7, 12)
        assert "at least the last 5 records" in said["detail"]
    status, said = await lossy_while_heard(nodes, "s1")
    assert (status, said["number"], said["told"]) == (202, 7, 12)
    await nodes.follow()
    assert nodes.config().primary.node == "s2"
    assert nodes.config().term == nodes.config().epoch
    assert [(copy.node, copy.state) for copy in nodes.config().replicas] == [("s1", "joining")]
    shard = nodes.map.shard("s1")
    assert shard is not None
    assert shard.clock_floor > 4000


async def test_an_old_folder_of_a_copy_in_sync_is_told_and_gone_on_with_only_by_a_person(nodes: Nodes) -> None:
    await in_sync(nodes)
    await left_alone(nodes, number=7)
    await until_older(nodes, number=7, told=12)
    assert nodes.config().primary.node == "s1"
    status, said = await lossy_while_heard(nodes, None)
    assert (status, said["number"], said["told"]) == (409, 7, 12)
    assert (await lossy_while_heard(nodes, "s1"))[0] == 202
    await nodes.follow()
    assert nodes.config().primary.node == "s2"
    assert [(each.node, each.state) for each in nodes.config().replicas] == [("s1", "joining")]


async def test_what_a_primary_has_committed_is_known_by_its_beats_and_outlives_the_controllers_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, QUICK) as controller:
        nodes = Nodes(controller, await controller.form())
        await in_sync(nodes)
        store_id = await has_old_folder(nodes, number=7)
        asked = {"store_id": store_id, "number": 0, "version": 0}
        await beats_that_tell(nodes, committed=9, promised=nodes.config().term + 1)  # not of the present term
        assert (await controller.call("POST", "/v1/told", json=asked))[1]["number"] == 0
        await beats_that_tell(nodes, committed=12, promised=nodes.config().term)
        assert (await controller.call("POST", "/v1/told", json=asked))[1]["number"] == 12
        nodes.dead.add("s1")
        await nodes.until(lambda: "what is here of it ends with record 7, and record 12 was committed" in caplog.text)
        assert nodes.config().primary.node == "s1"
    async with running(tmp_path, QUICK) as controller:
        assert (await controller.call("POST", "/v1/told", json=asked))[1]["number"] == 12


async def test_what_beats_have_told_is_forgotten_when_a_person_goes_on_with_an_older_copy(nodes: Nodes) -> None:
    await in_sync(nodes)
    await has_old_folder(nodes, number=7)
    await beats_that_tell(nodes, committed=12, promised=nodes.config().term)
    nodes.dead.add("s1")
    await until_older(nodes, number=7, told=12)
    status, said = await lossy_while_heard(nodes, "s1")
    assert (status, said["number"], said["told"]) == (202, 7, 12)
    shard = nodes.map.shard("s1")
    assert shard is not None
    asked = {"store_id": shard.store_id, "number": 0, "version": 0}
    assert (await nodes.controller.call("POST", "/v1/told", json=asked))[1]["number"] == 0


async def test_what_the_old_primary_tells_once_a_person_has_gone_on_without_it_counts_no_more(nodes: Nodes) -> None:
    """Its process was stopped, and tells as soon as it goes on, before it has heard of the map."""
    await stranded(nodes)
    assert (await lossy_while_heard(nodes, "s1"))[0] == 202
    await nodes.follow()
    shard = nodes.map.shard("s1")
    assert shard is not None
    for number, version, counts in ((20, 4100, 0), (8, shard.clock_floor, 8), (21, 4101, 8)):
        told = {"store_id": shard.store_id, "number": number, "version": version}
        assert (await nodes.controller.call("POST", "/v1/told", json=told))[1]["number"] == counts


async def test_a_controller_whose_record_is_old_forgets_nothing_that_was_told_when_it_refuses_to_go_on_with_loss(
    nodes: Nodes,
) -> None:
    await stranded(nodes)
    shard = nodes.map.shard("s1")
    assert shard is not None
    nodes.map = msgspec.structs.replace(nodes.map, epoch=nodes.map.epoch + 9)
    await nodes.beat("s2")
    status, said = await lossy_while_heard(nodes, "s1")
    assert (status, said["code"]) == (503, "controller-behind")
    asked = {"store_id": shard.store_id, "number": 0, "version": 0}
    assert (await nodes.controller.call("POST", "/v1/told", json=asked))[1] == {
        "number": 12, "version": 4000, "clock_floor": 0
    }  # fmt: skip


async def test_why_the_copies_stay_as_they_are_is_said_once_and_not_at_each_try(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    """A controller whose record is an old copy tries for as long as no person mends it."""
    await raised(nodes)
    await nodes.until(lambda: nodes.config("s1").replicas)
    nodes.map = msgspec.structs.replace(nodes.map, epoch=nodes.map.epoch + 9)
    await nodes.beat("s2")
    nodes.copies["s2"] = [
        msgspec.structs.replace(each, copy_id="another") if each.role == "copy" else each for each in nodes.copies["s2"]
    ]
    said = "the copies stay as they are: this controller's map is that of epoch"
    for _ in range(20):
        for node in ("s1", "s2"):
            await nodes.beat(node)
        await asyncio.sleep(0.1)
    assert caplog.text.count(said) == 1


async def test_nothing_is_given_up_while_the_primary_is_heard_or_for_a_copy_that_has_nothing(nodes: Nodes) -> None:
    await in_sync(nodes)
    for confirm in (None, "s1"):
        await refused_while_heard(nodes, "is heard", confirm)


async def test_where_primary_and_copy_have_old_folders_a_person_is_sent_to_accept_old(nodes: Nodes) -> None:
    await in_sync(nodes)
    told = {"store_id": await has_old_folder(nodes, number=7), "number": 12, "version": 4000}
    assert (await nodes.controller.call("POST", "/v1/told", json=told))[0] == 200
    (primary,) = (each for each in nodes.copies["s1"] if each.shard == "s1")
    nodes.copies["s1"].remove(primary)
    nodes.copies["s1"].append(msgspec.structs.replace(primary, role="opening", number=6, serves=False))
    await until_older(nodes, number=7, told=12)
    await refused_while_heard(nodes, "kvstore shard accept-old s1")
    accepted = await nodes.controller.call("POST", "/v1/shards/s1/accept-old", json={"confirm": "s1"})
    assert (accepted[0], accepted[1]["told"]) == (202, 12)
    asked = told | {"number": 0, "version": 0}
    assert (await nodes.controller.call("POST", "/v1/told", json=asked))[1]["number"] == 0


async def test_a_copy_that_has_nothing_cannot_be_gone_on_with(nodes: Nodes) -> None:
    await stranded(nodes, number=0)
    status, said = await lossy_while_heard(nodes, "s1")
    assert (status, "remove s1 --lost" in said["detail"]) == (409, True)
    status, said = await lossy(nodes, "s1", to="s9")
    assert (status, said["code"]) == (409, "change-refused")


async def test_the_only_copy_that_is_asked_for_lies_at_home_whatever_a_person_preferred_before(nodes: Nodes) -> None:
    await in_sync(nodes)
    assert (await nodes.controller.call("POST", "/v1/shards/s1/promote", json={"to": "s2"}))[0] == 202
    preferred = ClusterState(map=nodes.map, preferred={"s1": "s2"})
    assert with_replicas(preferred, 1, ()).preferred == {}
    assert with_replicas(preferred, 3, ()).preferred == {"s1": "s2"}


async def test_the_primary_changes_to_the_copy_that_the_lease_was_given_back_to(nodes: Nodes) -> None:
    await in_sync(nodes)
    status, _ = await nodes.controller.call("POST", "/v1/shards/s1/promote", json={"to": "s2"})
    assert status == 202
    while not (asked := (await nodes.beat("s1")).give_back):
        pass
    assert (asked[0].shard, asked[0].to, asked[0].term) == ("s1", "s2", nodes.config("s1").term)
    given = msgspec.structs.replace(nodes.copies["s1"][0], given_back=asked[0].term)
    nodes.copies["s1"][0] = given
    await nodes.until(lambda: nodes.config("s1").primary.node == "s2")


async def test_a_primary_is_promoted_neither_on_a_silent_node_nor_on_one_that_does_not_exist(nodes: Nodes) -> None:
    await in_sync(nodes)
    status, said = await nodes.controller.call("POST", "/v1/shards/s1/promote", json={"to": "s9"})
    assert (status, said["in_sync"]) == (409, ["s2"])
    assert "there is no node 's9': the nodes are s1, s2" in said["detail"]
    nodes.dead.add("s2")
    status = 202
    async with asyncio.timeout(60):
        while status == 202:
            await nodes.beats()
            status, said = await nodes.controller.call("POST", "/v1/shards/s1/promote", json={"to": "s2"})
    assert (status, said["in_sync"]) == (409, [])
    assert "node s2, which has a copy of shard s1 in sync, is silent: start it" in said["detail"]


async def test_a_lease_that_was_given_back_does_not_wait_for_the_pause_between_two_decisions(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients of that shard wait meanwhile."""
    await in_sync(nodes)
    assert (await nodes.controller.call("POST", "/v1/shards/s1/promote", json={"to": "s2"}))[0] == 202
    while not (asked := (await nodes.beat("s1")).give_back):
        pass
    monkeypatch.setattr(copy_keeper, "_SHORTEST_S", 1e6)
    await asyncio.sleep(0.05)  # the next decision is made, by the beat before, and the pause begins
    nodes.copies["s1"][0] = msgspec.structs.replace(nodes.copies["s1"][0], given_back=asked[0].term)
    await nodes.until(lambda: nodes.config("s1").primary.node == "s2")


async def test_the_number_of_copies_is_not_lowered_while_a_shard_has_no_primary(nodes: Nodes) -> None:
    await in_sync(nodes)
    nodes.copies["s1"][0] = msgspec.structs.replace(nodes.copies["s1"][0], serves=False)
    await nodes.beat("s1")
    status, said = await nodes.controller.call("PATCH", "/v1/cluster", json={"replicas": 1})
    assert (status, said["code"]) == (409, "change-refused")
    assert "shard s1" in said["detail"]


@pytest.mark.parametrize("replicas", [0, 6])
async def test_a_number_of_copies_that_is_none_is_refused(nodes: Nodes, replicas: int) -> None:
    status, said = await nodes.controller.call("PATCH", "/v1/cluster", json={"replicas": replicas})
    assert (status, said["code"]) == (400, "bad-body")


async def test_a_controller_that_hears_of_a_promised_term_above_its_epoch_changes_nothing(nodes: Nodes) -> None:
    nodes.copies["s1"][0] = msgspec.structs.replace(nodes.copies["s1"][0], promised=99)
    await nodes.beat("s1")
    status, said = await nodes.controller.call("PATCH", "/v1/cluster", json={"replicas": 2})
    assert (status, said["code"]) == (503, "controller-behind")


async def test_what_a_copy_of_another_store_has_promised_says_nothing_about_this_cluster(nodes: Nodes) -> None:
    foreign = {"store_id": "of-another-cluster", "copy_id": "x", "role": "copy", "promised": 99, "term": 98}
    nodes.copies["s1"] += [CopyReport(shard=shard, **foreign) for shard in ("s2", "s9")]  # type: ignore[arg-type]
    await nodes.beat("s1")
    status, said = await nodes.controller.call("PATCH", "/v1/cluster", json={"replicas": 2})
    assert (status, said["replicas"]) == (202, 2)


async def test_a_beat_of_another_cluster_and_of_a_node_that_is_not_in_the_map_are_refused(nodes: Nodes) -> None:
    for node, cluster in (("s1", "another"), ("s9", nodes.map.cluster_id)):
        beat = Beat(node=node, start="x", cluster_id=cluster, epoch=1)
        status, said = await nodes.controller.call("POST", f"/v1/nodes/{node}/beat", data=msgspec.json.encode(beat))
        assert (status, said["code"]) == (409, "conflict")


async def test_the_beat_of_one_node_is_not_taken_for_that_of_another(nodes: Nodes) -> None:
    beat = Beat(node="s1", start="x", cluster_id=nodes.map.cluster_id, epoch=1)
    status, _ = await nodes.controller.call("POST", "/v1/nodes/s2/beat", data=msgspec.json.encode(beat))
    assert status == 400
