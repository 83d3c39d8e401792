"""The web page in a real Chromium: chat, branches, tools, JSON, dashboard, keys, accessibility."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("selenium")

from helpers.browser import Page, chromium  # noqa: E402
from helpers.fake_openai import FakeOpenAI, serving  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402


@pytest.fixture(scope="module")
def fake():
    return FakeOpenAI()


@pytest.fixture(scope="module")
def address(fake):
    with serving(fake) as found:
        yield found


@pytest.fixture(scope="module")
def driver():
    with chromium() as started:
        yield started


@pytest.fixture
def page(driver, address, fake):
    made = Page(driver, address)
    driver.set_window_size(1280, 860)
    made.fresh()
    fake.requests.clear()
    made.errors()
    yield made
    assert made.errors() == []


@pytest.fixture(scope="module")
def shots(request):
    folder = Path(request.config.rootpath) / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def settle(page):
    page.driver.execute_script("document.activeElement?.blur()")


def key(page, name, alt=True):
    code = {"altKey": alt, "code": f"Key{name.upper()}", "key": name, "bubbles": True, "cancelable": True}
    page.driver.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', arguments[0]))", code)


def test_an_answer_streams_and_its_speed_stands_under_it(page, fake):
    page.ask("hello there")
    page.answered()
    assert page.texts("user") == ["hello there"]
    assert page.texts("assistant")[0].endswith("to: hello there")
    page.until(lambda: "tokens/s" in page.one(".message .stats").text)
    assert page.one(".stats").text.startswith("5 tokens · ")
    assert "4 cached" in page.one(".stats").text
    sent = fake.requests[-1]
    assert sent["stream"] is True
    assert sent["messages"] == [{"role": "user", "content": "hello there"}]
    assert page.one("#announce").text == "Answer complete"


def test_stop_ends_the_stream_on_the_server_and_keeps_what_came(page, fake):
    page.ask("a long one")
    page.until(lambda: page.texts("assistant")[0].count("and on") > 3)
    assert fake.open_streams == 1
    page.one("#stop").click()
    page.answered()
    page.until(lambda: fake.open_streams == 0)
    assert "and on" in page.texts("assistant")[0]
    assert "stopped" in page.one(".stats").text


def test_escape_stops_too_and_one_can_ask_again(page, fake):
    page.ask("a long one")
    page.until(lambda: "and on" in page.texts("assistant")[0])
    page.type(Keys.ESCAPE)
    page.answered()
    page.until(lambda: fake.open_streams == 0)
    page.ask("short")
    page.answered()
    assert len(page.texts("assistant")) == 2
    assert [m["role"] for m in fake.requests[-1]["messages"]] == ["user", "assistant", "user"]


def test_regenerating_adds_a_version_and_both_stay(page):
    page.ask("hi")
    page.answered()
    first = page.texts("assistant")[0]
    page.button("Write another answer").click()
    page.until(lambda: page.texts("assistant")[0] not in ("", first) and not page.one("#stop").is_displayed())
    assert page.one(".branches").text.split() == ["‹", "2/2", "›"]
    page.button("Previous version").click()
    page.until(lambda: page.texts("assistant")[0] == first)
    assert not page.button("Previous version").is_enabled()


def test_editing_branches_the_conversation_and_the_old_branch_comes_back(page, fake):
    page.ask("one")
    page.answered()
    page.ask("two")
    page.answered()
    page.all('button[aria-label="Edit this message"]')[0].click()
    page.type(Keys.CONTROL + "a", ".edit textarea")
    page.type("changed\n", ".edit textarea")
    page.until(lambda: page.texts("user") == ["changed"] and not page.one("#stop").is_displayed())
    assert fake.requests[-1]["messages"] == [{"role": "user", "content": "changed"}]
    page.button("Previous version", '.message[data-role="user"]').click()
    page.until(lambda: page.texts("user") == ["one", "two"])


def test_conversations_survive_a_reload_and_can_be_deleted(page):
    page.ask("remember me")
    page.answered()
    page.open()
    assert page.texts("user") == ["remember me"]
    page.one("#new-chat").click()
    page.until(lambda: page.texts("user") == [])
    page.driver.execute_script("document.querySelector('[aria-label=\"Delete remember me\"]').click()")
    page.open()
    assert page.texts("user") == []


def test_markdown_is_shown_and_markup_in_it_stays_text(page):
    page.ask("code please")
    page.answered()
    page.until(lambda: page.all(".fence code") and page.all(".body table td"))
    assert "def merge" in page.one(".fence code").text
    assert page.one(".body strong").text == "Time"
    assert page.one(".body a").get_attribute("href") == "https://example.com/notes"
    assert "<script>alert(1)</script> stays text." in page.texts("assistant")[0]
    assert page.all(".messages script") == []


def test_thoughts_are_shown_apart(page):
    page.ask("think first")
    page.answered()
    page.until(lambda: page.one(".thinking summary").text == "Thoughts")
    assert "question is short" not in page.one(".text").text


def test_errors_before_and_within_a_stream_are_shown_with_their_message(page, fake):
    page.ask("refuse this")
    page.until(lambda: "temperature = 3" in page.one(".message .error").text)
    assert len(page.errors()) == 1  # the browser notes the 400 itself
    page.ask("go on")
    page.until(lambda: len(page.texts("assistant")) == 2 and not page.one("#stop").is_displayed())
    assert [m["role"] for m in fake.requests[-1]["messages"]] == ["user", "user"]  # what failed was never said
    page.one("#new-chat").click()
    page.ask("fail later")
    page.until(lambda: "a step of the engine failed" in page.one(".message .error").text)
    assert "Answer" in page.texts("assistant")[0]


def test_sampling_settings_reach_the_server_and_stay(page, fake):
    page.one("#toggle-panel").click()
    for name, value in (("temperature-number", "0.25"), ("max_tokens-number", "77")):
        page.type(Keys.CONTROL + "a", f'input[name="{name}"]')
        page.type(value, f'input[name="{name}"]')
    page.type("42", "#seed")
    page.type("END", "#stop-text")
    page.type("Be brief.", "#system")
    page.ask("hi")
    page.answered()
    sent = fake.requests[-1]
    assert (sent["temperature"], sent["max_tokens"], sent["seed"], sent["stop"]) == (0.25, 77, 42, ["END"])
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    page.open()
    assert page.one("#temperature").get_attribute("value") == "0.25"


def test_the_api_key_is_sent_and_not_kept_on_disk(page):
    page.one("#toggle-panel").click()
    page.type("sk-secret\t", "#api-key")
    kept = page.driver.execute_script("return [JSON.stringify(localStorage), sessionStorage.getItem('jaxllm.key')]")
    assert "sk-secret" not in kept[0]
    assert kept[1] == "sk-secret"


def test_json_mode_sends_the_schema_and_names_what_is_wrong_with_one(page, fake):
    page.one("#toggle-panel").click()
    page.type("JSON schema", "#format")
    assert page.one("#mode").text == "JSON schema"
    page.ask("who?")
    page.answered()
    sent = fake.requests[-1]["response_format"]
    assert sent["json_schema"]["schema"]["required"] == ["name", "year"]
    assert json.loads(page.texts("assistant")[0])["year"] == 1815
    page.type("}", "#schema")
    assert page.one("#settings-error").text.startswith("Schema: ")


def test_tool_calls_are_shown_and_their_results_continue_the_conversation(page, fake):
    page.one("#toggle-panel").click()
    page.one("#use-tools").click()
    page.ask("the weather?")
    page.answered()
    page.until(lambda: page.one(".call pre").text == '{"city": "Oslo"}')
    page.type("rain\n", ".call input")
    page.until(lambda: page.texts("assistant")[-1] == "The tool says rain.")
    messages = fake.requests[-1]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert messages[2]["tool_call_id"] == "call_1"


def test_every_shortcut_works(page, fake):
    settle(page)
    page.type("?", "body")
    assert page.one("#help").is_displayed()
    page.type(Keys.ESCAPE, "#help")
    page.until(lambda: not page.one("#help").is_displayed())
    theme = page.one("html").get_attribute("data-theme")
    key(page, "t")
    assert page.one("html").get_attribute("data-theme") != theme
    key(page, "d")
    assert page.one("#view-dashboard").is_displayed()
    key(page, "d")
    page.ask("hi")
    page.answered()
    key(page, "r")
    page.until(lambda: "2/2" in page.one(".branches").text)
    page.answered()
    key(page, "s")
    assert page.one("#panel").is_displayed()
    key(page, "s")
    key(page, "n")
    page.until(lambda: page.texts("user") == [])
    settle(page)
    page.type("/", "body")
    assert page.driver.switch_to.active_element.get_attribute("id") == "composer-text"
    assert page.one("#composer-text").get_attribute("value") == ""


def test_a_server_that_is_not_ready_is_said_to_be_so(page, fake):
    fake.ready = False
    page.driver.get(page.address)
    page.until(lambda: page.one("#health").text == "Not ready")
    fake.ready = True
    page.until(lambda: page.one("#health").text == "Ready")
    page.errors()


def test_the_dashboard_draws_what_the_metrics_say(page):
    page.one("#tab-dashboard").click()
    page.until(lambda: len(page.all(".plot canvas")) == 6)
    page.until(lambda: page.one(".plot .legend span").text not in ("", "–"), 15)
    tiles = {
        row.find_element("tag name", "dt").text: row.find_element("tag name", "dd").text
        for row in page.all(".tiles div")
    }
    assert tiles["Written"].endswith("tokens/s")
    assert tiles["KV cache in use"].endswith("%")
    label = page.one(".plot canvas").get_attribute("aria-label")
    assert label.startswith("Throughput, tokens/s, last 300 seconds. Now: Written ")
    page.one(".plot summary").click()
    page.until(lambda: len(page.all(".plot details[open] tr")) >= 3)
    painted = "const c = document.querySelector('.plot canvas'); return c.getContext('2d')"
    painted += ".getImageData(0, 0, c.width, c.height).data.some((v, i) => i % 4 === 3 && v > 0)"
    assert page.driver.execute_script(painted)


NAMES = """
const name = (e) => e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent || e.title;
return [...document.querySelectorAll('button, input, select, textarea, canvas, [role="img"]')]
  .filter((e) => !name(e)?.trim()).map((e) => e.outerHTML);
"""
CONTRAST = """
const parse = (text) => {
  const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text; c.fillRect(0, 0, 1, 1);
  return [...c.getImageData(0, 0, 1, 1).data]; };
const lum = ([r, g, b]) => { const f = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
const behind = (e) => {
  for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; }
  return [255, 255, 255]; };
const bad = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.offsetParent || e.closest(':disabled') || e.closest('.hidden')) continue;
  const [a, b] = [lum(parse(getComputedStyle(e).color)), lum(behind(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) bad.push(`${ratio.toFixed(2)} ${e.tagName} ${e.textContent.slice(0, 30)}`);
}
return bad;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_control_has_a_name_and_every_text_enough_contrast(page, theme):
    page.ask("think about code")
    page.answered()
    page.one("#toggle-panel").click()
    page.driver.execute_script(f"document.documentElement.dataset.theme = '{theme}'")
    assert page.driver.execute_script(NAMES) == []
    assert page.driver.execute_script(CONTRAST) == []
    page.one("#tab-dashboard").click()
    page.until(lambda: page.all(".tiles dd"))
    assert page.driver.execute_script(NAMES) == []
    assert page.driver.execute_script(CONTRAST) == []


def test_the_keyboard_alone_reaches_and_marks_every_control(page):
    page.ask("hi")
    page.answered()
    page.driver.execute_script("document.querySelector('.skip').focus()")
    seen = []
    for _ in range(30):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        active = page.driver.switch_to.active_element
        if active.tag_name == "body":
            break
        seen.append(active.get_attribute("id") or active.get_attribute("aria-label") or active.text)
        outline = active.value_of_css_property("outline-style")
        assert outline != "none" or active.get_attribute("id") == "composer-text", seen[-1]
    for wanted in (
        "tab-dashboard",
        "model",
        "toggle-theme",
        "new-chat",
        "Edit this message",
        "Write another answer",
        "composer-text",
    ):
        assert wanted in seen


def test_less_motion_when_the_reader_asks_for_it(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    )
    script = "const e = document.createElement('div'); e.className = 'cursor'; document.body.append(e);"
    assert page.driver.execute_script(script + "return getComputedStyle(e, '::after').animationName") == "none"
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_narrow_window_scrolls_nowhere_sideways(page):
    page.driver.set_window_size(500, 800)
    page.ask("code please")
    page.answered()
    for view in ("chat", "dashboard"):
        page.one(f"#tab-{view}").click()
        wide = page.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0
    page.one("#tab-chat").click()
    assert not page.one("#sidebar").is_displayed()
    page.one("#toggle-list").click()
    assert page.one("#sidebar").is_displayed()


def test_screenshots_for_people_to_look_at(page, shots):
    page.ask("Write a Python function that merges two sorted lists, and think first")
    page.answered()
    settle(page)
    page.driver.save_screenshot(str(shots / "light.png"))
    page.one("#toggle-panel").click()
    page.driver.execute_script("document.documentElement.dataset.theme = 'dark'")
    page.driver.save_screenshot(str(shots / "dark.png"))
    page.one("#tab-dashboard").click()
    page.until(
        lambda: (
            len(page.driver.execute_script("return document.querySelector('.plot canvas').getAttribute('aria-label')"))
            > 20
        )
    )
    assert page.one("#view-dashboard").is_displayed()
