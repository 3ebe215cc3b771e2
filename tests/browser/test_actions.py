"""What the page does: a shard added, a lock handed on, a transaction brought to its end, conflicts, hostile texts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import requests

from tests.browser.page import Page
from tests.cluster.clusters import Cluster

ALICE, BOB = "article[aria-labelledby=client-Alice]", "article[aria-labelledby=client-Bob]"
HOSTILE = [
    "<script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "a\u202etxt.exe\u0007\u001b[31m\u0000end",
    "${7*7} {{constructor}} '); window.hacked=1; ('",
    ".",
    "..",
    "a/../b?c=%2F#d",
    "\u200b\u2066\ufeffhidden",
    "ü" * 512,
]


@pytest.fixture
def hostile(demo: Cluster) -> Iterator[list[str]]:
    ops = [{"op": "put", "key": key, "value": f"<b>{key}</b>"} for key in HOSTILE]
    requests.post(f"{demo.url}/v1/batch", json={"ops": ops}, timeout=30).raise_for_status()
    yield HOSTILE
    requests.post(
        f"{demo.url}/v1/batch", json={"ops": [{"op": "delete", "key": key} for key in HOSTILE]}, timeout=30
    ).raise_for_status()


def put(demo: Cluster, key: str, value: bytes, **headers: str) -> Any:
    answer = requests.put(f"{demo.url}/v1/kv/{quote(key, safe='')}", data=value, headers=headers, timeout=30)
    answer.raise_for_status()
    return answer


def test_a_shard_is_added_a_lock_handed_on_and_a_stuck_transaction_resolved_in_few_clicks(
    page: Page, demo: Cluster
) -> None:
    ops = [{"op": "put", "key": f"story/{n}", "value": "x" * 100} for n in range(3000)]
    requests.post(f"{demo.url}/v1/batch", json={"ops": ops}, timeout=30).raise_for_status()
    page.refusals = {412}
    page.open("overview")
    page.until_says("All is well: 4 shards")

    page.follow("Ring")
    _add_a_shard(page)
    page.follow("Locks")
    _hand_on_a_lock(page)
    page.follow("Transactions")
    _kill_two_coordinators(page)
    assert page.clicks <= 40

    page.follow("Ring")
    page.click("Remove s5")
    page.until(lambda: "would move" in page.text_of("dialog"))
    page.click("Remove s5", "dialog")
    page.until(lambda: "s5" not in page.text_of(".members"))
    page.until(lambda: requests.get(f"{demo.url}/v1/moves", timeout=30).json()["ending"] == [])
    deletes = [{"op": "delete", "key": op["key"]} for op in ops]
    requests.post(f"{demo.url}/v1/batch", json={"ops": deletes}, timeout=30).raise_for_status()


def _add_a_shard(page: Page) -> None:
    page.click("Add a shard")
    page.until(lambda: "820 partitions" in page.text_of("dialog"))
    assert "kvstore shard add s5" in page.text_of("dialog")
    page.keep("ring-plan")
    page.click("Add s5")
    page.until_says("The last change: 820 partitions", "longest write pause", "Add shard s5, done: All 820 partitions")
    page.until(lambda: "20.0 %" in page.text_of(".legend") and "s5" in page.text_of(".legend"))
    page.keep("ring-after-adding")


def _hand_on_a_lock(page: Page) -> None:
    page.click("Take", ALICE)
    page.until(lambda: "holds it, token" in page.text_of(ALICE))
    page.click("Take", BOB)
    page.until(lambda: "Bob" in page.text_of(".waiters"))
    page.keep("locks-waiting")
    page.click("Release", ALICE)
    page.until(lambda: "holds it, token" in page.text_of(BOB))
    page.click("Release", BOB)


def _kill_two_coordinators(page: Page) -> None:
    page.click("Kill the coordinator before")
    page.until(lambda: page.all(".played[data-state=aborted]"))
    page.until_says("Nothing had been decided", "still 200")
    page.click("Kill it after")
    page.until(lambda: page.all(".played[data-state=committed]"))
    page.until_says("The decision was durable", "still 200")
    page.keep("transactions-recovered")


def test_the_stale_holder_of_a_lock_is_refused_before_ones_eyes(page: Page) -> None:
    page.refusals = {412, 423}
    page.open("locks")
    alice, bob = ALICE, BOB
    page.click("Take", alice)
    page.until(lambda: "holds it, token" in page.text_of(alice))
    page.click("Write without", bob)
    page.until(lambda: "423 locked" in page.text_of(bob))
    page.click("Take", bob)  # Alice sleeps
    page.until(lambda: "holds it, token" in page.text_of(bob))
    page.until(lambda: "still thinks" in page.text_of(alice))
    page.click("Write with token", alice)
    page.until(lambda: "412 lock-lost" in page.text_of(alice))
    page.click("Write with token", bob)
    page.until(lambda: "the store took it" in page.text_of(bob))
    page.keep("locks-stale-holder")
    page.click("Release", bob)


def test_a_transfer_is_drawn_message_by_message(page: Page) -> None:
    page.open("transactions")
    page.click("Transfer 10")
    page.until(lambda: page.all(".played[data-state=committed]"))
    drawn = page.run("return [...document.querySelectorAll('.message text')].map((text) => text.textContent)")
    assert [word.split(":")[0].split(" at ")[0] for word in drawn[:4]] == ["prepare", "vote", "decide", "committed"]
    assert "finish" in drawn
    page.click("Kill", "body")
    page.until(lambda: page.all(".mark.killed"))
    page.until(lambda: page.all(".played[data-state=aborted]"))


def test_a_key_is_made_changed_and_deleted_and_a_conflict_is_shown(page: Page, demo: Cluster) -> None:
    page.refusals = {404, 412}
    page.open("keys")
    page.type("form.row input", "browser/greeting")
    page.click("Open")
    page.until_says("There is no such key yet")
    page.type("textarea", '{"hello": "world"}')
    page.click("Put only if absent")
    page.until_says("expires", "never", "Put only if still version")
    page.click("json")
    page.until(lambda: '"hello": "world"' in page.text_of(".value"))
    page.click("hex")
    page.until(lambda: "7b 22 68" in page.text_of(".value"))
    put(demo, "browser/greeting", b"another client")
    page.type("textarea", "mine")
    page.click("Put only if still")
    page.until_says("412 precondition-failed", "Conflict.")
    page.keep("keys-conflict")
    page.click("Look again")
    page.until(lambda: "another client" in page.text_of(".value"))
    page.type("textarea", "mine, again")
    page.click("Put only if still")
    page.until(lambda: "mine, again" in page.text_of(".value"))
    page.click("Delete…")
    page.click("Delete it")
    page.until_says("There is no such key yet")
    assert requests.get(f"{demo.url}/v1/kv/browser%2Fgreeting", timeout=30).status_code == 404


def test_bytes_that_are_no_text_are_shown_in_hexadecimal(page: Page, demo: Cluster) -> None:
    put(demo, "browser/bytes", bytes(range(128, 160)))
    page.open("keys")
    page.type("form.row input", "browser/bytes")
    page.click("Open")
    page.until(lambda: "80 81 82" in page.text_of(".value"))


def test_a_value_of_a_mebibyte_is_shown_without_delay(page: Page, demo: Cluster) -> None:
    put(demo, "browser/large", b"<script>window.hacked=1</script>" + b"x" * (1024 * 1024 - 32))
    page.open("keys")
    page.type("form.row input", "browser/large")
    page.click("Open")
    page.until_says("1.0 MiB")
    assert page.text_of(".value").startswith("<script>window.hacked=1</script>xxx")
    assert page.run("return document.querySelector('.value').textContent.length") == 65536
    page.click("Show all of 1.0 MiB")
    page.until(lambda: page.run("return document.querySelector('.value').textContent.length") == 1024 * 1024)
    assert page.run("return window.hacked") is None


def test_hostile_keys_and_values_are_text(page: Page, hostile: list[str]) -> None:
    page.open("keys")
    page.until(lambda: len(page.all(".entry")) >= len(hostile))
    shown = page.run("return [...document.querySelectorAll('.entry .text')].map((text) => text.textContent)")
    assert "<script>window.hacked=1</script>" in shown
    assert "a\\u{202e}txt.exe\\u{7}\\u{1b}[31m\\u{0}end" in shown
    assert "\\u{200b}\\u{2066}\\u{feff}hidden" in shown
    for number in range(len(page.all(".entry"))):
        name = page.all(".entry .text")[number].text
        page.all(".entry")[number].click()
        page.until(lambda name=name: name[:40] in page.text_of(".detail h2"))
        page.until(lambda: page.text_of(".detail .value"))
    assert page.run("return window.hacked") is None
    assert page.run("return document.querySelectorAll('main script, main img').length") == 0
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")


def test_hostile_owners_and_locks_are_text_and_a_hostile_key_has_a_way(page: Page, demo: Cluster) -> None:
    tokens = {}
    for number, name in enumerate(HOSTILE[:4]):
        url = f"{demo.url}/v1/locks/{quote(name, safe='')}"
        answer = requests.post(url, json={"ttl": 60, "owner": HOSTILE[number][:60]}, timeout=30)
        tokens[url] = str(answer.json()["token"])
    page.open("locks")
    page.until(lambda: len(page.all("tbody tr")) >= 4)
    assert "<script>window.hacked=1</script>" in page.text_of("tbody")
    page.open("ring")
    page.run("document.getElementById('walk-key').focus()")
    for name in HOSTILE[:4]:
        page.type("#walk-key", name)
        page.until(lambda: "partition" in page.text_of(".way"))
        page.until(lambda: "locked by" in page.text_of(".way"))
    assert page.run("return window.hacked") is None
    for url, token in tokens.items():
        requests.delete(url, headers={"Lock-Token": token}, timeout=30).raise_for_status()


def test_a_plan_that_cannot_be_is_said_and_nothing_is_done(page: Page, demo: Cluster) -> None:
    page.refusals = {400, 409}
    page.open("ring")
    page.type("input[maxlength]", "S 9")
    page.click("Add a shard")
    page.until(lambda: "400 bad-body" in page.text_of("dialog"))
    page.click("Close")
    page.until(lambda: not page.all("dialog"))
    page.type("input[maxlength]", "s1")
    page.click("Add a shard")
    page.until(lambda: "409 change-refused" in page.text_of("dialog"))
    assert not [button for button in page.all("dialog button") if button.text.startswith("Add")]
    page.click("Close")
    assert len(requests.get(f"{demo.url}/v1/cluster", timeout=30).json()["shards"]) == 4


def test_what_has_not_moved_yet_is_cancelled_after_a_question(page: Page, demo: Cluster) -> None:
    page.refusals = {503}
    page.open("ring")
    os.kill(demo.pid("shard-s3"), signal.SIGSTOP)  # what has to come from it waits
    try:
        page.type("input[aria-label='Weight of s1']", "2")
        page.click("weigh")
        page.click("Set weight 2")
        page.until_says("Weight of s1 → 2")
        page.click("Cancel moves")
        page.until(lambda: "What has moved stays where it is" in page.text_of("dialog"))
        assert "kvstore shard cancel" in page.text_of("dialog")
        page.click("Cancel the moves", "dialog")
        page.until(lambda: not _running(demo))
    finally:
        os.kill(demo.pid("shard-s3"), signal.SIGCONT)
    page.until_says("Weight of s1 → 2, cancelled")
    requests.patch(f"{demo.url}/v1/shards/s1", json={"weight": 1}, timeout=30).raise_for_status()
    page.until(lambda: not _running(demo) and "s1 1,024" in " ".join(page.text_of(".members").split()))


def _running(demo: Cluster) -> list[Any]:
    changes = requests.get(f"{demo.url}/v1/changes", timeout=30).json()["items"]
    return [change for change in changes if change["state"] == "running"]


def test_a_weight_is_planned_set_and_set_back(page: Page, demo: Cluster) -> None:
    def weights() -> list[int]:
        return [shard["weight"] for shard in requests.get(f"{demo.url}/v1/cluster", timeout=30).json()["shards"]]

    page.open("ring")
    for weight, expected, owned in (("2", [2, 1, 1, 1], "s1 1,63"), ("1", [1, 1, 1, 1], "s1 1,024")):
        page.type("input[aria-label='Weight of s1']", weight)
        page.click("weigh")
        page.until(lambda: "would move" in page.text_of("dialog"))
        page.click(f"Set weight {weight}")
        page.until(lambda expected=expected: weights() == expected)
        page.until(lambda owned=owned: owned in " ".join(page.text_of(".members").split()))
