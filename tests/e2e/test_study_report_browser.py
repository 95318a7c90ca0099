"""The pages in a real browser: whole, quiet, needing no network, and never wider than the window."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from glann.reports.run import write_report as run_report
from glann.tuning.report.study import write_report
from study_folder import fill_study, make_study

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER),
    reason="needs chromium and chromedriver: `make system-test-packages` installs them on Debian, as root",
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
SECTIONS = ("samples", "again", "leaderboard", "curves", "values", "parallel", "importance", "configuration")
SCHEMES = {"light": "rgb(252, 252, 251)", "dark": "rgb(20, 23, 27)"}  # of the paper
WIDTHS = (390, 1400)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A study that went its way, one that has not begun, and a run of the first: the same frame."""
    folder = tmp_path_factory.mktemp("studies")
    full, empty = make_study(folder, name="long-" + "x" * 70), make_study(folder, name="y" * 80)
    fill_study(full)
    return {"full": write_report(full), "empty": write_report(empty), "run": run_report(full.run_dir(0))}


def show(browser: Any, page: Path, width: int, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for log in ("browser", "performance"):
        browser.get_log(log)  # what went before
    browser.get(page.as_uri())


def requested(browser: Any) -> list[str]:
    """Addresses that the page asked for, data within the page left out."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["full", "empty", "run"])
def test_the_page_is_quiet_asks_for_nothing_and_fits_the_window(browser, pages, which, width, scheme):
    show(browser, pages[which], width, scheme)
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == SCHEMES[scheme]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert requested(browser) == [pages[which].as_uri()]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_part_of_a_study_is_seen(browser, pages, width, scheme):
    from selenium.webdriver.common.by import By

    show(browser, pages["full"], width, scheme)
    for name in SECTIONS:
        section = browser.find_element(By.ID, name)
        assert section.is_displayed(), name
        assert section.size["height"] > 40, name
    drawings = browser.find_elements(By.CSS_SELECTOR, "figure svg")
    assert [drawing.is_displayed() for drawing in drawings] == [True] * 3
    assert all(drawing.size["width"] > 300 and drawing.size["height"] > 200 for drawing in drawings)
    loaded = browser.execute_script("return [...document.images].map(image => image.complete && image.naturalWidth)")
    assert len(loaded) == 2
    assert all(side > 0 for side in loaded)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#leaderboard tbody tr")) == 12
    ink = "return getComputedStyle(document.querySelector('#curves svg text')).fill"
    assert browser.execute_script(ink) == browser.execute_script("return getComputedStyle(document.body).color")


def test_what_is_too_wide_scrolls_in_its_own_frame(browser, pages):
    show(browser, pages["full"], 390, "light")
    frames = "return [...document.querySelectorAll('.scroll')].map(one => [one.scrollWidth, one.clientWidth])"
    for content, frame in browser.execute_script(frames):
        assert content > frame
        assert frame <= 390


def test_the_command_is_marked_by_one_click(browser, pages):
    from selenium.webdriver.common.by import By

    show(browser, pages["full"], 1400, "light")
    shown = browser.find_element(By.CSS_SELECTOR, "#again pre")
    shown.click()
    assert browser.execute_script("return getSelection().toString()").strip() == shown.text
    assert shown.text.startswith("glann train digits ")
