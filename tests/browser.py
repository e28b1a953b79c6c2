"""A real browser without a window, by the WebDriver protocol, for tests of pages.

It needs chromedriver and Chromium on the path.
"""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARROW_RIGHT, ARROW_LEFT, TAB, ENTER = "\ue014", "\ue012", "\ue004", "\ue007"


def available():
    return bool(shutil.which("chromedriver") and any(map(shutil.which, BROWSERS)))


class Page:
    """One page, open in the browser."""

    def __init__(self, address):
        self._address = address

    def _ask(self, method, path, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(
            f"{self._address}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script, *arguments):
        return self._ask("POST", "/execute/sync", script=script, args=list(arguments))

    def element(self, css):
        (found,) = self._ask("POST", "/element", using="css selector", value=css).values()
        return found

    def click(self, css):
        self._ask("POST", f"/element/{self.element(css)}/click")

    def press(self, *keys):
        """Press keys one after the other; the focused element receives them."""
        actions = [
            action
            for key in keys
            for action in ({"type": "keyDown", "value": key}, {"type": "keyUp", "value": key})
        ]
        self._ask(
            "POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}]
        )

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        command = "Emulation.setDeviceMetricsOverride"
        self._ask("POST", "/goog/cdp/execute", cmd=command, params=size)

    def logs(self):
        return self._ask("POST", "/se/log", type="browser")

    def picture(self):
        return base64.b64decode(self._ask("GET", "/screenshot"))


@contextmanager
def opened(address, width=1200, height=900):
    """Open the page at ``address``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    session = None
    try:
        whole = Page(f"http://127.0.0.1:{port}")
        for _ in range(100):
            try:
                whole._ask("GET", "/status")
                break
            except OSError:
                time.sleep(0.1)
        options = {
            "args": [
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--window-size={width},{height}",
            ],
            "binary": next(filter(None, map(shutil.which, BROWSERS))),
        }
        asked = {
            "browserName": "chrome",
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        found = whole._ask("POST", "/session", capabilities={"alwaysMatch": asked})
        session = Page(f"http://127.0.0.1:{port}/session/{found['sessionId']}")
        session._ask("POST", "/url", url=address)
        yield session
    finally:
        if session is not None:
            session._ask("DELETE", "")
        driver.terminate()
        driver.wait(10)
