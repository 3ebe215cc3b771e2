"""The page in a browser, as a person uses it: looks, clicks, types, and counts the clicks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

VIEWS = ("overview", "ring", "locks", "transactions", "failover", "keys")
WAIT_S = 30.0
_POLL_S = 0.05


class Page:
    """`refusals`: statuses of calls that the test wants to be refused; a browser reports those as errors, too."""

    def __init__(self, driver: webdriver.Chrome, url: str, folder: Path) -> None:
        self.driver = driver
        self.url = url
        self.clicks = 0
        self.refusals: set[int] = set()
        self.lost_connection = False
        self._folder = folder
        self._errors: list[str] = []
        driver.get("about:blank")
        for kind in ("browser", "performance"):
            driver.get_log(kind)

    # --- looking ------------------------------------------------------------------------------------------------------

    def open(self, view: str) -> Page:
        """Load the page again at that view, and wait until it is live."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.url}/#{view}")
        self.until(lambda: "live" in self.text_of(".connection"))
        return self

    def text_of(self, selector: str) -> str:
        """The text of all that match."""
        return "\n".join(element.text for element in self.all(selector))

    @property
    def text(self) -> str:
        return self.text_of("main")

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, is_it: Callable[[], Any], what: str = "") -> Any:
        """What `is_it` returns as soon as that is true."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            try:
                if found := is_it():
                    return found
            except StaleElementReferenceException:
                pass  # it was drawn again while we looked
            time.sleep(_POLL_S)
        raise AssertionError(f"{what or 'it'} did not come; the page says:\n{self.text}")

    def until_says(self, *words: str) -> None:
        """All of these are on the page."""
        self.until(lambda: all(word in self.text for word in words), f"{words}")

    def keep(self, name: str) -> None:
        """A picture of the whole page."""
        size = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        metrics = {"width": size[0], "height": min(size[1], 4000), "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.save_screenshot(str(self._folder / f"{name}.png"))
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    # --- doing --------------------------------------------------------------------------------------------------------

    def button(self, label: str, within: str = "body") -> WebElement:
        """The enabled, visible button whose label begins like that."""

        def look() -> WebElement | None:
            for element in self.driver.find_elements(By.CSS_SELECTOR, f"{within} button"):
                name = element.accessible_name or element.text
                if (element.text.startswith(label) or name.startswith(label)) and element.is_enabled():
                    return element
            return None

        found: WebElement = self.until(look, f"a button {label!r}")
        return found

    def click(self, label: str, within: str = "body") -> None:
        def press() -> bool:
            try:
                self.button(label, within).click()
            except WebDriverException as error:
                if "click intercepted" not in str(error):
                    raise
                return False
            return True

        self.until(press, f"a click on {label!r}")
        self.clicks += 1

    def follow(self, title: str) -> None:
        """A link of the navigation."""
        (link,) = [element for element in self.all("nav a") if element.text == title]
        link.click()
        self.clicks += 1

    def type(self, selector: str, text: str) -> None:
        """Into a field, in place of what it holds."""
        (field,) = self.all(selector)
        self.run(
            "const [field, text] = arguments; const kind = field.tagName === 'TEXTAREA' ? HTMLTextAreaElement : "
            "HTMLInputElement; Object.getOwnPropertyDescriptor(kind.prototype, 'value').set.call(field, text); "
            "field.dispatchEvent(new Event('input', {bubbles: true}));",
            field,
            text,
        )

    def press(self, *keys: str) -> None:
        """On the keyboard, wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    @property
    def focus(self) -> str:
        """The name of what has the focus."""
        return str(self.driver.switch_to.active_element.accessible_name)

    # --- at the end ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """No error in the console, nothing asked of another host, no view that broke."""
        hosts = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                hosts.add(urlsplit(message["params"]["request"]["url"]).netloc)
        assert hosts - {""} <= {urlsplit(self.url).netloc}
        for entry in self.driver.get_log("browser"):
            is_refusal = entry["source"] == "network" and any(
                f"status of {n} " in entry["message"] for n in self.refusals
            )
            is_lost = self.lost_connection and "net::ERR_" in entry["message"]
            if entry["level"] == "SEVERE" and not is_refusal and not is_lost:
                self._errors.append(entry["message"])
        assert not self._errors
        assert "an error of its own" not in self.text_of("body")

    def forget(self) -> None:
        """Leave nothing to the next test: size, theme, chosen colours, key presses."""
        self.run("try { localStorage.clear() } catch {}")
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
