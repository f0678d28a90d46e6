"""A headless Chromium for tests: where it is found, and what happens without one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> Iterator[Any]:
    """A running browser of playwright; the body of a fixture.

    Without Chromium or playwright tests are skipped, and fail where REQUIRE_BROWSER=1.
    """
    path = next(filter(None, map(shutil.which, NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path, missing = None, "the package playwright is not installed, so that Chromium cannot be driven"
    else:
        missing = "no Chromium found; install it, for example with apt-get install chromium"
    if path is None:
        if os.environ.get("REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
