"""Copies on the page: made, seen, and used: a node is killed, its shard taken over, and a copy promoted on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import requests

from tests.browser.page import Page
from tests.cluster.clusters import Cluster, running, write_config
from tests.cluster.test_events_and_demo import listening

WAIT_S = 30.0


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes, one copy of every key at first."""
    with running(write_config(tmp_path_factory.mktemp("failover"), shards=3), options=["--demo"]) as cluster:
        yield cluster


def shards(demo: Cluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = requests.get(f"{demo.url}/v1/cluster", timeout=WAIT_S).json()["shards"]
    return found


def are_in_sync(demo: Cluster) -> bool:
    return all([copy["state"] for copy in shard["copies"]] == ["in-sync"] for shard in shards(demo))


@pytest.fixture
def copied(page: Page, demo: Cluster) -> Page:
    """The page of a cluster with two copies of every key."""
    requests.patch(f"{demo.url}/v1/cluster", json={"replicas": 2}, timeout=WAIT_S).raise_for_status()
    page.until(lambda: are_in_sync(demo))
    return page


def test_two_copies_are_asked_for_on_the_page_and_made(page: Page, demo: Cluster) -> None:
    page.open("failover")
    page.until_says("There is one copy of every key", "kvstore cluster replicas 2")
    assert not [button for button in page.all("button.danger") if button.is_enabled()]  # none could take over
    page.click("Keep two copies")
    page.until(lambda: "1 node now" in page.text_of("dialog") and "2 nodes" in page.text_of("dialog"))
    page.keep("failover-plan-of-copies")
    page.click("Keep 2", "dialog")
    page.until(lambda: page.text_of("td[data-label=copies]").count("in sync") == 3)
    assert are_in_sync(demo)
    page.follow("Overview")
    page.until_says("2 copies of every key are in sync", "Nodes", "keeps copies of")


def test_the_way_of_a_key_leads_to_its_copies(copied: Page) -> None:
    copied.open("ring")
    copied.type("#walk-key", "users/42")
    copied.until_says("the primary is node", "a copy is on node")
    explained = requests.get(f"{copied.url}/v1/explain/users%2F42", timeout=WAIT_S).json()
    marked = copied.run(
        "return ['.primary', '.copy'].map((role) => document.querySelector(`.nodes ${role} text`).textContent)"
    )
    assert marked == [explained["primary"], *explained["copies"]]
    copied.keep("ring-copies")


def test_a_node_is_killed_its_shard_taken_over_and_brought_home_before_ones_eyes(copied: Page, demo: Cluster) -> None:
    copied.open("failover")
    pid = demo.pid("shard-s1")
    copied.click("Kill s1")
    copied.until(lambda: "dead" in copied.text_of(".strip"))
    copied.until(lambda: "promoted" in copied.text_of(".story") and "first write" in copied.text_of(".story"))
    assert "lease over" in copied.text_of(".story")
    copied.until_says("(away from home)")
    copied.driver.refresh()  # a reload in the middle
    copied.until(lambda: "promoted" in copied.text_of(".story"))
    copied.keep("failover-taken-over")
    copied.until(lambda: copied.all(".failover[data-state=done]"))
    copied.keep("failover-done")
    said = copied.text_of(".story")
    kinds = ["killed", "lease over", "promoted", "first write", "back", "in sync", "home again"]
    assert sorted(kinds, key=said.index) == kinds
    assert "nothing was lost" in copied.text
    assert demo.pid("shard-s1") != pid
    assert {shard["id"]: shard["primary"] for shard in shards(demo)}["s1"] == "s1"
    _check_document(demo)


def _check_document(demo: Cluster) -> None:
    """The event has the shape that the OpenAPI document says, and what it tells is so."""
    components = requests.get(f"{demo.url}/openapi.json", timeout=WAIT_S).json()["components"]
    with listening(demo.url) as events:
        snapshot = next(events)[2]
    jsonschema.validate(snapshot, {"$ref": "#/components/schemas/Snapshot", "components": components})
    told = snapshot["failover"]
    assert (told["node"], told["led"], told["state"]) == ("s1", ["s1"], "done")
    at_ms = {step["kind"]: step["at_ms"] for step in told["steps"] if step["shard"] in (None, "s1")}
    assert at_ms["promoted"] - told["killed_ms"] >= told["failover_after_s"] * 500
    assert at_ms["back"] - told["killed_ms"] >= told["away_s"] * 1000
    assert max(took for _, took, _ in told["writes"]) > 1000


def test_a_copy_is_promoted_after_its_plan_was_shown(copied: Page, demo: Cluster) -> None:
    copied.open("ring")
    (shard,) = [each for each in shards(demo) if each["id"] == "s2"]
    (copy,) = shard["copies"]
    wanted = f"s2 {copy['node']}"
    copied.until(lambda: copied.all(f"option[value='{wanted}']"))
    copied.run(
        "const select = document.querySelector('select'); select.value = arguments[0];"
        "select.dispatchEvent(new Event('change', {bubbles: true}));",
        wanted,
    )
    copied.click("Promote…")
    copied.until(lambda: f"kvstore shard promote s2 --to {copy['node']}" in copied.text_of("dialog"))
    assert f"node {shard['primary']}" in copied.text_of("dialog")
    copied.click(f"Promote {copy['node']}", "dialog")
    copied.until(lambda: {each["id"]: each["primary"] for each in shards(demo)}["s2"] == copy["node"])
    copied.until_says(f"Promote a copy of s2 → {copy['node']}, done")
