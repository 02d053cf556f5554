"""Headless Chromium through chromedriver, with nothing but WebDriver's HTTP interface.

https://www.w3.org/TR/webdriver2/ says what the addresses and their answers are.
"""

import json
import os
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

DRIVER = "chromedriver"
REQUIRED = "DIFFSYNTH_REQUIRE_BROWSER"
"""An environment variable: when it is set, a missing browser is a failure."""
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver hands out elements."""
SECONDS = 60
OPTIONS = (
    *("--headless", "--hide-scrollbars", "--no-first-run", "--disable-dev-shm-usage"),
    *("--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=<-loopback>"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
"""Every request over a network, of the page or of the browser itself, ends at a closed port."""


@dataclass(frozen=True)
class Browser:
    """One window of a browser."""

    address: str

    def open(self, page: str) -> None:
        """Go to an address and wait until it is loaded."""
        self._ask("POST", "url", {"url": "about:blank"})
        self._ask("POST", "url", {"url": page})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns in the page; a promise is waited for."""
        return self._ask("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Click as a user does: an element that is hidden or covered cannot be."""
        self._ask("POST", f"element/{self._find(selector)}/click", {})

    def wait(self, selector: str) -> None:
        """Wait until there is such an element: a change of the address behind `#` comes some time after the click."""
        self._find(selector)

    def type(self, selector: str, text: str) -> None:
        self._ask("POST", f"element/{self._find(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        """What is seen of an element's text."""
        return self._ask("GET", f"element/{self._find(selector)}/text")

    def resize(self, width: int, height: int) -> None:
        self._ask("POST", "window/rect", {"width": width, "height": height})

    def image(self) -> bytes:
        """What is seen of the window, as a PNG."""
        return b64decode(self._ask("GET", "screenshot"))

    def log(self) -> list[str]:
        """Messages of the console since it was last asked for, errors of the policy among them."""
        return [entry["message"] for entry in self._ask("POST", "se/log", {"type": "browser"})]

    def _find(self, selector: str) -> str:
        return self._ask("POST", "element", {"using": "css selector", "value": selector})[ELEMENT]

    def _ask(self, method: str, what: str, body: dict[str, Any] | None = None) -> Any:
        return _ask(method, f"{self.address}/{what}", body)


def _ask(method: str, address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(address, data, {"Content-Type": "application/json"}, method=method)
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
            return json.load(answer)["value"]
    except HTTPError as error:
        raise RuntimeError(json.load(error)["value"]["message"]) from error


def missing() -> bool:
    """Whether there is no browser to test with."""
    return shutil.which(DRIVER) is None


@contextmanager
def browser(options: Sequence[str] = (), width: int = 1440, height: int = 1200) -> Iterator[Browser]:
    """A browser for the length of the block."""
    arguments = [*OPTIONS, f"--window-size={width},{height}", *options]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    chrome = {"args": arguments}
    wanted = {
        "browserName": "chrome",
        "timeouts": {"implicit": 1000 * SECONDS // 2},  # how long an element is waited for, in milliseconds
        "goog:chromeOptions": chrome,
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            root = f"http://127.0.0.1:{_port(driver)}/session"
            session = _ask("POST", root, {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            try:
                yield Browser(f"{root}/{session}")
            finally:
                _ask("DELETE", f"{root}/{session}")
        finally:
            driver.terminate()


def _port(driver: "subprocess.Popen[str]") -> int:
    """The port that the driver says it listens at."""
    assert driver.stdout
    for line in driver.stdout:
        if "started successfully on port" in line:
            return int(line.rstrip(".\n").rpartition(" ")[2])
    raise RuntimeError(f"{DRIVER} did not start")
