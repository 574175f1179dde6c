"""A headless Chromium to look at pages with."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

try:
    from selenium import webdriver
except ImportError:
    webdriver = None


@pytest.fixture(scope="session")
def browser():
    """Opens pages: browser(path, width, dark) gives the driver, and what went wrong or over the network."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None or webdriver is None:
        complaint = "no chromium, chromedriver or selenium here (Debian: apt-get install chromium chromium-driver)"
        pytest.fail(complaint) if os.environ.get("CI") == "true" else pytest.skip(complaint)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))

    def view(path, width=1200, dark=False):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        for kind in ("browser", "performance"):
            chromium.get_log(kind)  # of the page before
        chromium.get(path.as_uri())
        return SimpleNamespace(driver=chromium, complaints=lambda: complaints(chromium))

    yield view
    chromium.quit()


@pytest.fixture(scope="module", autouse=True)
def quick(quick_evaluation):
    """Here everything is evaluated so, but in files whose own ``quick_evaluation`` does nothing."""


def complaints(chromium) -> list[str]:
    """Console messages, and every request that is not the page's own file or inside it."""
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [entry["message"] for entry in chromium.get_log("browser")] + [
        url for url in asked if not url.startswith(("file:", "data:"))
    ]
