"""A headless Chromium that reads a report as a person would."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 60.0
"""For what a busy machine does late."""


def missing_browser() -> str:
    """Why no browser can be started; empty where one can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "needs selenium (the extra `test`)"
    found = _chromium() and shutil.which("chromedriver")
    return "" if found else "needs Chromium and chromedriver on the path"


def _chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One tab.

    Attributes:
        driver: Selenium's.
    """

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = _chromium()
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)

    def close(self) -> None:
        self.driver.quit()

    def open(self, url: str, view: str = "") -> None:
        """Open a page, with what is chosen in it, and wait until it is drawn."""
        self.driver.get("about:blank")  # else a change of the address alone loads nothing
        self.driver.get(f"{url}#{view}")
        self.wait(lambda: self.run("return document.body.dataset.ready === '1'"))

    def size(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """A screen; narrow ones are a telephone's."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, holds: Callable[[], Any]) -> Any:
        """Wait until something holds; gives what it came to."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := holds()):
            if time.monotonic() > deadline:
                raise TimeoutError("the page did not come to what was waited for")
            time.sleep(0.02)
        return found

    def text(self, selector: str) -> str:
        """The text of the first element, as it is in the document."""
        found = self.run(
            "const node = document.querySelector(arguments[0]); return node && node.textContent",
            selector,
        )
        return found or ""

    def texts(self, selector: str) -> list[str]:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)",
            selector,
        )

    def count(self, selector: str) -> int:
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def click(self, selector: str) -> None:
        """Click as a mouse does."""
        self.driver.find_element("css selector", selector).click()

    def click_text(self, words: str) -> None:
        """Click the button that says so."""
        self.driver.find_element("xpath", f"//button[normalize-space()={words!r}]").click()

    def press(self, keys: str, selector: str = "") -> None:
        """Press keys, in an element or where the focus is."""
        if selector:
            self.driver.find_element("css selector", selector).send_keys(keys)
        else:
            self.driver.switch_to.active_element.send_keys(keys)

    def type(self, selector: str, text: str) -> None:
        """Put text into a field."""
        field = self.driver.find_element("css selector", selector)
        field.clear()
        field.send_keys(text)

    def choose(self, name: str, value: str) -> None:
        """Choose from one of the view's lists."""
        self.run(
            "const box = document.querySelector("
            "`section:not([hidden]) [data-choose='${arguments[0]}']`);"
            "box.value = arguments[1]; box.dispatchEvent(new Event('change'))",
            name,
            value,
        )

    def complaints(self) -> list[str]:
        """What the console holds since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]
