"""The page against the real server: `jaxllm serve` with the bundled model, in a real Chromium; with screenshots."""

import contextlib
import json
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="make test-ui")

from helpers.browser import Page, chromium
from helpers.served import SMALL, Served
from selenium.common.exceptions import ElementNotInteractableException

pytestmark = pytest.mark.browser
SHOTS = Path(__file__).parents[3] / "build" / "screenshots"


@pytest.fixture(scope="module")
def server():
    with Served(*SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def page(server):
    with chromium() as driver:
        yield Page(driver, server.url)


def asked(page, text):
    """The answer's text."""
    before = len(page.texts("assistant"))
    page.ask(text)
    page.until(lambda: len(page.texts("assistant")) > before and not page.one("#stop").is_displayed(), 60)
    return page.texts("assistant")[-1]


def shot(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.driver.save_screenshot(str(SHOTS / f"real-{name}.png"))


def test_the_bundled_model_answers_and_its_speed_stands_under_it(page):
    page.fresh()
    page.errors()  # the browser asks for a favicon beside /v1/models
    assert page.one("#model").text == "first-light"
    assert asked(page, "Hello!")
    page.until(lambda: "tokens/s" in page.one(".message .stats").text)
    asked(page, "Write a function that adds two numbers")
    shot(page, "chat")
    assert page.errors() == []


def test_json_mode_gives_an_object_of_the_schema(page):
    page.fresh()
    page.one("#toggle-panel").click()
    page.type("JSON schema", "#format")
    found = json.loads(asked(page, 'Extract name and year as JSON: "Ada Lovelace, 1815"'))
    assert set(found) == {"name", "year"}
    shot(page, "json")
    page.one("#toggle-panel").click()


def test_stop_ends_a_long_answer_and_the_server_is_idle_after(page, server):
    page.fresh()
    page.ask("Write a long Python module with many classes and functions")
    page.until(lambda: page.texts("assistant") and page.texts("assistant")[0], 60)
    with contextlib.suppress(ElementNotInteractableException):  # it has ended by itself
        page.one("#stop").click()
    page.answered()
    page.until(lambda: server.info()["in_flight"] == {"slots": 0, "streams": 0}, 20)
    assert server.info()["engine"]["stats"]["held_pages"] == 0


def test_the_dashboard_shows_what_the_real_server_did(page):
    page.one("#tab-dashboard").click()
    page.until(lambda: len(page.all(".plot canvas")) == 6)
    page.until(lambda: page.one(".plot .legend span").text not in ("", "–"), 30)
    shot(page, "dashboard")
    page.driver.execute_script("document.documentElement.dataset.theme = 'dark'")
    shot(page, "dashboard-dark")
    assert page.errors() == []
