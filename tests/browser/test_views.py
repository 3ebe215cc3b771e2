"""Each view on a live cluster: what it shows, on small screens, in the dark, by keyboard, without scripts."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.page import VIEWS, Page
from tests.cluster.clusters import Cluster

SAYS = {
    "overview": ("All is well", "Shards", "s1", "s4", "Calls", "Latency", "Errors", "epoch"),
    "ring": ("The way of a key", "Change the cluster", "What moves"),
    "locks": ("Held now", "Two clients, one lock", "Alice", "Bob"),
    "transactions": ("At work and in doubt", "A transfer, step by step", "Transfer 10"),
    "failover": ("Who answers, and who could", "one copy of every key", "Kill a node"),
    "keys": ("Browse", "prefix", "Choose a key"),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_shows_the_live_cluster_and_how_to_do_the_same_in_a_terminal(page: Page, view: str) -> None:
    page.open(view)
    page.until_says(*SAYS[view])
    terminal = page.text_of(".terminal")
    assert f"curl {page.url}" in terminal or f"curl '{page.url}" in terminal or f"curl -X POST {page.url}" in terminal
    assert "kvstore " in terminal
    linked = page.run("return [...document.querySelectorAll('.terminal a')].map(a => a.href)")
    assert any(link.startswith(f"{page.url}/page/docs/") for link in linked)
    assert page.run("return document.querySelectorAll('h1').length") == 1
    page.keep(f"{view}-light")


def _narrow(page: Page) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_fits_a_narrow_screen(page: Page, view: str) -> None:
    _narrow(page)
    page.open(view)
    page.until_says(SAYS[view][0] if view != "overview" else "Shards")
    assert page.run("return document.documentElement.scrollWidth") <= 360
    cut = page.run(
        "return [...document.querySelectorAll('nav a')].filter((a) => a.getBoundingClientRect().right > innerWidth)"
        ".map((a) => a.textContent)"
    )
    assert not cut  # the name of every view is seen, that of this one among them
    letters = page.run(
        "return [...document.querySelectorAll('svg text')]"
        ".map((text) => [text.textContent, text.getBoundingClientRect().height])"
    )
    assert not [text for text, height in letters if text and height < 9]
    page.keep(f"{view}-narrow")


def _luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


# Every text that is seen, with its colour and that of the surface behind it.
_TEXTS = """
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (colour !== 'rgba(0, 0, 0, 0)' && colour !== 'transparent') return colour;
  }
  return getComputedStyle(document.body).backgroundColor;
};
const found = [];
for (const element of document.querySelectorAll('body *')) {
  const isText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!isText || !element.checkVisibility()) continue;
  if (element.closest('svg, noscript, script, .skip, :disabled')) continue;
  found.push([element.textContent.trim().slice(0, 40), getComputedStyle(element).color, behind(element)]);
}
return found;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_text_has_enough_contrast(page: Page, view: str, theme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.open(view)
    page.until_says(*SAYS[view][:1])
    texts: list[Any] = page.run(_TEXTS)
    assert len(texts) > 10
    weak = [(text, round(_contrast(*colours), 2)) for text, *colours in texts if _contrast(*colours) < 4.5]
    assert not weak
    body = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (_luminance(body) < 0.1) is (theme == "dark")
    page.keep(f"{view}-{theme}")


def test_a_chosen_theme_stays_after_a_reload(page: Page) -> None:
    page.open("overview")
    for theme in ("light", "dark"):
        page.click("Theme")
        assert page.run("return document.documentElement.dataset.theme") == theme
    page.driver.refresh()
    assert page.run("return document.documentElement.dataset.theme") == "dark"


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    page.open("overview")
    page.press(Keys.TAB)
    assert page.focus == "Skip to the content"
    page.press(Keys.ENTER)
    assert page.run("return document.activeElement.id") == "main"
    assert page.run("return location.hash") == "#overview"
    page.run("document.querySelector('.brand').focus()")
    for title in ("Overview", "Ring"):
        page.press(Keys.TAB)
        assert page.focus == title
    page.press(Keys.ENTER)
    page.until_says("Change the cluster")
    page.run("document.getElementById('walk-key').focus()")
    page.press("users/42")
    page.until_says("partition", "owner", "hash")
    page.press(Keys.TAB, Keys.TAB)  # the field of the new shard, then its button
    assert page.focus.startswith("Add a shard")
    page.press(Keys.ENTER)
    page.until(lambda: "would move" in page.text_of("dialog"))
    page.press(Keys.TAB)
    page.press(Keys.ESCAPE)
    page.until(lambda: not page.all("dialog"))
    page.until(lambda: page.focus.startswith("Add a shard"), "the focus, back where it was")


def test_names_and_roles_are_there_for_screen_readers(page: Page) -> None:
    for view in VIEWS:
        page.open(view)
        page.until_says(*SAYS[view][:1])
        nameless = page.run(
            "return [...document.querySelectorAll("
            "'input, select, textarea, button, a, svg[role], meter, progress, dialog')]"
            ".map((element) => [element.outerHTML.slice(0, 120), element])"
        )
        assert not [text for text, element in nameless if not element.accessible_name]
        assert page.run("return document.querySelectorAll('main [aria-live], main [role=status]').length") >= 1
        assert page.run("return document.documentElement.lang") == "en"
        assert page.run("return document.querySelectorAll('nav [aria-current=page]').length") == 1


def test_without_scripts_the_page_says_what_it_is(page: Page) -> None:
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.driver.get(f"{page.url}/")
    text = page.driver.find_element("tag name", "body").text
    assert "This is the page of a kvstore cluster" in text
    assert "curl -N http://127.0.0.1:8080/v1/events" in text
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_the_tour_leads_through_all_views_in_ten_steps(page: Page) -> None:
    page.open("overview")
    page.click("Tour")
    seen = []
    for number in range(1, 11):
        page.until(lambda number=number: f"step {number} of 10" in page.text_of(".tour"))
        seen.append(page.run("return location.hash.slice(1).split('/')[0]"))
        assert "See it:" in page.text_of(".tour")
        if number < 10:
            page.click("Next")
    assert seen == sorted(seen, key=["overview", "ring", "keys", "locks", "transactions", "failover"].index)
    assert set(seen) == set(VIEWS)
    page.click("End")
    page.until(lambda: not page.all(".tour"))


def test_the_tour_covers_nothing_that_has_the_focus_and_not_the_end_of_the_page(page: Page) -> None:
    _narrow(page)
    page.open("ring/tour-4")
    page.until_says("Add a shard…")
    page.keep("tour-narrow")
    for number in range(len(page.all("main button:enabled, main input, main a"))):
        bottom, top = page.run(
            "const one = document.querySelectorAll('main button:enabled, main input, main a')[arguments[0]];"
            "one.focus();"
            "return [one.getBoundingClientRect().bottom, document.querySelector('.tour').getBoundingClientRect().top]",
            number,
        )
        assert bottom <= top, number
    page.run("scrollTo(0, document.documentElement.scrollHeight)")
    bottom, top = page.run(
        "return ['main', '.tour'].map((name) => document.querySelector(name)).map((one, i) =>"
        " i ? one.getBoundingClientRect().top : one.lastElementChild.getBoundingClientRect().bottom)"
    )
    assert bottom <= top


def test_a_time_in_which_no_page_was_open_is_a_gap_in_every_curve(page: Page) -> None:
    page.open("overview")
    columns = page.driver.execute_async_script(
        "const done = arguments[0]; const at = (at_ms) => ({at_ms, one: 1, other: 2});"
        "import('/page/chart.js').then(({columns}) => done(columns([at(1000), at(2000), at(9000)],"
        " [{value: (sample) => sample.one}, {value: (sample) => sample.one + sample.other}]).map(String)));"
    )
    assert columns == ["1,2,3,9", "1,1,,1", "3,3,,3"]


def test_a_reload_in_the_middle_shows_the_same_view_and_goes_on(page: Page) -> None:
    page.open("keys")
    page.open("overview")
    page.until(lambda: page.all(".chart .u-wrap"))
    page.until(lambda: page.run("return document.querySelectorAll('.chart canvas').length") == 3)
    page.driver.refresh()
    page.until(lambda: "live" in page.text_of(".connection"))
    page.until_says("All is well", "s4")
    assert page.run("return location.hash") == "#overview"


def test_a_router_that_is_started_again_is_listened_to_again(page: Page, demo: Cluster) -> None:
    page.lost_connection = True
    page.refusals = {503}
    page.open("overview")
    page.until_says("All is well")
    os.kill(demo.pid("router-0"), signal.SIGKILL)
    page.until(lambda: "connection lost" in page.text_of(".connection"))
    page.until(lambda: "live" in page.text_of(".connection").split())
    page.until_says("All is well")


def test_a_shard_that_dies_is_seen_and_seen_again_when_it_is_back(page: Page, demo: Cluster) -> None:
    page.open("overview")
    page.until_says("All is well")
    os.kill(demo.pid("shard-s2"), signal.SIGSTOP)  # `kvstore up` starts a dead one again too soon to be looked at
    try:
        page.until_says("Shard s2 does not answer", "down")
        page.keep("overview-shard-down")
    finally:
        os.kill(demo.pid("shard-s2"), signal.SIGKILL)
    page.until_says("All is well")
    assert page.all("tr.down") == []
